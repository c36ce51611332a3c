"""Pictures of a model that is asked in words of its own: as in training, guided by text and images, each by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.data import images
from dreamllm_jax.data.batch import RowShape, SlotGroup, empty_batch
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.packing import Item
from dreamllm_jax.data.prompting import Prompting
from dreamllm_jax.data.rows import Pixels, fill_row
from dreamllm_jax.data.tokens import encode_document
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.generation import documents
from dreamllm_jax.generation import images as painting
from dreamllm_jax.generation.documents import png
from dreamllm_jax.generation.images import generate_images, paint, read_asked
from dreamllm_jax.generation.prompts import Painted
from dreamllm_jax.generation.text import begin, read_image, read_queries
from dreamllm_jax.model import DreamLLM, take
from dreamllm_jax.objectives.images import hidden_states
from dreamllm_jax.towers.queries import QueriesConfig
from tests.painter import TOKENIZER, model_that_paints
from tests.tiny import DREAM_SIZE, SEE_SIZE

WORDS = Prompting("vicuna_v1", paint="Of {text}", paint_null="Of", edit="{image}\na {text}", edit_null="{image} of")
PLAIN, PARAMS = model_that_paints()
MODEL = DreamLLM(dataclasses.replace(PLAIN.config, prompting=WORDS))
RED = Image(png(np.full((20, 20, 3), (250, 20, 20), np.uint8)))
BLUE = Image(png(np.full((24, 20, 3), (20, 20, 250), np.uint8)))
PROMPTS = [[Text("a red fox")], [RED, Text("blue bird")], [BLUE, RED, Text("story")]]
SEEDS = [5, 6, 7]


@pytest.fixture
def given(monkeypatch):
    """What pictures are painted from, by prompts and settings; without painting."""

    def states(prompts=PROMPTS, seeds=SEEDS, model=MODEL, **settings):
        monkeypatch.setattr(painting, "paint", lambda model, params, hidden, seeds, **rest: {"hidden": hidden, **rest})
        return generate_images(model, PARAMS, TOKENIZER, prompts, seeds=seeds, size=DREAM_SIZE, **settings)

    return states


SEE = SlotGroup(2, MODEL.config.vision_encoder.num_patches, SEE_SIZE, SEE_SIZE)
SHAPE = RowShape(256, (SEE,), (SlotGroup(1, MODEL.config.num_queries, DREAM_SIZE, DREAM_SIZE),))


@jax.jit
def at_queries(batch):
    return take(hidden_states(MODEL, PARAMS, batch), batch.dream[0].at, MODEL.config.num_queries)[0]


def trained_on(prompt, drop="", text=None):
    """The hidden states at the queries of a prompt's document in a row of training."""
    *read, said = prompt
    document = Document("edit" if read else "pair", (*read, Text(said.text if text is None else text), RED))
    encoded = encode_document(document, TOKENIZER, SHAPE, "creation", prompting=WORDS, drop=drop)
    batch = empty_batch(1, SHAPE, TOKENIZER.special.pad)
    pixels = Pixels(SHAPE, MODEL.config.vision_encoder.preprocess, MODEL.config.image_decoder.preprocess)
    fill_row(batch, 0, [Item(0, "", encoded)], pixels, strict=True)
    return at_queries(batch)


