"""Runs a command as a pod of several hosts would, on this machine, each host a process with CPU devices.

    launch/local_pod.sh --hosts=2 --devices=4 -- python -m dreamllm_jax.train --config=configs/tiny.py --workdir=runs/2

The processes find each other by the variables that GKE gives the hosts of TPU slices, so the command runs unchanged.
A signal goes on to all of them. The status is 0 if all ended well, otherwise the worst: any, then 76, then 75.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout that is not installed

from dreamllm_jax.common.exits import HUNG, PREEMPTED
from launch.shell import Children, parse

BETTER = (0, PREEMPTED, HUNG)  # statuses, each better than the next and than all others


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(takes_command=True, required=[])
    parser.add_argument("--hosts", type=int, default=2, help="processes a slice (2)")
    parser.add_argument("--devices", type=int, default=4, help="devices a process (4)")
    parser.add_argument("--slices", type=int, default=1, help="slices, each of --hosts (1)")
    parser.add_argument("--restarts", type=int, default=0, help="how often to start again on status 75 or 76 (0)")
    parser.add_argument("--port", type=int, default=0, help="at which they meet; 0 for a free one")
    parser.add_argument("--dry-run", action="store_true", help="print the commands instead")
    return parser


def environments(hosts: int, devices: int, slices: int, port: int) -> list[dict[str, str]]:
    """The variables of each process, slice by slice."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    shared = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "NPROC": str(max(os.cpu_count(), 4 * devices)),  # XLA's threads: devices that wait for each other hold some
        "JAX_FORCE_TPU_INIT": "1",  # JAX then heeds the following, chips or not
        "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * hosts),
        "MEGASCALE_NUM_SLICES": str(slices),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "JAX_COORDINATOR_PORT": str(port),
    }
    return [
        shared | {"MEGASCALE_SLICE_ID": str(index), "TPU_WORKER_ID": str(host)}
        for index in range(slices)
        for host in range(hosts)
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run(pod: Children, command: list[str], variables: list[dict[str, str]]) -> int:
    """Runs the command with each of the variables to its end and returns the worst status."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    processes = [pod.start(command, env=os.environ | one, **streams) for one in variables]
    readers = [threading.Thread(target=_tell, args=each) for each in enumerate(processes)]
    for reader in readers:
        reader.start()
    statuses = [process.wait() for process in processes]
    for reader in readers:
        reader.join()
    statuses = [status if status >= 0 else 128 - status for status in statuses]
    return max(statuses, key=lambda status: BETTER.index(status) if status in BETTER else len(BETTER))


def _tell(host: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stdout.write(f"[host {host}] {line}")
        sys.stdout.flush()


def main(argv: list[str]) -> int:
    arguments, command = parse(make_parser(), argv)
    counts = arguments.hosts, arguments.devices, arguments.slices
    if min(counts) < 1 or arguments.restarts < 0:
        sys.exit("error: --hosts, --devices and --slices must be positive, and --restarts not negative")
    if arguments.dry_run:
        for one in environments(*counts, arguments.port or free_port()):
            print(shlex.join(["env", *(f"{name}={value}" for name, value in one.items()), *command]), "&")
        print("wait")
        return 0
    pod = Children({number: number for number in (signal.SIGTERM, signal.SIGINT)})
    for left in range(arguments.restarts, -1, -1):
        try:
            status = run(pod, command, environments(*counts, arguments.port or free_port()))
        except OSError as error:
            sys.exit(f"error: {error}")
        if status not in (PREEMPTED, HUNG) or pod.stopped or not left:
            break
        print(f"status {status}: started again, {left} times at most", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
