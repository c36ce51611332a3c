"""A checkpoint comes back as it was or not at all: any damage to any of its files is noticed."""

import functools
import gc
import json
import logging
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dreamllm_jax.checkpoints import steps as checkpoints_file
from dreamllm_jax.checkpoints.checksums import checksums
from dreamllm_jax.checkpoints.steps import Checkpoints
from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.experiment.settings import CheckpointConfig, OptimizerConfig
from dreamllm_jax.training.optimizer import make_optimizer
from dreamllm_jax.training.state import TrainState, from_items, to_items

STEPS = (2, 4)


class Position:
    """Stands for a loader: somewhere in the data."""

    def __init__(self, at: int):
        self.at = at

    def get_state(self):
        return {"settings": {}, "streams": {"0": [self.at, self.at + 1]}, "totals": [], "rows": self.at}

    def set_state(self, state, accept_changes):
        assert not accept_changes
        self.at = state["streams"]["0"][0]


def parts(state):
    """What is saved of a state."""
    return to_items(state), state.frozen


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def mesh():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


def state_at(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    split, whole = (NamedSharding(mesh(), spec) for spec in (PartitionSpec("fsdp"), PartitionSpec()))
    trainable = {
        "language_model/kernel": jax.device_put(rng.normal(size=(16, 24)).astype(np.float32), split),
        "language_model/scale": jax.device_put(rng.normal(size=24).astype(ml_dtypes.bfloat16), whole),
    }
    frozen = {
        "vision_encoder/kernel": jax.device_put(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), split)
    }
    optimizer = make_optimizer(OptimizerConfig(ema_decay=0.9, muon=("language_model/kernel",)), 10)
    state = jax.tree.map(lambda x: jax.device_put(x, whole), optimizer.init(trainable))
    return TrainState(jax.device_put(jnp.int32(step), whole), trainable, state, frozen)


def abstract() -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's directory with the checkpoints of two steps."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(workdir, CheckpointConfig(every=1, keep=3)) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, *parts(state_at(step)), Position(step))
    return workdir


def restore(workdir) -> tuple[TrainState, int]:
    position = Position(-1)
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        return from_items(*checkpoints.restore(*parts(abstract()), position)), position.at


@pytest.fixture
def quietly():
    """Orbax leaves coroutines behind where a file cannot be read; they are collected here."""
    yield
    gc.collect()


LEFT_BEHIND = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def damages(path):
    """The file deleted, cut to its half, emptied, and with one bit flipped at three places."""
    data = path.read_bytes()
    path.unlink()
    yield "deleted"
    for size in {len(data) // 2, 0} - {len(data)}:
        path.write_bytes(data[:size])
        yield f"cut to {size} bytes"
    rng = np.random.default_rng(len(data))
    for bit in {int(rng.integers(8 * len(data))) for _ in range(3)} if data else ():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        yield f"bit {bit} flipped"
    path.write_bytes(data)


def test_the_newest_is_restored(saved):
    state, position = restore(saved)
    assert_same(state, state_at(4))
    assert position == 4 and not (saved / "broken").exists()


@LEFT_BEHIND
@pytest.mark.slow
def test_any_damage_to_the_newest_leads_to_the_one_before(saved, tmp_path, caplog, quietly):
    files = sorted(path.relative_to(saved) for path in (saved / "checkpoints/4").rglob("*") if path.is_file())
    assert len(files) > 10
    outcomes = {"as saved": 0, "the one before": 0}
    for file in files:
        workdir = tmp_path / "run"
        shutil.copytree(saved, workdir)
        for damage in damages(workdir / file):
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="dreamllm_jax"):
                state, position = restore(workdir)
            if position == 4:  # a file that says nothing of the arrays, such as times
                assert_same(state, state_at(4))
                outcomes["as saved"] += 1
                continue
            assert_same(state, state_at(2))
            assert position == 2, (file, damage)
            assert f"the checkpoint of step 4 is damaged and was moved to {workdir}/broken/4" in caplog.text
            outcomes["the one before"] += 1
            shutil.move(workdir / "broken/4", workdir / "checkpoints/4")
        shutil.rmtree(workdir)
    print(outcomes)
    assert outcomes["the one before"] > len(files)


