"""Command lines in processes of their own, without the seconds that it takes to import their libraries."""

import multiprocessing.reduction
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.forks import SERVER

ROOT = Path(__file__).parent.parent


def run(
    module: str,
    arguments: Sequence[str],
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> SimpleNamespace:
    """What `python -m dreamllm_jax.MODULE ARGUMENTS...` says, as `subprocess.run` gives it.

    Args:
      environment: variables to set beside those that there are.
      timeout: seconds within which it ends.
    """
    return call(command, module, list(arguments), cwd=cwd, environment=environment, timeout=timeout)


def call(
    function: Callable[..., None],
    *arguments: Any,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> SimpleNamespace:
    """As `run`, what a function of a module says, which is called in a process of its own."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        streams = [multiprocessing.reduction.DupFd(stream.fileno()) for stream in (out, errors)]
        given = (function, arguments, str(cwd), dict(environment or {}), streams)
        process = SERVER.Process(target=_call, args=given)
        process.start()
        try:
            process.join(timeout)
            assert process.exitcode is not None, f"{function.__name__}{arguments} is not done after {timeout:g} s"
        finally:
            process.kill()
        for stream in (out, errors):
            stream.seek(0)
        return SimpleNamespace(returncode=process.exitcode, stdout=out.read(), stderr=errors.read())


def command(module: str, arguments: Sequence[str]) -> None:
    """Runs a module of the package as Python's `-m` does, with these words."""
    sys.argv = [f"dreamllm_jax.{module}", *arguments]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _call(
    function: Callable[..., None],
    arguments: Sequence[Any],
    cwd: str,
    environment: Mapping[str, str],
    streams: Sequence[Any],
) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)
    os.environ.update(environment)
    os.chdir(cwd)
    function(*arguments)
