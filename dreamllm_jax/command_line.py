"""What the command lines share: errors of the user as one line, log lines on the console."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from absl.flags import argparse_flags
from ml_collections import config_flags

from dreamllm_jax.configuration import ConfigError

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error was raised, not only what it says.")

# What the package raises for wrong settings, files and environments, with a message for the user.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def define_config() -> flags.FlagHolder:
    """The flag `--config=FILE.py[:argument]`, and one for each setting: `--config.rows.per_step=8`.

    Settings that the file leaves out can be given too; misspelt ones are refused when the configuration is read.
    """
    return config_flags.DEFINE_config_file(
        "config", None, "The experiment, a file with get_config().", lock_config=False, accept_new_attributes=True
    )


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags and runs `main`; an error of the user ends it with status 1 and one line that says which."""

    def checked(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments {' '.join(argv[1:])}; every setting is a --flag")
        main(argv)

    app.run(_guarded(checked), flags_parser=_parse)


def run_commands(parser: argparse_flags.ArgumentParser) -> None:
    """Like `run`, for a program of several commands, or with words that are no flags: runs the `main` that is parsed.

    Args:
      parser: it or its sub-parsers have `set_defaults(main=...)`, a function of the parsed arguments.
    """

    def main(arguments: argparse.Namespace) -> None:
        arguments.main(arguments)

    app.run(_guarded(main), flags_parser=lambda argv: parser.parse_args(argv[1:]))


def positive(text: str) -> int:
    """The type of a flag that is a positive whole number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def _guarded(main: Callable[[Any], None]) -> Callable[[Any], None]:
    def guarded(arguments: Any) -> None:
        _show_progress()
        try:
            main(arguments)
        except USER_ERRORS as error:
            if _TRACEBACK.value:
                raise
            if isinstance(error, ImportError) and "gcsfs" in str(error):  # etils names the package alone
                sys.exit("error: gs:// paths need gcsfs: pip install 'dreamllm_jax[gcs]'")
            sys.exit(f"error: {error}")

    return guarded


def _parse(argv: Sequence[str]) -> list[str]:
    """Flags, with errors in a configuration file's name or in an overridden setting told as plainly as other flags'."""
    try:
        return flags.FLAGS(list(argv))
    except SystemExit as ended:  # absl ends with status 1 after --help too
        sys.exit(0 if any(word.startswith(("--help", "-help", "-?")) for word in argv) else ended.code)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if error.args else error)
        if "Traceback" in text and "--traceback" not in argv:  # of the configuration's file, whose last line says why
            text = text.rstrip().splitlines()[-1].removeprefix(f"{ConfigError.__module__}.{ConfigError.__name__}: ")
        sys.exit(f"error: {' '.join(text.split())} (--help lists the flags)")


def _show_progress() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step of every save
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("dreamllm_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
