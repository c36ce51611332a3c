"""Generation gives the same result alone and in any batch, and the same as the model run without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.generation.images import paint
from dreamllm_jax.generation.text import read_image, read_prompts, read_queries, write
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.images import hidden_states
from tests.tiny import DREAM_SIZE, SEE_SIZE, make_batch, random_document, tiny_config, tiny_params

pytestmark = pytest.mark.slow

CONFIG = tiny_config()
MODEL, PARAMS = DreamLLM(CONFIG), tiny_params(CONFIG)
NEW = 6


def prompts() -> Batch:
    """Four prompts of different lengths, two with an image; each ends before its `</s>`."""
    rng = np.random.default_rng(3)
    documents = [random_document(rng, CONFIG, parts) for parts in ("t", "ts", "tt", "st")]
    documents = [
        dataclasses.replace(document, tokens=document.tokens[:-1], weights=document.weights[:-1])
        for document in documents
    ]
    return make_batch(CONFIG, [[document] for document in documents])


def row(batch: Batch, i: int, length: int | None = None) -> Batch:
    """One prompt alone, its padding cut to `length`."""
    one = jax.tree.map(lambda x: x[i : i + 1], batch)
    cut = {name: getattr(one, name)[:, :length] for name in ("tokens", "segment_ids", "positions", "loss_weights")}
    return one.replace(**cut)


def written(batch: Batch, cache_length: int) -> tuple[np.ndarray, np.ndarray]:
    reading = read_prompts(MODEL, PARAMS, batch, cache_length)
    tokens, count, _ = write(MODEL, PARAMS, reading, NEW, (CONFIG.special_tokens.eos,))
    return np.asarray(tokens), np.asarray(count)


@pytest.fixture(scope="module")
def together():
    return written(prompts(), 64)


def test_greedy_text_equals_the_model_without_a_cache(together):
    batch = prompts()
    tokens, count = together
    assert count.max() == NEW
    longer = jax.tree.map(np.copy, batch)
    lengths = (batch.segment_ids > 0).sum(axis=1)
    for i, n in enumerate(lengths):
        fed = tokens[i, : count[i]]
        longer.tokens[i, n : n + count[i]] = fed
        longer.segment_ids[i, n : n + count[i]] = 1
        longer.positions[i, n : n + count[i]] = np.arange(n, n + count[i])
    hidden = hidden_states(MODEL, PARAMS, longer)
    best = np.asarray(MODEL.bind({"params": PARAMS}).language_model.logits(hidden)).argmax(-1)
    for i, n in enumerate(lengths):
        np.testing.assert_array_equal(best[i, n - 1 : n - 1 + count[i]], tokens[i, : count[i]])


@pytest.mark.parametrize(("i", "cache_length"), [(0, 64), (1, 50)])
def test_a_prompt_alone_gives_the_same_text(together, i, cache_length):
    batch = prompts()
    length = int((batch.segment_ids[i] > 0).sum())
    tokens, count = written(row(batch, i, length), cache_length)
    np.testing.assert_array_equal(tokens[0], together[0][i])
    assert count[0] == together[1][i]


def test_rows_that_have_stopped_write_nothing_more():
    reading = read_prompts(MODEL, PARAMS, prompts(), 64)
    first = int(np.argmax(reading.logits[0]))
    before = np.asarray(reading.length)
    tokens, count, reading = write(MODEL, PARAMS, reading, NEW, (first,))
    assert count[0] == 1 and tokens[0, 0] == first
    assert np.all(np.asarray(tokens)[0, 1:] == CONFIG.special_tokens.pad)
    np.testing.assert_array_equal(np.asarray(reading.length) - before, count)


def test_queries_and_images_are_read_as_in_training():
    """`<dream_start>` queries `<dream_end>`, then an image, continue the cache as the packed row would have it."""
    rng = np.random.default_rng(4)
    document = random_document(rng, CONFIG, "tds")
    whole = make_batch(CONFIG, [[document]])
    hidden = hidden_states(MODEL, PARAMS, whole)
    slot = int(whole.dream[0].at[0, 0])
    prompt = row(whole, 0, slot - 1).replace(see=(), dream=())
    reading = read_prompts(MODEL, PARAMS, prompt, 64)
    queried, reading = read_queries(MODEL, PARAMS, reading)
    np.testing.assert_allclose(queried[0], hidden[0, slot : slot + CONFIG.num_queries], rtol=1e-4, atol=1e-5)
    reading = read_image(MODEL, PARAMS, reading, jnp.asarray(whole.see[0].images[:, 0]))
    end = int(whole.see[0].at[0, 0]) + CONFIG.vision_encoder.num_patches
    want = MODEL.bind({"params": PARAMS}).language_model.logits(hidden[:, end : end + 1])[:, 0]
    np.testing.assert_allclose(reading.logits, want, rtol=1e-4, atol=1e-4)
    assert whole.see[0].images.shape[2] == SEE_SIZE


def test_an_image_depends_on_its_own_prompt_and_seed():
    hidden = jax.random.normal(jax.random.key(0), (3, CONFIG.num_queries, CONFIG.language_model.hidden_size))
    paint_tiny = lambda hidden, seeds: np.asarray(  # noqa: E731
        paint(MODEL, PARAMS, hidden, seeds, size=DREAM_SIZE, sampler=SamplerConfig(steps=4), guidance=2.0)
    )
    pictures = paint_tiny(hidden, jnp.array([5, 6, 5]))
    assert pictures.shape == (3, DREAM_SIZE, DREAM_SIZE, 3) and pictures.dtype == np.uint8
    alone = paint_tiny(hidden[1:2], jnp.array([6]))
    assert np.abs(alone[0].astype(int) - pictures[1]).max() <= 1  # one level of rounding
    assert np.abs(paint_tiny(hidden[1:2], jnp.array([7]))[0].astype(int) - pictures[1]).max() > 1
