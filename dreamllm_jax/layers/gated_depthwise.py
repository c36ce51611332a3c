"""The middle of SANA's feed-forward: SiLU, a 3x3 convolution of each channel by itself, and one half gating the other.

XLA writes every shifted copy of it to memory, in float32; on TPU it is one kernel that reads the two halves and writes
their product, and one backward that reads them again. What is between them lives in fast memory, float32.

Lines of an image lie one after the other. Those above and below are whole registers away; a neighbour to the left or
right is a rotation by one, of the sum over three lines, from which the ends of lines are left out.

Legend: N images, h, w their lines and columns, T = h x w positions, I channels, R positions in a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dreamllm_jax.parallel.collectives import on_shards

Array = jax.Array

LANES = 128
ROWS = 16  # of `taps`: nine, the bias after them and that before, and zeros up to whole registers
_AFTER, _BEFORE = 9, 10
_BLOCK, _CHUNK = 2048, 64  # positions
MAX_POSITIONS = 4096
_VMEM_BYTES = 32 * 2**20


def stack_taps(before: Array, kernel: Array, bias: Array) -> Array:
    """A bias f[2I] and a depthwise convolution's weights, f[3,3,1,2I] and f[2I], for both halves apart: f32[2,16,I]."""
    rows = jnp.concatenate([kernel.reshape(9, -1), bias[None], before[None]]).astype(jnp.float32)
    rows = jnp.pad(rows, ((0, ROWS - len(rows)), (0, 0)))
    return jnp.stack(jnp.split(rows, 2, axis=-1))


def gated_depthwise_xla(values: Array, gates: Array, taps: Array, size: tuple[int, int]) -> Array:
    """As `gated_depthwise`, on any device."""

    def convolve(x: Array, rows: Array) -> Array:
        x = jax.nn.silu(x.astype(jnp.float32) + rows[_BEFORE]).reshape(len(x), *size, -1)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        places = [(i, j) for i in range(3) for j in range(3)]
        shifted = (x[:, i : i + size[0], j : j + size[1]] for i, j in places)
        return sum(part * tap for part, tap in zip(shifted, rows, strict=False)) + rows[_AFTER]

    y = convolve(values, taps[0]) * jax.nn.silu(convolve(gates, taps[1]))
    return y.astype(values.dtype).reshape(values.shape)


def supported(x: Array, size: tuple[int, int]) -> bool:
    """Whether `gated_depthwise` takes halves of this shape, f[N,T,I]."""
    return x.dtype == jnp.bfloat16 and size[1] % 8 == 0 and _lines(size) is not None and x.shape[1] <= MAX_POSITIONS


def _lines(size: tuple[int, int]) -> int | None:
    """Lines of a chunk: whole registers of two bytes, no more than are kept in registers if that can be."""
    fitting = [lines for lines in range(1, size[0] + 1) if size[0] % lines == 0 and lines * size[1] % 16 == 0]
    small = [lines for lines in fitting if lines * size[1] <= _CHUNK]
    return max(small) if small else min(fitting, default=None)


