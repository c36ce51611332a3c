import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamllm_jax.experiment.settings import OptimizerConfig, ParametersConfig
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh
from dreamllm_jax.training.optimizer import join_average, learning_rate_factors, make_optimizer, split_average
from dreamllm_jax.training.state import abstract_state
from tests.tiny import tiny_config


def test_averages_follow_the_parameters_and_leave_the_updates_alone():
    config = {"learning_rate": 0.1, "warmup_ratio": 0.0}
    plain, averaging = (make_optimizer(OptimizerConfig(**config, ema_decay=decay), 10) for decay in (0.0, 0.75))
    params = {"a": jnp.asarray([1.0, -2.0])}
    states, both, mean = [plain.init(params), averaging.init(params)], [params, params], np.asarray(params["a"])
    for step in range(4):
        gradient = {"a": jnp.asarray([step - 1.5, 1.0])}
        for i, optimizer in enumerate((plain, averaging)):
            updates, states[i] = optimizer.update(gradient, states[i], both[i])
            both[i] = optax.apply_updates(both[i], updates)
        mean = 0.75 * mean + 0.25 * np.asarray(both[1]["a"])
    np.testing.assert_array_equal(both[0]["a"], both[1]["a"])
    rest, average = split_average(states[1])
    np.testing.assert_allclose(average["a"], mean, rtol=1e-6)
    assert join_average(rest, average) == states[1] and split_average(states[0]) == (states[0], None)


GROUPS = OptimizerConfig(
    learning_rate=0.1,
    warmup_ratio=0.0,
    weight_decay=0.3,
    clip_norm=0.0,
    ema_decay=0.5,
    learning_rates=(("dream_queries/.*", 5.0), ("language_model/.*", 0.5), (".*", 2.0)),
    layer_decays=(("language_model/layers/.*", 0.9),),
)


def test_layers_of_several_kinds_are_counted_through():
    """Two kinds by turns: entry r of the second is layer 2 r + 1."""
    shapes = {f"language_model/layers/{kind}_of_2/mlp/up_proj/kernel": (2, 5, 7) for kind in range(2)}
    factors = learning_rate_factors(OptimizerConfig(layer_decays=((".*", 0.5),)), shapes)
    found = np.stack([factor.ravel() for factor in factors.values()], axis=1).ravel()
    np.testing.assert_allclose(found, [0.5**3, 0.5**2, 0.5, 1.0])


def test_groups_have_learning_rates_of_their_own():
    """Each layer's and each group's updates are those of plain AdamW at the learning rate multiplied by hand."""
    rng = np.random.default_rng(0)
    shapes = {
        "language_model/layers/mlp/up_proj/kernel": (3, 2, 4),
        "language_model/norm/scale": (4,),
        "dream_queries/embedding": (2, 4),
    }
    shapes["vision_encoder/layers/mlp/fc1/kernel"] = (2, 3, 3)
    params = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    optimizer = make_optimizer(GROUPS, 10)
    state = optimizer.init(params)

    rates = {("language_model/layers/mlp/up_proj/kernel", i): 0.5 * 0.9 ** (2 - i) for i in range(3)}
    rates |= {
        ("language_model/norm/scale", ...): 0.5,
        ("dream_queries/embedding", ...): 5.0,
        ("vision_encoder/layers/mlp/fc1/kernel", ...): 2.0,
    }
    alone = {}
    for (path, part), rate in rates.items():
        plain = dataclasses.replace(GROUPS, learning_rate=0.1 * rate, learning_rates=(), layer_decays=(), ema_decay=0.0)
        one = make_optimizer(plain, 10)
        alone[path, part] = [one, one.init(params[path][part]), params[path][part]]

    for _ in range(4):
        gradients = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for (path, part), told in alone.items():
            one, before, values = told
            update, told[1] = one.update(gradients[path][part], before, values)
            told[2] = optax.apply_updates(values, update)
            np.testing.assert_allclose(params[path][part], told[2], rtol=2e-6, atol=1e-7)


