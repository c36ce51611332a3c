"""Sums in chunks: the same values and gradients as in one piece, and nothing computed for empty chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.objectives.next_token import next_token_loss
from dreamllm_jax.parallel import chunks

GROUPS, ITEMS, WIDTH = 3, 12, 5


def total(shared, items):
    x, filled = items
    return jnp.sum(jnp.where(filled, jnp.sum(jnp.tanh(x @ shared["w"]) ** 2, -1), 0.0)) * shared["scale"]


def inputs(fill):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(GROUPS, ITEMS, WIDTH)), jnp.float32)
    shared = {"w": jnp.asarray(rng.normal(size=(WIDTH, 4)), jnp.float32), "scale": jnp.float32(3)}
    return shared, x, jnp.asarray(rng.random((GROUPS, ITEMS)) < fill)


@pytest.mark.parametrize("number", [1, 3, 12])
@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
def test_a_sum_in_chunks_is_the_sum(number, fill):
    shared, x, filled = inputs(fill)

    def whole(shared, x):
        return 2 * total(shared, (x, filled))

    def parts(shared, x):
        return 2 * chunks.chunked_sum(total, shared, (x, filled), filled, number)

    want = jax.jit(jax.value_and_grad(whole, (0, 1)))(shared, x)
    got = jax.jit(jax.value_and_grad(parts, (0, 1)))(shared, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    np.testing.assert_allclose(parts(shared, x), want[0], rtol=1e-5, atol=1e-6)


def test_only_what_is_differentiated_has_a_gradient():
    shared, x, filled = inputs(1.0)
    text = str(jax.make_jaxpr(jax.grad(lambda x: chunks.chunked_sum(total, shared, (x, filled), filled, 3)))(x).jaxpr)
    both = str(
        jax.make_jaxpr(jax.grad(lambda s, x: chunks.chunked_sum(total, s, (x, filled), filled, 3), (0, 1)))(shared, x)
    )
    assert text.count("dot_general") == 2 and both.count("dot_general") == 3  # x @ w, and its transposes


def test_empty_chunks_are_not_computed():
    """Half of the items are empty, wherever they stand: half of the chunks run."""
    shared, x, _ = inputs(1.0)
    filled = jnp.asarray(np.random.default_rng(1).permuted(np.arange(ITEMS) % 2 == 0, axis=-1))[None].repeat(GROUPS, 0)
    ran = []

    def counting(shared, items):
        jax.debug.callback(lambda: ran.append(1))
        return total(shared, items)

    jax.block_until_ready(jax.jit(lambda x: chunks.chunked_sum(counting, shared, (x, filled), filled, 4))(x))
    jax.effects_barrier()
    assert len(ran) == 2


def test_the_number_of_chunks_divides_the_items():
    assert [chunks.count(12, size) for size in (0, 1, 5, 6, 11, 12, 20)] == [1, 12, 3, 2, 2, 1, 1]


@pytest.mark.parametrize("chunk", [0, 4, 5])
def test_next_token_loss_is_the_textbook_formula(chunk):
    rng = np.random.default_rng(0)
    hidden, head = jnp.asarray(rng.normal(size=(2, 12, 8))), jnp.asarray(rng.normal(size=(8, 20)))
    tokens, weights = rng.integers(0, 20, (2, 12)), rng.integers(0, 3, (2, 12)).astype(np.float32)
    weights[:, 0] = weights[:, 8:] = 0

    def textbook(hidden, head):
        logp = jax.nn.log_softmax(hidden @ head)
        return -sum(weights[b, i] * logp[b, i - 1, tokens[b, i]] for b, i in np.ndindex(2, 12))

    def ours(hidden, head):
        return next_token_loss(hidden, head, jnp.asarray(tokens), jnp.asarray(weights), chunk)

    want = jax.value_and_grad(textbook, (0, 1))(hidden, head)
    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
