"""Qwen2.5-VL's vision tower against transformers' class on the same random weights."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.interop.vision_encoder import open_vision_encoder, read_vision_config
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.planning.program import read_program
from dreamllm_jax.towers.vision_encoders.clip import MEAN, STD
from dreamllm_jax.towers.vision_encoders.pixels import normalise
from dreamllm_jax.towers.vision_encoders.qwen25_vl import Qwen25Vision, Qwen25VisionConfig
from tests.parity import assert_same, compiled, gradients, nchw, randomised, relative_error, tensors

TINY = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 20,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
# Height and width: windows at the border that are smaller, in both directions; whole windows; one; one that is smaller.
SIZES = ((40, 24), (32, 48), (8, 56))


def pair(**changes):
    """A random PyTorch tower, ours, and its weights for ours."""
    config = transformers.models.qwen2_5_vl.Qwen2_5_VLConfig(vision_config={**TINY, **changes}).vision_config
    config._attn_implementation = "eager"
    theirs = randomised(transformers.Qwen2_5_VisionTransformerPretrainedModel(config))
    shape = dataclasses.replace(Qwen25VisionConfig.from_public(config.to_dict()), min_pixels=64)
    ours = Qwen25Vision(shape)
    side = shape.image_size
    template = jax.eval_shape(lambda: ours.init(jax.random.key(0), jnp.zeros((1, side, side, 3))))
    return theirs, ours, {"params": from_torch(nn.unbox(template)["params"], tensors(theirs))}


def outcome(ours, params, images, cotangent):
    """Features, and the gradients of pixels and weights."""

    @compiled
    def run(params, images):
        features, pullback = jax.vjp(ours.apply, params, images)
        return features, pullback(jnp.asarray(cotangent, features.dtype))

    return run(params, images)


def assert_equal_towers(theirs, ours, params, size, count=2):
    rng, config = np.random.default_rng(0), ours.config
    images = rng.normal(size=(count, *size, 3)).astype(np.float32)
    cotangent = rng.normal(size=(count, config.tokens(*size), config.width)).astype(np.float32)
    theirs.zero_grad()
    pixels = nchw(images).requires_grad_()
    output = config.run_public(theirs, pixels)
    output.backward(torch.from_numpy(cotangent))
    features, (weights, grad) = outcome(ours, params, images, cotangent)
    got = {"features": features, "pixels": grad.transpose(0, 3, 1, 2), **to_torch(weights["params"])}
    return assert_same(got, {"features": output.detach(), "pixels": pixels.grad, **gradients(theirs)})


@pytest.fixture(scope="module")
def towers():
    return pair()


@pytest.mark.parametrize("size", [SIZES[0], *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES[1:])])
def test_equals_transformers(towers, size):
    assert_equal_towers(*towers, size)


@pytest.mark.slow
def test_one_layer_of_each_kind_at_true_width():
    true = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "window_size": 112}
    theirs, ours, params = pair(**true, depth=2)
    assert_equal_towers(theirs, ours, params, (112, 140), count=1)


@pytest.mark.slow
def test_half_precision_stays_near(towers):
    _, ours, params = towers
    rng, size = np.random.default_rng(0), (40, 24)
    images = rng.normal(size=(2, *size, 3)).astype(np.float32)
    cotangent = rng.normal(size=(2, ours.config.tokens(*size), ours.config.width)).astype(np.float32)
    want, wanted = outcome(ours, params, images, cotangent)
    got, (weights, _) = outcome(ours.clone(dtype=jnp.bfloat16, remat="none"), params, images, cotangent)
    assert got.dtype == jnp.bfloat16 and relative_error(got.astype(jnp.float32), want) < 0.02
    for name, found in to_torch(weights["params"]).items():
        assert relative_error(found, to_torch(wanted[0]["params"])[name]) < 0.04, name


def test_flops_are_those_of_the_compiled_program(towers):
    """Which has both kinds of attention in every layer, of which one is run."""
    _, ours, params = towers
    size, count, depth = (40, 24), 2, ours.config.depth
    images = jnp.zeros((count, *size, 3), jnp.uint8)
    program = read_program(compiled(ours.apply).lower(params, images).compile().as_text(), {"data": 1})

    def counted(full):
        tally = Tally(lambda _: False, platform="cpu", dtype="float32")
        dataclasses.replace(ours.config, fullatt_block_indexes=full).flops(tally, count, *size, remat=True)
        return tally.total.products

    patches = size[0] * size[1] // ours.config.patch_size**2
    whole = depth * 4 * count * patches**2 * ours.config.hidden_size
    both = whole + counted(())
    assert counted(tuple(range(depth))) - counted(()) == whole - depth * 4 * count * 6 * 16**2 * ours.config.hidden_size
    assert sum(program.flops_by_name.values()) == pytest.approx(both, rel=0.01)


def test_pictures_become_pixels_as_transformers_makes_them(tmp_path):
    """To the last bit, at the size that it gives them; and its file says which sizes there are."""
    transformers.Qwen2VLImageProcessorPil(min_pixels=800, max_pixels=4000, patch_size=4).save_pretrained(tmp_path)
    theirs, ours, _ = pair()
    theirs.save_pretrained(tmp_path)
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    config = open_vision_encoder(tmp_path).config
    assert (config.min_pixels, config.max_pixels, config.image_size) == (800, 4000, 56)
    assert dataclasses.replace(config, min_pixels=64, max_pixels=ours.config.max_pixels, image_size=448) == ours.config
    rng = np.random.default_rng(0)
    for height, width in [(30, 44), (61, 9), (200, 30), (17, 17), *rng.integers(8, 300, (20, 2))]:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = processor(picture, return_tensors="np")
        size = config.fitting(width, height)
        assert tuple(found["image_grid_thw"][0, 1:] * 4) == size
        pixels = normalise(config.preprocess(picture, *size), MEAN, STD)
        want, *_ = processor.patchify(np.asarray(pixels).transpose(2, 0, 1), 4, 2, 2)
        np.testing.assert_allclose(found["pixel_values"], want, atol=1e-6)
    few = dataclasses.replace(config, sizes=((32, 32), (32, 64), (64, 32)))
    assert few.fitting(300, 160) == (32, 64) and few.fitting(90, 100) == (32, 32)

    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(config.processor()))  # what is exported
    assert read_vision_config(tmp_path) == config
    for wrong in ({"merge_size": 3}, {"resample": 2}, {"do_resize": False}):
        path.write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {next(iter(wrong))} = .* is not supported"):
            read_vision_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"temporal_patch_size": 1}, "temporal_patch_size = 1 is not supported"),
        ({"rope_parameters": {"rope_theta": 5.0}}, r"rope_theta = 5\.0 is not supported"),
        ({"num_heads": 3}, "hidden_size 32 is no multiple of 4"),
        ({"fullatt_block_indexes": [3]}, "fullatt_block_indexes has 3, but there are 3 layers"),
        ({"window_size": 4}, "window_size 4 is less than a feature's 8 pixels"),
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is not supported"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Qwen25VisionConfig.from_public({**TINY, **changes})


def test_sizes_that_cannot_be_seen_are_named(towers):
    _, ours, params = towers
    for size in ((16, 20), (8, 0), (8, 4)):
        with pytest.raises(ValueError, match=rf"multiples of 8 pixels, of 64 .* not {size[0]} x {size[1]}"):
            ours.config.tokens(*size)
    with pytest.raises(ValueError, match="not 20 x 16"):
        jax.eval_shape(ours.apply, params, jnp.zeros((1, 20, 16, 3)))
