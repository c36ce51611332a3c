"""Documents of text and images: the same alone, in a batch, and continued from what was saved."""

import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Image, Text
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.generation import images as painting
from dreamllm_jax.generation.documents import DOCUMENT, PAGE, generate_documents, load_document, png, save_document
from dreamllm_jax.generation.images import paint
from dreamllm_jax.generation.prompts import Painted, Written, encode_prompts, require_fits
from dreamllm_jax.generation.text import Sampling, begin, read_image, read_queries
from dreamllm_jax.layers.rope import RopeScaling
from dreamllm_jax.model import DreamLLM
from tests.painter import TOKENIZER, model_that_paints
from tests.tiny import DREAM_SIZE

MODEL, PARAMS = model_that_paints()
PICTURE = Image(png(np.full((20, 20, 3), (250, 20, 20), np.uint8)))
PROMPTS = [[Text("a red fox")], [Text("a blue bird and"), PICTURE, Text("a story")], [Text("of")], [PICTURE]]
BUDGET = {"size": DREAM_SIZE, "max_tokens": 40, "max_images": 3, "sampler": SamplerConfig(steps=3)}


def told(prompts, **settings) -> list[list]:
    """The segments of each document."""
    documents = [[] for _ in prompts]
    for event in generate_documents(MODEL, PARAMS, TOKENIZER, prompts, **BUDGET | settings):
        if event.complete:
            documents[event.row].append(event.segment)
    return documents


def assert_same(got, want) -> None:
    assert [type(segment) for segment in got] == [type(segment) for segment in want]
    for one, other in zip(got, want, strict=True):
        if isinstance(one, Written):
            assert one == other
        else:
            pixels = [np.asarray(images.decode(image.data)).astype(int) for image in (one, other)]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.fixture(scope="module")
def together():
    return told(PROMPTS, seeds=[1, 20, 300, 4000])


@pytest.mark.slow
def test_a_document_is_the_same_alone(together):
    painted = [sum(isinstance(segment, Painted) for segment in document) for document in together]
    assert sorted(set(painted))[-1] == 3 and len(set(painted)) > 1, "some documents paint more than others"
    assert_same(told(PROMPTS[:1], seeds=[1])[0], together[0])
    assert_same(told(PROMPTS[1:2], seeds=[20])[0], together[1])


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [None, {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.2}])
def test_a_saved_document_goes_on_as_it_would_have(together, drawn, tmp_path):
    seeds = [1, 20, 300, 4000]

    def sampling(rows):
        return (drawn and {"sampling": Sampling.of([7 + row for row in rows], **drawn)}) or {}

    documents = told(PROMPTS, seeds=seeds, **sampling(range(4))) if drawn else together
    whole = max(documents, key=len)
    row = next(i for i, document in enumerate(documents) if document is whole)
    cut = next(i for i, segment in enumerate(whole) if isinstance(segment, Painted)) + 1
    assert cut < len(whole), "something follows"
    save_document([*PROMPTS[row], *whole[:cut]], tmp_path)
    begun = load_document(tmp_path)
    assert begun == [*PROMPTS[row], *whole[:cut]]
    named = [item["image"] for item in json.loads((tmp_path / DOCUMENT).read_text()) if "image" in item]
    assert named and all((tmp_path / name).exists() for name in named)
    assert (tmp_path / PAGE).read_text().count("<img") == len(named)
    # Up to the first image the model wrote one text, perhaps an empty one, and the decision to paint.
    spent = sum(len(segment.tokens) for segment in whole[:cut] if isinstance(segment, Written)) + 1
    left = {"max_tokens": BUDGET["max_tokens"] - spent, "max_images": 2, "seeds": [seeds[row]]}
    assert_same(told([begun], **left, **sampling([row]))[0], whole[cut:])


