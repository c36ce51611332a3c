"""UniLIP's autoencoder equals a composition of public torch classes, in outputs and gradients."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from dreamllm_jax.common.configuration import read
from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.interop.unilip_modules import autoencoder
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.planning.program import read_program
from dreamllm_jax.towers.autoencoders.dc import DCAutoencoderConfig
from dreamllm_jax.towers.autoencoders.unilip import UnilipAutoencoderConfig
from dreamllm_jax.towers.image_decoders.sana import SanaConfig
from tests.parity import assert_same, compiled, gradients, nchw, nhwc, randomised, tensors
from tests.tiny import DECODER_UNILIP, SEE_SIZE, tiny_config

DC = DCAutoencoderConfig(
    latent_channels=4,
    attention_head_dim=8,
    **{
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in (
            ("block_types", ("ResBlock", "ResBlock", "EfficientViTBlock")),
            ("block_out_channels", (8, 16, 16)),
            ("layers_per_block", (1, 1, 1)),
            ("qkv_multiscales", ((), (), (5,))),
        )
    },
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu",) * 3,
)
# Of 2 x 2 latents for 6 x 6 pixels; the decoder makes 8 x 8.
CONFIG = UnilipAutoencoderConfig(feature_width=12, decoder=DC, downscale=3)


def shapes_of(config):
    side = 2
    features = jnp.zeros((1, side**2, config.feature_width))

    def touch(module):
        return module.decode(module.encode(features))

    return nn.unbox(jax.eval_shape(functools.partial(config.make(jnp.float32).init, method=touch), jax.random.key(0)))[
        "params"
    ]


def test_output_and_gradients_equal_torch():
    reference = randomised(autoencoder(CONFIG))
    params, rng = from_torch(shapes_of(CONFIG), tensors(reference)), np.random.default_rng(0)
    assert to_torch(params).keys() == dict(reference.named_parameters()).keys()
    features, latents = rng.normal(size=(2, 4, 12)), rng.normal(size=(2, 3, 2, 4))
    weights = rng.normal(size=(2, 2, 2, 4)), rng.normal(size=(2, 9, 6, 3))
    features, latents, *weights = (x.astype(np.float32) for x in (features, latents, *weights))

    @compiled
    def ours(*given):
        def run(params, features, latents):
            module = CONFIG.make(jnp.float32).bind({"params": params})
            return module.encode(features), module.decode(latents)

        outputs, pull = jax.vjp(run, *given)
        return outputs, pull(tuple(weights))

    outputs, (grads, *of_inputs) = ours(params, features, latents)
    given = [torch.from_numpy(features).requires_grad_(), nchw(latents).requires_grad_()]
    found = CONFIG.run_public(reference, *given)
    sum((x * nchw(w)).sum() for x, w in zip(found.values(), weights, strict=True)).backward()
    want = {name: nhwc(x) for name, x in found.items()}
    want |= {"of features": given[0].grad.numpy(), "of latents": nhwc(given[1].grad)}
    got = dict(zip(want, (*outputs, *of_inputs), strict=True))
    assert_same(got | to_torch(grads), want | gradients(reference))


def test_latents_are_scaled_and_unscaled():
    stored = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype(np.float32)
    np.testing.assert_allclose(CONFIG.latents(stored), stored * 10.6, rtol=1e-6)
    np.testing.assert_allclose(CONFIG.unscaled(CONFIG.latents(stored)), stored, rtol=1e-6)
    narrow = jax.eval_shape(
        lambda params, x: CONFIG.make(jnp.bfloat16).apply({"params": params}, x, method="encode"),
        shapes_of(CONFIG),
        jax.ShapeDtypeStruct((1, 4, 12), jnp.bfloat16),
    )
    assert (narrow.shape, narrow.dtype) == ((1, 2, 2, 4), jnp.float32)


@pytest.mark.parametrize("upsampling", ["interpolate", "pixel_shuffle"])
def test_flops_are_the_compiled_ones(upsampling):
    # As large as the decoder's pictures, so that these are not scaled.
    config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(DC, upsample_block_type=upsampling), downscale=4)
    params, counted = shapes_of(config), set()
    counting = {name: Tally(trained=lambda path: bool(counted.add(path))) for name in ("encode", "decode")}
    config.encoder_flops(counting["encode"], 2, 24, 24)
    config.decoder_flops(counting["decode"], 2, 24, 24)
    given = {"encode": (2, 36, 12), "decode": (2, 6, 6, 4)}
    for name, shape in given.items():
        run = compiled(functools.partial(config.make(jnp.float32).apply, method=name))
        text = run.lower({"params": params}, jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()
        tally = counting[name]
        assert tally.forward == pytest.approx(read_program(text, {"data": 1}).mxu_flops, rel=0.01)
    assert counted == {path for path in flatten_dict(params, sep="/") if path.endswith("/kernel")}


def test_an_image_decoder_of_features_goes_with_what_makes_them():
    decoder = SanaConfig(
        DECODER_UNILIP.denoiser, dataclasses.replace(CONFIG, feature_width=32, downscale=SEE_SIZE // 2)
    )
    config = tiny_config(image_decoder=decoder)
    assert decoder.encodes_features == "visual_projector"
    assert (decoder.default_size, decoder.training_size_multiple, decoder.largest_size) == (SEE_SIZE,) * 3
    assert decoder.latent_shape(SEE_SIZE, SEE_SIZE) == (2, 2, 4) and config.language_model.width == 32
    assert decoder.stored_depends == ("autoencoder/down_blocks", "autoencoder/down_mlp")
    for change, message in (
        ({"feature_width": 31}, r"feature_width is 31, but features have 32 channels"),
        ({"downscale": 4}, r"are 4 features of pictures of 16 pixels, .* it was made for 4 of 8 pixels"),
    ):
        other = dataclasses.replace(decoder, autoencoder=dataclasses.replace(decoder.autoencoder, **change))
        with pytest.raises(ValueError, match=message):
            tiny_config(image_decoder=other)
    for name in ("feature_width", "blocks", "downscale", "scaling_factor"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            UnilipAutoencoderConfig(**{name: 0})


@pytest.mark.parametrize(("name", "layers", "width"), [("unilip-1b", 28, 896), ("unilip-2b", 20, 1536)])
def test_published_ones_paint_what_was_seen(name, layers, width):
    found = read(SanaConfig, SanaConfig.PUBLISHED[name])
    assert (found.denoiser.num_layers, found.autoencoder.feature_width) == (layers, width)
    assert found.default_size == 448 and found.latent_shape(448, 448) == (16, 16, 32)