@pytest.mark.slow
@pytest.mark.parametrize(("negative", "image_guidance"), [("", 1.0), ("story", 1.8)])
def test_what_was_learned_is_asked(negative, image_guidance, given):
    """As training has them: hidden states of the document, of it without its text, and without images too."""
    words = {"negative": [Text(negative)] if negative else [], "image_guidance": image_guidance}
    got = given(**words)
    drops = ("", "images") if negative else ("text", "both")
    seeing, blind = ([trained_on(prompt, drop, negative or None) for prompt in PROMPTS] for drop in drops)
    want = {"hidden": [trained_on(prompt) for prompt in PROMPTS], "negative": seeing}
    if image_guidance != 1:
        assert got["image_guidance"] == 1.8
        want["blind"] = blind
    assert ("blind" in got) == ("blind" in want)
    alone = given(PROMPTS[2:], SEEDS[2:], **words)
    for name, states in want.items():
        np.testing.assert_allclose(got[name], np.concatenate(states), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(alone[name][0], got[name][2], rtol=1e-4, atol=1e-4)


def test_what_needs_no_second_reading(given):
    assert "negative" not in given(guidance=1.0) and "blind" not in given(PROMPTS[:1], SEEDS[:1], image_guidance=2.0)
    assert {"negative", "blind"} <= given(guidance=1.0, image_guidance=2.0).keys()
    with pytest.raises(ValueError, match=r"image_guidance=2 is of a model that is asked to edit in words of its own"):
        given(model=PLAIN, image_guidance=2.0)


@pytest.mark.slow
def test_guidance_by_images_and_by_text():
    """Of three predictions the first two or the last two may be alike: then it is guidance by one step."""
    rng = np.random.default_rng(0)
    null, states = rng.normal(size=(2, 1, *MODEL.config.queries_shape)).astype(np.float32)

    def painted(hidden, **guiding):
        settings = {"size": DREAM_SIZE, "sampler": SamplerConfig(steps=3)}
        return np.asarray(paint(MODEL, PARAMS, hidden, [5], **settings, **guiding)).astype(int)

    want = painted(states, negative=null, guidance=3.0)
    by_images = painted(states, negative=states, blind=null, guidance=9.0, image_guidance=3.0)
    by_text = painted(states, negative=null, blind=null, guidance=3.0, image_guidance=9.0)
    assert max(np.abs(by_images - want).max(), np.abs(by_text - want).max()) <= 1
    assert np.abs(painted(states, negative=null, blind=null, guidance=9.0) - want).max() > 1


def test_the_last_turn_of_a_conversation_is_painted(monkeypatch):
    asked, picture = {}, np.full((1, 8, 8, 3), 7, np.uint8)

    def paints(*given, **settings):
        asked.update(settings, prompts=given[3])
        return picture

    monkeypatch.setattr(documents, "generate_images", paints)
    turns = [Text("a story", "user"), Painted(RED.data, "assistant"), BLUE, Text("blue bird", "user")]
    announced, shown = documents.paint_reply(MODEL, PARAMS, TOKENIZER, turns, 5, guidance=2.0)
    assert not announced.complete and shown.complete
    np.testing.assert_array_equal(np.asarray(images.decode(shown.segment.data)), picture[0])
    assert asked == {"prompts": [turns[2:]], "seeds": [6], "guidance": 2.0}


@pytest.mark.slow
def test_queries_that_are_drawn_anew_are_the_pictures_own():
    """A function of the picture's seed, also in a prompt that had it painted before."""
    noisy = QueriesConfig(deviation=1.0, redrawn=True)
    model = DreamLLM(dataclasses.replace(MODEL.config, dream_queries=noisy))
    params = {name: tree for name, tree in PARAMS.items() if name != "dream_queries"}
    first, again, other = (np.asarray(read_asked(model, params, TOKENIZER, [[]], [seed])) for seed in (5, 5, 6))
    assert np.abs(first - other).max() > 0.1 and np.array_equal(first, again)
    whole, begun = (
        begin(model, params, TOKENIZER, [[Text("a story"), *more]], 16, seeds=jnp.asarray([7], jnp.uint32))
        for more in ((Painted(RED.data),), ())
    )
    _, reading = read_queries(model, params, begun, seeds=jnp.asarray([7], jnp.uint32))
    seen = MODEL.config.vision_encoder.preprocess(images.decode(RED.data), SEE_SIZE, SEE_SIZE)
    reading = read_image(model, params, reading, jnp.asarray(seen)[None])
    np.testing.assert_allclose(whole.logits, reading.logits, rtol=1e-4, atol=1e-4)
