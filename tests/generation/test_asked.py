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
from dreamllm_jax.generation.documents import paint_reply, png
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
SETTINGS = {"size": DREAM_SIZE, "sampler": SamplerConfig(steps=3), "guidance": 2.5}


def painted(prompts=PROMPTS, seeds=SEEDS, model=MODEL, params=PARAMS, **settings):
    return np.asarray(generate_images(model, params, TOKENIZER, prompts, seeds=seeds, **SETTINGS | settings)).astype(
        int
    )


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
def test_what_was_learned_is_asked(negative, image_guidance):
    """Pictures equal those of the hidden states that training has: of the document, without its text, without both."""
    got = painted(negative=[Text(negative)] if negative else [], image_guidance=image_guidance)
    for prompt, seed, picture in zip(PROMPTS, SEEDS, got, strict=True):
        drops = ("", "images") if negative else ("text", "both")
        seeing, blind = (trained_on(prompt, drop, negative or None) for drop in drops)
        given = {"negative": seeing}
        if image_guidance != 1:
            given |= {"blind": blind, "image_guidance": image_guidance}
        want = np.asarray(paint(MODEL, PARAMS, trained_on(prompt), [seed], **SETTINGS, **given))
        assert np.abs(picture - want[0]).max() <= 1


@pytest.mark.slow
def test_guidance_by_images_is_of_edits_alone():
    by_text, both = painted(), painted(image_guidance=2.0)
    moved = np.abs(by_text - both).max(axis=(1, 2, 3))
    assert moved[0] <= 1 < moved[1:].min()
    alone = painted(PROMPTS[2:], SEEDS[2:], image_guidance=2.0)[0]
    assert np.abs(alone - both[2]).max() <= 1
    with pytest.raises(ValueError, match=r"image_guidance=2 is of a model that is asked to edit in words of its own"):
        painted(model=PLAIN, image_guidance=2.0)


@pytest.mark.slow
def test_the_last_turn_of_a_conversation_is_painted():
    turns = [Text("a story", "user"), Painted(RED.data, "assistant"), dataclasses.replace(BLUE, role="user")]
    turns.append(Text("blue bird", "user"))
    announced, shown = paint_reply(MODEL, PARAMS, TOKENIZER, turns, 5, **SETTINGS)
    assert not announced.complete and shown.complete
    want = painted([[BLUE, Text("blue bird")]], [6])[0]
    np.testing.assert_array_equal(np.asarray(images.decode(shown.segment.data)), want)


@pytest.mark.slow
def test_queries_that_are_drawn_anew_are_the_pictures_own():
    """A function of the picture's seed: alone and in a batch, and in a prompt that had it painted before."""
    noisy = QueriesConfig(deviation=1.0, redrawn=True)
    model = DreamLLM(dataclasses.replace(MODEL.config, dream_queries=noisy))
    params = {name: tree for name, tree in PARAMS.items() if name != "dream_queries"}
    both = np.asarray(read_asked(model, params, TOKENIZER, [[], []], [5, 6]))
    alone = np.asarray(read_asked(model, params, TOKENIZER, [[]], [6]))
    assert np.abs(both[0] - both[1]).max() > 0.1 and np.abs(alone[0] - both[1]).max() < 1e-4
    whole, begun = (
        begin(model, params, TOKENIZER, [[Text("a story"), *more]], 16, seeds=jnp.asarray([7], jnp.uint32))
        for more in ((Painted(RED.data),), ())
    )
    _, reading = read_queries(model, params, begun, seeds=jnp.asarray([7], jnp.uint32))
    seen = MODEL.config.vision_encoder.preprocess(images.decode(RED.data), SEE_SIZE, SEE_SIZE)
    reading = read_image(model, params, reading, jnp.asarray(seen)[None])
    np.testing.assert_allclose(whole.logits, reading.logits, rtol=1e-4, atol=1e-4)