def test_muon_moves_the_matrices_it_is_told_and_as_far_as_adamw_would():
    """Every layer of a stack by itself: all its singular values alike, whatever the gradient's, and a root mean square
    of 0.2 learning rates. What is not matched moves as by AdamW; the weights decay."""
    rng = np.random.default_rng(0)
    plain = OptimizerConfig(learning_rate=0.1, warmup_ratio=0.0, weight_decay=0.3, clip_norm=0.0)
    config = dataclasses.replace(plain, muon=("a/layers/.*/kernel", "conv/kernel"))
    shapes = {"a/layers/up/kernel": (3, 24, 64), "a/layers/norm/scale": (3, 24), "conv/kernel": (1, 1, 32, 16)}
    params, gradients = (
        {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()} for _ in range(2)
    )
    gradients["a/layers/up/kernel"] *= np.linspace(0.01, 1, 24)[:, None]  # far from alike
    moved, usual = make_optimizer(config, 10**6), make_optimizer(plain, 10**6)
    updates, state = moved.update(gradients, moved.init(params), params)
    expected, _ = usual.update(gradients, usual.init(params), params)
    np.testing.assert_allclose(updates["a/layers/norm/scale"], expected["a/layers/norm/scale"], rtol=1e-6)
    for path in ("a/layers/up/kernel", "conv/kernel"):
        step = -np.asarray(updates[path] / 0.1 + 0.3 * params[path]).reshape(-1, *shapes[path][-2:])
        values = np.linalg.svd(step, compute_uv=False) / (0.2 * max(step.shape[1:]) ** 0.5)
        assert (values > 0.65).all() and (values < 1.25).all()
        assert (np.einsum("lio,lio->l", step, np.asarray(gradients[path]).reshape(step.shape)) > 0).all()  # downhill
        one = {path: params[path][:1]}
        alone = dataclasses.replace(config, muon=(path,))
        first, _ = (by := make_optimizer(alone, 10**6)).update({path: gradients[path][:1]}, by.init(one), one)
        np.testing.assert_allclose(first[path], updates[path][:1], rtol=1e-4, atol=1e-6)
    assert sum(leaf.shape == (3, 24, 64) for leaf in jax.tree.leaves(state)) == 1  # one moment


def test_muon_lies_on_the_mesh_as_its_parameters_do_and_gives_the_same_there():
    """A stack that is split along each of its sides; the moment in the type and place that it is told."""
    config = tiny_config()
    path = "language_model/layers/mlp/up_proj/kernel"
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_ratio=0.0, muon=(path,), mu_dtype="bfloat16")
    sharding = ShardingConfig(fsdp=4, tensor=2)
    rules = ParametersConfig(trainable=(("language_model/.*", True), (".*", False)))
    state = abstract_state(config, rules, optimizer, make_mesh(sharding), sharding)
    told = state.trainable[path]
    assert not told.sharding.is_fully_replicated
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    (moment,) = (leaf for where, leaf in leaves if where[-1] == jax.tree_util.DictKey(path))
    assert (moment.shape, moment.sharding, moment.dtype) == (told.shape, told.sharding, jnp.bfloat16)

    rng = np.random.default_rng(0)
    params, gradients = ({path: rng.normal(size=told.shape).astype(np.float32)} for _ in range(2))
    moved = make_optimizer(optimizer, 10)
    step = jax.jit(lambda params, gradients: moved.update(gradients, moved.init(params), params)[0])
    split = ({path: jax.device_put(tree[path], told.sharding)} for tree in (params, gradients))
    np.testing.assert_allclose(step(*split)[path], step(params, gradients)[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"muon": ("lama/.*",)}, r"optimizer\.muon: 'lama/\.\*' decides about no trained"),
        ({"muon": (".*",)}, r"optimizer\.muon: language_model/layers/a of shape \(2, 3\) is no matrix"),
        (
            {"muon": ("conv/.*",)},
            r"optimizer\.muon: conv/kernel of shape \(3, 3, 4, 4\) is no matrix.*wider than a pixel",
        ),
        ({"learning_rates": (("lama/.*", 2.0),)}, r"optimizer\.learning_rates: 'lama/\.\*' decides about no trained"),
        (
            {"layer_decays": (("language_model/layer/.*", 0.9),)},
            r"optimizer\.layer_decays: 'language_model/layer/\.\*' decides about no",
        ),
        (
            {"layer_decays": (("dream_queries/.*", 0.9),)},
            r"layer_decays: dream_queries/embedding is matched, but is not of a",
        ),
    ],
    ids=str,
)
def test_a_group_of_nothing_is_refused(changes, message):
    params = {"language_model/layers/a": jnp.zeros((2, 3)), "dream_queries/embedding": jnp.zeros((2, 4))}
    params["conv/kernel"] = jnp.zeros((3, 3, 4, 4))
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(**changes), 10).init(params)
