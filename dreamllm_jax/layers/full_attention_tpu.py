"""Attention without a mask as one TPU kernel (FlashAttention, Dao et al. 2205.14135), for heads packed in the channels.

A block is 128 lanes wide, as wide as a TPU's registers and matrix units, and holds two heads of 64 (or one of 128)
side by side, just as the projections leave them: nothing is padded or transposed. A head is singled out by zeroing the
other's lanes in one operand of a product, which takes a matrix unit as long as a product half as deep.

The keys and values of a block stay in fast memory while the queries pass by, so scores never leave the chip, and one
backward kernel computes all three gradients from the saved log-sum-exp.

Legend: N images, T queries, S keys, C channels of all heads, R rows of queries or keys in a block, G channel blocks.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dreamllm_jax.parallel.collectives import on_shards

Array = jax.Array

LANES = 128
QUERY_ROWS, KEY_ROWS = 512, 1024
# One block of 9216 keys (96 x 96 latents) takes 31 MiB with its gradients; a v4 has 16.
MAX_KEYS, MAX_KEYS_V4 = 9216, 4096
_VMEM_BYTES = 32 * 2**20


def _rows(length: int, most: int) -> int | None:
    """Rows of a block: all, or the largest power of two times the lanes up to `most` that divides the length."""
    if length <= most:
        return length
    rows = math.gcd(length, most)
    return rows if rows % LANES == 0 else None


def supported(q: Array, k: Array, heads: int) -> bool:
    """Whether `full_attention` takes these shapes on the chip that is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    most = MAX_KEYS_V4 if device is not None and "v4" in device.device_kind else MAX_KEYS
    return (
        q.shape[-1] // heads in (LANES // 2, LANES)
        and _rows(q.shape[1], QUERY_ROWS) is not None
        and _rows(k.shape[1], KEY_ROWS) is not None
        and k.shape[1] <= most
    )


def _dot(x: Array, y: Array, contract: tuple[int, int], **kwargs) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32, **kwargs)


class _Step:
    """One head at one block of queries: grid (N, G, T / R, heads in a block)."""

    def __init__(self, channels: int, dim: int, keys: int, scale: float):
        lanes = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        self.head = pl.program_id(3)
        self.mine = lanes // dim == self.head
        self.scale = scale
        self.rows = _rows(keys, KEY_ROWS)
        self.chunks = keys // self.rows
        self.partial = channels % LANES != 0
        left = channels - pl.program_id(1) * LANES
        self.inside = lanes < left
        self.exists = self.head * dim < left

    def keep(self, x: Array) -> Array:
        """Zeroes the other head's lanes."""
        return jnp.where(self.mine, x, jnp.zeros_like(x))

    def chunk(self, ref, i: Array) -> Array:
        """Some rows of keys or values; lanes beyond the last channel hold anything, even NaN, and become zero."""
        x = ref[0, pl.ds(i * self.rows, self.rows)]
        return jnp.where(self.inside, x, jnp.zeros_like(x)) if self.partial else x

    def put(self, ref, x: Array) -> None:
        """Writes this head's lanes, leaving those of the heads before it."""
        ref[0] = jnp.where((self.head == 0) | self.mine, x.astype(ref.dtype), ref[0])

    def loop(self, body: Callable, init):
        return body(0, init) if self.chunks == 1 else jax.lax.fori_loop(0, self.chunks, body, init)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, lse_ref, *, channels: int, dim: int, scale: float):
    step = _Step(channels, dim, k_ref.shape[1], scale)

    @pl.when(step.exists)
    def _():
        q = step.keep(q_ref[0])

        def body(i, carry):
            top, total, out = carry
            scores = _dot(q, step.chunk(k_ref, i), (1, 1))
            higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp((scores - higher) * step.scale)
            fade = jnp.exp((top - higher) * step.scale)
            total = fade * total + jnp.sum(weights, axis=1, keepdims=True)
            v = step.chunk(v_ref, i)
            return higher, total, fade * out + _dot(weights.astype(v.dtype), v, (1, 0))

        column = jnp.zeros((q.shape[0], 1), jnp.float32)
        top, total, out = step.loop(body, (column - jnp.inf, column, jnp.zeros(q.shape, jnp.float32)))
        step.put(out_ref, out / total)
        lse = jnp.broadcast_to(top * step.scale + jnp.log(total), q.shape)
        lse_ref[0, 0, pl.ds(step.head, 1)] = lse.T[:1]


