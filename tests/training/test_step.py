"""A training step gives the same numbers on any mesh and in any microbatches; frozen weights stay as they are."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.experiment.settings import OptimizerConfig, ParametersConfig
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.parallel.feeding import rows_sharding, to_mesh
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, use
from dreamllm_jax.towers.image_decoders.stable_diffusion import DenoisingConfig
from dreamllm_jax.training.optimizer import make_optimizer
from dreamllm_jax.training.state import abstract_state, state_from_leaves
from dreamllm_jax.training.step import jit_train_step, make_train_step
from tests.parity import assert_same
from tests.tiny import make_batch, random_rows, tiny_config, tiny_params

CONFIG = tiny_config(
    image_decoder=dataclasses.replace(tiny_config().image_decoder, training=DenoisingConfig(noise_offset=0.1))
)
OBJECTIVE = JointConfig(drop_prob=0.3).make(DreamLLM(CONFIG))
FROZEN_TOWERS = ParametersConfig(
    trainable=(("(language_model|dream_queries|visual_projector|connector)/.*", True), (".*", False)),
    frozen_dtype="float32",
)
# With a large epsilon a step is proportional to the gradient; near-signs would blow up the rounding of small ones.
SETTINGS = OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0, eps=1.0)
OPTIMIZER = make_optimizer(SETTINGS, 10)
ONE = ShardingConfig(fsdp=1)


def run(
    sharding: ShardingConfig,
    microbatches: int = 1,
    steps: int = 2,
    parameters: ParametersConfig = FROZEN_TOWERS,
    settings: OptimizerConfig = SETTINGS,
):
    """Metrics of each step and the final state, as numpy, and the state's shardings."""
    devices = jax.devices() if -1 in dataclasses.astuple(sharding) or sharding != ONE else jax.devices()[:1]
    mesh = make_mesh(sharding, devices)
    abstract = abstract_state(CONFIG, parameters, settings, mesh, sharding)
    params = flatten_dict(tiny_params(CONFIG), sep="/")
    leaves = {
        path: jax.device_put(params[path].astype(leaf.dtype), leaf.sharding)
        for path, leaf in (abstract.trainable | abstract.frozen).items()
    }
    state = state_from_leaves(abstract, leaves, OPTIMIZER)
    step = jit_train_step(make_train_step(OBJECTIVE, OPTIMIZER, microbatches), state)
    metrics = []
    with use(mesh, sharding):
        for seed in range(steps):
            batch = to_mesh(make_batch(CONFIG, random_rows(CONFIG, seed)), rows_sharding(mesh, sharding, 8), 8)
            state, numbers = step(state, batch, jax.random.key(3))
            metrics.append({name: float(value) for name, value in numbers.items()})
    return metrics, jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding.spec, state)


@pytest.fixture(scope="module")
def alone():
    """The numbers of one device and one batch."""
    return run(ONE)


def assert_equal_runs(got, want):
    for a, b in zip(got[0], want[0], strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)
    assert_same(got[1].trainable, want[1].trainable, tolerance=1e-6)
    # The first moments are a sum of both steps' gradients: they tell tensor by tensor what a small step hides.
    moments = [optax.tree.get(run[1].opt_state, "mu") for run in (got, want)]
    assert_same(*moments, tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharding",
    [
        ShardingConfig(data=8, fsdp=1),
        ShardingConfig(fsdp=8),
        ShardingConfig(fsdp=1, sequence=8),
        ShardingConfig(fsdp=1, tensor=8),
        ShardingConfig(fsdp=2, tensor=4),
        ShardingConfig(data=2, fsdp=2, tensor=2),
        ShardingConfig(fsdp=2, sequence=2, tensor=2),
    ],
    ids=lambda s: f"data={s.data},fsdp={s.fsdp},sequence={s.sequence},tensor={s.tensor}",
)
def test_a_step_on_any_mesh_equals_one_device(sharding, alone):
    got = run(sharding)
    assert_equal_runs(got, alone)
    if sharding.data < 8:
        for (path, leaf), spec in zip(jax.tree.leaves_with_path(got[1]), jax.tree.leaves(got[2]), strict=True):
            large = leaf.size * leaf.itemsize > 2**14
            assert not large or any(spec), f"{jax.tree_util.keystr(path)} {leaf.shape} is replicated"


@pytest.mark.slow
def test_trained_towers_on_a_mesh_equal_one_device():
    """Their gradients are added up by each device alone, and travel once: see `sharding.sum_of_copies`."""
    everything = ParametersConfig(trainable=((".*", True),))
    got = run(ShardingConfig(data=2, fsdp=2, tensor=2), parameters=everything)
    assert_equal_runs(got, run(ONE, parameters=everything))


@pytest.mark.slow
@pytest.mark.parametrize(("microbatches", "sharding"), [(4, ONE), (2, ShardingConfig(fsdp=4, tensor=2))], ids=str)
def test_microbatches_equal_one_batch(microbatches, sharding, alone):
    assert_equal_runs(run(sharding, microbatches), alone)


@pytest.mark.slow
def test_frozen_parameters_stay_bit_identical(alone):
    _, state, _ = alone
    params = flatten_dict(tiny_params(CONFIG), sep="/")
    assert {path.split("/")[0] for path in state.frozen} == {"vision_encoder", "image_decoder"}
    for path, leaf in state.frozen.items():
        np.testing.assert_array_equal(leaf, params[path])
    assert not any(np.array_equal(leaf, params[path]) for path, leaf in state.trainable.items())
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not any("image_decoder" in jax.tree_util.keystr(path) for path, _ in leaves)


@pytest.mark.slow
def test_narrow_storage_is_kept_and_follows_the_wide_one(alone):
    """bfloat16 weights and moments: as many bits as asked for, losses near what float32 gives."""
    parameters = dataclasses.replace(FROZEN_TOWERS, dtype="bfloat16")
    settings = dataclasses.replace(SETTINGS, mu_dtype="bfloat16", nu_dtype="bfloat16")
    narrow = run(ShardingConfig(fsdp=8), parameters=parameters, settings=settings)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow[1].trainable)} == {"bfloat16"}
    for name in ("mu", "nu"):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(optax.tree.get(narrow[1].opt_state, name))} == {"bfloat16"}
    for got, wide in zip(narrow[0], alone[0], strict=True):
        np.testing.assert_allclose(got["loss"], wide["loss"], rtol=2e-2)
