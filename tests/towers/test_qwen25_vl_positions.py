"""Positions of three axes: the whole of Qwen2.5-VL against transformers, and documents packed and written on."""

import functools
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image as Picture

from dreamllm_jax.data.batch import RowShape, SlotGroup, empty_batch
from dreamllm_jax.data.document import Image
from dreamllm_jax.data.packing import Item
from dreamllm_jax.data.positions import grid_of, place
from dreamllm_jax.data.rows import Pixels, fill_row
from dreamllm_jax.data.writing import Encoded, Placed
from dreamllm_jax.experiment import published
from dreamllm_jax.experiment.experiment import read_experiment
from dreamllm_jax.generation.beams import search
from dreamllm_jax.generation.text import read_image, read_prompts, read_queries, write
from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.model import DreamLLM, abstract_params
from dreamllm_jax.objectives.images import hidden_states
from dreamllm_jax.towers.connectors.projector import IdentityConfig
from dreamllm_jax.towers.language_models.qwen25_vl import Qwen25VLConfig
from dreamllm_jax.towers.vision_encoders.clip import MEAN, STD
from dreamllm_jax.towers.vision_encoders.pixels import normalise
from dreamllm_jax.towers.vision_encoders.qwen25_vl import Qwen25VisionConfig
from tests.parity import assert_same, compiled, gradients, randomised, tensors
from tests.tiny import logits_of, tiny_config, tiny_params

VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
SIZES = ((16, 24), (8, 16))  # height and width: grids of 2 x 3 and of 1 x 2
IDS = tiny_config().special_tokens


def theirs_config():
    return transformers.Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=IDS.im_patch,
        vision_start_token_id=IDS.im_start,
        vision_end_token_id=IDS.im_end,
        video_token_id=IDS.image,
    )


def ours_config():
    settings = theirs_config().to_dict()
    vision = Qwen25VisionConfig.from_public(settings)
    return tiny_config(
        language_model=Qwen25VLConfig.from_public(settings),
        vision_encoder=Qwen25VisionConfig(**vars(vision) | {"image_size": 16, "min_pixels": 64, "max_pixels": 1024}),
        visual_projector=IdentityConfig(),
    )


CONFIG = ours_config()
MODEL = DreamLLM(CONFIG)
ENCODER = CONFIG.vision_encoder
SHAPE = RowShape(48, tuple(SlotGroup(4, ENCODER.tokens(*size), *size) for size in SIZES), (SlotGroup(2, 3, 16, 16),), 3)


@functools.cache
def pair():
    """A random model of transformers, and our parameters made of it; the image decoder's are random."""
    theirs = randomised(transformers.Qwen2_5_VLForConditionalGeneration(theirs_config()))
    found, shapes = tensors(theirs), nn.unbox(abstract_params(CONFIG))
    params = tiny_params(CONFIG)
    assert "visual_projector" not in params
    for name, prefix in (("vision_encoder", "model.visual."), ("language_model", "model.language_model.")):
        own = {key.removeprefix(prefix): x for key, x in found.items() if key.startswith((prefix, "lm_head"))}
        if name == "vision_encoder":
            del own["lm_head.weight"]
        params[name] = from_torch(shapes[name], own)
    return theirs, params


def document(parts: str, seed: int = 0) -> Encoded:
    """Of t, a few tokens of text; a number, an image of that one of `SIZES`; d, dream queries."""
    rng = np.random.default_rng(seed)
    tokens, see, dream = [IDS.bos], [], []
    for part in parts:
        if part == "t":
            tokens += [*rng.integers(3, IDS.pad, 3)]
        elif part == "d":
            dream.append(Placed(picture(rng, (16, 16)), len(tokens) + 1))
            tokens += [IDS.dream_start, *[IDS.im_patch] * CONFIG.num_queries, IDS.dream_end]
        else:
            see.append(Placed(picture(rng, SIZES[int(part)]), len(tokens) + 1, int(part)))
            tokens += [IDS.im_start, *[IDS.im_patch] * ENCODER.tokens(*SIZES[int(part)]), IDS.im_end]
    return Encoded(np.array(tokens, np.int32), np.ones(len(tokens), np.float32), tuple(see), tuple(dream))


def picture(rng, size) -> Image:
    file = io.BytesIO()
    Picture.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
    return Image(file.getvalue())


