"""A disk that fills up, and a process that is killed, leave nothing that looks whole."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conversion.helpers import run

_IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run([*_IN_NAMESPACE, "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="a file system cannot be mounted here",
)
def test_a_disk_that_fills_up_loses_nothing(original, tmp_path):
    """On a real small file system, told to have room: the first write that fails ends it with one line."""
    program = (
        "import shutil, types; shutil.disk_usage = lambda _: types.SimpleNamespace(free=1 << 40)\n"
        "import runpy; runpy.run_module('dreamllm_jax.convert', run_name='__main__')"
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    into = f"import --dreamllm={original / 'original'}"
    out = f"export --checkpoint={original / 'ours'}"
    for flags, size in (
        (into, "100k"),  # while the tensors are gathered
        (into, "700k"),  # while the checkpoint is written
        (f"{out} --format=hf", "100k"),
        (f"{out} --format=hf", "230k"),  # while safetensors are written
        (f"{out} --format=dreamllm", "900k"),  # while pickles are written
    ):
        script = (
            f"mount -t tmpfs -o size={size} tmpfs {disk} && "
            f'{sys.executable} -c "$PROGRAM" {flags} --to={disk / "to"}; status=$?; ls -A {disk}; exit $status'
        )
        done = subprocess.run(
            [*_IN_NAMESPACE, "sh", "-c", script],
            env=os.environ | {"PROGRAM": program},
            capture_output=True,
            text=True,
            check=False,
        )
        # Orbax's threads may still be writing to what is then an abandoned temporary directory, and say so, even in the
        # middle of our line.
        assert done.returncode == 1 and done.stdout in ("", ".to.building\n"), (done.stdout, done.stderr)
        error = f"error: the disk of {disk / 'to'} is full; nothing was kept there: "
        assert done.stderr.count("error: ") == done.stderr.count(error) == 1, done.stderr


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_looks_whole(original, tmp_path):
    command = [sys.executable, "-m", "dreamllm_jax.convert", "export", f"--checkpoint={original / 'ours'}"]
    command += ["--format=dreamllm", f"--to={tmp_path / 'to'}", "--no-check"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / ".to.building").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "to").exists()
    assert (tmp_path / ".to.building").exists()
    run("export", checkpoint=original / "ours", format="dreamllm", to=tmp_path / "to", no_check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    assert not (tmp_path / "to" / ".scratch").exists()
