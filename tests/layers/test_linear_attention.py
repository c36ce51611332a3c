"""Linear attention: its kernel against plain XLA, and that against every query and key taken by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.layers.linear_attention import (
    linear_attention,
    linear_attention_wide,
    linear_attention_xla,
    supported,
)
from tests.parity import relative_error


def arrays(images, positions, channels, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(images, positions, channels)).astype(dtype) for _ in range(4)]


def output_and_gradients(function, q, k, v, dout):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(dout)


@pytest.mark.parametrize("function", [linear_attention_xla, linear_attention_wide])
def test_sums_serve_all_queries(function):
    q, k, v, dout = arrays(2, 6, 12)

    def plain(q, k, v):
        q, k, v = (x.reshape(2, 6, 3, 4) for x in (jax.nn.relu(q), jax.nn.relu(k), v))
        weights = jnp.einsum("nthd,nshd->nhts", q, k)
        weights /= weights.sum(-1, keepdims=True) + 1e-15
        return jnp.einsum("nhts,nshd->nthd", weights, v).reshape(2, 6, 12)

    got, want = (output_and_gradients(f, q, k, v, dout) for f in (lambda q, k, v: function(q, k, v, 3), plain))
    assert max(map(relative_error, got, want)) < 1e-5


# Whole and partial blocks of channels, heads of 32 and of 64; images that share a block.
@pytest.mark.parametrize(("images", "positions", "channels", "heads"), [(3, 32, 192, 6), (1, 48, 128, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_is_plain_xla(images, positions, channels, heads, dtype):
    inputs = arrays(images, positions, channels, jnp.dtype(dtype))
    assert supported(jnp.zeros(inputs[0].shape, jnp.bfloat16), heads)
    got = output_and_gradients(lambda *args: linear_attention(*args, heads, True), *inputs)
    want = output_and_gradients(lambda *args: linear_attention_xla(*args, heads), *inputs)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]
    errors = list(map(relative_error, got, want))
    print(errors)
    assert max(errors) < (1e-5 if dtype == "float32" else 6e-3)


def test_what_attends_to_nothing_is_zero():
    q, k, v, dout = arrays(1, 16, 128)
    k = -np.abs(k)
    for function in (lambda *x: linear_attention_xla(*x, 4), lambda *x: linear_attention(*x, 4, True)):
        assert all(np.isfinite(x).all() for x in output_and_gradients(function, q, k, v, dout))
        assert not np.any(function(q, k, v))


def test_what_the_kernel_takes():
    def takes(shape, heads, dtype="bfloat16"):
        return supported(jax.ShapeDtypeStruct(shape, dtype), heads)

    assert takes((2, 256, 2240), 70) and takes((1, 1024, 1152), 36)
    assert not takes((2, 256, 2240), 70, "float32") and not takes((2, 9, 128), 4) and not takes((2, 16, 144), 2)
    assert not takes((1, 128 * 128, 128), 4)