class _Image:
    """Loops over the chunks of one image of a block."""

    def __init__(self, size: tuple[int, int], taps_ref):
        self.width = size[1]
        self.rows = _lines(size) * self.width
        self.chunks = math.prod(size) // self.rows
        column = jax.lax.broadcasted_iota(jnp.int32, (self.rows, LANES), 0) % self.width
        self.has_left, self.has_right = column > 0, column < self.width - 1
        self.taps = [[taps_ref[half, row : row + 1] for row in range(_BEFORE + 1)] for half in range(2)]

    def each(self, body) -> None:
        jax.lax.fori_loop(0, self.chunks, lambda i, _: body(pl.multiple_of(i * self.rows, 16)), None)

    def given(self, ref, n: Array, half: int, start: Array) -> Array:
        """A chunk of what comes in."""
        return ref[n, pl.ds(start, self.rows)].astype(jnp.float32) + self.taps[half][_BEFORE]

    def lines(self, ref, half: int, start: Array) -> list[Array]:
        """A chunk of a margined image: the lines above its, its own, and those below."""
        return [ref[half, pl.ds(pl.multiple_of(start + i * self.width, 8), self.rows)] for i in range(3)]

    def put(self, ref, half: int, start: Array, x: Array) -> None:
        """Writes a chunk of a margined image."""
        ref[half, pl.ds(pl.multiple_of(start + self.width, 8), self.rows)] = x

    def activate(self, refs, n: Array, inside) -> None:
        """Fills a margined image with what comes in, activated."""

        def chunk(start):
            for half, ref in enumerate(refs):
                self.put(inside, half, start, jax.nn.silu(self.given(ref, n, half, start)))

        self.each(chunk)

    def from_left(self, x: Array) -> Array:
        return jnp.where(self.has_left, pltpu.roll(x, 1, 0), 0.0)

    def from_right(self, x: Array) -> Array:
        return jnp.where(self.has_right, pltpu.roll(x, self.rows - 1, 0), 0.0)

    def column(self, half: int, lines: list[Array], j: int) -> Array:
        """Lines times a column of taps."""
        return sum(line * self.taps[half][3 * i + j] for i, line in enumerate(lines))

    def convolved(self, ref, half: int, start: Array) -> Array:
        lines = self.lines(ref, half, start)
        left, middle, right = (self.column(half, lines, j) for j in range(3))
        return self.from_left(left) + middle + self.from_right(right) + self.taps[half][_AFTER]

    def clear_margins(self, ref) -> None:
        margin = jnp.zeros((2, self.width, LANES), jnp.float32)
        ref[:, : self.width] = margin
        ref[:, pl.ds(self.width + self.rows * self.chunks, self.width)] = margin


def _forward_kernel(values_ref, gates_ref, taps_ref, out_ref, inside, *, size):
    image = _Image(size, taps_ref)
    image.clear_margins(inside)

    def one(n, _):
        def gate(start):
            values, gates = (image.convolved(inside, half, start) for half in range(2))
            out_ref[n, pl.ds(start, image.rows)] = (values * jax.nn.silu(gates)).astype(out_ref.dtype)

        image.activate((values_ref, gates_ref), n, inside)
        image.each(gate)

    jax.lax.fori_loop(0, values_ref.shape[0], one, None)


