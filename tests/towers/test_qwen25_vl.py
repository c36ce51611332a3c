"""Qwen2.5-VL's vision tower against transformers' class on the same random weights."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.towers.vision_encoders.qwen25_vl import Qwen25Vision, Qwen25VisionConfig
from tests.parity import assert_same, compiled, gradients, nchw, randomised, tensors

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
# Height and width: one window, whole windows, windows at the border that are smaller in either direction or both.
SIZES = ((16, 16), (32, 48), (40, 24), (8, 56))


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


@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers(towers, size):
    assert_equal_towers(*towers, size)