@pytest.mark.slow
def test_text_comes_as_it_is_written_and_seeds_draw_it(together):
    sampling = Sampling.of([5, 6], temperature=2.0)
    events = list(generate_documents(MODEL, PARAMS, TOKENIZER, PROMPTS[:2], sampling=sampling, **BUDGET))
    for event, later in itertools.pairwise(events):
        if isinstance(event.segment, Written) and not event.complete and later.row == event.row:
            assert later.segment.tokens[: len(event.segment.tokens)] == event.segment.tokens
    assert {event.row for event in events} == {0, 1}
    for row in (0, 1):
        pictures = [event for event in events if event.row == row and isinstance(event.segment, Painted)]
        assert [event.complete for event in pictures] == [False, True] * (len(pictures) // 2), "announced, then shown"
        assert all(event.complete == bool(event.segment.data) for event in pictures)
    drawn = [event.segment for event in events if event.complete and event.row == 0]
    assert drawn != together[0]


def test_prompts_are_what_training_has():
    batch = encode_prompts([PROMPTS[1], [*PROMPTS[0], Painted(PICTURE.data)]], TOKENIZER, MODEL.config)
    ids, patches, queries = TOKENIZER.special, MODEL.config.vision_encoder.num_patches, MODEL.config.num_queries
    see = [ids.im_start, *[ids.im_patch] * patches, ids.im_end]
    dream = [ids.dream_start, *[ids.im_patch] * queries, ids.dream_end]
    texts = [TOKENIZER.encode_text(text) for text in ("a red fox", "a blue bird and", "a story")]
    for row, tokens in enumerate(([*texts[1], *see, *texts[2]], [*texts[0], *dream, *see])):
        used = batch.tokens[row][batch.segment_ids[row] > 0]
        np.testing.assert_array_equal(used, [ids.bos, *tokens])
    np.testing.assert_array_equal(batch.dream[0].at[:, 0], [-1, len(texts[0]) + 2])
    assert batch.tokens.shape[1] == 32 and batch.see[0].at.shape == (2, 1)


def test_what_the_model_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="exceed the 512 that the model can read"):
        next(generate_documents(MODEL, PARAMS, TOKENIZER, PROMPTS, **BUDGET | {"max_tokens": 500}))
    with pytest.raises(ValueError, match="multiples of 2 pixels, got 15 x 15"):
        next(generate_documents(MODEL, PARAMS, TOKENIZER, PROMPTS, **BUDGET | {"size": 15}))
    with pytest.raises(ValueError, match="max_tokens must be positive"):
        next(generate_documents(MODEL, PARAMS, TOKENIZER, PROMPTS, **BUDGET | {"max_tokens": 0}))
    with pytest.raises(images.ImageError):
        next(generate_documents(MODEL, PARAMS, TOKENIZER, [[Image(b"no image")]], **BUDGET))


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 512),
        (RopeScaling("linear", 2.5), 1280),
        (RopeScaling("dynamic", 2.0), 1024),
        (RopeScaling("linear", 4.0, original_max_position_embeddings=128), 512),
        (RopeScaling("llama3", 8.0, 1.0, 4.0, 64), 512),  # max_position_embeddings is the stretched length
    ],
)
def test_scaled_positions_have_an_end_too(scaling, longest):
    llama = dataclasses.replace(MODEL.config.language_model, rope_scaling=scaling, max_position_embeddings=512)
    config = dataclasses.replace(MODEL.config, language_model=llama)
    batch = encode_prompts(PROMPTS, TOKENIZER, config)
    prompt = require_fits(config, batch, 0)
    assert require_fits(config, batch, longest - prompt) == longest == llama.max_length
    with pytest.raises(ValueError, match=f"exceed the {longest} that the model can read"):
        require_fits(config, batch, longest - prompt + 1)
    assert require_fits(config, batch, 300 - prompt, allowed=300) == 300
    with pytest.raises(ValueError, match="exceed the 300 that are allowed here"):
        require_fits(config, batch, 301 - prompt, allowed=300)


@pytest.mark.slow
def test_other_shapes_seeds_and_scales_of_images():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, MODEL.config.num_queries, MODEL.config.language_model.hidden_size)).astype(np.float32)
    common = {"size": (DREAM_SIZE, DREAM_SIZE + 6), "sampler": SamplerConfig("dpmpp_2m", 3)}

    def painted(**settings):
        return paint(MODEL, PARAMS, hidden, [1, 2], **common | settings).astype(int)

    first = painted()
    assert first.shape == (2, DREAM_SIZE, DREAM_SIZE + 6, 3)
    compiled = painting._sample._cache_size()
    others = [painted(guidance=5.0), painted(rescale=0.7), painted(negative=hidden[::-1])]
    others.append(painted(guidance_interval=(0.3, 0.7)))
    assert all(np.abs(first - other).max() > 1 for other in others)
    assert painting._sample._cache_size() <= compiled + 1  # a negative prompt has a row each
    without, hardly = painted(guidance=1.0), painted(guidance=1.000001)  # the null condition is left out, and is not
    assert np.abs(without - painted(guidance_interval=(0.0, 0.0))).max() <= 1
    with pytest.raises(ValueError, match=r"two ascending numbers from 0 to 1, got 0\.7 and 0\.3"):
        painted(guidance_interval=(0.7, 0.3))
    assert np.abs(without - hardly).max() <= 1 and painting._sample._cache_size() <= compiled + 2


@pytest.mark.slow
def test_a_model_whose_documents_begin_with_nothing_and_whose_images_have_no_marks():
    special = dataclasses.replace(TOKENIZER.special, bos=None, im_start=None, im_end=None)
    tokenizer, model = copy.copy(TOKENIZER), DreamLLM(dataclasses.replace(MODEL.config, special_tokens=special))
    tokenizer.special = special
    reading = begin(model, PARAMS, tokenizer, [[Text("")], [Text("a red fox"), PICTURE]], 8, writes=False)
    assert reading.length.tolist() == [0, len(TOKENIZER.encode_text("a red fox")) + 4]
    hidden, _ = read_queries(model, PARAMS, reading)
    null = model.bind({"params": PARAMS}).null_hidden()
    np.testing.assert_allclose(hidden[0], null, rtol=1e-5, atol=1e-5)
    reading = begin(model, PARAMS, tokenizer, [[Text("a red fox")], [Text("a red fox"), PICTURE]], 8)
    pixels = model.config.vision_encoder.preprocess(images.decode(PICTURE.data), 16, 16)
    again = read_image(model, PARAMS, reading, np.stack([pixels] * 2), np.array([True, False]))
    np.testing.assert_allclose(again.logits[0], again.logits[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a prompt is empty, and this model's documents begin with no token"):
        next(generate_documents(model, PARAMS, tokenizer, [[Text("")]], **BUDGET))
