"""Attention without a mask as one TPU kernel (FlashAttention, Dao et al. 2205.14135), for heads packed in the channels.

A block is 128 lanes wide, as wide as a TPU's registers and matrix units, and holds two heads of 64 (or one of 128)
side by side, just as the projections leave them: nothing is padded or transposed. A head is singled out by zeroing the
other's lanes in one operand of a product, which takes a matrix unit as long as a product half as deep.

The keys and values of a block stay in fast memory while the queries pass by, so scores never leave the chip, and one
backward kernel computes all three gradients from the saved log-sum-exp.

Legend: N images, T queries, S keys, C channels of all heads, R rows of queries or keys in a block, G channel blocks.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dreamllm_jax.layers.remat import keep
from dreamllm_jax.parallel.collectives import on_shards

Array = jax.Array

LANES = 128
QUERY_ROWS, KEY_ROWS = 512, 1024
_TILE = 16  # rows of a register of bfloat16
# One block of 9216 keys (96 x 96 latents) takes 31 MiB with its gradients; a v4 has 16.
MAX_KEYS, MAX_KEYS_V4 = 9216, 4096
_VMEM_BYTES = 32 * 2**20


def _rows(length: int, most: int) -> int:
    """Rows of a block: as few blocks as will do, of equal size; the last may reach beyond the length."""
    blocks = pl.cdiv(length, most)
    return length if blocks == 1 else pl.cdiv(pl.cdiv(length, blocks), _TILE) * _TILE


def computed(length: int) -> int:
    """Of how many queries the kernel computes the attention, for so many."""
    rows = _rows(length, QUERY_ROWS)
    return pl.cdiv(length, rows) * rows


def supported(q: Array, k: Array | tuple[Array, ...], heads: int) -> bool:
    """Whether `full_attention` takes these shapes on the chip that is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    most = MAX_KEYS_V4 if device is not None and "v4" in device.device_kind else MAX_KEYS
    keys = [part.shape[1] for part in jax.tree.leaves(k)]
    # The compiler takes no product with one vector.
    return q.shape[-1] // heads in (LANES // 2, LANES) and min(q.shape[1], *keys) > 1 and sum(keys) <= most


def _dot(x: Array, y: Array, contract: tuple[int, int], **kwargs) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32, **kwargs)


class _Step:
    """One head at one block of queries: grid (N, G, T / R, heads in a block)."""

    def __init__(self, queries: int, rows: int, channels: int, dim: int, scale: float):
        lanes = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        self.head = pl.program_id(3)
        self.mine = lanes // dim == self.head
        if queries % rows:  # beyond the last query stands anything, even NaN
            row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
            self.mine &= row < queries - pl.program_id(2) * rows
        self.scale = scale
        self.partial = channels % LANES != 0
        left = channels - pl.program_id(1) * LANES
        self.inside = lanes < left
        self.exists = self.head * dim < left
        self.spare = lanes == (1 - self.head) * dim  # a lane of the other head, which `keep` leaves free

    def keep(self, x: Array) -> Array:
        """Zeroes the other head's lanes, and rows that are no query's."""
        return jnp.where(self.mine, x, jnp.zeros_like(x))

    def chunk(self, ref, rows) -> Array:
        """Some rows of keys or values; lanes beyond the last channel hold anything, even NaN, and become zero."""
        x = ref[0, rows]
        return jnp.where(self.inside, x, jnp.zeros_like(x)) if self.partial else x

    def keys(self, ref, rows, added=None) -> Array:
        """A chunk of keys, in whose spare lane stands what is added to their scores."""
        k = self.chunk(ref, rows)
        return (
            k if added is None else jnp.where(self.spare, jnp.broadcast_to(added[0, rows], k.shape).astype(k.dtype), k)
        )

    def asking(self, q: Array, masked: bool) -> Array:
        """Queries that read that lane."""
        return jnp.where(self.spare, jnp.ones_like(q), q) if masked else q

    def put(self, ref, x: Array) -> None:
        """Writes this head's lanes, leaving those of the heads before it."""
        ref[0] = jnp.where((self.head == 0) | self.mine, x.astype(ref.dtype), ref[0])

    def loop(self, body: Callable, init, *sequences):
        """Carries `init` through all chunks of the keys' sequences: `body(rows, refs of a sequence, carry)`."""
        for refs in zip(*sequences, strict=True):
            keys = refs[0].shape[1]
            size = _rows(keys, KEY_ROWS)

            def chunk(i, carry, refs=refs, size=size):
                return body(pl.ds(i * size, size), refs, carry)

            whole, rest = divmod(keys, size)
            init = chunk(0, init) if whole == 1 else jax.lax.fori_loop(0, whole, chunk, init)
            init = body(pl.ds(keys - rest, rest), refs, init) if rest else init
        return init


