"""Beam search: the continuation that is most probable as a whole, as far as a few beams see.

Legend: B rows, K beams, M new tokens, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamllm_jax.generation.text import Reading, read_tokens
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.parallel.collectives import replicate

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
) -> tuple[Int[Array, "B M"], Int[Array, " B"], Float[Array, " B"]]:
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
    stops = jnp.asarray(stop, jnp.int32)
    candidates = max(2, 1 + len(stop)) * beams
    may_end = jnp.arange(candidates) < beams  # only the best candidates, the others stand in for them

    def best(scores: Array, *others: Array) -> tuple[Array, ...]:
        scores, index = jax.lax.top_k(scores, beams)
        return scores, *(jax.vmap(lambda one, at: one[at])(other, index) for other in others)

    def unfinished(state):
        step, *_, open_ = state
        return (step < max_tokens) & jnp.any(open_)

    def body(state):
        step, reading, scores, tokens, done_scores, done_tokens, open_ = state
        logs = jax.nn.log_softmax(reading.logits, axis=-1).reshape(rows, beams, vocabulary) + scores[:, :, None]
        found, index = jax.lax.top_k(logs.reshape(rows, -1), candidates)
        parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        grown = jax.vmap(lambda one, at: one[at])(tokens, parent).at[:, :, step].set(token)
        ended = jnp.isin(token, stops) | (step + 1 == max_tokens)

        length = (step + 1.0) ** length_penalty
        closed = jnp.where(ended & may_end & open_[:, None], found / length, _NEVER)
        done_scores, done_tokens = best(
            jnp.concatenate([done_scores, closed], axis=1), jnp.concatenate([done_tokens, grown], axis=1)
        )
        scores, tokens, parent, token = best(jnp.where(ended, _NEVER, found), grown, parent, token)
        open_ = open_ & (scores[:, 0] / length > done_scores[:, -1])

        reading = _rows(reading, (jnp.arange(rows)[:, None] * beams + parent).reshape(-1))
        reading = read_tokens(model, params, reading, token.reshape(-1), jnp.repeat(open_, beams))
        return step + 1, reading, scores, tokens, done_scores, done_tokens, open_

    reading = _rows(reading, jnp.repeat(jnp.arange(rows), beams))
    none = jnp.full((rows, beams, max_tokens), model.config.special_tokens.pad, jnp.int32)
    never = jnp.full((rows, beams), _NEVER, jnp.float32)
    begun = never.at[:, 0].set(0.0)  # all beams begin alike: only the first counts
    state = 0, reading, begun, none, never, none, jnp.ones(rows, bool)
    *_, scores, tokens, _ = jax.lax.while_loop(unfinished, body, state)
    tokens = tokens[:, 0]
    ends = jnp.isin(tokens, stops)
    count = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1) + 1, max_tokens)
    return replicate((tokens, count, scores[:, 0]))


def _rows(reading: Reading, index: Int[Array, " R"]) -> Reading:
    """The readings of rows `index`, which may repeat."""
    parts = {name: getattr(reading, name) for name in ("logits", "seen", "recent", "position")}
    return reading.replace(cache=reading.cache.rows(index), **jax.tree.map(lambda x: x[index], parts))
