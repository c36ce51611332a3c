"""A simulated pod: the processes find each other as real hosts do, and end as one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import shell

ROOT = Path(__file__).parent.parent.parent
MEETS = """
import jax
from dreamllm_jax.parallel import distributed
distributed.start()
print(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of {jax.device_count()}")
"""
# Ends with a status that depends on the host and on how often it was started.
ENDS = """
import os, pathlib, sys
host = int(os.environ["TPU_WORKER_ID"])
started = pathlib.Path(sys.argv[1], f"host{host}")
count = len(started.read_text()) if started.exists() else 0
started.write_text("x" * (count + 1))
statuses = [one.split(",") for one in sys.argv[2:]]
sys.exit(int(statuses[min(count, len(statuses) - 1)][host]))
"""
WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("waits", flush=True)
time.sleep(60)
"""


def start(*flags: str, program: str, words: tuple[str, ...] = ()) -> subprocess.Popen:
    command = ["bash", str(ROOT / "launch" / "local_pod.sh"), *flags, "--", sys.executable, "-c", program, *words]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def run(*flags: str, program: str, words: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
    with start(*flags, program=program, words=words) as pod:
        output, errors = pod.communicate(timeout=120)
    return pod.returncode, sorted(output.splitlines()), errors


@pytest.mark.parametrize("slices", [1, 2])
def test_processes_meet(slices):
    status, output, errors = run("--hosts=2", "--devices=2", f"--slices={slices}", program=MEETS)
    assert status == 0, errors
    count = 2 * slices
    said = [line for line in output if "process" in line]
    assert said == [f"[host {i}] process {i} of {count}, 2 of {2 * count}" for i in range(count)]


@pytest.mark.parametrize(
    ("statuses", "restarts", "expected", "starts"),
    [
        (["0,0"], 0, 0, 1),
        (["0,75"], 0, 75, 1),
        (["75,76"], 0, 76, 1),
        (["76,1"], 3, 1, 1),  # not started again
        (["3,75"], 3, 3, 1),
        (["75,75", "76,75", "0,0"], 5, 0, 3),
        (["75,75"], 2, 75, 3),  # no longer
    ],
)
def test_the_worst_status_counts(tmp_path, statuses, restarts, expected, starts):
    words = (str(tmp_path), *statuses)
    status, _, errors = run("--hosts=2", f"--restarts={restarts}", program=ENDS, words=words)
    assert status == expected, errors
    assert [len((tmp_path / f"host{i}").read_text()) for i in (0, 1)] == [starts] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_and_ends_the_restarts(number):
    program = WAITS.replace("signal.SIGTERM,", f"{int(number)},")
    with start("--hosts=3", "--restarts=9", program=program) as pod:
        lines = [pod.stdout.readline() for _ in range(3)]
        assert sorted(lines) == [f"[host {i}] waits\n" for i in range(3)]
        begun = time.monotonic()
        pod.send_signal(number)
        assert pod.wait(timeout=30) == 75 and time.monotonic() - begun < 20


def test_a_signal_that_comes_while_a_process_is_started_is_passed_on_once(monkeypatch):
    popen, before = subprocess.Popen, signal.getsignal(signal.SIGTERM)

    def interrupted(*words, **options):
        process = popen(*words, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        assert process.stdout.readline() == "ready\n"
        return process

    counts = "import signal, sys, time\nseen = []\nsignal.signal(signal.SIGTERM, lambda *_: seen.append(1))\n"
    counts += "print('ready', flush=True)\nwhile not seen: time.sleep(0.01)\ntime.sleep(0.3)\nsys.exit(len(seen))"
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    try:
        children = shell.Children({signal.SIGTERM: signal.SIGTERM})
        process = children.start([sys.executable, "-c", counts], stdout=subprocess.PIPE, text=True)
        assert process.wait(timeout=30) == 1 and children.stopped
    finally:
        signal.signal(signal.SIGTERM, before)
    process.stdout.close()


def test_a_process_that_is_killed():
    status, _, _ = run("--hosts=1", program="import os; os.kill(os.getpid(), 9)")
    assert status == 128 + 9


def test_dry_run_can_be_pasted():
    _, output, _ = run("--hosts=2", "--devices=2", "--port=8123", "--dry-run", program=MEETS)
    with start("--hosts=2", "--devices=2", "--dry-run", program=MEETS) as pod:
        script, _ = pod.communicate(timeout=60)
    assert "JAX_COORDINATOR_PORT=8123" in "\n".join(output)
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    said = re.findall(r"process \d of \d, \d of \d", done.stdout)
    assert sorted(said) == [
        "process 0 of 2, 2 of 4",
        "process 1 of 2, 2 of 4",
    ], done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hosts=0"], "--hosts, --devices and --slices must be positive"),
        (["--restarts=-1"], "--restarts not negative"),
    ],
)
def test_errors(flags, message):
    status, _, errors = run(*flags, program="")
    assert status == 1 and message in errors


@pytest.mark.slow
def test_training_finds_the_others(tmp_path):
    """Hosts compare what they were given before anything else; how they train: training/test_hosts.py."""
    train = f"{sys.executable} -m dreamllm_jax.train --config=configs/tiny.py --workdir={tmp_path}/run"
    differing = ["bash", "-c", f"exec {train} --config.steps=1$MEGASCALE_SLICE_ID"]
    command = ["bash", "launch/local_pod.sh", "--hosts=1", "--slices=2", "--devices=2", "--", *differing]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    for host in range(2):
        told = (
            f"[host {host}] error: process 1 was given another command line than process 0 (config.steps: 10, now 11)"
        )
        assert told in done.stdout
