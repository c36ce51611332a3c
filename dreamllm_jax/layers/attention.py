"""Attention: one function for every tower, behind which a device's own kernels stand.

On TPU packed rows go through the splash attention kernel, and heads that lie packed through `full_attention`; half
precision goes through cuDNN on GPU; all else, and every CPU, through plain XLA, in chunks of queries.

What a query may see is told by segments and indices; where there is no kernel for them a mask is made, bool[B, T, S].

Legend: B rows, T queries, S keys, H query heads, K key heads, D head dimension.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dreamllm_jax.layers import splash
from dreamllm_jax.layers.full_attention_tpu import full_attention, supported
from dreamllm_jax.parallel.collectives import on_shards
from dreamllm_jax.parallel.mesh import constrain, mesh_spec, platform

Array = jax.Array

# Scores (T x S, of one head) held at once; longer rows of queries are taken in chunks.
MAX_SCORES = 2**20


def _visible(
    q_segments: Array | None, k_segments: Array | None, q_index: Array, k_index: Array, causal: bool, window: int
) -> Array | None:
    """bool[B or 1, T, S], or None where every query sees every key."""
    parts = []
    if q_segments is not None:
        parts.append((q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] != 0))
    if causal:
        parts.append(k_index[:, None] <= q_index[:, :, None])
    if window:
        parts.append(k_index[:, None] > q_index[:, :, None] - window)
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _attend(q: Array, *parts: tuple[Array, Array, Array | None]) -> Array:
    """Attention to keys and values that stand in several arrays, each with what is visible of it."""
    rows, queries, heads, dim = q.shape
    q = q.reshape(rows, queries, parts[0][0].shape[2], -1, dim)
    scores = []
    for k, _, visible in parts:
        found = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        if visible is not None:
            # A finite fill, and zeros after the softmax: a query that sees nothing gives 0, and 0 gradient, not NaN.
            found = jnp.where(visible[:, None, None], found, jnp.finfo(jnp.float32).min)
        scores.append(found)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1) if len(parts) > 1 else scores[0])
    found, at = [], 0
    for k, v, visible in parts:
        own, at = weights[..., at : at + k.shape[1]], at + k.shape[1]
        own = own if visible is None else jnp.where(visible[:, None, None], own, 0.0)
        found.append(jnp.einsum("bkgts,bskd->btkgd", own.astype(v.dtype), v, preferred_element_type=jnp.float32))
    return sum(found[1:], found[0]).reshape(rows, queries, heads, -1).astype(q.dtype)


def _cudnn(q: Array, k: Array, v: Array, visible: Array | None) -> Array:
    """cuDNN's fused attention (GPU, half precision): scores never leave the chip, what is visible does."""
    if visible is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    out = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation="cudnn")
    return jnp.where(visible.any(-1)[..., None, None], out, 0)


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_segments: Array | None = None,
    k_segments: Array | None = None,
    q_index: Array | None = None,
    causal: bool,
    window: int = 0,
) -> Array:
    """Scaled dot-product attention with grouped queries (arXiv 2305.13245) and a float32 softmax.

    A query sees the keys of its own segment, and if `causal` only those up to its own index. Segment 0
    is padding: it sees nothing and is not seen; a query that sees nothing gives zeros. Exact for every length: many
    queries are taken in chunks, recomputed in the backward pass.

    Args:
      q: f[B, T, H, D] queries; H is a multiple of K, and head h reads key head h // (H / K).
      k: f[B, S, K, D] keys.
      v: f[B, S, K, D] values.
      q_segments: i32[B, T] segments of the queries; None (with `k_segments`) is one segment.
      k_segments: i32[B, S] segments of the keys.
      q_index: i32[B, T] places of the queries among the keys; None counts from 0.
      causal: whether a query sees only keys up to its own index.
      window: of how many of these, the last ones; 0 for all.

    Returns:
      f[B, T, H, D] in the type of `q`.

    Raises:
      ValueError: the heads do not divide, or segments are given for one side only.
    """
    queries, keys = q.shape[1], k.shape[1]
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if (q_segments is None) != (k_segments is None):
        raise ValueError("attention needs the segments of queries and keys, or of neither")
    packed_rows = causal and q_segments is not None and q_index is None
    if packed_rows and platform() == "tpu" and splash.supports(queries, keys):
        heads = ("rows", None, "attention_heads", None)
        if mesh_spec(heads, q.shape) != mesh_spec(heads, k.shape):  # a query's head must find its key's on its device
            groups = q.shape[2] // k.shape[2]
            k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
        q, k, v = (constrain(x, heads) for x in (q, k, v))
        attention = functools.partial(splash.causal_attention, window=window)
        return on_shards(attention, (heads, heads, heads, ("rows", None)), q, k, v, q_segments)
    q_index = jnp.arange(queries)[None] if q_index is None else q_index
    seen = functools.partial(_visible, k_segments=k_segments, k_index=jnp.arange(keys)[None], causal=causal)

    if _takes_cudnn(q):
        return _cudnn(q, k, v, seen(q_segments, q_index=q_index, window=window))
    if queries <= MAX_SCORES // keys:
        return _attend(q, (k, v, seen(q_segments, q_index=q_index, window=window)))

    wide = k.astype(jnp.float32), v.astype(jnp.float32)  # what is added up over the chunks are their gradients

    def part(q, q_segments, q_index):
        k, v = (x.astype(q.dtype) for x in wide)
        return _attend(q, (k, v, seen(q_segments, q_index=q_index, window=window)))

    return _in_chunks(part, keys, q, q_segments, q_index)


