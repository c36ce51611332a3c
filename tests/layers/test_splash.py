"""The TPU kernel for packed rows computes what plain XLA does; it is run step by step, on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.layers import attention, splash
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, use

LENGTH, HEADS, KEY_HEADS, DIM = 256, 4, 2, 128


def inputs(rows, length=LENGTH, dim=DIM):
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.normal(size=(rows, length, heads, dim)), jnp.float32)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    ends = np.sort(rng.integers(1, length, (rows, 3)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= ends[:, None]).sum(-1)
    return q, k, v, jnp.asarray(np.where(segments == 4, 0, segments)), cotangent  # the last quarter or so is padding


def outcome(attend, q, k, v, segments, cotangent):
    out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
    return out, *pullback(cotangent)


def plain(q, k, v, segments, window=0):
    return attention.attend(q, k, v, q_segments=segments, k_segments=segments, causal=True, window=window)


@pytest.fixture
def on_tpu(monkeypatch):
    """`attend` chooses as if it were compiled for TPU, and the kernel runs where we are."""
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    interpreted = functools.partial(splash.causal_attention, interpret=True)
    monkeypatch.setattr(splash, "causal_attention", interpreted)


@pytest.mark.parametrize(
    ("length", "dim", "window"), [(LENGTH, DIM, 0), (LENGTH, 64, 0), (200, 80, 0), (300, 64, 0), (LENGTH, DIM, 5)]
)
def test_forward_and_gradients_equal_plain_attention(monkeypatch, length, dim, window):
    """The kernel takes multiples of 128 alone: other lengths and heads are filled up."""
    monkeypatch.setattr(splash, "_BLOCK", 256)  # of 300 tokens two tiles
    *arrays, cotangent = inputs(2, length, dim)
    kernel = functools.partial(splash.causal_attention, window=window, interpret=True)
    got = jax.jit(functools.partial(outcome, kernel))(*arrays, cotangent)
    want = jax.jit(functools.partial(outcome, functools.partial(plain, window=window)))(*arrays, cotangent)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    padding = np.asarray(arrays[3]) == 0
    assert padding.any() and not np.asarray(got[0])[padding].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        ShardingConfig(fsdp=2, sequence=2),
        ShardingConfig(fsdp=2, sequence=2, tensor=2),
        ShardingConfig(fsdp=2, tensor=4),  # divides the four query heads, but not the two key heads
    ],
    ids=["sequence=2", "sequence=2,tensor=2", "tensor=4"],
)
def test_a_mesh_changes_nothing(on_tpu, config):
    """Rows over two devices, heads over `tensor` and `sequence`, whose parts of the rows meet first."""
    *arrays, cotangent = inputs(rows=2)
    want = outcome(plain, *arrays, cotangent)
    devices = jax.devices()[: config.fsdp * config.sequence * config.tensor]
    with use(make_mesh(config, devices), config):
        got = jax.jit(functools.partial(outcome, plain))(*arrays, cotangent)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_attend_chooses_the_kernel_for_packed_rows_alone(on_tpu, monkeypatch):
    calls = []
    monkeypatch.setattr(splash, "causal_attention", lambda q, k, v, segments, window: calls.append(q.shape) or q)
    for length, dim in ((LENGTH, DIM), (200, 64)):
        q, k, v, segments, _ = inputs(1, length, dim)
        plain(q, k, v, segments)
        assert calls.pop() == q.shape
    attention.attend(q, k, v, causal=False)
    attention.attend(q, k, v, q_segments=segments, k_segments=segments, q_index=segments, causal=True)
    plain(q[:, :100], k[:, :100], v[:, :100], segments[:, :100])
    assert not calls


@pytest.mark.parametrize(
    ("length", "tiles"),
    {128: (1, 128), 200: (1, 256), 1024: (1, 1024), 2048: (2, 1024), 2304: (3, 768), 2688: (3, 896)}.items(),
)
def test_tiles_are_few(length, tiles):
    assert splash.tiles_of(length) == tiles
