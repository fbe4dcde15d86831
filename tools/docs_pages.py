"""A hook of mkdocs (mkdocs.yml names it): makes pages of the READMEs and of what each package exports.

The READMEs, CONTRIBUTING.md and SECURITY.md stay where people look for them in the repository; here each becomes a
page whose links lead to other pages of the site. The reference has a page for each package, with one entry for each
name in its `__all__`. After the build every one of these entries must be there, or the build fails.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from workspace import ROOT, packages

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

REPOSITORY = "https://github.com/titan-training/titan/blob/main/"
NAMES = sorted(packages())

# Files of the repository, and the pages that they become.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    **{f"packages/{name}/README.md": f"guides/{name}.md" for name in NAMES},
    **{f"packages/{name}/CHANGELOG.md": f"changelog/{name}.md" for name in NAMES},
}

_LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def exported(package: str) -> list[str]:
    """Return a package's `__all__`, without importing it."""
    module = package.replace("-", "_")
    tree = ast.parse((ROOT / "packages" / package / "src" / module / "__init__.py").read_text("utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return sorted(ast.literal_eval(statement.value), key=str.lower)
    raise ValueError(f"{package}: its __init__ has no __all__")


def reference(package: str) -> str:
    """Return the page of what a package exports, for mkdocstrings to fill in."""
    module = package.replace("-", "_")
    entries = [f"::: {module}.{name}\n" for name in exported(package)]
    intro = f"What `import {module}` offers. What is not on this page may change without notice.\n"
    return "\n".join([f"# {module}\n", intro, f"[Guide to {package}](../guides/{package}.md)\n", *entries])


def relinked(text: str, source: str, page: str) -> str:
    """Lead a file's links to pages of the site.

    Args:
        text: Markdown.
        source: The file it is from, relative to the root.
        page: The page it becomes, relative to the folder of documents.

    Returns:
        The same, where a link to a file that has a page leads to that page, and one to another file of the repository
        to GitHub.
    """

    def new(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        if target.startswith(REPOSITORY):
            file = target.removeprefix(REPOSITORY)
        elif ":" in target or target.startswith("/"):
            return target + anchor
        else:
            file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if file in PAGES:
            return posixpath.relpath(PAGES[file], posixpath.dirname(page)) + anchor
        if file.startswith("docs/"):
            return posixpath.relpath(file.removeprefix("docs/"), posixpath.dirname(page)) + anchor
        return REPOSITORY + file + anchor

    return _LINK.sub(new, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        content = relinked((ROOT / source).read_text("utf-8"), source, page)
        files.append(File.generated(config, page, content=content))
    for name in NAMES:
        files.append(File.generated(config, f"reference/{name}.md", content=reference(name)))
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ (to READMEs and sources) to pages or to GitHub."""
    path = page.file.src_uri  # type: ignore[attr-defined]
    return relinked(markdown, f"docs/{path}", path) if (ROOT / "docs" / path).exists() else markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Check that every exported name has its entry.

    Raises:
        ValueError: If one has none.
    """
    missing = []
    for name in NAMES:
        module = name.replace("-", "_")
        html = (Path(config.site_dir) / "reference" / name / "index.html").read_text("utf-8")
        missing += [f"{module}.{entry}" for entry in exported(name) if f'id="{module}.{entry}"' not in html]
    if missing:
        raise ValueError(f"exported, but not in the reference: {', '.join(missing)}")
