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
from dreamllm_jax.interop.vision_encoder import read_vision_config
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.towers.vision_encoders.clip import MEAN, STD, ClipVision, ClipVisionConfig
from dreamllm_jax.towers.vision_encoders.pixels import normalise
from tests.parity import assert_same, gradients, randomised, relative_error, tensors
from tests.tiny import tiny_config, tiny_params

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def pair(select_layer=-2, **changes):
    """A random PyTorch tower, ours, and its weights for ours."""
    config = transformers.CLIPVisionConfig(**{**TINY, **changes})
    theirs = randomised(transformers.CLIPVisionModel(config))
    ours = ClipVision(ClipVisionConfig.from_public(config.to_dict(), select_layer))
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
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous().requires_grad_()
    output = theirs(pixels, output_hidden_states=True).hidden_states[config.select_layer][:, 1:]
    output.backward(torch.from_numpy(cotangent))

    @jax.jit
    def run(params, images):
        states, pullback = jax.vjp(ours.apply, params, images)
        return states, pullback(cotangent)

    states, (weights, grad) = run(params, images)
    got = {"states": states, "pixels": grad.transpose(0, 3, 1, 2), **to_torch(weights["params"])}
    want = {"states": output.detach(), "pixels": pixels.grad, **gradients(theirs)}
    # A bias of the keys moves every score of a query alike: its gradient is zero but for rounding.
    for name in [name for name in want if name.endswith("k_proj.bias")]:
        scale = np.linalg.norm(want[name.replace("k_proj", "v_proj")])
        assert np.linalg.norm(got.pop(name)) <= 1e-5 * scale
        assert np.linalg.norm(want.pop(name)) <= 1e-5 * scale
    assert_same(got, want)


@pytest.mark.parametrize(
    ("select_layer", "changes"),
    [
        (-2, {}),
        (-1, {"hidden_act": "gelu", "layer_norm_eps": 1e-6}),
        (1, {"patch_size": 14}),
        (0, {"patch_size": 9}),  # does not divide the image: the rest is not read
        (3, {"image_size": 14}),
    ],
)
def test_equals_transformers(select_layer, changes):
    assert_equal_towers(*pair(select_layer, **changes))


def test_only_the_needed_layers_run():
    flops = {}
    for select_layer in (0, 1, 2, 3):
        _, ours, params = pair(select_layer)
        jaxpr = jax.make_jaxpr(ours.apply)(params, images_of(ours.config, 1)).jaxpr
        flops[select_layer] = [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert flops == {0: [], 1: [1], 2: [2], 3: [3]}


@pytest.mark.parametrize("select_layer", [0, -2])
def test_checkpoints_go_through_whole(select_layer):
    theirs, _, params = pair(select_layer)
    assert_same(to_torch(params["params"]), tensors(theirs), tolerance=0.0)


def test_remat_changes_no_number():
    _, ours, params = pair()
    images = images_of(ours.config, 2)

    def outcome(policy):
        model = ours.clone(remat=policy)
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(model.apply(p, images)).sum()))(params)

    want = outcome("none")
    for policy in ("full",):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), outcome(policy), want)


def test_half_precision_stays_near():
    _, ours, params = pair()
    images = images_of(ours.config, 2)
    states = jax.jit(ours.clone(dtype=jnp.bfloat16).apply)(params, images)
    assert states.dtype == jnp.bfloat16
    assert relative_error(states.astype(jnp.float32), jax.jit(ours.apply)(params, images)) < 0.03


def test_pixels_are_normalised_as_transformers_does():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    want = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(normalise(image, MEAN, STD), want, atol=1e-6)


def test_the_processor_beside_a_tower_says_how_its_pixels_are_normalised(tmp_path):
    """And where it makes other pixels than ours, it is refused."""
    theirs = transformers.CLIPVisionConfig(**TINY)
    theirs.save_pretrained(tmp_path)
    assert read_vision_config(tmp_path).image_mean == (0.48145466, 0.4578275, 0.40821073)
    size = TINY["image_size"]
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    processor = transformers.CLIPImageProcessorPil(**sizes, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.5])
    processor.save_pretrained(tmp_path)
    config = read_vision_config(tmp_path)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    want = processor(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    got = normalise(config.preprocess(photo, size, size), config.image_mean, config.image_std)
    np.testing.assert_allclose(got, want, atol=1e-6)

    whole = tiny_config()
    encoder = dataclasses.replace(whole.vision_encoder, image_mean=(0.5,) * 3)
    model = DreamLLM(dataclasses.replace(whole, vision_encoder=encoder))
    images = np.random.default_rng(1).integers(0, 256, (1, *[encoder.image_size] * 2, 3), dtype=np.uint8)
    features = jax.jit(lambda variables, images: model.bind(variables).see(images))
    variables = {"params": tiny_params(whole)}
    normalised = normalise(images, (0.5,) * 3, STD)
    assert relative_error(features(variables, images), features(variables, normalised)) < 1e-6

    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.rename(tmp_path / "kept.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))  # of a CLIPProcessor
    assert read_vision_config(tmp_path) == config
    path.write_text(json.dumps(settings | {"size": size, "crop_size": size}))  # as they were written once
    assert read_vision_config(tmp_path) == config
    for wrong in ({"do_center_crop": False}, {"size": {"shortest_edge": 2 * size}}, {"resample": 2}):
        path.write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {next(iter(wrong))} = .* is not supported"):
            read_vision_config(tmp_path)


def test_config_is_read_whole_or_alone():
    alone = transformers.CLIPVisionConfig(**TINY)
    whole = transformers.CLIPConfig(vision_config=alone.to_dict())
    want = ClipVisionConfig(**TINY, select_layer=-1)
    assert (
        ClipVisionConfig.from_public(alone.to_dict(), -1) == ClipVisionConfig.from_public(whole.to_dict(), -1) == want
    )
    assert want.num_patches == 16
    assert ClipVisionConfig.from_public(transformers.CLIPVisionConfig().to_dict()) == ClipVisionConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_channels": 4}, "num_channels = 4 is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported"),
        ({"model_type": "siglip_vision_model"}, "model_type 'siglip_vision_model' is not supported"),
        ({"image_size": [28, 56]}, "image_size = .* only a single number"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"patch_size": 56}, "patch_size 56 does not fit image_size 28"),
        ({"num_hidden_layers": 0}, "select_layer -2 is beyond the 0 layers"),
    ],
)
def test_config_refuses_what_it_cannot_honour(changes, message):
    with pytest.raises(ValueError, match=message):
        ClipVisionConfig.from_public({**TINY, **changes})


def test_images_of_another_size_are_refused():
    _, ours, params = pair()
    with pytest.raises(ValueError, match=r"images are \(32, 32, 3\) where the tower takes \(28, 28, 3\)"):
        ours.apply(params, jnp.zeros((1, 32, 32, 3)))


@pytest.mark.slow
def test_one_layer_at_the_width_of_clip_large():
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    assert_equal_towers(*pair(-1, **large, num_hidden_layers=1, image_size=224, patch_size=14), count=1)
