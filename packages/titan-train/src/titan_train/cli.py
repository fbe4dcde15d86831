"""The command line: `titan-train --config NAME|FILE [--nproc N] [--section.key value ...]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

from titan_train import settings
from titan_train.errors import ConfigError, ExitCode, TrainingError

_USAGE = "titan-train --config NAME|FILE [--nproc N] [--section.key value ...]"
_EPILOG = """\
exit codes:
  0   the last step is done (or was before)
  1   failed; the message says why
  2   a setting cannot work; the message says which
  75  stopped by SIGTERM or Ctrl-C after saving: the same command goes on from there
  128+n  ended at once by a second signal n
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options, overrides = _parse(arguments)
        loaded = settings.load(options.config, overrides)
        if options.print_config:
            print(settings.to_toml(loaded.config, loaded.origins), end="")
            return ExitCode.DONE
        # Heavy imports come after all that can be wrong without them: a typo is answered at once.
        if options.nproc and "WORLD_SIZE" not in os.environ:
            from titan_train.assembly import check
            from titan_train.launch import launch

            check(loaded.config, options.nproc)  # one message, before there are processes that each would give it
            return launch(options.nproc, _without_nproc(arguments))
        from titan_train.running import run

        return run(loaded)
    except ConfigError as error:
        return _refuse(error, ExitCode.BAD_CONFIG)
    except TrainingError as error:
        return _refuse(error, ExitCode.FAILED)
    except KeyboardInterrupt:  # before or after the run, which takes signals itself
        return 128 + signal.SIGINT


def _refuse(error: Exception, code: ExitCode) -> int:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # all ranks mostly fail alike: rank 0 speaks, and its end ends the others before they do
    for line in str(error).splitlines():
        print(f"titan-train: {line}", file=sys.stderr, flush=True)
    return code


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = _parser()
    known, unknown = parser.parse_known_args(arguments)
    if known.help:
        print(parser.format_help(), end="")
        raise SystemExit(ExitCode.DONE)
    if known.config is None:
        raise ConfigError(
            f"--config is missing; shipped configs: {', '.join(settings.preset_names())}\nusage: {_USAGE}"
        )
    if known.nproc is not None and known.nproc < 1:
        raise ConfigError(f"--nproc is {known.nproc}: it must be at least 1")
    overrides = [(key, value) for key, value in vars(known).items() if "." in key and value is not None]
    # What argparse does not know is left to settings.load, which names the nearest setting.
    overrides += [(_key_of(word), "") for word in unknown if word.startswith("--")]
    if unknown and not any(word.startswith("--") for word in unknown):
        raise ConfigError(f"cannot make sense of {' '.join(unknown)!r}\nusage: {_USAGE}")
    return known, overrides


def _key_of(word: str) -> str:
    return word.removeprefix("--").split("=", 1)[0]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="titan-train",
        usage=_USAGE,
        description="Pre-train a language model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--help", "-h", action="store_true", help="show this and exit")
    parser.add_argument("--config", metavar="NAME|FILE", help=f"one of {', '.join(settings.preset_names())}; or a file")
    parser.add_argument("--nproc", type=int, metavar="N", help="start N processes on this machine")
    parser.add_argument("--print-config", action="store_true", help="print every setting and where it comes from")
    for section, table in settings.sections().items():
        group = parser.add_argument_group(section, table.__doc__)
        for key, field in table.model_fields.items():
            default = settings.shown(field.default)
            group.add_argument(
                f"--{section}.{key}",
                dest=f"{section}.{key}",
                metavar="VALUE",
                help=f"{field.description} ({settings.type_name(field)}; default: {default})".replace("%", "%%"),
            )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}\nusage: {_USAGE}")


def _without_nproc(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in arguments:
        if not skip and word != "--nproc" and not word.startswith("--nproc="):
            kept.append(word)
        skip = word == "--nproc"
    return kept
