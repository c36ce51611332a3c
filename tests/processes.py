"""Commands in processes of their own, which can be killed, and which can take part as hosts."""

import argparse
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax

from dreamllm_jax import evaluate
from launch.local_pod import free_port
from tests.forks import SERVER

Parser = Callable[[], argparse.ArgumentParser]


def _run(words: list[str], parser: Parser) -> None:
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_force_host_platform_device_count=2"])
    arguments = parser().parse_args(words)
    try:
        arguments.main(arguments)
    finally:
        jax.distributed.shutdown()  # see `lives.train`


def _start(words: list[str], parser: Parser) -> BaseProcess:
    """The command of these words, on two simulated devices."""
    process = SERVER.Process(target=_run, args=(words, parser), daemon=True)
    process.start()
    return process


def finish(words: list[str], parser: Parser = evaluate.make_parser, timeout: float = 300) -> int:
    """The status with which it ends."""
    process = _start(words, parser)
    process.join(timeout)
    return process.exitcode


def kill_at(
    words: list[str], folder: Path, pictures: int, parser: Parser = evaluate.make_parser, timeout: float = 300
) -> int:
    """Kills it once there are so many pictures; how many there are then."""
    process = _start(words, parser)
    limit = time.monotonic() + timeout
    while len([*folder.glob("*.png")]) < pictures:
        assert process.is_alive() and time.monotonic() < limit
        time.sleep(1e-3)
    process.kill()
    process.join()
    return len([*folder.glob("*.png")])


def finish_together(
    words: list[str], hosts: int, parser: Parser = evaluate.make_parser, timeout: float = 300
) -> list[int]:
    """The statuses of processes that take part as hosts."""
    shared = [*words, f"--coordinator=localhost:{free_port()}", f"--num_processes={hosts}"]
    processes = [_start([*shared, f"--process_id={index}"], parser) for index in range(hosts)]
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]
