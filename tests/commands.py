"""Command lines in processes of their own, without the seconds that it takes to import their libraries."""

import multiprocessing.reduction
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.forks import SERVER

ROOT = Path(__file__).parent.parent


def run(
    module: str, arguments: Sequence[str], cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> SimpleNamespace:
    """What `python -m dreamllm_jax.MODULE ARGUMENTS...` says, as `subprocess.run` gives it, within two minutes.

    Args:
      environment: variables to set beside those that there are.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        streams = [multiprocessing.reduction.DupFd(stream.fileno()) for stream in (out, errors)]
        words = [f"dreamllm_jax.{module}", *arguments]
        process = SERVER.Process(target=_main, args=(words, str(cwd), dict(environment or {}), streams))
        process.start()
        process.join(120)
        assert process.exitcode is not None, f"{words} is not done after two minutes"
        for stream in (out, errors):
            stream.seek(0)
        return SimpleNamespace(returncode=process.exitcode, stdout=out.read(), stderr=errors.read())


def _main(words: Sequence[str], cwd: str, environment: Mapping[str, str], streams: Sequence[Any]) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
