import dataclasses
import json
import re

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
from dreamllm_jax.towers.connectors.newline import NewlineConfig
from dreamllm_jax.towers.vision_encoders.pixels import normalise
from dreamllm_jax.towers.vision_encoders.siglip import SiglipVision, SiglipVisionConfig
from tests import public_models
from tests.parity import assert_same, compiled, gradients, nchw, nhwc, randomised, relative_error, tensors

TINY = {
    "hidden_size": 36,  # heads of 18 channels, as odd a number as the published 72
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 9,
}


def pair(select_layer=None, packed=False, **changes):
    """A random PyTorch tower, ours, and its weights for ours."""
    config = transformers.SiglipVisionConfig(**{**TINY, **changes}, vision_use_head=False)
    theirs = randomised(transformers.SiglipVisionModel(config))
    ours = SiglipVision(SiglipVisionConfig.from_public(config.to_dict(), select_layer, packed))
    template = jax.eval_shape(lambda: ours.init(jax.random.key(0), images_of(ours.config, 1)))
    return theirs, ours, {"params": from_torch(nn.unbox(template)["params"], tensors(theirs))}


def images_of(config, count):
    size = config.image_size
    return np.random.default_rng(0).normal(size=(count, size, size, 3)).astype(np.float32)


def assert_equal_towers(theirs, ours, params, count=2):
    """Outputs, and gradients with respect to the pixels and every weight."""
    config, images = ours.config, images_of(ours.config, count)
    shape = (count, config.num_patches, config.hidden_size)
    cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    pixels = nchw(images).requires_grad_()
    output = config.run_public(theirs, pixels)
    output.backward(torch.from_numpy(cotangent))

    @compiled
    def run(params, images):
        states, pullback = jax.vjp(ours.apply, params, images)
        return states, pullback(cotangent)

    states, (weights, grad) = run(params, images)
    got = {"states": states, "pixels": grad, **to_torch(weights["params"])}
    return assert_same(got, {"states": output.detach(), "pixels": nhwc(pixels.grad), **gradients(theirs)})


@pytest.mark.parametrize(
    ("select_layer", "packed", "changes"),
    [(None, False, {}), (-1, True, {"patch_size": 7}), (1, False, {"hidden_act": "gelu"})],
    ids=["tower's output", "packed", "a layer within"],
)
def test_equals_transformers(select_layer, packed, changes):
    assert_equal_towers(*pair(select_layer, packed, **changes))


@pytest.mark.slow
def test_one_layer_at_the_width_of_so400m():
    width = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    assert_equal_towers(*pair(**width, num_hidden_layers=1, image_size=384, patch_size=14), count=1)


def test_half_precision_stays_near():
    _, ours, params = pair()
    images = images_of(ours.config, 2)
    states = compiled(ours.clone(dtype=jnp.bfloat16).apply)(params, images)
    assert states.dtype == jnp.bfloat16
    assert relative_error(states.astype(jnp.float32), compiled(ours.apply)(params, images)) < 0.03


def test_flops_are_those_of_the_compiled_program():
    for select_layer, packed, remat in ((None, False, "full"), (1, True, "none")):
        _, ours, params = pair(select_layer, packed, patch_size=7)
        ours, images = ours.clone(remat=remat), images_of(ours.config, 2)
        step = jax.jit(jax.grad(lambda params, ours=ours, images=images: jnp.square(ours.apply(params, images)).sum()))
        program = read_program(step.lower(params).compile().as_text(), {"data": 1})
        tally = Tally(lambda path: True, platform="cpu", dtype="float32")
        ours.config.flops(tally, len(images), *[ours.config.image_size] * 2, remat == "full")
        assert tally.total.executed == pytest.approx(sum(program.flops_by_name.values()), rel=0.01)


def test_pixels_are_those_of_the_image_processor(tmp_path):
    """Bytes to the last bit, floats to the last step; and where it makes other pixels than ours, it is refused."""
    transformers.SiglipVisionConfig(**TINY).save_pretrained(tmp_path)
    assert read_vision_config(tmp_path).resample == "bicubic"
    path, size = tmp_path / "preprocessor_config.json", TINY["image_size"]
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    for resample in (3, 2):
        given = {"size": {"height": size, "width": size}, "resample": resample}
        processor = transformers.SiglipImageProcessorPil(**given)
        processor.save_pretrained(tmp_path)
        config = read_vision_config(tmp_path)
        want = processor(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        pixels = config.preprocess(photo, *config.fitting(*photo.size))
        np.testing.assert_array_equal(pixels, np.rint((want / 2 + 0.5) * 255))
        got = normalise(pixels, config.image_mean, config.image_std)
        np.testing.assert_allclose(got, want, rtol=0, atol=2**-23)  # one step of a number next to 1
        again = transformers.SiglipImageProcessorPil.from_dict(config.processor())
        np.testing.assert_array_equal(again(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0), want)
    settings = json.loads(path.read_text())
    for wrong in ({"do_resize": False}, {"size": {"shortest_edge": size}}, {"resample": 0}):
        path.write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {next(iter(wrong))} = .* is not supported"):
            read_vision_config(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_published_is_read_without_its_head(whole, tmp_path):
    part = open_vision_encoder(public_models.save_siglip(tmp_path, whole=whole))
    assert part.config == SiglipVisionConfig(**public_models.CLIP, resample="bilinear")
    heads = {re.sub(r"^vision_model\.", "", name).split(".")[0] for name in part.left_out}
    assert heads == {"head", *(("text_model", "logit_scale", "logit_bias") if whole else ())}
    config = dataclasses.replace(part.config, select_layer=-2)
    assert open_vision_encoder(tmp_path, -2).config == config and config.depth == 2


def test_a_row_of_patches_is_ended_by_the_projector():
    """As `pack_image_features` of LLaVA-OneVision does it; and the vector's gradient is a sum in float32."""
    config, side, width = NewlineConfig(), 3, 8
    features = np.random.default_rng(2).normal(size=(2, side * (2 * side + 1), 5)).astype(np.float32)
    module = config.make(width, jnp.float32)
    params = nn.unbox(module.init(jax.random.key(0), features))
    newline = params["params"]["image_newline"]
    given = compiled(module.apply)(params, features)
    rows = given[:, side**2 :].reshape(2, side, side + 1, width)
    np.testing.assert_array_equal(rows[:, :, side], np.broadcast_to(newline, (2, side, width)))
    many = np.zeros((512, *features.shape[1:]), np.float32)
    half = config.make(width, jnp.bfloat16)
    grad = compiled(jax.grad(lambda params: half.apply(params, many).astype(jnp.float32).sum()))(params)
    np.testing.assert_array_equal(grad["params"]["image_newline"], np.full(width, 512 * side))
    for tokens in (0, 9, 20, 22):
        with pytest.raises(ValueError, match=rf"needs features with places for its vector, got {tokens}"):
            config.require_tokens(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"model_type": "siglip2_vision_model"}, "model_type 'siglip2_vision_model' is not supported"),
        ({"image_size": [28, 56]}, "image_size = .* only a single number"),
    ],
)
def test_config_refuses_what_it_cannot_honour(changes, message):
    with pytest.raises(ValueError, match=message):
        SiglipVisionConfig.from_public({**TINY, **changes})
