"""What is written equals what transformers' generate writes with the same weights, and draws are as asked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.generation.beams import search
from dreamllm_jax.generation.text import Reading, Sampling, choose, read_prompts, write
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.towers.language_models.qwen2 import Qwen2Config
from dreamllm_jax.towers.language_models.qwen3 import Qwen3Config
from tests.tiny import TinyDocument, make_batch, tiny_config, tiny_params
from tests.torch_reference import TorchDreamLLM

CONFIG = tiny_config()
MODEL, PARAMS = DreamLLM(CONFIG), tiny_params(CONFIG)
PROMPTS, NEW = 64, 10
IDS = CONFIG.special_tokens

LLAMA = CONFIG.language_model
SIZES = {
    name: getattr(LLAMA, name)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
FAMILIES = {
    "llama": LLAMA,
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=12),
}


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.array([IDS.bos, *rng.integers(3, IDS.pad, rng.integers(2, 12))], np.int32) for _ in range(PROMPTS)]


@pytest.fixture(scope="module")
def prompts(documents) -> Batch:
    batch = make_batch(CONFIG, [[TinyDocument(tokens, np.ones(len(tokens), np.float32))] for tokens in documents])
    return batch.replace(see=(), dream=())


@pytest.fixture(scope="module")
def family(request):
    """A language model of the family as both programs have it: ours, its parameters, transformers'."""
    config = dataclasses.replace(CONFIG, language_model=FAMILIES[request.param])
    params = tiny_params(config)
    return DreamLLM(config), params, TorchDreamLLM(config, params).language_model.eval()


def stop_at(reference, documents) -> int:
    """A token that is often chosen, so that many continuations end early."""
    with torch.no_grad():
        chosen = [int(reference(torch.tensor(tokens)[None].long()).logits[0, -1].argmax()) for tokens in documents]
    return int(np.bincount(chosen).argmax())


SETTINGS = [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.5}, {"repetition_penalty": 1.7}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(("llama", settings) for settings in SETTINGS),
        *((family, SETTINGS[1]) for family in ("qwen2", "qwen3")),  # of which the first step is a greedy one
    ],
    indirect=["family"],
    ids=str,
)
def test_equals_transformers(documents, prompts, family, settings):
    model, params, reference = family
    stop = stop_at(reference, documents)
    reading = read_prompts(model, params, prompts, 48)
    if beams := settings.get("num_beams"):
        tokens, count, _ = search(model, params, reading, beams, NEW, (stop,), settings.get("length_penalty", 1.0))
    else:
        penalty = settings.get("repetition_penalty", 1.0)
        sampling = Sampling.of(range(PROMPTS), temperature=0.0, repetition_penalty=penalty)
        tokens, count, _ = write(model, params, reading, NEW, (stop,), sampling)
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=stop, pad_token_id=IDS.pad, bos_token_id=IDS.bos, **settings
    )
    tokens, count = np.asarray(tokens), np.asarray(count)
    assert 4 < (count < NEW).sum() < PROMPTS, "some end early, some do not"
    lengths = np.array([len(prompt) for prompt in documents])
    for length in np.unique(lengths):  # without padding, which transformers' rows are not indifferent to
        (rows,) = np.nonzero(lengths == length)
        given = torch.tensor(np.stack([documents[i] for i in rows])).long()
        want = np.full((len(rows), NEW), IDS.pad)
        written = reference.generate(given, generation_config=config)[:, length:]
        want[:, : written.shape[1]] = written
        np.testing.assert_array_equal(tokens[rows], want)
        np.testing.assert_array_equal(count[rows], np.where((want == stop).any(1), (want == stop).argmax(1) + 1, NEW))


def reading_of(logits: np.ndarray, seen: np.ndarray) -> Reading:
    cache = CONFIG.language_model.cache(len(logits), 1)
    return Reading(cache, jnp.asarray(logits), jnp.asarray(seen))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.4},
    ],
)
def test_tokens_are_drawn_as_often_as_transformers_processors_say(settings):
    rng, draws = np.random.default_rng(0), 40_000
    logits = 2 * rng.normal(size=(1, 24)).astype(np.float32)
    before = np.array([[3, 5, 5]])
    scores = torch.tensor(logits)
    for name, processor in (
        ("repetition_penalty", RepetitionPenaltyLogitsProcessor),
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        if name in settings:
            scores = processor(settings[name])(torch.tensor(before), scores)
    want = torch.softmax(scores, -1)[0].numpy()
    seen = np.zeros((draws, 24), bool)
    seen[:, before[0]] = True
    tokens = jax.jit(choose)(reading_of(np.repeat(logits, draws, 0), seen), Sampling.of(range(draws), **settings))
    got = np.bincount(tokens, minlength=24) / draws
    assert not got[want == 0].any() and (got[want > 0.01] > 0).all()
    np.testing.assert_allclose(got, want, atol=5 * 0.5 / np.sqrt(draws))


@pytest.mark.slow
def test_draws_depend_on_the_seed_and_not_on_the_batch(prompts):
    def written(rows, seeds):
        part = jax.tree.map(lambda x: x[rows], prompts)
        reading = read_prompts(MODEL, PARAMS, part, 48)
        return np.asarray(write(MODEL, PARAMS, reading, NEW, (IDS.eos,), Sampling.of(seeds, 0.9, 20, 0.95))[0])

    whole = written(slice(0, 6), range(6))
    np.testing.assert_array_equal(written(slice(2, 4), [2, 3]), whole[2:4])
    assert (written(slice(2, 4), [8, 9]) != whole[2:4]).any()


@pytest.mark.slow
def test_ids_that_the_tokenizer_does_not_have_are_never_written(prompts):
    some, known = jax.tree.map(lambda x: x[:8], prompts), 20
    for limit, few in ((None, False), (known, True)):
        read = functools.partial(read_prompts, MODEL, PARAMS, some, 48, limit)
        drawn, *_ = write(MODEL, PARAMS, read(), NEW, (known - 1,), Sampling.of(range(8), 3.0, repetition_penalty=1.5))
        likely, *_ = write(MODEL, PARAMS, read(), NEW, (known - 1,))
        searched, *_ = search(MODEL, PARAMS, read(), 3, NEW, (known - 1,), 1.0)
        for tokens in (drawn, likely, searched):
            written = np.asarray(tokens)
            assert (written[written != IDS.pad] < known).all() == few


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="must not be negative"):
        Sampling.of([0], **settings)