def rows_of(*rows, length: int = 48):
    """A batch of rows of documents."""
    shape = RowShape(length, SHAPE.see, SHAPE.dream, SHAPE.axes)
    batch, pixels = (
        empty_batch(len(rows), shape, IDS.pad),
        Pixels(shape, ENCODER.preprocess, CONFIG.image_decoder.preprocess),
    )
    for index, row in enumerate(rows):
        fill_row(batch, index, [Item(n, "", encoded) for n, encoded in enumerate(row)], pixels, strict=True)
    return batch


def seen_by_transformers(encoded: Encoded) -> dict:
    """What its model is given of a document."""
    patches, grids = [], []
    for placed in encoded.see:
        image = normalise(np.asarray(Picture.open(io.BytesIO(placed.image.data))), MEAN, STD)
        processor = transformers.Qwen2VLImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False)
        found, *grid = processor.patchify(np.asarray(image).transpose(2, 0, 1), 4, 2, 2)
        patches.append(found)
        grids.append([1, *grid])
    tokens = torch.from_numpy(encoded.tokens).long()[None]
    images = {"pixel_values": torch.tensor(np.concatenate(patches)), "image_grid_thw": torch.tensor(grids)}
    is_image = torch.zeros_like(tokens)
    for placed in encoded.see:
        is_image[0, placed.at : placed.at + ENCODER.tokens(*SIZES[placed.group])] = 1
    return {"input_ids": tokens, "mm_token_type_ids": is_image, **images}


