"""Linear attention with ReLU weights (SANA, arXiv 2410.10629; Katharopoulos et al. 2006.16236), of heads side by side.

A query's weight for a key is relu(q) · relu(k), so the sum over keys of k vᵀ serves all queries. Heads are narrower
than a TPU's registers, and by themselves would be padded four times over. The kernel takes 128 channels, several heads,
as the projections leave them, and strikes out what one head would have of another: a product of 128 x 128 takes a
matrix unit as long as one of 32 x 32.

Legend: N images, T positions, E channels of all heads, H heads, D channels of one.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dreamllm_jax.parallel.collectives import on_shards

Array = jax.Array

LANES = 128
_BLOCK = 2048  # positions
MAX_POSITIONS = 4096
_VMEM_BYTES = 32 * 2**20
_SMALLEST = 1e-15  # added to a query's sum of weights


def linear_attention_xla(q: Array, k: Array, v: Array, heads: int) -> Array:
    """As `linear_attention`, on any device."""
    shape, dtype = q.shape, q.dtype
    q, k, v = (x.astype(jnp.float32).reshape(*shape[:2], heads, -1) for x in (nn.relu(q), nn.relu(k), v))
    sums = jnp.einsum("nthd,nthe->nhde", k, v)
    out = jnp.einsum("nthd,nhde->nthe", q, sums)
    total = jnp.einsum("nthd,nhd->nth", q, jnp.sum(k, axis=1))
    return (out / (total[..., None] + _SMALLEST)).astype(dtype).reshape(shape)


def same_head(channels: int, head_dim: int) -> Array:
    """bool[c,c]: whether two channels are of the same head."""
    head = jnp.arange(channels) // head_dim
    return head[:, None] == head


def linear_attention_wide(q: Array, k: Array, v: Array, heads: int) -> Array:
    """As `linear_attention`, of any number of positions, by XLA alone; products are of the type of `q`.

    Heads are narrow against a matrix unit: one product of all channels with all, of which the heads' blocks are kept,
    costs less there than many small ones while the heads are few, and channels stay where they lie.
    """
    q, k = nn.relu(q), nn.relu(k)
    same = same_head(q.shape[-1], q.shape[-1] // heads)
    values = jnp.where(same, jnp.einsum("nti,ntj->nij", k, v, preferred_element_type=jnp.float32), 0)
    ones = jnp.where(same, jnp.sum(k, axis=1, dtype=jnp.float32)[:, :, None], 0)

    def weigh(sums: Array) -> Array:
        return jnp.einsum("nti,nij->ntj", q, sums.astype(q.dtype), preferred_element_type=jnp.float32)

    return (weigh(values) / (weigh(ones) + _SMALLEST)).astype(q.dtype)


def supported(q: Array, heads: int) -> bool:
    """Whether `linear_attention` takes queries of this shape, f[N,T,E]."""
    dim = q.shape[-1] // heads
    return q.dtype == jnp.bfloat16 and LANES % dim == 0 and q.shape[1] % 16 == 0 and q.shape[1] <= MAX_POSITIONS


def kernel_flops(images: int, positions: int, channels: int) -> tuple[float, float]:
    """What the kernels execute, forward and backward."""
    product = 2.0 * images * positions * pl.cdiv(channels, LANES) * LANES**2
    return 6 * product, 16 * product


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _exact(x: Array, sums: Array, contract: tuple[int, int]) -> Array:
    """A product with float32 sums, in two parts where a single one would round them to two bytes."""
    if x.dtype == jnp.float32:
        return _dot(x, sums, contract)
    high = sums.astype(x.dtype)
    return _dot(x, high, contract) + _dot(x, (sums - high.astype(jnp.float32)).astype(x.dtype), contract)


class _Block:
    """Several heads: which lanes are there, and which pairs of them are of one head."""

    def __init__(self, channels: int, dim: int):
        def lanes(axis: int) -> Array:
            return jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis)

        self.same = lanes(0) // dim == lanes(1) // dim
        left = channels - pl.program_id(0) * LANES
        self.inside = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) < left
        self.partial = channels % LANES != 0

    def read(self, ref, n: Array) -> Array:
        """An image; lanes beyond the last channel hold anything, even NaN, and become zero."""
        x = ref[n]
        return jnp.where(self.inside, x, jnp.zeros_like(x)) if self.partial else x

    def own(self, x: Array) -> Array:
        """f[128,128] without what is between different heads."""
        return jnp.where(self.same, x, 0.0)

    def attended(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array, Array]:
        """Sums of k vᵀ, of k (in every lane of its head), what queries make of the first, and of the second."""
        sums = self.own(_dot(k, v, (0, 0)))
        weights = self.own(_dot(k, jnp.ones_like(v), (0, 0)))
        return sums, weights, _exact(q, sums, (1, 0)), _exact(q, weights, (1, 0)) + _SMALLEST


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, channels: int, dim: int):
    block = _Block(channels, dim)

    def one(n, _):
        q, k, v = (block.read(ref, n) for ref in (q_ref, k_ref, v_ref))
        _, _, out, total = block.attended(nn.relu(q), nn.relu(k), v)
        out_ref[n] = (out / total).astype(out_ref.dtype)

    jax.lax.fori_loop(0, q_ref.shape[0], one, None)


def _backward_kernel(q_ref, k_ref, v_ref, dout_ref, dq_ref, dk_ref, dv_ref, *, channels: int, dim: int):
    block = _Block(channels, dim)

    def one(n, _):
        q, k, v, dout = (block.read(ref, n) for ref in (q_ref, k_ref, v_ref, dout_ref))
        q, k = nn.relu(q), nn.relu(k)
        sums, weights, out, total = block.attended(q, k, v)
        scaled = dout.astype(jnp.float32) / total
        dtotal = (-scaled * out / total).astype(q.dtype)  # one summand for each lane of the head
        scaled = scaled.astype(q.dtype)
        dq = _exact(scaled, sums, (1, 1)) + _exact(dtotal, weights, (1, 1))
        dsums = block.own(_dot(q, scaled, (0, 0)))
        dweights = jnp.sum(block.own(_dot(dtotal, q, (0, 0))), axis=0, keepdims=True)
        dk = _exact(v, dsums, (1, 1)) + dweights
        dq_ref[n] = jnp.where(q > 0, dq, 0.0).astype(dq_ref.dtype)
        dk_ref[n] = jnp.where(k > 0, dk, 0.0).astype(dk_ref.dtype)
        dv_ref[n] = _exact(k, dsums, (1, 0)).astype(dv_ref.dtype)

    jax.lax.fori_loop(0, q_ref.shape[0], one, None)


def _call(kernel, outputs: int, heads: int, interpret: bool, *arrays: Array) -> list[Array]:
    """Runs a kernel on the images that this device holds."""
    images, positions, channels = arrays[0].shape
    together = max(n for n in range(1, images + 1) if images % n == 0 and n * positions <= max(_BLOCK, positions))
    spec = pl.BlockSpec((together, positions, LANES), lambda g, n: (n, 0, g))
    return pl.pallas_call(
        functools.partial(kernel, channels=channels, dim=channels // heads),
        grid=(pl.cdiv(channels, LANES), images // together),
        in_specs=[spec] * len(arrays),
        out_specs=[spec] * outputs,
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(kernel_flops(*arrays[0].shape)[kernel is _backward_kernel]),
            transcendentals=0,
            bytes_accessed=(len(arrays) + outputs) * arrays[0].size * arrays[0].dtype.itemsize,
        ),
        interpret=interpret,
    )(*arrays)


def _sharded(kernel, outputs: int, heads: int, interpret: bool, *arrays: Array) -> list[Array]:
    call = functools.partial(_call, kernel, outputs, heads, interpret)
    return on_shards(call, [("images", None, None)] * len(arrays), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_attention(q: Array, k: Array, v: Array, heads: int, interpret: bool = False) -> Array:
    """Attention with weights relu(q) · relu(k), normalised over the keys, its sums in float32, on TPU.

    Args:
      q, k, v: f[N,T,E], heads side by side; see `supported`.
      interpret: emulates the kernel on any platform.

    Returns:
      f[N,T,E] in the type of `q`.
    """
    return _forward(q, k, v, heads, interpret)[0]


def _forward(q, k, v, heads, interpret):
    return _sharded(_forward_kernel, 1, heads, interpret, q, k, v)[0], (q, k, v)


def _backward(heads, interpret, saved, dout):
    return tuple(_sharded(_backward_kernel, 3, heads, interpret, *saved, dout))


linear_attention.defvjp(_forward, _backward)
