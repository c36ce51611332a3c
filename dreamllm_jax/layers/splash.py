"""Causal attention of packed rows on TPU, through JAX's splash attention kernel.

Scores exist a tile at a time in the chip's vector memory, and tiles above the diagonal are not computed.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import splash_attention as splash

Array = jax.Array

_TILE = 128  # the kernel takes rows and heads of multiples of it
_BLOCK = 1024


def supports(queries: int, keys: int) -> bool:
    """Whether `causal_attention` takes rows of this shape and is of use: all scores of shorter ones are one tile."""
    return queries == keys and queries >= _TILE


def padded(size: int) -> int:
    """What the kernel computes of a head's channels: zeros are added to what is no multiple."""
    return pl.cdiv(size, _TILE) * _TILE


def tiles_of(length: int) -> tuple[int, int]:
    """Along a row of this length, how many tiles the kernel takes, and their side: few, for each column of them leaves
    a sum of its own for the queries' gradient. Zeros are added to a row that they reach beyond."""
    count = pl.cdiv(length, _BLOCK)
    return count, padded(pl.cdiv(length, count))


def causal_attention(q: Array, k: Array, v: Array, segments: Array, window: int = 0, interpret: bool = False) -> Array:
    """Each token attends to its segment up to itself; see `attention.attend`.

    Args:
      q: f[B, T, H, D] queries.
      k: f[B, T, K, D] keys.
      v: f[B, T, K, D] values.
      segments: i32[B, T]; the output on padding (segment 0) is zero.
      window: how many tokens each attends to at most, the last ones; 0 for all.
      interpret: run the kernel step by step in Python, on any device.

    Returns:
      f[B, T, H, D].
    """
    _, length, heads, dim = q.shape
    tiles, block = tiles_of(length)
    more = tiles * block - length, padded(dim) - dim
    scaled = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, more[0]), (0, 0), (0, more[1]))) for x in (scaled, k, v))
    ids = jnp.pad(segments, ((0, 0), (0, more[0])))
    halves = block > _BLOCK // 2 and block % (2 * _TILE) == 0
    computed = block // 2 if halves else block  # of a tile's keys at once
    square = (tiles * block,) * 2
    mask = splash.LocalMask(square, (window - 1, 0), offset=0) if window else splash.CausalMask(square)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=computed,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=computed,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",  # see `remat`
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    attend = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids)))
    out = attend(q, k, v, ids).swapaxes(1, 2)[:, :length, :, :dim]
    return jnp.where((segments != 0)[..., None, None], out, 0).astype(q.dtype)
