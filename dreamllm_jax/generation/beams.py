"""Beam search: the continuation that is most probable as a whole, as far as a few beams see.

Legend: B rows, K beams, M new tokens, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamllm_jax.generation.text import Reading, read_tokens
from dreamllm_jax.models.dreamllm import DreamLLM
from dreamllm_jax.models.llama import KVCache
from dreamllm_jax.sharding import whole

_NEVER = -1e9


@functools.partial(jax.jit, static_argnames=("model", "beams", "max_tokens", "stop"))
def search(
    model: DreamLLM,
    params: dict,
    reading: Reading,
    beams: int,
    max_tokens: int,
    stop: tuple[int, ...],
    length_penalty: Float[Array, ""] | float = 1.0,
) -> tuple[Int[Array, "B M"], Int[Array, "B"], Float[Array, "B"]]:
    """The best of the continuations that `beams` beams find, as transformers' `generate(num_beams=...)` does.

    A row's search ends when its best unfinished beam, at its present length, scores no better than the worst of as many
    finished ones as there are beams.

    Args:
      stop: tokens that end a continuation, which includes them.
      length_penalty: scores are log-probabilities over length to this power.

    Returns:
      Token ids (padded with the pad token), how many each row wrote, and their scores.
    """
    rows, vocabulary = reading.logits.shape
    pad = model.config.special_tokens.pad
    stops = jnp.asarray(stop, jnp.int32)
    candidates = max(2, 1 + len(stop)) * beams
    first = jnp.arange(candidates) < beams  # only the best candidates may end, the others stand in for them

    def best(scores: Array, count: int, *others: Array) -> tuple[Array, ...]:
        top, index = jax.lax.top_k(scores, count)
        return top, *(jax.vmap(lambda one, at: one[at])(other, index) for other in others)

    def unfinished(state):
        step, *_, open_ = state
        return (step < max_tokens) & jnp.any(open_)

    def body(state):
        step, reading, tokens, scores, done_tokens, done_scores, done, open_ = state
        logs = jax.nn.log_softmax(reading.logits, axis=-1).reshape(rows, beams, vocabulary) + scores[:, :, None]
        found, index = jax.lax.top_k(logs.reshape(rows, -1), candidates)
        parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        grown = jax.vmap(lambda one, at: one[at])(tokens, parent).at[:, :, step].set(token)
        ended = jnp.isin(token, stops) | (step + 1 == max_tokens)

        scores, tokens, parent, token = best(found + ended * _NEVER, beams, grown, parent, token)

        length = (step + 1.0) ** length_penalty
        closed = ended & first
        final = found / length + ~closed * _NEVER + ~open_[:, None] * _NEVER
        done_scores, done_tokens, done = best(
            jnp.concatenate([done_scores, final], axis=1),
            beams,
            jnp.concatenate([done_tokens, grown], axis=1),
            jnp.concatenate([done, closed], axis=1),
        )
        worst = jnp.where(done, done_scores.min(axis=1, keepdims=True), _NEVER)
        open_ = open_ & jnp.any(scores[:, :1] / length > worst, axis=1)

        reading = _rows(reading, (jnp.arange(rows)[:, None] * beams + parent).reshape(-1))
        reading = read_tokens(model, params, reading, token.reshape(-1), jnp.repeat(open_, beams))
        return step + 1, reading, tokens, scores, done_tokens, done_scores, done, open_

    none = jnp.full((rows, beams, max_tokens), pad, jnp.int32)
    never = jnp.full((rows, beams), _NEVER, jnp.float32)
    # All beams begin alike: only the first counts.
    begin = never.at[:, 0].set(0.0)
    state = (
        0,
        _rows(reading, jnp.repeat(jnp.arange(rows), beams)),
        none,
        begin,
        none,
        never,
        jnp.zeros((rows, beams), bool),
        jnp.ones(rows, bool),
    )
    *_, tokens, scores, _, _ = jax.lax.while_loop(unfinished, body, state)
    tokens = tokens[:, 0]
    ends = jnp.isin(tokens, stops)
    count = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1) + 1, max_tokens)
    return whole((tokens, count, scores[:, 0]))


def _rows(reading: Reading, index: Int[Array, "R"]) -> Reading:
    """The readings of rows `index`, which may repeat."""
    cache = reading.cache
    return Reading(
        KVCache(cache.k[:, index], cache.v[:, index], cache.segment_ids[index], cache.length[index]),
        reading.logits[index],
        reading.seen[index],
    )