def _grouped(refs: Sequence, groups: str, parts: int) -> list:
    """A kernel's arguments: one for each letter, of keys and values ("k") and masks ("m") a list of one a sequence."""
    refs = iter(refs)
    return [[next(refs) for _ in range(parts)] if letter in "km" else next(refs) for letter in groups]


def _forward_kernel(*refs, parts: int, masked: bool, **shape):
    q_ref, k_refs, v_refs, *masks, out_ref, lse_ref = _grouped(refs, "qkk" + "m" * masked + "ql", parts)
    step = _Step(**shape)

    @pl.when(step.exists)
    def _():
        q = step.asking(step.keep(q_ref[0]), masked)

        def body(rows, refs, carry):
            top, total, out = carry
            k_ref, v_ref, *mask = refs
            k, v = step.keys(k_ref, rows, *mask), step.chunk(v_ref, rows)
            scores = _dot(q, k, (1, 1))
            higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp((scores - higher) * step.scale)
            fade = jnp.exp((top - higher) * step.scale)
            total = fade * total + jnp.sum(weights, axis=1, keepdims=True)
            return higher, total, fade * out + _dot(weights.astype(v.dtype), v, (1, 0))

        column = jnp.zeros((q.shape[0], 1), jnp.float32)
        init = column - jnp.inf, column, jnp.zeros(q.shape, jnp.float32)
        top, total, out = step.loop(body, init, k_refs, v_refs, *masks)
        step.put(out_ref, out / total)
        lse = jnp.broadcast_to(top * step.scale + jnp.log(total), q.shape)
        lse_ref[0, 0, 0, pl.ds(step.head, 1)] = lse.T[:1]


def _backward_kernel(*refs, parts: int, masked: bool, **shape):
    refs = _grouped(refs, "qkk" + "m" * masked + "qlq" + "qkk" + "kk", parts)  # inputs, outputs, what is summed
    q_ref, k_refs, v_refs, *masks, out_ref, lse_ref, dout_ref, dq_ref, dk_refs, dv_refs, dk_sums, dv_sums = refs
    step = _Step(**shape)

    @pl.when((pl.program_id(2) == 0) & (step.head == 0))
    def _():
        for sums in (*dk_sums, *dv_sums):
            sums[...] = jnp.zeros_like(sums)

    @pl.when(step.exists)
    def _():
        # Scores are transposed, [keys, queries]: what belongs to a query is then a row, and one product of five, not
        # two, takes a transposed operand.
        q, dout = step.keep(q_ref[0]), step.keep(dout_ref[0])
        asking = step.asking(q, masked)
        lse = lse_ref[0, 0, 0, pl.ds(step.head, 1)]
        products = step.keep(dout_ref[0].astype(jnp.float32) * out_ref[0].astype(jnp.float32))
        ones = jnp.ones((8, LANES), jnp.float32)
        delta = _dot(ones, products, (1, 1), precision=jax.lax.Precision.HIGHEST)[:1]

        def body(rows, refs, dq):
            k_ref, v_ref, dk_sum, dv_sum, *mask = refs
            k, v = step.keys(k_ref, rows, *mask), step.chunk(v_ref, rows)
            weights = jnp.exp(_dot(k, asking, (1, 1)) * step.scale - lse)
            dv_sum[rows] += _dot(weights.astype(v.dtype), dout, (1, 0))
            dscores = (weights * (_dot(v, dout, (1, 1)) - delta)).astype(k.dtype)
            dk_sum[rows] += _dot(dscores, q, (1, 0))
            return dq + _dot(dscores, k, (0, 0))

        dq = step.loop(body, jnp.zeros(q.shape, jnp.float32), k_refs, v_refs, dk_sums, dv_sums, *masks)
        step.put(dq_ref, dq * step.scale)

    @pl.when((pl.program_id(2) == pl.num_programs(2) - 1) & (step.head == pl.num_programs(3) - 1))
    def _():
        for dk_ref, dv_ref, dk_sum, dv_sum in zip(dk_refs, dv_refs, dk_sums, dv_sums, strict=True):
            dk_ref[0] = (dk_sum[...] * step.scale).astype(dk_ref.dtype)
            dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


