"""The image towers over all images of a batch: a few at a time on each device, which has a copy of their weights.

Legend: B rows, L tokens in a row, S slots of a group, N images, P patches, Q dream queries, E language model's
width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dreamllm_jax.data.batch import Batch, Slots
from dreamllm_jax.layers.weights import cast_early
from dreamllm_jax.model import DreamLLM, abstract_params, axes_of
from dreamllm_jax.parallel import chunks
from dreamllm_jax.parallel.collectives import copied, on_devices
from dreamllm_jax.parallel.mesh import constrain, shards, split_over
from dreamllm_jax.towers.condition import Condition


def hidden_states(
    model: DreamLLM, params: dict, batch: Batch, chunk: int = 0, drawn: Sequence[Float[Array, "B S Q E"]] = ()
) -> Float[Array, "B L E"]:
    """The language model's final hidden states for packed rows, images and queries spliced in.

    Args:
      chunk: at most how many images each device sees at a time; 0 for all.
      drawn: queries by group, where they are drawn anew.
    """
    joined = model.bind({"params": params})
    seen = [(see(model, params, slots, chunk), slots.at) for slots in batch.see]
    x = joined.embed(batch.tokens, seen, [slots.at for slots in batch.dream], drawn)
    return joined.decode(x, batch.positions, batch.segment_ids, seen=seen)[0]


def see(model: DreamLLM, params: dict, slots: Slots, chunk: int) -> Float[Array, "B S P E"]:
    """What the language model is given for a group of images."""

    def features(towers, images):
        return model.bind({"params": towers}).see(images, slots.stored)

    towers, weights = towers_of(model, params, "vision_encoder", "visual_projector")
    return each(features, towers, weights, slots, chunk, again=False)


def each(
    function: Callable[[dict, Array], Array], towers: dict, weights: dict, slots: Slots, chunk: int, again: bool = True
) -> Float[Array, "B S ..."]:
    """What `function(towers, images)` gives of each image of a group.

    Args:
      towers, weights: as from `towers_of`.
      chunk: at most how many images each device computes at a time; 0 for all.
      again: of several chunks, compute each again in the backward pass, and keep nothing of it until then.
    """
    images, over = slots.images, split_over("images", slots.at.size)
    towers = jax.tree.map(lambda x, axes: copied(x, axes, over), towers, axes_of(weights))
    types = jax.tree.map(lambda x: x.dtype, towers)
    items = _by_device(images)
    number = chunks.count(items.shape[1], chunk)
    function = jax.checkpoint(function) if again and number > 1 else function

    def on_device(towers, parts):
        # Their gradients are added up over the chunks: in float32.
        wide = jax.tree.map(lambda x: x[0].astype(jnp.float32), towers)

        def found(part):
            given = jax.tree.map(lambda x, dtype: x.astype(dtype), wide, types)
            return _regroup(function(given, flat(part)), len(part))

        return jax.lax.map(found, parts)

    results = chunks.join(on_devices(on_device, over, (0, 1), 1)(towers, chunks.split(items, number)))
    return results.reshape(*images.shape[:2], *results.shape[2:])


def painting_error(
    model: DreamLLM, params: dict, condition: Condition, slots: Slots, draws: Any, chunk: int
) -> Float[Array, ""]:
    """Sum of the image decoder's training errors over the filled slots of a group.

    Args:
      condition: of the slots' images, [B * S, ...].
      draws: the decoder's, [B, S, ...].
      chunk: at most how many images each device paints at a time; 0 for all.
    """

    def total(towers, items):
        condition, images, draws, filled = jax.tree.map(flat, items)
        joined = model.bind({"params": towers})
        decoder, features = joined.image_decoder, {}
        if read:
            seen = joined.see(images) if "visual_projector" in read else joined.vision_encoder(images)
            features = {"features": jax.lax.stop_gradient(seen)}
        error = decoder.error(condition, decoder.encode(images, draws, slots.stored, **features), draws)
        return jnp.sum(jnp.where(filled, error, 0.0))

    made_of = "" if slots.stored else model.config.image_decoder.encodes_features
    read = {"": (), "vision_encoder": ("vision_encoder",)}.get(made_of, ("vision_encoder", "visual_projector"))
    towers, weights = towers_of(model, params, "image_decoder", *read)
    filled: Bool[Array, "B S"] = slots.filled
    if slots.sizes is not None:
        condition = condition.with_sizes(flat(slots.sizes))
    condition = jax.tree.map(lambda x: x.reshape(*filled.shape, *x.shape[1:]), condition)
    items = jax.tree.map(_by_device, (condition, slots.images, draws, filled))
    number, over = chunks.count(items[-1].shape[1], chunk), split_over("images", filled.size)
    return chunks.chunked_sum(total, towers, items, items[-1], number, axes=axes_of(weights), over=over)


def towers_of(model: DreamLLM, params: dict, *names: str) -> tuple[dict, dict]:
    """The parameters of some towers, cast as they are used, and their `Weight`s."""
    trees = (params, abstract_params(model.config))  # a projector may have none
    params, weights = ({name: tree[name] for name in names if name in tree} for tree in trees)
    return cast_early(params, weights, model.config.dtype), weights


def flat(tree: Any) -> Any:
    """[a, b, ...] -> [a · b, ...] in every leaf."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _regroup(x: Array, groups: int) -> Array:
    return x.reshape(groups, -1, *x.shape[1:])


def _by_device(x: Array) -> Array:
    """Images [B, S, ...] -> [devices, images of each, ...]."""
    devices = shards("images", x.shape[0] * x.shape[1])
    return constrain(_regroup(flat(x), devices), ("images", *[None] * (x.ndim - 1)))
