"""How dream queries begin, and what is drawn anew in each step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.model import DreamLLM, abstract_params
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.towers.queries import DreamQueries, QueriesConfig, from_vocabulary
from tests.tiny import make_batch, random_document, row_shape, tiny_config, tiny_params

MANY, WIDTH = 4000, 24


@pytest.mark.parametrize(
    ("config", "deviation"), [({}, 0.02), ({"init": "width"}, 24**-0.5), ({"deviation": 1.0}, 1.0)]
)
def test_deviations(config, deviation):
    config = QueriesConfig(**config)
    module = DreamQueries(MANY, WIDTH, config.deviation_of(WIDTH))
    table = module.init(jax.random.key(0))["params"]["embedding"].unbox()
    np.testing.assert_allclose(np.std(table), deviation, rtol=0.02)
    np.testing.assert_allclose(np.std(config.draw(jax.random.key(0), (MANY, WIDTH))), deviation, rtol=0.02)


def test_rows_of_a_vocabulary():
    """Mean and covariance are those of which transformers draws the rows of new tokens."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5)).astype(np.float32)
    got = np.asarray(from_vocabulary(jnp.asarray(rows), 6000, jax.random.key(1)), np.float64)
    want = 1e-9 * np.cov(rows.T.astype(np.float64), bias=True)
    np.testing.assert_allclose(got.mean(axis=0), rows.mean(axis=0), atol=2e-6)
    # In float32 a row has only some bits for so little noise: its deviation is 3e-5 of the mean's size.
    assert np.linalg.norm(np.cov((got - rows.mean(axis=0)).T, bias=True) - want) < 0.1 * np.linalg.norm(want)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"dream_queries\.deviation must be positive"):
        QueriesConfig(deviation=0.0)
    with pytest.raises(ValueError, match="drawn anew has init normal or width"):
        QueriesConfig(init="vocabulary", redrawn=True)
    with pytest.raises(ValueError, match=r"drop_prob=0\.1: dream queries that are drawn anew have no null condition"):
        noisy = tiny_config(dream_queries=QueriesConfig(redrawn=True))
        JointConfig(drop_prob=0.1).require(noisy, lambda path: True, True)


@pytest.mark.slow
def test_queries_drawn_anew():
    """Each image has its own in each step, by row and slot; it reads as a model that has learned just these."""
    learned = tiny_config()
    config = dataclasses.replace(learned, dream_queries=QueriesConfig(deviation=0.5, redrawn=True))
    assert "dream_queries" not in abstract_params(config)
    params = tiny_params(learned)
    noisy, table = (JointConfig(lm_weight=0.0, image_chunk=0).make(DreamLLM(one)) for one in (config, learned))
    rng, rows = np.random.default_rng(0), ("tdd", "dt", "td", "ttd")
    rows = [[random_document(rng, config, parts)] for parts in rows]
    batch = make_batch(config, rows, shape=row_shape(config, see_slots=0))
    drawn = jax.jit(noisy.draws)
    (draws,), (other,) = (drawn(jax.random.key(seed), batch) for seed in (1, 2))
    (few,) = drawn(jax.random.key(1), jax.tree.map(lambda x: x[:3], batch))
    np.testing.assert_array_equal(few.queries, draws.queries[:3])
    each = np.asarray(draws.queries).reshape(-1, *config.queries_shape)
    assert len(np.unique(each[:, 0, 0])) == len(each) and not np.isin(other.queries, draws.queries).any()
    np.testing.assert_allclose(each.std(), 0.5, rtol=0.1)

    @jax.jit
    def drawn_and_learned(batch, given):
        theirs = params | {"dream_queries": {"embedding": given}}
        return noisy.hidden(params, batch, (draws,)), table.hidden(theirs, batch, (draws.replace(queries=None),))

    (dream,) = batch.dream
    for row, slot in np.argwhere(dream.filled)[:3]:
        one = np.full_like(dream.at, -1)
        one[row, slot] = dream.at[row, slot]
        alone = batch.replace(dream=(dream.replace(at=one),))
        got, want = drawn_and_learned(alone, draws.queries[row, slot])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
