import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.layers import attention
from dreamllm_jax.layers.attention import attend

B, T, S, H, K, D = 2, 7, 11, 6, 2, 4


def arrays(rng, queries=T):
    shapes = (B, queries, H, D), (B, S, K, D), (B, S, K, D)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def direct(q, k, v, visible):
    """The textbook formula, a head and a query at a time."""
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(visible[b, t])
        if seen.size:
            scores = k[b, seen, h // (H // K)].astype(np.float64) @ q[b, t, h] / np.sqrt(D)
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, seen, h // (H // K)]
    return out


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_it_is_the_textbook_formula(rng):
    q, k, v = arrays(rng)
    got = attend(q, k, v, causal=False)
    np.testing.assert_allclose(got, direct(*map(np.asarray, (q, k, v)), np.ones((B, T, S), bool)), atol=1e-6)


def test_causal_counts_from_zero(rng):
    q, k, v = arrays(rng)
    visible = np.broadcast_to(np.arange(S) <= np.arange(T)[:, None], (B, T, S))
    got = attend(q, k, v, causal=True)
    np.testing.assert_allclose(got, direct(*map(np.asarray, (q, k, v)), visible), atol=1e-6)


def some_segments(rng):
    q_segments, k_segments = rng.integers(0, 3, (B, T)), rng.integers(0, 3, (B, S))
    q_segments[0, 0], q_segments[1, 3] = 0, 9  # padding, and a segment that no key has
    return q_segments, k_segments, rng.integers(0, S, (B, T))


def test_segments_and_places_decide_what_is_seen(rng):
    q, k, v = arrays(rng)
    q_segments, k_segments, q_index = some_segments(rng)
    visible = (q_segments[:, :, None] == k_segments[:, None]) & (q_segments != 0)[:, :, None]
    visible &= np.arange(S) <= q_index[:, :, None]
    got = attend(q, k, v, q_segments=q_segments, k_segments=k_segments, q_index=q_index, causal=True)
    np.testing.assert_allclose(got, direct(*map(np.asarray, (q, k, v)), visible), atol=1e-6)
    assert not np.asarray(got)[~visible.any(-1)].any()


def test_a_window_ends_what_is_seen(rng):
    q, k, v = arrays(rng)
    distance = np.arange(T)[:, None] - np.arange(S)
    visible = np.broadcast_to((distance >= 0) & (distance < 2), (B, T, S))
    got = attend(q, k, v, causal=True, window=2)
    np.testing.assert_allclose(got, direct(*map(np.asarray, (q, k, v)), visible), atol=1e-6)


def test_queries_that_see_nothing_give_finite_zero_gradients(rng):
    q, k, v = arrays(rng)
    q_segments, k_segments, *_ = some_segments(rng)
    blind = ~((q_segments[:, :, None] == k_segments[:, None]) & (q_segments != 0)[:, :, None]).any(-1)
    unseen = ~((q_segments[:, :, None] == k_segments[:, None]) & (k_segments != 0)[:, None]).any(1)

    @jax.jit
    def loss(q, k, v):
        return jnp.square(attend(q, k, v, q_segments=q_segments, k_segments=k_segments, causal=False)).sum()

    grads = [np.asarray(g) for g in jax.grad(loss, argnums=(0, 1, 2))(q, k, v)]
    assert all(np.isfinite(g).all() for g in grads)
    assert blind.any() and not grads[0][blind].any()
    assert unseen.any() and not grads[1][unseen].any() and not grads[2][unseen].any()
    everything_padding = jax.grad(
        lambda q: attend(q, k, v, q_segments=jnp.zeros((B, T), int), k_segments=k_segments, causal=True).sum()
    )(q)
    assert not np.asarray(everything_padding).any()


@pytest.mark.parametrize(("causal", "segmented"), [(False, False), (True, True)])
@pytest.mark.parametrize("scores", [S, 3 * S])  # chunks of 1 and of 3 of the 7 queries
def test_chunks_change_nothing(rng, monkeypatch, causal, segmented, scores):
    q, k, v = arrays(rng)
    q_segments, k_segments, q_index = some_segments(rng) if segmented else (None,) * 3
    cotangent = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def outcome():
        def run(q, k, v):
            return attend(q, k, v, q_segments=q_segments, k_segments=k_segments, q_index=q_index, causal=causal)

        def both(*inputs):
            out, pullback = jax.vjp(run, *inputs)
            return out, *pullback(cotangent)

        return jax.jit(both)(q, k, v)

    whole = outcome()
    monkeypatch.setattr(attention, "MAX_SCORES", scores)
    for got, want in zip(outcome(), whole, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_softmax_is_float32_in_half_precision(rng):
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(rng))
    got = attend(q, k, v, causal=False)
    assert got.dtype == jnp.bfloat16
    want = attend(*(x.astype(jnp.float32) for x in (q, k, v)), causal=False)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


def test_refusals(rng):
    q, k, v = arrays(rng)
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4 key heads"):
        attend(q, jnp.zeros((B, S, 4, D)), jnp.zeros((B, S, 4, D)), causal=True)
    with pytest.raises(ValueError, match="segments of queries and keys"):
        attend(q, k, v, q_segments=jnp.ones((B, T), int), causal=True)
