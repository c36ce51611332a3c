"""Pictures that are seen in tiles, on their way through rows, training and prompts."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.data import images
from dreamllm_jax.data.batch import RowShape, SlotGroup, empty_batch
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.packing import Item
from dreamllm_jax.data.rows import Pixels, fill_row
from dreamllm_jax.data.tokens import encode_document
from dreamllm_jax.experiment.experiment import read_experiment
from dreamllm_jax.generation.documents import png
from dreamllm_jax.generation.prompts import Painted, encode_prompts
from dreamllm_jax.generation.text import read_image, read_prompts
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.vision_encoders.intern_vit import InternVitConfig
from dreamllm_jax.training.step import loss_and_gradients
from tests.painter import TOKENIZER
from tests.parity import assert_same, relative_error
from tests.public_models import INTERN_VIT
from tests.tiny import tiny_config, tiny_params

ENCODER = InternVitConfig(**INTERN_VIT, max_tiles=3)
CONFIG = tiny_config(
    vision_encoder=ENCODER,
    visual_projector=ProjectorConfig("mlp", 2, pre_layernorm=True),
    language_model=dataclasses.replace(tiny_config().language_model, vocab_size=TOKENIZER.vocab_size),
    special_tokens=TOKENIZER.special,
)
MODEL = DreamLLM(CONFIG)
SIZES = (16, 16), (16, 32), (32, 16)  # height, width


def group(size, slots=1):
    return SlotGroup(slots, ENCODER.tokens(*size), *size, pixels=ENCODER.pixels_shape(*size))


def picture(height, width, seed=0):
    return Image(png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)))


SQUARE, WIDE, TALL = picture(20, 22), picture(24, 50), picture(64, 30)
PAIRS = [
    Document("pair", (one, Text(text))) for one, text in ((WIDE, "a red fox"), (SQUARE, "a bird"), (TALL, "a story"))
]


def batch_of(rows, shape):
    batch = empty_batch(len(rows), shape, TOKENIZER.special.pad)
    pixels = Pixels(shape, ENCODER.preprocess, images.paint_pixels)
    for index, row in enumerate(rows):
        encoded = [encode_document(document, TOKENIZER, shape, "comprehension") for document in row]
        fill_row(batch, index, [Item(i, "", one) for i, one in enumerate(encoded)], pixels, strict=True)
    return batch


def test_each_picture_takes_the_slot_next_to_it_in_shape():
    """In the tiles of its size; of squares of two sizes by how many pixels it has, of what is left otherwise."""
    batch = batch_of([PAIRS], RowShape(96, tuple(map(group, SIZES))))
    for slots, image, size in zip(batch.see, (SQUARE, WIDE, TALL), SIZES, strict=True):
        assert slots.filled.all()
        np.testing.assert_array_equal(slots.images[0, 0], ENCODER.preprocess(images.decode(image.data), *size))
    assert [slots.images.shape[2:] for slots in batch.see] == [(16, 16, 3), *[(3, 16, 16, 3)] * 2]
    assert (batch.tokens == TOKENIZER.special.im_patch).sum() == 4 + 12 + 12

    shape = RowShape(192, (group((32, 32), 2), group((16, 16), 2)))
    for image, want in ((picture(22, 22), 1), (picture(24, 24), 0), (picture(60, 60), 0)):
        row = encode_document(Document("interleaved", (image,) * 3), TOKENIZER, shape, "comprehension")
        assert [placed.group for placed in row.see] == [want, want, 1 - want]


@pytest.mark.slow
def test_packed_with_other_sizes_a_document_teaches_the_same():
    """Loss and every gradient of three documents in one row and in three, whose other groups are empty."""
    shape, params = RowShape(96, tuple(map(group, SIZES))), tiny_params(CONFIG)
    leaves = {path: x for path, x in flatten_dict(params, sep="/").items() if not path.startswith("image_decoder/")}
    rest = {path: x for path, x in flatten_dict(params, sep="/").items() if path.startswith("image_decoder/")}
    objective = JointConfig(dm_weight=0.0, image_chunk=2).make(MODEL)
    step = jax.jit(lambda leaves, batch: loss_and_gradients(objective, leaves, rest, batch, ()))
    packed, alone = [PAIRS, [], []], [[pair] for pair in PAIRS]
    outcomes = [jax.device_get(step(leaves, batch_of(rows, shape))) for rows in (packed, alone)]
    (metrics, gradients), (want_metrics, want) = outcomes
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
    assert_same(gradients, want)
    assert all(gradients[f"vision_encoder/{path}"].any() for path in ("embeddings/cls_token", "encoder/layer/lambda_1"))


def test_a_prompt_s_pictures_are_seen_in_the_tiles_that_fit_them():
    prompts = [[Text("a red fox"), WIDE], [SQUARE, Painted(TALL.data), Text("of")], [Text("of")]]
    batch = encode_prompts(prompts, TOKENIZER, CONFIG)
    assert [slots.images.shape for slots in batch.see] == [(3, 1, 16, 16, 3), *[(3, 1, 3, 16, 16, 3)] * 2]
    assert [slots.filled[:, 0].tolist() for slots in batch.see] == [
        [False, True, False],
        [True, False, False],
        [False, True, False],
    ]
    turns = encode_prompts(prompts, TOKENIZER, CONFIG, "vicuna_v1")
    for got, want in zip(turns.see, batch.see, strict=True):
        np.testing.assert_array_equal(got.images, want.images)
    assert not encode_prompts([[Text("of")]], TOKENIZER, CONFIG).see


@pytest.mark.slow
def test_prompts_are_read_alike_whatever_is_beside_them():
    """And a picture that is read later as one of the prompt."""
    params = tiny_params(CONFIG)
    prompts = [[Text("a red fox"), WIDE], [SQUARE, TALL, Text("of")], [Text("a bird"), TALL]]

    def read(prompts):
        return read_prompts(MODEL, params, encode_prompts(prompts, TOKENIZER, CONFIG), 64)

    together = np.asarray(read(prompts).logits)
    for row, prompt in enumerate(prompts[:2]):
        assert relative_error(read([prompt]).logits[0], together[row]) < 1e-5
    pixels = ENCODER.preprocess(images.decode(WIDE.data), 16, 32)[None]
    later = read_image(MODEL, params, read([prompts[0][:1]]), pixels)
    assert relative_error(later.logits[0], together[0]) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": {"see": ({"slots": 1, "height": 16, "width": 24},)}},
            "rows: images are seen in tiles of 16 x 16 pixels",
        ),
        (
            {"rows": {"see": ({"slots": 1, "height": 32, "width": 32},)}, "data": {"stored": ("features",)}},
            "data.stored: features are of pictures of the vision encoder's image_size=16",
        ),
        (
            {
                "rows": {"see": ({"slots": 1, "height": 16, "width": 32},)},
                "model": {"visual_projector": {"kind": "conv"}},
            },
            "rows: a conv projector needs a square number of tokens, got 12",
        ),
    ],
)
def test_what_tiles_do_not_allow(changes, message):
    settings = {
        "model": dataclasses.asdict(CONFIG) | changes.get("model", {}),
        "data": {"path": "", **changes.get("data", {})},
        "rows": {"length": 96, "dream_size": 16, **changes["rows"]},
        "optimizer": {},
        "steps": 1,
    }
    with pytest.raises(ConfigError, match=message):
        read_experiment(settings)