def _backward_kernel(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    dout_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dk_sum,
    dv_sum,
    *,
    channels: int,
    dim: int,
    scale: float,
):
    step = _Step(channels, dim, k_ref.shape[1], scale)

    @pl.when((pl.program_id(2) == 0) & (step.head == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(step.exists)
    def _():
        # Scores are transposed, [keys, queries]: what belongs to a query is then a row, and one product of five, not
        # two, takes a transposed operand.
        q, dout = step.keep(q_ref[0]), step.keep(dout_ref[0])
        lse = lse_ref[0, 0, pl.ds(step.head, 1)]
        products = step.keep(dout_ref[0].astype(jnp.float32) * out_ref[0].astype(jnp.float32))
        ones = jnp.ones((8, LANES), jnp.float32)
        delta = _dot(ones, products, (1, 1), precision=jax.lax.Precision.HIGHEST)[:1]

        def body(i, dq):
            k, v = step.chunk(k_ref, i), step.chunk(v_ref, i)
            rows = pl.ds(i * step.rows, step.rows)
            weights = jnp.exp(_dot(k, q, (1, 1)) * step.scale - lse)
            dv_sum[rows] += _dot(weights.astype(v.dtype), dout, (1, 0))
            dscores = (weights * (_dot(v, dout, (1, 1)) - delta)).astype(k.dtype)
            dk_sum[rows] += _dot(dscores, q, (1, 0))
            return dq + _dot(dscores, k, (0, 0))

        step.put(dq_ref, step.loop(body, jnp.zeros(q.shape, jnp.float32)) * step.scale)

    @pl.when((pl.program_id(2) == pl.num_programs(2) - 1) & (step.head == pl.num_programs(3) - 1))
    def _():
        dk_ref[0] = (dk_sum[...] * step.scale).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


def _call(
    kernel: Callable, products: int, outputs: str, heads: int, interpret: bool, scale: float | None, *arrays: Array
) -> list[Array]:
    """Runs a kernel on the images this device holds.

    `arrays` are q, k, v and, going backward, out, lse and dout; `outputs` names the array that each output is shaped
    like ("l" for lse), `products` counts the matrix products of T x S x C.
    """
    q, k = arrays[:2]
    images, queries, channels = q.shape
    keys, dim = k.shape[1], channels // heads
    rows, blocks, parts = _rows(queries, QUERY_ROWS), pl.cdiv(channels, LANES), LANES // dim
    specs = {
        "q": pl.BlockSpec((1, rows, LANES), lambda n, g, t, h: (n, t, g)),
        "k": pl.BlockSpec((1, keys, LANES), lambda n, g, t, h: (n, 0, g)),
        "l": pl.BlockSpec((1, 1, parts, rows), lambda n, g, t, h: (n, g, 0, t)),
    }
    shapes = {
        "q": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "k": jax.ShapeDtypeStruct(k.shape, k.dtype),
        "l": jax.ShapeDtypeStruct((images, blocks, parts, queries), jnp.float32),
    }
    nbytes = sum(x.size * x.dtype.itemsize for x in (*arrays, *(shapes[name] for name in outputs)))
    return pl.pallas_call(
        functools.partial(kernel, channels=channels, dim=dim, scale=scale or dim**-0.5),
        grid=(images, blocks, queries // rows, parts),
        in_specs=[specs[name] for name in "qkkqlq"[: len(arrays)]],
        out_specs=[specs[name] for name in outputs],
        out_shape=[shapes[name] for name in outputs],
        scratch_shapes=[pltpu.VMEM((keys, LANES), jnp.float32)] * outputs.count("k"),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * images * queries * keys * channels,
            transcendentals=images * heads * queries * keys,
            bytes_accessed=nbytes,
        ),
        interpret=interpret,
    )(*arrays)


def _sharded(call: Callable, *arrays: Array) -> list[Array]:
    """Splits a call over the mesh by its images."""
    return on_shards(call, [("images",) + (None,) * (x.ndim - 1) for x in arrays], *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def full_attention(
    q: Array, k: Array, v: Array, heads: int, interpret: bool = False, scale: float | None = None
) -> Array:
    """Softmax attention of every query to every key, the softmax in float32, on TPU.

    Args:
      q: f[N, T, C] queries, their heads side by side in C.
      k: f[N, S, C] keys.
      v: f[N, S, C] values.
      heads: number of heads, of 64 or 128 channels each; see `supported` for the lengths.
      interpret: emulates the kernel on any platform.
      scale: of the scores, None for that of the heads' width.

    Returns:
      f[N, T, C] in the type of `q`.
    """
    return _forward(q, k, v, heads, interpret, scale)[0]


def _forward(q, k, v, heads, interpret, scale):
    out, lse = _sharded(functools.partial(_call, _forward_kernel, 2, "ql", heads, interpret, scale), q, k, v)
    return out, (q, k, v, out, lse)


def _backward(heads, interpret, scale, saved, dout):
    call = functools.partial(_call, _backward_kernel, 5, "qkk", heads, interpret, scale)
    return tuple(_sharded(call, *saved, dout))


full_attention.defvjp(_forward, _backward)
