"""Several processes find each other and agree, or say why not; how they train: training/test_hosts.py."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dreamllm_jax.parallel.distributed import require_same, start
from dreamllm_jax.parallel.feeding import local_rows
from launch.local_pod import free_port
from tests.runs.test_run import settings

ROOT = Path(__file__).parents[2]
DEVICES = 4


def test_which_flags_go_together():
    start()  # alone: nothing happens
    for wrong in (("localhost:1", 0, -1), ("", 2, 0), ("localhost:1", 2, 2)):
        with pytest.raises(ValueError, match=r"--coordinator=HOST:PORT, --num_processes=N and --process_id"):
            start(*wrong)


def test_one_process_feeds_all_rows():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert local_rows(NamedSharding(mesh, PartitionSpec("data")), 16) == tuple(range(16))
    assert local_rows(NamedSharding(mesh, PartitionSpec()), 16) == tuple(range(16))
    require_same({"a": 1}, "configuration")


def configuration(folder: Path, **changes) -> Path:
    path = folder / f"config_{len(list(folder.glob('*.py')))}.py"
    lines = ["import ml_collections", "", "", "def get_config():"]
    path.write_text("\n".join([*lines, f"    return ml_collections.ConfigDict({settings() | changes!r})", ""]))
    return path


def launch(config: Path, workdir: Path, count: int, index: int, port: int, timeout: int = 120) -> subprocess.Popen:
    """Process `index` of `count`; together they have DEVICES simulated devices."""
    # As the tests' own, but for the number of devices; compiled fast.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={DEVICES // count}")
    command = [sys.executable, "-m", "dreamllm_jax.train", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"]
    command += [f"--timeout={timeout}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(processes: list[subprocess.Popen], timeout: int = 900) -> list[str]:
    """What they wrote to stderr; none is left running."""
    try:
        return [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_processes_with_different_settings_are_told(tmp_path):
    port = free_port()
    configs = [configuration(tmp_path), configuration(tmp_path, steps=7)]
    processes = [launch(config, tmp_path / "run", 2, index, port) for index, config in enumerate(configs)]
    for process, stderr in zip(processes, finish(processes), strict=True):
        assert process.returncode == 1
        assert "error: process 1 was given another command line than process 0 (config.steps: 6, now 7)" in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_that_the_first_process_cannot_make_ends_all(tmp_path):
    port = free_port()
    config = configuration(tmp_path, data={"path": str(tmp_path / "nothing"), "corpora": {"pairs": {}}})
    began = time.monotonic()
    processes = [launch(config, tmp_path / "run", 2, index, port) for index in range(2)]
    said = finish(processes, 120)
    assert [process.returncode for process in processes] == [1, 1] and time.monotonic() - began < 60
    assert f"error: process 0 could not prepare {tmp_path / 'nothing'}: no folder" in said[1], said[1]
    assert "error: no folder" in said[0]


@pytest.mark.slow
def test_a_process_that_does_not_come_is_missed(tmp_path):
    port = free_port()
    process = launch(configuration(tmp_path), tmp_path / "run", 2, 0, port, timeout=10)
    (stderr,) = finish([process])
    assert process.returncode == 1
    assert f"error: process 0 of 2 did not meet the others at localhost:{port} within 10 s" in stderr, stderr


@pytest.mark.parametrize(
    ("variables", "platforms", "joins"),
    [
        ({}, None, False),  # a laptop, a GPU machine
        ({"TPU_SKIP_MDS_QUERY": "1"}, "cpu", False),
        ({}, "tpu,cpu", True),  # a TPU VM: its metadata server knows the others
        ({}, "cpu", False),  # a TPU VM whose chips are not to be used
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", False),  # one host on GKE
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2", "TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", True),
        ({"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_SKIP_MDS_QUERY": "1"}, "cpu", True),  # local_pod.sh
    ],
)
def test_who_joins_others_without_being_told(monkeypatch, variables, platforms, joins):
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_platforms=platforms))
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: calls.append(given))
    start()
    assert calls == [()] * joins
