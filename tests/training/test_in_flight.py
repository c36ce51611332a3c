"""Memory has a bound: few batches lie on the chips at a time, however seldom something is logged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.runs.start import start_run
from dreamllm_jax.training import loop, validation
from dreamllm_jax.training.step import IN_FLIGHT
from tests.lives import micro
from tests.tiny import tiny_config


@pytest.fixture
def slow():
    """Makes a value wait until a device has computed for some time, without waiting for it here."""

    def after(value):
        matrix = jnp.full((600, 600), 1e-3)
        matrix = jax.lax.fori_loop(0, 40, lambda _, m: m @ matrix, matrix)
        return value + 0 * matrix[0, 0]

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    compiled = jax.jit(after).lower(jax.ShapeDtypeStruct((), jnp.float32, sharding=device)).compile()
    return lambda value: compiled(jax.device_put(value, device))


class Chips:
    """Counts the batches that are there: those of steps that are not finished, and the one that comes."""

    def __init__(self, to_mesh, slow):
        self._to_mesh, self._slow, self._steps, self.counts = to_mesh, slow, [], []

    def receive(self, *args):
        self.counts.append(1 + sum(not value.is_ready() for value in self._steps))
        return self._to_mesh(*args)

    def compute(self, step, name, *args):
        result = step(*args)
        metrics = result[1] if isinstance(result, tuple) else result
        metrics[name] = self._slow(metrics[name].addressable_data(0))
        self._steps.append(metrics[name])
        return result


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [1, 50])
def test_memory_does_not_depend_on_how_often_is_logged(data, tmp_path, monkeypatch, slow, log_every):
    chips, compiled = Chips(loop.to_mesh, slow), loop.train_step_of
    monkeypatch.setattr(loop, "to_mesh", chips.receive)
    monkeypatch.setattr(
        loop, "train_step_of", lambda *given: functools.partial(chips.compute, compiled(*given), "loss")
    )
    run = start_run(micro(data, steps=20, log_every=log_every, checkpoint={"every": 100}), tmp_path)
    loop.train(run.experiment, run.tokenizer, run.workdir, run.initial, run.record)
    assert max(chips.counts) == (1 if log_every == 1 else IN_FLIGHT), chips.counts


def test_nor_on_how_many_batches_are_held_out(monkeypatch, slow):
    chips = Chips(lambda number: np.float32(number), slow)
    sums = functools.partial(
        chips.compute, lambda _, number, key: {"lm": jnp.float32(number), "tokens": 1, "images": 0}, "lm"
    )
    losses = JointConfig().held_out(tiny_config(), 1)
    means = validation.validate(losses, sums, None, map(chips.receive, range(8)), jax.random.key(0))
    assert means == {"lm_loss": sum(range(8)) / 8} and max(chips.counts) == IN_FLIGHT, chips.counts
