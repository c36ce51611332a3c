"""The keys and values of what rows have read, so that what they read next need not read them again.

The layers only read it; what they make of a call's tokens is written once, after the last of them: where each layer
wrote its own, XLA laid the whole stack out anew for every layer.

Legend: N layers, B rows, T tokens of this call, S entries, K key heads, D head dimension.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from dreamllm_jax.parallel.collectives import on_shards
from dreamllm_jax.parallel.mesh import constrain

Array = jax.Array

_STACK = ("layers", "rows", "kv_heads", None, None)
_LAYOUT = Layout(major_to_minor=tuple(range(len(_STACK))))  # the one that attention reads
_NEW = ("layers", "rows", None, "kv_heads", None)


@struct.dataclass
class KVCache:
    """Keys and values of what each row has read; rows fill at their own pace, without gaps.

    Attributes:
      k: f[N, B, K, S, D] rotated keys; entries stand beside the head dimension, for a chip may hold one head alone.
      v: f[N, B, K, S, D] values.
      segment_ids: i32[B, S] segment of each entry, 0 where empty.
      length: i32[B] filled entries of each row.
    """

    k: Array
    v: Array
    segment_ids: Array
    length: Array

    @classmethod
    def create(
        cls, layers: int, heads: int, head_dim: int, rows: int, length: int, dtype: Any = jnp.float32
    ) -> "KVCache":
        """An empty one for so many rows of at most `length` tokens."""
        shape = (layers, rows, heads, length, head_dim)
        return cls(
            k=constrain(jnp.zeros(shape, dtype), _STACK),
            v=constrain(jnp.zeros(shape, dtype), _STACK),
            segment_ids=jnp.zeros((rows, length), jnp.int32),
            length=jnp.zeros((rows,), jnp.int32),
        )

    def rows(self, index: Array) -> "KVCache":
        """The caches of rows `index` i32[R], which may repeat."""
        return KVCache(self.k[:, index], self.v[:, index], self.segment_ids[index], self.length[index])

    def index(self, tokens: int) -> Array:
        """i32[B, T] entries that so many tokens take."""
        return self.length[:, None] + jnp.arange(tokens)

    def layer(self, layer: Array, dtype: Any) -> tuple[Array, Array]:
        """A layer's keys and values f[B, S, K, D]."""
        return tuple(stack[layer].swapaxes(1, 2).astype(dtype) for stack in (self.k, self.v))

    def extended(self, k: Array, v: Array, segment_ids: Array) -> "KVCache":
        """The cache with a call's tokens behind what each row has read; what does not fit is dropped.

        Args:
          k, v: f[N, B, T, K, D] of all layers.
          segment_ids: i32[B, T]; a row's tokens stand first, its padding (segment 0) after them.
        """
        valid, size = segment_ids != 0, self.segment_ids.shape[1]
        slots = jnp.where(valid, self.index(segment_ids.shape[1]), size)  # past the end: padding is dropped
        rows = jnp.arange(len(slots))[:, None]
        k, v = k.astype(self.k.dtype), v.astype(self.v.dtype)
        if segment_ids.shape[1] == 1:
            axes = (_STACK, _STACK, _NEW, _NEW, ("rows",))
            stacks = on_shards(_put_one, axes, self.k, self.v, k, v, slots[:, 0])
        else:
            new = (jnp.moveaxis(x, 0, 2) for x in (k, v))
            stacks = (
                stack.at[:, rows, :, slots].set(x, mode="drop") for stack, x in zip((self.k, self.v), new, strict=True)
            )
        return KVCache(
            *stacks,
            segment_ids=self.segment_ids.at[rows, slots].set(segment_ids, mode="drop"),
            length=self.length + valid.sum(axis=1, dtype=jnp.int32),
        )


def _put_one(k: Array, v: Array, new_k: Array, new_v: Array, slots: Array) -> tuple[Array, Array]:
    """Writes each row's token in its slot, in place: a scatter is laid out by itself, and the stacks then copied.

    Args:
      k, v: f[N, B, K, S, D]; `new_k`, `new_v` f[N, B, 1, K, D].
      slots: i32[B]; S where there is none.
    """
    size = k.shape[3]

    def put(row: Array, stacks: tuple[Array, Array]) -> list[Array]:
        there, written = (0, row, 0, jnp.minimum(slots[row], size - 1), 0), []
        for stack, new in zip(stacks, (new_k, new_v), strict=True):
            new = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=1).swapaxes(2, 3)
            old = jax.lax.dynamic_slice(stack, there, new.shape)
            stack = jax.lax.dynamic_update_slice(stack, jnp.where(slots[row] < size, new, old), there)
            written.append(with_layout_constraint(stack, _LAYOUT))
        return tuple(written)

    return jax.lax.fori_loop(0, len(slots), put, (k, v))
