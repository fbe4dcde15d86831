"""The command line: `titan-train --config NAME|FILE [--nproc N] [--section.key value ...]`.

It reads the settings, then hands on to `titan_train.launch` (with `--nproc`) or to `titan_train.run`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

from titan_train import settings
from titan_train.config.fields import Setting, sections, settings_of
from titan_train.errors import ConfigError, ExitCode, TrainingError

_USAGE = "titan-train --config NAME|FILE [--nproc N] [--section.key value ...]"
_EPILOG = """\
exit codes:
  0   the last step is done, now or in an earlier run
  1   failed; the message says why
  2   a setting is invalid; the message says which
  75  stopped by SIGTERM or Ctrl-C and saved; run the same command to resume
  128+n  terminated at once by a second signal n
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
        # torch is imported from here on: mistakes that need no torch are reported at once.
        if options.nproc and "WORLD_SIZE" not in os.environ:
            from titan_train.check import check
            from titan_train.launch import launch

            check(loaded.config, options.nproc)  # one message instead of one from each process
            return launch(options.nproc, _without_nproc(arguments))
        from titan_train.run import run

        return run(loaded)
    except ConfigError as error:
        return _report(error, ExitCode.BAD_CONFIG)
    except TrainingError as error:
        return _report(error, ExitCode.FAILED)
    except KeyboardInterrupt:  # before or after the run, which handles signals itself
        return 128 + signal.SIGINT


def _report(error: Exception, code: ExitCode) -> int:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # ranks mostly fail for the same reason: rank 0 prints it, and its exit ends the others first
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
            f"--config is missing: give a preset ({', '.join(settings.config_names())}) or a file\n{_usage()}"
        )
    if known.nproc is not None and known.nproc < 1:
        raise ConfigError(f"--nproc is {known.nproc}: it must be at least 1")
    overrides = [(key, value) for key, value in vars(known).items() if "." in key and value is not None]
    # Flags that argparse does not know go to settings.load, which names the nearest setting.
    overrides += [(_key_of(word), "") for word in unknown if word.startswith("--")]
    if unknown and not any(word.startswith("--") for word in unknown):
        raise ConfigError(f"unexpected argument {' '.join(unknown)!r}\n{_usage()}")
    return known, overrides


def _key_of(word: str) -> str:
    return word.removeprefix("--").split("=", 1)[0]


def _usage() -> str:
    return f"usage: {_USAGE}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="titan-train",
        usage=_USAGE,
        description="Pre-train a language model. Each run is described by a config: a preset or a TOML file, with any "
        "setting below changed on the command line.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--help", "-h", action="store_true", help="Show this text and exit.")
    parser.add_argument(
        "--config", metavar="NAME|FILE", help=f"Preset ({', '.join(settings.config_names())}) or path of a TOML file."
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="Number of processes to start on this machine, one per GPU."
    )
    parser.add_argument(
        "--print-config", action="store_true", help="Print every setting with where its value comes from, and exit."
    )
    for section, table in sections().items():
        group = parser.add_argument_group(f"[{section}]", table.__doc__)
        for key, setting in settings_of(table).items():
            group.add_argument(
                f"--{section}.{key}", dest=f"{section}.{key}", metavar="VALUE", help=_help(setting).replace("%", "%%")
            )
    return parser


def _help(setting: Setting) -> str:
    default = "no default" if setting.required else f"default: {settings.shown(setting.default)}"
    return f"{setting.help} ({setting.type_name}; {default})"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}\n{_usage()}")


def _without_nproc(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in arguments:
        if not skip and word != "--nproc" and not word.startswith("--nproc="):
            kept.append(word)
        skip = word == "--nproc"
    return kept
