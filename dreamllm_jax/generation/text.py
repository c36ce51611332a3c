"""Reading prompts and writing text with a key-value cache.

Legend: B rows, T prompt tokens, S cache entries, E llama width, V vocabulary, M new tokens.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dreamllm_jax.batch import Batch
from dreamllm_jax.models.dreamllm import DreamLLM
from dreamllm_jax.models.llama import KVCache


@struct.dataclass
class Reading:
    """What the rows have read so far, and the logits of their next tokens."""

    cache: KVCache
    logits: Float[Array, "B V"]

    @property
    def length(self) -> Int[Array, "B"]:
        return self.cache.length


def _advance(model: DreamLLM, params: dict, cache: KVCache, embeddings: Array, segment_ids: Array) -> tuple:
    """Feeds embeddings (padding, segment 0, on the right) after what the rows have read: hidden states and Reading."""
    positions = cache.length[:, None] + jnp.arange(segment_ids.shape[1])
    hidden, cache = model.apply({"params": params}, embeddings, positions, segment_ids, cache, method="decode")
    last = jnp.maximum(jnp.sum(segment_ids != 0, axis=1) - 1, 0)
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return hidden, Reading(cache, model.apply({"params": params}, final, method="logits")[:, 0])


@functools.partial(jax.jit, static_argnames=("model", "cache_length"))
def read_prompts(model: DreamLLM, params: dict, prompts: Batch, cache_length: int) -> Reading:
    """Reads prompts of any lengths, with images to see.

    Args:
      prompts: one document a row from position 0, padded on the right with segment 0.
      cache_length: room for prompt and continuation (S).
    """
    rows, see = prompts.see_slots.shape
    features = None
    if see:
        images = prompts.see_images.reshape(-1, *prompts.see_images.shape[2:])
        features = model.apply({"params": params}, images, method="see")
        features = features.reshape(rows, see, *features.shape[1:])
    dream_slots = prompts.dream_slots if prompts.dream_slots.shape[1] else None
    embeddings = model.apply(
        {"params": params}, prompts.tokens, features, prompts.see_slots, dream_slots, method="embed"
    )
    cache = KVCache.create(model.config.llama, rows, cache_length, jnp.dtype(model.config.dtype))
    return _advance(model, params, cache, embeddings, prompts.segment_ids)[1]


@functools.partial(jax.jit, static_argnames=("model", "max_tokens", "stop"), donate_argnames=("reading",))
def write(
    model: DreamLLM, params: dict, reading: Reading, max_tokens: int, stop: tuple[int, ...]
) -> tuple[Int[Array, "B M"], Int[Array, "B"], Reading]:
    """Greedy continuation of every row until a stop token, which is written and read too.

    Returns:
      Token ids (padded with the pad token), how many each row wrote, and what the rows have now read.
    """
    rows = reading.logits.shape[0]
    tokens = jnp.full((rows, max_tokens), model.config.special_tokens.pad, jnp.int32)
    stops = jnp.asarray(stop, jnp.int32)

    def unfinished(state):
        step, _, _, done, _ = state
        return (step < max_tokens) & ~jnp.all(done)

    def body(state):
        step, tokens, count, done, reading = state
        token = jnp.argmax(reading.logits, axis=-1).astype(jnp.int32)
        tokens = tokens.at[:, step].set(jnp.where(done, tokens[:, step], token))
        embeddings = model.apply({"params": params}, token[:, None], method="embed")
        _, advanced = _advance(model, params, reading.cache, embeddings, (~done)[:, None].astype(jnp.int32))
        logits = jnp.where(done[:, None], reading.logits, advanced.logits)
        reading = Reading(advanced.cache, logits)
        return step + 1, tokens, count + ~done, done | jnp.isin(token, stops), reading

    start = (0, tokens, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), reading)
    _, tokens, count, _, reading = jax.lax.while_loop(unfinished, body, start)
    return tokens, count, reading


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("reading",))
def read_image(model: DreamLLM, params: dict, reading: Reading, images: Array) -> Reading:
    """Every row reads an image, `<im_start> patches <im_end>`: u8[B, H, W, 3], resized and cropped for CLIP."""
    ids = model.config.special_tokens
    patches = model.config.clip.num_patches
    tokens = jnp.asarray([ids.im_start, *[ids.im_patch] * patches, ids.im_end], jnp.int32)
    tokens = jnp.broadcast_to(tokens, (images.shape[0], patches + 2))
    features = model.apply({"params": params}, images, method="see")[:, None]
    slots = jnp.ones((images.shape[0], 1), jnp.int32)
    embeddings = model.apply({"params": params}, tokens, features, slots, method="embed")
    return _advance(model, params, reading.cache, embeddings, jnp.ones_like(tokens))[1]


@functools.partial(jax.jit, static_argnames=("model", "announced"), donate_argnames=("reading",))
def read_queries(
    model: DreamLLM, params: dict, reading: Reading, announced: bool = False
) -> tuple[Float[Array, "B Q E"], Reading]:
    """Every row reads `<dream_start> queries <dream_end>`: the hidden states to paint an image from.

    Args:
      announced: the rows have read `<dream_start>` already.
    """
    ids, queries = model.config.special_tokens, model.config.num_queries
    start = 0 if announced else 1
    tokens = [ids.dream_start, *[ids.im_patch] * queries, ids.dream_end][1 - start :]
    tokens = jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (reading.logits.shape[0], len(tokens)))
    slots = jnp.full((tokens.shape[0], 1), start, jnp.int32)
    embeddings = model.apply({"params": params}, tokens, dream_slots=slots, method="embed")
    hidden, reading = _advance(model, params, reading.cache, embeddings, jnp.ones_like(tokens))
    return hidden[:, start : start + queries], reading