@pytest.mark.parametrize("parts", ["t", "0t", "t1t0t", "tt01", "td0t", "1d1t"])
def test_positions_equal_those_of_transformers(parts):
    """Of text, of one image and of several; of documents that share a row, in which each begins anew."""
    encoded, other = document(parts), document("t0", 1)
    batch, n = rows_of([encoded, other, encoded], length=96), len(encoded.tokens)
    first, last = slice(0, n), slice(n + len(other.tokens), 2 * n + len(other.tokens))
    assert (batch.positions[0, first] == batch.positions[0, last]).all() and (batch.segment_ids[0, last] == 3).all()
    given = seen_by_transformers(encoded) if encoded.see else {}
    if given:
        index = {name: given[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
        want = pair()[0].model.get_rope_index(**index)[0][:, 0].T.numpy()
    else:
        want = np.arange(n)[:, None]
    np.testing.assert_array_equal(batch.positions[0, first], np.broadcast_to(want, (n, 3)))
    assert not batch.positions[0, last.stop :].any()


def test_grids_of_tokens():
    """Their places are known of height, width and number alone."""
    for height, width in ((1, 1), (7, 3), (16, 1), (36, 12)):
        assert grid_of(height * width, 28 * height, 28 * width) == (height, width)
    assert grid_of(7, 100, 100) == (1, 7)
    parts = Encoded(np.zeros(20, np.int32), np.zeros(20), document("0").see, starts=(0, 11))  # as of a preference
    batch = rows_of([parts])
    assert batch.positions[0, 11:20].tolist() == [[i] * 3 for i in range(9)]
    np.testing.assert_array_equal(batch.positions[0, :11], place(11, [(2, (2, 3))]))


@pytest.mark.slow
def test_what_is_seen_and_read_equals_transformers():
    """Hidden states, logits, and the gradients of every parameter, of both towers."""
    (theirs, params), encoded = pair(), document("t0t0t")
    batch, n = rows_of([encoded], length=32), len(encoded.tokens)
    cotangent = np.random.default_rng(1).normal(size=(1, n, VOCABULARY)).astype(np.float32)
    trained = {name: params[name] for name in ("language_model", "vision_encoder")}
    slots = batch.see[0]

    @compiled
    def run(params):
        def logits(params):
            joined = MODEL.bind({"params": params})
            seen = joined.see(slots.images[0])[None]
            hidden, _ = joined.decode(
                joined.embed(batch.tokens, [(seen, slots.at)]), batch.positions, batch.segment_ids
            )
            return joined.language_model.logits(hidden)[:, :n], hidden[:, :n]

        found, pullback, hidden = jax.vjp(logits, params, has_aux=True)
        return found, hidden, pullback(cotangent)[0]

    logits, hidden, found = run(trained)
    theirs.zero_grad()
    want = theirs(**seen_by_transformers(encoded), output_hidden_states=True)
    want.logits.backward(torch.from_numpy(cotangent))
    got = {"logits": logits, "hidden": hidden}
    got |= {f"model.visual.{name}": x for name, x in to_torch(found["vision_encoder"]).items()}
    own = {"lm_head.weight": "lm_head.weight"}
    got |= {own.get(name, f"model.language_model.{name}"): x for name, x in to_torch(found["language_model"]).items()}
    assert_same(got, {"logits": want.logits.detach(), "hidden": want.hidden_states[-1].detach(), **gradients(theirs)})


@pytest.mark.slow
def test_documents_that_share_a_row_do_not_see_each_other():
    _, params = pair()
    one, other = document("t0d", 2), document("t1t0", 3)
    run = jax.jit(lambda batch: hidden_states(MODEL, params, batch))
    packed, apart = run(rows_of([one, other], [other, one])), run(rows_of([one], [other]))
    n, m = len(one.tokens), len(other.tokens)
    for got, want in (
        (packed[0, :n], apart[0, :n]),
        (packed[0, n : n + m], apart[1, :m]),
        (packed[1, m : m + n], apart[0, :n]),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_written_tokens_equal_those_of_transformers():
    """The most probable ones and those of beams, behind images: positions go on after them, not after their tokens."""
    (theirs, params), new = pair(), 8
    documents = [document(parts, seed) for seed, parts in enumerate(("t0t", "1t0", "tt01t", "t"))]
    prompts = rows_of(*([one] for one in documents)).replace(dream=())
    reading = read_prompts(MODEL, params, prompts, 64)
    found, _, _ = search(MODEL, params, reading, 3, new, (IDS.eos,))
    tokens, _, _ = write(MODEL, params, reading, new, (IDS.eos,))
    for row, one in enumerate(documents):
        given = seen_by_transformers(one) if one.see else {"input_ids": torch.from_numpy(one.tokens).long()[None]}
        for beams, got in ((1, tokens), (3, found)):
            made = theirs.generate(
                **given,
                max_new_tokens=new,
                do_sample=False,
                num_beams=beams,
                eos_token_id=IDS.eos,
                pad_token_id=IDS.pad,
            )
            want = made[0, len(one.tokens) :].numpy()
            np.testing.assert_array_equal(np.asarray(got)[row, : len(want)], want, err_msg=f"{row}, {beams} beams")


@pytest.mark.slow
def test_what_is_read_bit_by_bit_is_what_is_read_at_once():
    """An image that is read later, and dream queries behind it."""
    _, params = pair()
    whole, begun = document("t0d", 4), document("t", 4)
    batch, n = rows_of([whole]), len(begun.tokens)
    hidden, slot = jax.jit(lambda batch: hidden_states(MODEL, params, batch))(batch), whole.dream[0].at
    reading = read_prompts(MODEL, params, rows_of([begun]).replace(see=(), dream=()), 64)
    reading = read_image(MODEL, params, reading, jnp.asarray(batch.see[0].images[:, 0]))
    assert reading.position.tolist() == [n + 2 + 3] and reading.length.tolist() == [n + 2 + 6]
    got, reading = read_queries(MODEL, params, reading)
    np.testing.assert_allclose(got[0], hidden[0, slot : slot + CONFIG.num_queries], rtol=1e-4, atol=1e-5)
    assert reading.position.tolist() == [1 + batch.positions[0].max()]


@pytest.mark.parametrize(("name", "parameters"), [("qwen25-vl-3b", 3754622976), ("qwen25-vl-7b", 8292166656)])
def test_published_towers_fit_together_and_are_of_the_published_sizes(name, parameters):
    config = published.alignment(f"llm={name},vision={name}")
    experiment = read_experiment({**config.to_dict(), "steps": 1, "data": {"path": "", "corpora": {}}})
    model = experiment.model
    assert isinstance(model.visual_projector, IdentityConfig)
    assert model.vision_encoder.width == model.language_model.width and model.language_model.head_dim == 128
    assert (experiment.row_shape.axes, experiment.row_shape.see[0].tokens) == (3, 256)
    decoder, tower = (part.make(jnp.bfloat16) for part in (model.language_model, model.vision_encoder))
    tokens, image = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 112, 112, 3), jnp.uint8)
    shapes = jax.eval_shape(
        lambda: (decoder.init(jax.random.key(0), tokens, method=logits_of), tower.init(jax.random.key(0), image))
    )
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == parameters
