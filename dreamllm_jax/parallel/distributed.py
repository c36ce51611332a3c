"""Many hosts, one program: how they find each other, and what they must agree on before anything is compiled."""

import argparse
import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dreamllm_jax.common.configuration import changes

TIMEOUT = 300  # seconds that hosts wait for each other at the start


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `start` takes."""
    parser.add_argument("--coordinator", default="", help="host:port of process 0; not needed on Cloud TPU or one host")
    parser.add_argument("--num_processes", type=int, default=0, help="how many take part, one a host")
    parser.add_argument("--process_id", type=int, default=-1, help="which of them this is, from 0")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds that hosts wait for each other")


def start(coordinator: str = "", num_processes: int = 0, process_id: int = -1, timeout: int = TIMEOUT) -> None:
    """Joins this process with the other hosts' into one JAX program; to be called before anything of JAX is used.

    On a Cloud TPU slice of several hosts, or several slices, JAX finds out by itself who takes part; elsewhere the
    three arguments say it. With neither, this process stays alone. Where the others do not come in time, the process
    ends with status 1 and one line that says so.

    Args:
      coordinator: address `host:port` of process 0, the same on all.
      num_processes: how many take part.
      process_id: which of them this is, from 0.
      timeout: seconds after which to give up waiting for the others.

    Raises:
      ValueError: some of the three arguments without the others, or out of range.
    """
    alone = not coordinator and num_processes <= 0 and process_id < 0
    if alone and not _is_cloud_tpu_cluster():
        return
    if not alone and (not coordinator or num_processes <= 0 or not 0 <= process_id < num_processes):
        raise ValueError(
            "--coordinator=HOST:PORT, --num_processes=N and --process_id=0..N-1 go together, got "
            f"{coordinator!r}, {num_processes} and {process_id}"
        )
    who = "this host of the TPU slice" if alone else f"process {process_id} of {num_processes}"
    where = "" if alone else f" at {coordinator}"
    way_out = "the same --coordinator and --num_processes, each with its own --process_id"
    if alone:
        way_out = "the same command, and let their firewall pass the port that JAX_COORDINATOR_PORT names"
    line = f"error: {who} did not meet the others{where} within {timeout} s: start all with {way_out}"
    # JAX itself would abort the process with a stack trace.
    timer = threading.Timer(timeout, _give_up, [line])
    timer.daemon = True
    timer.start()
    known = () if alone else (coordinator, num_processes, process_id)
    jax.distributed.initialize(*known, initialization_timeout=timeout + 60)
    timer.cancel()
    require_same({"num_processes": num_processes}, "--num_processes")


def _give_up(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def _is_cloud_tpu_cluster() -> bool:
    """Whether JAX can find out by itself who takes part.

    GKE, and launch/local_pod.sh like it, say it in variables. A TPU VM has none: there JAX asks the metadata server,
    unless it found no TPU when it was imported; it leaves a note of that in TPU_SKIP_MDS_QUERY.
    """
    several_hosts = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if several_hosts or int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return True
    return "tpu" in (jax.config.jax_platforms or "") and "TPU_SKIP_MDS_QUERY" not in os.environ


def gather(value: Any) -> list[Any]:
    """The values that all processes have, in their order and as JSON gives them back; all must call it."""
    text = json.dumps(value, sort_keys=True)
    if jax.process_count() == 1:
        return [json.loads(text)]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size]))
    padded = np.zeros(max(1024, 1 << int(sizes.max() - 1).bit_length()), np.uint8)  # few sizes, for each is compiled
    padded[: mine.size] = mine
    everyone = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(everyone, sizes[:, 0], strict=True)]


def require_same(settings: Mapping[str, Any], name: str) -> None:
    """Checks that all processes were given the same settings; each says what it has otherwise.

    Raises:
      ValueError: naming the settings in which this process differs from the first, or the first from another.
    """
    everyone = gather(settings)
    other = next((index for index, given in enumerate(everyone) if given != everyone[0]), None)
    if other is not None:
        different = changes(everyone[0], everyone[other])
        raise ValueError(f"process {other} was given another {name} than process 0 ({different}): start all alike")
