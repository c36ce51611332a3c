"""A run's directory has one writer, whoever comes and whatever becomes of it."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dreamllm_jax.common.directories import write_whole
from dreamllm_jax.training import claim
from dreamllm_jax.training.claim import FILE, Claim, Writer
from tests.lives import Life, micro, together

HOLD = """
import sys, time
from dreamllm_jax.training.claim import Claim
with Claim(sys.argv[1], interval=0.2):
    print("claimed", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that claims a directory for a minute."""
    started = []

    def start(directory) -> subprocess.Popen:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(holder)
        assert holder.stdout.readline() == "claimed\n"
        return holder

    yield start
    for holder in started:
        holder.kill()
        holder.communicate()


def writer(**changes) -> Writer:
    """This process, which has claimed nothing."""
    known = Writer("its", "there", os.getpid(), claim._machine(), claim._started(os.getpid()), 0.0, 3661.0)
    return dataclasses.replace(known, **changes)


def leave(directory, found: Writer) -> None:
    directory.mkdir(exist_ok=True)
    write_whole(directory / FILE, json.dumps(dataclasses.asdict(found)))


def test_the_second_is_refused_and_a_killed_ones_claim_counts_no_more(tmp_path, hold):
    first = hold(tmp_path)
    with pytest.raises(OSError, match=rf"{tmp_path} has a writer: process {first.pid} on ") as refused, Claim(tmp_path):
        pass
    line = str(refused.value)
    assert "\n" not in line and "since 20" in line and "last sign of life 20" in line
    assert f"choose another --workdir; where it cannot be reached, remove {tmp_path / FILE}, upon which" in line
    began = time.monotonic()
    first.kill()  # nobody has asked yet how it ended
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    with Claim(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()
    assert time.monotonic() - began < 10 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("left", "why"),
    [
        (None, f" is claimed by nobody, for {FILE} was removed"),
        ({}, " was taken over by another writer: process "),
        ({"new": 1}, f"/{FILE} is damaged, or of another version"),
    ],
)
def test_whoever_has_lost_its_claim_ends(tmp_path, hold, left, why):
    first = hold(tmp_path)
    if left is None:
        (tmp_path / FILE).unlink()
    else:
        write_whole(tmp_path / FILE, json.dumps(dataclasses.asdict(writer()) | left))
    told = first.communicate(timeout=30)[1]
    assert first.returncode == 1 and told.startswith(f"error: {tmp_path}{why}") and told.count("\n") == 1
    assert (tmp_path / FILE).exists() == (left is not None)


def test_a_claim_is_held_though_the_answer_was_lost(tmp_path, monkeypatch):
    write, answers = Claim._write, iter([b""])  # as after a request that TensorStore had to repeat
    monkeypatch.setattr(Claim, "_write", lambda self, *given: next(answers, write(self, *given)))
    with Claim(tmp_path, interval=0.1):
        time.sleep(0.5)
        assert (tmp_path / FILE).exists()
    assert not list(tmp_path.iterdir())


def test_another_process_with_the_number_of_a_dead_one_is_not_it(tmp_path):
    leave(tmp_path, writer(started="1"))
    with Claim(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()


def test_a_directory_that_was_made_in_vain_goes_again(tmp_path):
    with Claim(tmp_path / "run"):
        assert (tmp_path / "run" / FILE).exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", ["mine", "", "[1]", {"process": "1"}, {"process": 1 << 80}, {"since": "now"}, {"new": 1}]
)
def test_what_no_run_of_this_version_has_written_is_named(tmp_path, content):
    known = dataclasses.asdict(writer())
    (tmp_path / FILE).write_text(content if isinstance(content, str) else json.dumps(known | content))
    with (
        pytest.raises(OSError, match=rf"{tmp_path / FILE} is damaged, or of another version .* remove it"),
        Claim(tmp_path),
    ):
        pass


def test_a_directory_that_cannot_be_claimed_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"{tmp_path / 'file'} cannot be claimed .*: choose another --workdir"):
        Claim(tmp_path / "file").__enter__()


def test_a_writer_killed_as_it_wrote_leaves_nothing_in_the_file_of_the_next(tmp_path):
    (tmp_path / f"{FILE}.__lock").write_text(json.dumps(dataclasses.asdict(writer(host="h" * 300)), indent=9))
    with Claim(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("machine", ["", "another boot"])
def test_a_writer_of_another_machine_is_gone_when_it_is_silent(tmp_path, caplog, machine):
    leave(tmp_path, writer(machine=machine))
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), Claim(tmp_path, interval=0.1, lapse=1.0):
        assert 1.0 <= time.monotonic() - began < 10
    assert "since 1970-01-01 00:00:00, last sign of life 1970-01-01 01:01:01 UTC; waiting 1 s" in caplog.text


def test_a_writer_of_another_machine_that_gives_a_sign_stays(tmp_path):
    ended = threading.Event()

    def live():
        while not ended.wait(0.3):
            leave(tmp_path, writer(machine="another boot", seen=time.time()))

    leave(tmp_path, writer(machine="another boot"))
    other = threading.Thread(target=live)
    other.start()
    with pytest.raises(OSError, match="has a writer: process"), Claim(tmp_path, interval=0.1, lapse=30.0):
        pass
    ended.set()
    other.join()
    threading.Timer(0.5, (tmp_path / FILE).unlink).start()  # as a writer that ends well does
    began = time.monotonic()
    with Claim(tmp_path, interval=0.1, lapse=30.0):
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("dead", [False, True])
def test_of_several_that_come_at_once_one_gets_it(tmp_path, dead):
    if dead:
        leave(tmp_path, writer(machine="another boot"))
    claims, gate = [Claim(tmp_path, interval=0.1, lapse=0.5) for _ in range(8)], threading.Barrier(8)

    def enter(one: Claim) -> str:
        gate.wait()
        try:
            one.__enter__()
        except OSError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(enter, claims))
    try:
        assert told.count("") == 1 and sum("has a writer" in line for line in told) == 7, told
    finally:
        claims[told.index("")].__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_second_run_leaves_the_first_ones_checkpoint_alone(data, tmp_path, hosts):
    workdir = tmp_path / "run"
    first = Life(micro(data, steps=10), workdir, slow_save=2.0)
    try:
        while not (unfinished := [*workdir.glob("checkpoints/*tmp*")]):
            assert first.process.is_alive()
            time.sleep(0.05)
        os.kill(first.process.pid, signal.SIGSTOP)  # until the others have come and gone
        first.told = str(tmp_path / "first.log")
        os.rename(f"{workdir}.log", first.told)
        with together(micro(data, steps=10), workdir, [2] * hosts) as second:
            assert [life.end() for life in second] == [1] * hosts
            assert all(f"{workdir} has a writer: process {first.process.pid}" in life.said() for life in second)
        assert first.process.is_alive() and unfinished[0].exists()
        os.kill(first.process.pid, signal.SIGCONT)
        assert first.end() == 0, first.said()
    finally:
        first.process.kill()
    assert not (workdir / FILE).exists()
