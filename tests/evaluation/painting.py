"""Creation in a process of its own, which can be killed."""

import multiprocessing
import os
import socket
import time
from pathlib import Path

from dreamllm_jax.evaluate import make_parser

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.evaluation.painting"])


def run(words: list[str]) -> None:
    """`evaluate WORDS` on two simulated devices."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_force_host_platform_device_count=2"])
    arguments = make_parser().parse_args(words)
    arguments.main(arguments)


def finish(words: list[str], timeout: float = 300) -> int:
    """The status with which it ends."""
    process = _server.Process(target=run, args=(words,), daemon=True)
    process.start()
    process.join(timeout)
    return process.exitcode


def kill_at(words: list[str], folder: Path, pictures: int, timeout: float = 300) -> int:
    """Kills it once there are so many pictures; how many there are then."""
    process = _server.Process(target=run, args=(words,), daemon=True)
    process.start()
    limit = time.monotonic() + timeout
    while len([*folder.glob("*.png")]) < pictures:
        assert process.is_alive() and time.monotonic() < limit
        time.sleep(1e-3)
    process.kill()
    process.join()
    return len([*folder.glob("*.png")])


def finish_together(words: list[str], hosts: int, timeout: float = 300) -> list[int]:
    """The statuses of processes that take part as hosts."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    shared = [*words, f"--coordinator=localhost:{port}", f"--num_processes={hosts}"]
    processes = [
        _server.Process(target=run, args=([*shared, f"--process_id={index}"],), daemon=True) for index in range(hosts)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]
