"""Decoding pictures of any size in bounded memory: overlapping tiles, blended where they meet."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def decode_tiled(
    decode: Callable[[jax.Array], jax.Array], latents: jax.Array, downscale: int, tile: int = 512, stride: int = 448
) -> jax.Array:
    """Decodes tile by tile, as `tiled_decode` of diffusers' autoencoders does.

    Tiles at the right and the bottom are smaller. `decode` is called once a tile: where it is compiled, once for each
    of the few shapes.

    Args:
      decode: unscaled latents f[N,h,w,c] -> images f[N,H,W,3].
      latents: those of the whole pictures, f[N,h,w,c].
      downscale: pixels along one side of the square that a latent stands for.
      tile, stride: side of a tile and distance between two, in pixels; what they overlap by is blended linearly.

    Returns:
      f[N,H,W,3].

    Raises:
      ValueError: if tile or stride is no multiple of `downscale`, or the stride is larger than the tile.
    """
    if tile % downscale or stride % downscale or not 0 < stride <= tile:
        raise ValueError(f"tile={tile}, stride={stride}: must be multiples of {downscale}, stride at most tile")
    height, width = latents.shape[1:3]
    side, step, overlap = tile // downscale, stride // downscale, tile - stride
    if max(height, width) <= side:
        return decode(latents)
    above: list[jax.Array] = []
    rows = []
    for top in range(0, height, step):
        row: list[jax.Array] = []
        for left in range(0, width, step):
            picture = decode(latents[:, top : top + side, left : left + side])
            if above:
                picture = _blend(above[len(row)], picture, overlap, axis=1)
            if row:
                picture = _blend(row[-1], picture, overlap, axis=2)
            row.append(picture)
        rows.append(jnp.concatenate([picture[:, :stride, :stride] for picture in row], axis=2))
        above = row
    return jnp.concatenate(rows, axis=1)


def _blend(before: jax.Array, after: jax.Array, overlap: int, axis: int) -> jax.Array:
    """`after`, whose beginning along an axis goes over from the end of `before`."""
    overlap = min(before.shape[axis], after.shape[axis], overlap)
    share = (jnp.arange(overlap) / max(overlap, 1)).reshape([-1 if i == axis else 1 for i in range(after.ndim)])
    end = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, before.shape[axis], axis=axis)
    beginning, rest = jnp.split(after, [overlap], axis)
    return jnp.concatenate([end * (1 - share) + beginning * share, rest], axis)