def _call(
    kernel: Callable,
    products: int,
    outputs: str,
    heads: int,
    parts: int,
    masked: bool,
    interpret: bool,
    scale: float | None,
    *arrays: Array,
) -> list[Array]:
    """Runs a kernel on the images this device holds, whose keys are of so many sequences (`parts`).

    `arrays` are q, k, v, perhaps what is added to scores (`masked`) and, going backward, out, lse and dout; `outputs`
    names the array that each output is shaped like ("l" for lse, "k" for one a sequence), `products` counts the matrix
    products of T x S x C.
    """
    inputs = "qkk" + "m" * masked + "qlq" * (kernel is _backward_kernel)
    q, keys, *_ = _grouped(arrays, inputs, parts)
    images, queries, channels = q.shape
    dim = channels // heads
    rows, groups, sharing = _rows(queries, QUERY_ROWS), pl.cdiv(channels, LANES), LANES // dim
    blocks = pl.cdiv(queries, rows)
    specs = {
        "q": [pl.BlockSpec((1, rows, LANES), lambda n, g, t, h: (n, t, g))],
        "k": [pl.BlockSpec((1, k.shape[1], LANES), lambda n, g, t, h: (n, 0, g)) for k in keys],
        "m": [pl.BlockSpec((1, k.shape[1], 1), lambda n, g, t, h: (n, 0, 0)) for k in keys],
        "l": [pl.BlockSpec((1, 1, 1, sharing, rows), lambda n, g, t, h: (n, g, t, 0, 0))],
    }
    shapes = {
        "q": [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        "k": [jax.ShapeDtypeStruct(k.shape, k.dtype) for k in keys],
        "l": [jax.ShapeDtypeStruct((images, groups, blocks, sharing, rows), jnp.float32)],
    }
    scores = computed(queries) * sum(k.shape[1] for k in keys)
    step = {"queries": queries, "rows": rows, "channels": channels, "dim": dim, "scale": scale or dim**-0.5}
    out_shape = [shape for name in outputs for shape in shapes[name]]
    return pl.pallas_call(
        functools.partial(kernel, parts=parts, masked=masked, **step),
        grid=(images, groups, blocks, sharing),
        in_specs=[spec for name in inputs for spec in specs[name]],
        out_specs=[spec for name in outputs for spec in specs[name]],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((k.shape[1], LANES), jnp.float32) for k in keys] * outputs.count("k"),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * images * scores * channels,
            transcendentals=images * heads * scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *out_shape)),
        ),
        interpret=interpret,
    )(*arrays)


def _sharded(call: Callable, *arrays: Array) -> list[Array]:
    """Splits a call over the mesh by its images."""
    return on_shards(call, [("images",) + (None,) * (x.ndim - 1) for x in arrays], *arrays)


Keys = Array | tuple[Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def full_attention(
    q: Array,
    k: Keys,
    v: Keys,
    heads: int,
    interpret: bool = False,
    scale: float | None = None,
    mask: Keys | None = None,
) -> Array:
    """Softmax attention of every query to every key, the softmax in float32, on TPU.

    Args:
      q: f[N, T, C] queries, their heads side by side in C.
      k: f[N, S, C] keys; a tuple is attended to as if joined, and never is.
      v: f[N, S, C] values, likewise.
      heads: number of heads, of 64 or 128 channels each; see `supported` for the keys.
      interpret: emulates the kernel on any platform.
      scale: of the scores, None for that of the heads' width.
      mask: bool[N, S] keys that are there, likewise, for heads of 64; from the scores of others 10000 is taken.

    Returns:
      f[N, T, C] in the type of `q`.
    """
    return _forward(q, k, v, heads, interpret, scale, mask)[0]


def _forward(q, k, v, heads, interpret, scale, mask):
    keys, values, masks = map(jax.tree.leaves, (k, v, mask))
    away = -1e4 / (scale or (q.shape[-1] // heads) ** -0.5)
    masks = [jnp.where(here, 0.0, away)[..., None] for here in masks]
    call = functools.partial(_call, _forward_kernel, 2, "ql", heads, len(keys), bool(masks), interpret, scale)
    out, lse = (keep(x, "attention") for x in _sharded(call, q, *keys, *values, *masks))
    return out, (q, k, v, masks, out, lse)


def _backward(heads, interpret, scale, saved, dout):
    leaves, structure = jax.tree.flatten(saved[:3])
    masks, *rest = saved[3:]
    parts = len(leaves) // 2
    call = functools.partial(_call, _backward_kernel, 5, "qkk", heads, parts, bool(masks), interpret, scale)
    return *jax.tree.unflatten(structure, _sharded(call, *leaves, *masks, *rest, dout)), None


full_attention.defvjp(_forward, _backward)