def attend_packed(q: Array, keys: tuple[Array, ...], values: tuple[Array, ...], heads: int) -> Array:
    """Attention of every query to every key, the heads side by side in the channels.

    Args:
      q: f[N,T,c].
      keys, values: f[N,S,c] of one or more sequences, which are attended to as if joined.

    Returns:
      f[N,T,c].
    """
    if platform() == "tpu" and q.dtype == jnp.bfloat16 and supported(q, keys, heads):
        return full_attention(q, keys, values, heads)
    k, v = (jnp.concatenate(parts, axis=1) for parts in (keys, values))
    q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in (q, k, v))
    out = attend(q, k, v, causal=False)
    return out.reshape(*out.shape[:2], -1)


def attend_after(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    past_k: Array,
    past_v: Array,
    past_segments: Array,
    *,
    index: Array,
    window: int = 0,
) -> Array:
    """The same for tokens that continue what their row has read before, causally; their keys need not be joined.

    Args:
      q: f[B, T, H, D] queries; `k`, `v` f[B, T, K, D] of the same tokens.
      segments: i32[B, T] of the tokens.
      past_k, past_v: f[B, S, K, D] of entries before them; `past_segments` i32[B, S], 0 where there is none.
      index: i32[B, T] entries that the tokens will take.
      window: as of `attend`.

    Returns:
      f[B, T, H, D] in the type of `q`.
    """
    queries, keys = q.shape[1], past_k.shape[1] + k.shape[1]
    entries = jnp.arange(past_k.shape[1])[None]
    if _takes_cudnn(q) and queries > 1:
        joined = [jnp.concatenate(x, axis=1) for x in ((past_k, k), (past_v, v), (past_segments, segments))]
        there = jnp.concatenate([jnp.broadcast_to(entries, past_segments.shape), index], axis=1)
        return _cudnn(q, *joined[:2], _visible(segments, joined[2], index, there, True, window))

    def part(q, q_segments, q_index):
        past = past_k, past_v, _visible(q_segments, past_segments, q_index, entries, True, window)
        return _attend(q, past, (k, v, _visible(q_segments, segments, q_index, index, True, window)))

    return part(q, segments, index) if queries <= MAX_SCORES // keys else _in_chunks(part, keys, q, segments, index)


def _takes_cudnn(q: Array) -> bool:
    dim = q.shape[3]
    return platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and dim % 8 == 0 and dim <= 128


def _in_chunks(part: Callable, keys: int, q: Array, q_segments: Array | None, q_index: Array) -> Array:
    """`part` of so many queries that their scores are at most `MAX_SCORES`; computed again for its gradient."""
    size = max(1, MAX_SCORES // keys)

    def split(x):  # [B, T, ...] -> [chunks, B, size, ...]
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda chunk: jax.checkpoint(part)(*chunk), jax.tree.map(split, (q, q_segments, q_index)))
    return out.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]
