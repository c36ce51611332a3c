"""Next-token cross-entropy, in pieces of the vocabulary's product.

Legend: B rows, L tokens in a row, E language model's width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamllm_jax.parallel import chunks
from dreamllm_jax.parallel.mesh import constrain, shards, split_over


def next_token_nll(
    hidden: Float[Array, "B L E"], head: Float[Array, "E V"], targets: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """-log p(targets) given the hidden states, in float32."""
    logits = jnp.einsum("ble,ev->blv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    # A sum, not a gather: its gradient is an elementwise operation.
    chosen = jnp.arange(head.shape[1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def next_token_loss(
    hidden: Float[Array, "B L E"],
    head: Float[Array, "E V"],
    tokens: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    chunk: int = 0,
) -> Float[Array, ""]:
    """Sum over tokens of weight · -log p(token given the hidden state before it).

    In chunks, no logits of all tokens ever exist, and none of chunks whose tokens have no weight.

    Args:
      weights: of predicting `tokens[:, i]`; those of a row's first token count for nothing.
      chunk: at most how many tokens of each row (of each device's part of it) are computed at a time; 0 for all.
    """

    def total(head, items):
        hidden, targets, weights = items
        nll = next_token_nll(hidden, head, targets)
        return jnp.sum(jnp.where(weights > 0, nll * weights, 0.0))

    parts = shards("tokens", tokens.shape[1])

    def by_part(x):  # [B, L, ...] -> [B · parts, L / parts, ...]: what one device holds of a row stays there
        x = x.reshape(-1, x.shape[1] // parts, *x.shape[2:])
        return constrain(x, ("row_parts", *[None] * (x.ndim - 1)))

    weights = jnp.roll(weights, -1, axis=1).at[:, -1].set(0.0)  # nothing precedes a row's first token
    items = jax.tree.map(by_part, (hidden, jnp.roll(tokens, -1, axis=1), weights))
    number = chunks.count(tokens.shape[1] // parts, chunk)
    over = split_over("row_parts", tokens.shape[0] * parts)
    return chunks.chunked_sum(
        total, head.astype(hidden.dtype), items, items[-1] > 0, number, axes=("embed", "vocab"), over=over
    )
