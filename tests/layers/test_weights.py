"""Fresh parameters: what Flax's own `init` would draw from, and the same wherever they lie."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.layers.lora import LoraConfig
from dreamllm_jax.layers.weights import draw
from dreamllm_jax.model import DreamLLM, abstract_params
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, param_shardings
from tests.tiny import tiny_config


def drawn(config, sharding: ShardingConfig, devices: int, paths=None) -> dict[str, jax.Array]:
    boxed = abstract_params(config)
    mesh = make_mesh(sharding, jax.devices()[:devices])
    shardings = flatten_dict(param_shardings(boxed, mesh, sharding), sep="/")
    weights = flatten_dict(boxed, sep="/")
    leaves = {
        path: jax.ShapeDtypeStruct(weights[path].value.shape, "float32", sharding=shardings[path])
        for path in paths or weights
    }
    return draw(weights, leaves, jax.random.key(7))


@pytest.mark.slow
def test_they_are_the_initializers_wherever_they_lie():
    llama = dataclasses.replace(tiny_config().language_model, lora=LoraConfig(rank=4, alpha=6.0))
    config = tiny_config(language_model=llama)
    one = drawn(config, ShardingConfig(fsdp=1), 1)
    split = drawn(config, ShardingConfig(fsdp=4, tensor=2), 8)
    key = jax.random.key(0, impl="unsafe_rbg")  # whose draws are compiled in a tenth of the time
    flax = flatten_dict(nn.unbox(jax.jit(DreamLLM(config).init)(key)["params"]), sep="/")
    assert one.keys() == split.keys() == flax.keys()
    compared = 0
    for path, value in one.items():
        np.testing.assert_array_equal(value, split[path], err_msg=path)
        want = flax[path]
        assert value.shape == want.shape
        if want.std() == 0:  # zeros, ones
            np.testing.assert_array_equal(value, want, err_msg=path)
        elif value.size >= 256:
            compared += 1
            five_sigma = 5 / np.sqrt(value.size)
            assert value.std() == pytest.approx(want.std(), rel=five_sigma), path
            assert abs(value.mean()) < five_sigma * value.std(), path
    assert compared > 40
    # Neither two parameters alike nor two layers of one have the same values, and each depends on its own path alone.
    kernel, other = (
        one["language_model/layers/self_attn/k_proj/kernel"],
        one["language_model/layers/self_attn/v_proj/kernel"],
    )
    assert (kernel != other).mean() > 0.99
    assert (kernel[0] != kernel[1]).mean() > 0.99
    few = ["dream_queries/embedding", "language_model/layers/self_attn/k_proj/kernel"]
    for path, value in drawn(config, ShardingConfig(fsdp=1), 1, few).items():
        np.testing.assert_array_equal(value, one[path])
