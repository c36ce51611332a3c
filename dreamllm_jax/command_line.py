"""What the command lines share: errors of the user as one line, log lines on the console."""

import logging
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error was raised, not only what it says.")

# What the package raises for wrong settings, files and environments, with a message for the user.
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, ImportError, FloatingPointError)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags and runs `main`; an error of the user ends it with status 1 and one line that says which."""

    def guarded(argv: Sequence[str]) -> None:
        _show_progress()
        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments {' '.join(argv[1:])}; every setting is a --flag")
        try:
            main(argv)
        except USER_ERRORS as error:
            if _TRACEBACK.value:
                raise
            sys.exit(f"error: {error}")

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """Flags, with errors in a configuration file's name or in an overridden setting told as plainly as other flags'."""
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error.args[0] if error.args else error).split())} (--help lists the flags)")


def _show_progress() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step of every save
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("dreamllm_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
