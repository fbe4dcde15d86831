# The daily commands. `just` lists them; CONTRIBUTING.md has the same ones without just.

# List the commands.
default:
    @just --list

# Install everything into .venv, and keep index addresses out of what git stores of uv.lock.
setup:
    python3 tools/lock.py register
    uv sync

# Run the fast tests: all, or those of a folder or file. Example: just test packages/titan-data -k packing
test *arguments:
    uv run pytest {{ arguments }}

# Run the long matrices of a folder or file.
slow *arguments:
    uv run pytest -m slow {{ arguments }}

# Put imports and layout in order.
format:
    uv run ruff check --fix
    uv run ruff format

# Run what is quick and needs no test: lint, layout, types, imports, workflows, changelogs.
check:
    uv run ruff check
    uv run ruff format --check
    uv run mypy
    uv run lint-imports
    uv run python tools/dependencies.py
    uv run zizmor --offline --no-progress .
    uv run check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
    uv run python tools/release.py check

# Train the debug model for a minute. Example: just debug --nproc 2 --run.folder runs/two
debug *arguments:
    uv run titan-train --config debug {{ arguments }}

# Write examples/ anew from the READMEs.
examples:
    uv run python tools/examples.py write

# Build the documentation site into build/site.
docs:
    uv run mkdocs build --strict

# Show the documentation site on localhost, and follow changes.
serve:
    uv run mkdocs serve

# Build the five packages, serve them on this machine, install them into an empty environment.
rehearse:
    uv run python tools/rehearse_release.py

# Run every gate (CONTRIBUTING.md says how long that takes).
gates:
    .ci/run
