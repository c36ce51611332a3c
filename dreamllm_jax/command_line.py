"""What the command lines share: errors of the user as one line, log lines on the console."""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from absl.flags import argparse_flags
from ml_collections import ConfigDict

from dreamllm_jax.common.directories import expanded
from dreamllm_jax.experiment import recipes

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error was raised, not only what it says.")

_OVERRIDE = "--config."
_WORDS = ("--negative", "--stop")  # flags that are no paths

# What the package raises for wrong settings, files and environments, with a message for the user.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def define_config() -> None:
    """Defines `--config=FILE.py[:ARGUMENT]`, of which `run` makes a configuration."""
    flags.DEFINE_string(
        "config",
        None,
        "The experiment: FILE.py[:ARGUMENT] with get_config(). --config.rows.per_step=8 changes a setting.",
    )


def run(main: Callable[[ConfigDict | None], None]) -> None:
    """Parses the flags and runs `main` with the configuration that they describe, if they do.

    `--config.rows.per_step=8` gives a setting, also one that the file leaves out; misspelt ones are refused when the
    configuration is read. An error of the user ends the program with status 1 and one line that says which.
    """

    def checked(argv: Sequence[str]) -> None:
        overrides = [word for word in argv if word.startswith(_OVERRIDE)]
        if unexpected := [word for word in argv[1:] if word not in overrides]:
            sys.exit(f"error: unexpected arguments {' '.join(unexpected)}; flags are --NAME=VALUE")
        if flags.FLAGS.config is None:
            main(None)
            return
        file, _, argument = flags.FLAGS.config.partition(":")
        config = recipes.override(recipes.load(expanded(file), argument), overrides)
        main(_with_home(config))

    app.run(_guarded(checked), flags_parser=_parse)


def run_commands(parser: argparse_flags.ArgumentParser) -> None:
    """Like `run`, for a program of several commands, or with words that are no flags: runs the `main` that is parsed.

    Args:
      parser: it or its sub-parsers have `set_defaults(main=...)`, a function of the parsed arguments.
    """

    def main(arguments: argparse.Namespace) -> None:
        arguments.main(arguments)

    app.run(_guarded(main), flags_parser=lambda argv: parser.parse_args([_expanded(word) for word in argv[1:]]))


def positive(text: str) -> int:
    """The type of a flag that is a positive whole number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def not_negative(text: str) -> int:
    """The type of a flag that is a whole number, 0 included."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return number


def finite(text: str) -> float:
    """The type of a flag that is a number, which infinity is not."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number, got {text}")
    return number


def share(text: str) -> float:
    """The type of a flag that is a share, from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0 ... 1, got {text}")
    return number


def seed_number(text: str) -> int:
    """The type of a flag that is a seed; results after the first count on from it."""
    number = int(text)
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"must lie in 0 ... 2^31 - 1, got {text}")
    return number


def add_guidance_interval(parser: argparse.ArgumentParser) -> None:
    """The flag `--guidance_interval LOW HIGH` of a command that paints."""
    parser.add_argument(
        "--guidance_interval",
        type=finite,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="shares of the timesteps, 0 the picture and 1 the noise, between which there is guidance",
    )


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


def _expanded(word: str) -> str:
    """A word of the command line with `~` for the home directory in `--to=~/x` too, where a shell leaves it."""
    flag, equals, value = word.partition("=")
    if not equals or not flag.startswith("--") or flag in _WORDS:
        return word
    return f"{flag}={','.join(map(expanded, value.split(',')))}"


def _with_home(config: ConfigDict) -> ConfigDict:
    """The configuration with `~` for the home directory in its paths: no other setting begins with that sign."""
    with config.unlocked():
        for name, value in config.items():
            if isinstance(value, ConfigDict):
                _with_home(value)
            elif isinstance(value, str):
                config[name] = expanded(value)
    return config


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; the words that are left are the program's name and settings of the configuration."""
    argv = [word if word.startswith(_OVERRIDE) else _expanded(word) for word in argv]
    overrides = [word for word in argv if word.startswith(_OVERRIDE)]
    try:
        return flags.FLAGS([word for word in argv if word not in overrides]) + overrides
    except SystemExit as ended:  # absl ends with status 1 after --help too
        sys.exit(0 if any(word.startswith(("--help", "-help", "-?")) for word in argv) else ended.code)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())} (--help lists the flags)")


def _show_progress() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step of every save
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("dreamllm_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