def _backward_kernel(
    values_ref, gates_ref, taps_ref, dout_ref, dvalues_ref, dgates_ref, dtaps_ref, inside, outside, sums, *, size
):
    image = _Image(size, taps_ref)
    image.clear_margins(inside)
    image.clear_margins(outside)

    @pl.when(pl.program_id(1) == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    def add(half: int, row: int, x: Array) -> None:
        sums[half, row] += jnp.sum(x.reshape(-1, 8, LANES), axis=0)

    def one(n, _):
        def ungate(start):
            values, gates = (image.convolved(inside, half, start) for half in range(2))
            dout = dout_ref[n, pl.ds(start, image.rows)].astype(jnp.float32)
            open_ = jax.nn.sigmoid(gates)
            gradients = dout * gates * open_, dout * values * open_ * (1 + gates * (1 - open_))
            for half, gradient in enumerate(gradients):
                image.put(outside, half, start, gradient)
                add(half, _AFTER, gradient)

        def back(start):
            for half, (ref, to) in enumerate(((values_ref, dvalues_ref), (gates_ref, dgates_ref))):
                # What is in a line was read by the line below through the upper taps, and so on.
                lines = image.lines(outside, half, start)[::-1]
                left, middle, right = (image.column(half, lines, j) for j in range(3))
                gradient = image.from_right(left) + middle + image.from_left(right)
                x = image.given(ref, n, half, start)
                open_ = jax.nn.sigmoid(x)
                dx = gradient * open_ * (1 + x * (1 - open_))
                to[n, pl.ds(start, image.rows)] = dx.astype(to.dtype)
                add(half, _BEFORE, dx)
                here = x * open_
                for j, shifted in enumerate((image.from_left(here), here, image.from_right(here))):
                    for i, line in enumerate(lines):
                        add(half, 3 * i + j, line * shifted)

        image.activate((values_ref, gates_ref), n, inside)
        image.each(ungate)
        image.each(back)

    jax.lax.fori_loop(0, values_ref.shape[0], one, None)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        dtaps_ref[...] = jnp.zeros_like(dtaps_ref)
        for half in range(2):
            for row in range(_BEFORE + 1):
                dtaps_ref[0, half, row : row + 1] = jnp.sum(sums[half, row], axis=0, keepdims=True)


def _call(size: tuple[int, int], interpret: bool, values: Array, gates: Array, taps: Array, *dout: Array):
    """The forward kernel or, with `dout`, the backward one, on the images that this device holds."""
    images, positions, channels = values.shape
    together = max(n for n in range(1, images + 1) if images % n == 0 and n * positions <= max(_BLOCK, positions))
    of_image = pl.BlockSpec((together, positions, LANES), lambda g, n: (n, 0, g))
    of_taps = pl.BlockSpec((2, ROWS, LANES), lambda g, n: (0, 0, g))
    of_sums = pl.BlockSpec((1, 2, ROWS, LANES), lambda g, n: (0, 0, 0, g))
    half = jax.ShapeDtypeStruct(values.shape, values.dtype)
    margined = pltpu.VMEM((2, positions + 2 * size[1], LANES), jnp.float32)
    if dout:
        kernel, scratch = _backward_kernel, [margined, margined, pltpu.VMEM((2, _BEFORE + 1, 8, LANES), jnp.float32)]
        out_specs, out_shape = (
            [of_image, of_image, of_sums],
            [half, half, jax.ShapeDtypeStruct((1, *taps.shape), jnp.float32)],
        )
    else:
        kernel, scratch, out_specs, out_shape = _forward_kernel, [margined], of_image, half
    count = len(jax.tree.leaves(out_shape)) + 2 + len(dout)
    return pl.pallas_call(
        functools.partial(kernel, size=size),
        grid=(pl.cdiv(channels, LANES), images // together),
        in_specs=[of_image, of_image, of_taps, *[of_image] * len(dout)],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=(6 if dout else 2) * 18 * values.size,
            transcendentals=(6 if dout else 3) * values.size,
            bytes_accessed=count * values.size * values.dtype.itemsize,
        ),
        interpret=interpret,
    )(values, gates, taps, *dout)


_IMAGES, _TAPS = ("images", None, None), (None, None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gated_depthwise(values: Array, gates: Array, taps: Array, size: tuple[int, int], interpret: bool = False) -> Array:
    """conv(silu(values)) * silu(conv(silu(gates))), biases before and after; every channel is convolved by itself, zero
    padded by one; float32 inside, on TPU.

    Args:
      values, gates: f[N,T,I], see `supported`.
      taps: f32[2,16,I] of `stack_taps`.
      size: lines and columns of an image.
      interpret: emulates the kernel on any platform.

    Returns:
      f[N,T,I] in the type of `values`.
    """
    return _forward(values, gates, taps, size, interpret)[0]


def _forward(values, gates, taps, size, interpret):
    call = functools.partial(_call, size, interpret)
    return on_shards(call, (_IMAGES, _IMAGES, _TAPS), values, gates, taps), (values, gates, taps)


def _backward(size, interpret, saved, dout):
    axes = _IMAGES, _IMAGES, _TAPS, _IMAGES
    dvalues, dgates, dtaps = on_shards(functools.partial(_call, size, interpret), axes, *saved, dout)
    return dvalues, dgates, dtaps.sum(axis=0)


gated_depthwise.defvjp(_forward, _backward)