@LEFT_BEHIND
def test_no_whole_checkpoint_or_damaged_frozen_weights_stop_the_run(saved, tmp_path, quietly):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for step in STEPS:
        (workdir / f"checkpoints/{step}/params/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the checkpoints \[2, 4\] in .* can be restored; the newest: "):
        restore(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    with pytest.raises(FileNotFoundError, match="does not hold a checkpoint"):
        restore(tmp_path / "nothing")
    shutil.rmtree(workdir)
    shutil.copytree(saved, workdir)
    sums = json.loads((workdir / "frozen.json").read_text())
    (workdir / "frozen.json").write_text(json.dumps({path: value ^ 1 for path, value in sums.items()}))
    with pytest.raises(ValueError, match=r"frozen parameters in .* are damaged .*such as \['vision_encoder/kernel'\]"):
        restore(workdir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.replace(frozen={}),
            r"holds frozen\['vision_encoder/kernel'\] as float32\[8, 8\], .* it nothing",
        ),
        (
            lambda state: state.replace(
                trainable=state.trainable | {"language_model/more": state.trainable["language_model/scale"]}
            ),
            r"holds params\['language_model/more'\] as nothing, this configuration makes it bfloat16\[24\]: restore",
        ),
        (
            lambda state: state.replace(opt_state=jax.tree.map(halved, state.opt_state)),
            r"holds \w+\S* as float32\[.*\], this configuration makes it bfloat16\[",
        ),
    ],
)
def test_another_configuration_is_not_taken_for_damage(saved, tmp_path, change, message):
    workdir = shutil.copytree(saved, tmp_path / "run")
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints, pytest.raises(ConfigError, match=message):
        checkpoints.restore(*parts(change(abstract())), Position(-1))
    assert restore(workdir)[1] == 4 and not (workdir / "broken").exists()


def halved(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return x.update(dtype=jnp.bfloat16) if x.dtype == jnp.float32 else x


def test_a_run_that_is_begun_again_in_its_directory_saves_all_anew(saved, tmp_path):
    """As the message about damaged frozen parameters advises; and what a killed process left half written goes."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints" / "7.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    other = jax.tree.map(lambda x: x + 1, state_at(1))
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, *parts(other), Position(step))
    state, _ = restore(workdir)
    assert_same(state, other)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]


def test_what_is_kept(tmp_path):
    config = CheckpointConfig(keep=2, keep_every=5, keep_best=1, best="loss")
    with Checkpoints(tmp_path / "run", config) as checkpoints:
        for step, loss in enumerate((5.0, 4.0, 1.0, 3.0, 2.0, 2.5, 2.6, 2.7), 1):
            checkpoints.save(step, *parts(state_at(step)), Position(step), {"loss": loss})
    kept = sorted(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [3, 5, 7, 8]
    for wrong in ({"every": 0}, {"keep": 0}, {"minutes": -1}, {"keep_best": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CheckpointConfig(**wrong)


def test_a_run_that_fails_finishes_what_is_written_but_waits_for_no_host_without_end(tmp_path, monkeypatch, caplog):
    finalize, hang = ocp.CheckpointManager._finalize_checkpoint, threading.Event()
    with pytest.raises(OSError, match="the disk is gone"), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        wait = functools.partial(hang.wait, 0.5)
        monkeypatch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", lambda *of: (wait(), finalize(*of)))
        checkpoints.save(1, *parts(state_at(1)), Position(1))
        raise OSError("the disk is gone")
    assert (tmp_path / "checkpoints" / "1").exists()
    assert "OSError: the disk is gone; the checkpoint that is being written is finished first" in caplog.text
    monkeypatch.setattr(checkpoints_file, "_FINISH_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(OSError, match="the disk is gone"), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        wait = functools.partial(hang.wait, 30)
        checkpoints.save(2, *parts(state_at(2)), Position(2))
        raise OSError("the disk is gone")
    assert time.monotonic() - began < 20 and "was not finished within 0.2 s" in caplog.text
    hang.set()
    checkpoints.finish()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32])
def test_a_checksum_knows_every_bit_and_no_sharding(dtype):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (16, 8, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
    sums = [
        checksums({"a": jax.device_put(array, NamedSharding(mesh(), spec))})
        for spec in (PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"))
    ]
    assert sums[0] == sums[1] == sums[2]
    for bit in rng.integers(0, 8 * array.nbytes, 100):
        flipped = bytearray(array.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        assert checksums({"a": np.frombuffer(bytes(flipped), dtype).reshape(array.shape)}) != sums[0]
    assert checksums({"a": array[::-1]}) != sums[0]  # places count
