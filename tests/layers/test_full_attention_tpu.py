"""The TPU's attention kernel, emulated on the CPU, against `attend`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.layers import full_attention_tpu
from dreamllm_jax.layers.attention import attend
from dreamllm_jax.layers.full_attention_tpu import full_attention, supported
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, use
from tests.parity import relative_error

CASES = {  # images, queries, keys, heads, head dim
    "two heads a block": (2, 64, 64, 4, 64),
    "an odd head": (2, 128, 128, 5, 64),
    "one head": (1, 64, 64, 1, 64),
    "heads of 128": (1, 64, 64, 2, 128),
    "64 condition tokens": (2, 256, 64, 2, 64),
    "77 condition tokens": (1, 256, 77, 3, 64),
    "more keys than queries": (1, 16, 256, 2, 64),
    "17 positions": (2, 17, 17, 3, 64),
    "1,025 positions": (1, 1025, 1025, 2, 64),  # blocks of 352 queries and 528 keys
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(full_attention_tpu, "QUERY_ROWS", 128)
    monkeypatch.setattr(full_attention_tpu, "KEY_ROWS", 128)


def make_inputs(images, queries, keys, heads, dim, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=(images, length, heads * dim)), dtype)
        for length in (queries, keys, keys, queries)  # q, k, v and the output's cotangent
    ]


def reference(heads, q, k, v):
    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    return attend(split(q), split(k), split(v), causal=False).reshape(q.shape)


def results(attention, q, k, v, cotangent):
    @jax.jit
    def run(q, k, v, cotangent):
        out, pull = jax.vjp(attention, q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(cotangent)), strict=True))

    return run(q, k, v, cotangent)


def worst_error(shape, dtype):
    """Of the output and the three gradients, relative to float32 `attend`."""
    heads, inputs = shape[3], make_inputs(*shape, dtype)
    got = results(functools.partial(full_attention, heads=heads, interpret=True), *inputs)
    want = results(functools.partial(reference, heads), *(x.astype(jnp.float32) for x in inputs))
    assert {x.dtype for x in got.values()} == {jnp.dtype(dtype)}
    return np.max([relative_error(x.astype(jnp.float32), want[name]) for name, x in got.items()])  # NaN, if one is


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_attend(shape):
    assert worst_error(shape, jnp.float32) < 1e-5


@pytest.mark.parametrize("shape", [(2, 256, 384, 3, 64), (1, 131, 259, 2, 128)], ids=["whole", "in part"])
def test_blocks_of_queries_and_keys(small_blocks, shape):
    assert worst_error(shape, jnp.float32) < 1e-5


def test_keys_of_two_sequences_are_as_joined(small_blocks):
    heads = 3
    q, k, v, cotangent = make_inputs(2, 256, 256 + 40, heads, 64)

    def apart(q, k, v):
        return full_attention(q, (k[:, :256], k[:, 256:]), (v[:, :256], v[:, 256:]), heads, True)

    got, want = (results(f, q, k, v, cotangent) for f in (apart, functools.partial(reference, heads)))
    for name, x in got.items():
        assert relative_error(x, want[name]) < 1e-5


def test_bfloat16_is_near_float32(small_blocks):
    assert worst_error((1, 256, 256, 4, 64), jnp.bfloat16) < 0.01


def test_large_scores_stay_finite():
    q, k, v, _ = make_inputs(1, 64, 64, 2, 64)
    got = full_attention(100 * q, 100 * k, v, 2, True)
    assert relative_error(got, reference(2, 100 * q, 100 * k, v)) < 1e-5


@pytest.mark.parametrize("images", [4, 3])  # 3 images do not divide over 4 devices, and every device takes them all
def test_images_are_split_over_the_mesh(images):
    inputs = make_inputs(images, 64, 64, 2, 64)
    attention = functools.partial(full_attention, heads=2, interpret=True)
    want = results(attention, *inputs)
    config = ShardingConfig(data=2, fsdp=2)
    with use(make_mesh(config, jax.devices()[:4]), config):
        got = results(attention, *inputs)
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name], rtol=1e-6, atol=1e-6)
        assert x.sharding.is_fully_replicated == (images == 3)


@pytest.mark.parametrize(
    ("queries", "keys", "channels", "heads", "want"),
    [
        (4096, 4096, 320, 5, True),
        (4096, 77, 320, 5, True),
        (9216, 9216, 320, 5, True),
        (64, 64, 1280, 20, True),
        (4096, 4096, 512, 1, False),  # a head of 512
        (64, 64, 320, 8, False),  # heads of 40
        (600, 1500, 128, 2, True),  # of which no block is a divisor
        (1, 64, 128, 2, False),  # one query
        (64, 1, 128, 2, False),  # one key
        (64, 16384, 128, 2, False),  # keys that do not fit
    ],
)
def test_supported(queries, keys, channels, heads, want):
    q, k = (
        jax.ShapeDtypeStruct((1, queries, channels), "bfloat16"),
        jax.ShapeDtypeStruct((1, keys, channels), "bfloat16"),
    )
    assert supported(q, k, heads) == want


def test_sequences_are_supported_each_by_itself():
    q, k, one = (jax.ShapeDtypeStruct((1, length, 128), "bfloat16") for length in (4096, 4096, 1))
    assert supported(q, (k, k), 2) and not supported(q, (k, one), 2)
    assert not supported(q, (k, k, k), 2)  # more than fit
