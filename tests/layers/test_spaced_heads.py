"""Attention of what is there, by the TPU's kernel (emulated on the CPU), against `attend`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.layers import spaced_heads
from dreamllm_jax.layers.attention import attend
from dreamllm_jax.layers.spaced_heads import Spacing, find_spacing, self_attention
from tests.parity import relative_error

IMAGES, TOKENS = 3, 20


def reference(q, k, v, mask):
    segments = None if mask is None else mask.astype(jnp.int32)
    return attend(q, k, v, q_segments=segments, k_segments=segments, causal=False)


@functools.partial(jax.jit, static_argnums=0)
def outcome(attention, q, k, v, mask, cotangent):
    out, pull = jax.vjp(lambda *x: attention(*x, mask), q, k, v)
    return out, *pull(cotangent)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("heads", "keys", "dim"), [(6, 2, 64), (3, 3, 64), (2, 2, 48)])
def test_self_attention_by_the_kernel(monkeypatch, heads, keys, dim, masked):
    rng, calls, kernel = np.random.default_rng(0), [], spaced_heads.spaced_attention
    *arrays, cotangent = (
        jnp.asarray(rng.normal(size=(IMAGES, TOKENS, n, dim)), jnp.float32) for n in (heads, keys, keys, heads)
    )
    mask = jnp.asarray(rng.random((IMAGES, TOKENS)) < 0.6).at[1].set(False) if masked else None  # of the second nothing
    spacing = find_spacing((heads, dim), (IMAGES, TOKENS), TOKENS, jnp.bfloat16, masked)
    assert spacing == Spacing(heads, dim, 64)

    def interpreted(*given):
        calls.append(given)
        return kernel(*given, interpret=True)

    monkeypatch.setattr(spaced_heads, "platform", lambda: "tpu")
    monkeypatch.setattr(spaced_heads, "find_spacing", lambda *_: spacing)
    monkeypatch.setattr(spaced_heads, "spaced_attention", interpreted)
    got = outcome(lambda *x: self_attention(*x), *arrays, mask, cotangent)
    assert len(calls) == 1
    for a, b in zip(got, outcome(reference, *arrays, mask, cotangent), strict=True):
        assert relative_error(a, b) < 1e-5
