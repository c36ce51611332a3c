"""What the U-Net's and the autoencoder's blocks compute faster than they are usually written."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.layers import attention, blocks
from dreamllm_jax.layers.blocks import Attention, GroupNorm, LayerNorm, Upsample2D
from tests.parity import random_weights, relative_error


def made(module, x):
    """Random parameters for a module."""
    return random_weights(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)))


def pulled(module, params, x, cotangent):
    """Output, and the gradient to the input, as float32."""

    @jax.jit
    def run(params, x, cotangent):
        out, pull = jax.vjp(lambda x: module.apply(params, x), x)
        return out, *pull(cotangent.astype(out.dtype))

    return [np.asarray(y, np.float32) for y in run(params, x, cotangent)]


NORMS = {
    "group": (GroupNorm(num_groups=4), nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False)),
    "layer": (LayerNorm(), nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)),
}


def norm_inputs(offset):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 32)) + offset * (1 + rng.normal(size=32))  # each channel has a mean of its own
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=x.shape), jnp.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_equal_flax(norm):
    ours, reference = NORMS[norm]
    x, cotangent = norm_inputs(3.0)
    params = made(ours, x)
    for got, want in zip(pulled(ours, params, x, cotangent), pulled(reference, params, x, cotangent), strict=True):
        assert relative_error(got, want) < 2e-6


@pytest.mark.parametrize("offset", [0.0, 4.0, 64.0])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_bfloat16_lose_only_its_rounding(norm, offset):
    ours, reference = NORMS[norm]
    x, cotangent = norm_inputs(offset)
    x = x.astype(jnp.bfloat16)
    params = made(ours, x)
    got = pulled(ours.clone(dtype=jnp.bfloat16), params, x, cotangent)
    want = pulled(reference, params, x.astype(jnp.float32), cotangent.astype(jnp.bfloat16).astype(jnp.float32))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 2**-8


def test_a_constant_has_no_variance():
    x = jnp.full((1, 4, 4, 8), 300.0, jnp.bfloat16)
    out = GroupNorm(num_groups=2, dtype=jnp.bfloat16).apply({"params": {"scale": jnp.ones(8), "bias": jnp.ones(8)}}, x)
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=0.1)


@pytest.mark.parametrize("size", [None, (9, 12), (10, 11)])
def test_upsampling_equals_a_convolution_of_the_enlarged_image(size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6, 8)), jnp.float32)
    params = made(Upsample2D(), x)
    enlarged = x.repeat(2, axis=1).repeat(2, axis=2)
    if size is not None:
        enlarged = enlarged[:, : size[0], : size[1]]
    want = blocks.Conv(8).apply({"params": params["params"]["conv"]}, enlarged)
    assert relative_error(Upsample2D().apply(params, x, size), want) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "heads", "kernel"), [("bfloat16", 2, True), ("float32", 2, False), ("bfloat16", 8, False)]
)
def test_the_kernel_is_for_bfloat16_on_tpu(monkeypatch, dtype, heads, kernel):
    x = jnp.zeros((1, 64, 128), dtype)
    module = Attention(heads, dtype=dtype)
    params = made(module, x)

    def program():
        return str(jax.make_jaxpr(module.apply)(params, x))

    assert "pallas_call" not in program()
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    assert ("pallas_call" in program()) == kernel
