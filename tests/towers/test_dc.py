"""The deep compression autoencoder against diffusers' `AutoencoderDC` on the same random weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.planning.program import read_program
from dreamllm_jax.towers.autoencoders.dc import PUBLISHED, DCAutoencoder, DCAutoencoderConfig
from dreamllm_jax.towers.autoencoders.tiles import decode_tiled

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.parity import assert_same, compiled, gradients, nchw, nhwc, randomised, relative_error, tensors  # noqa: E402

# As SANA has it, and as the others have it: shuffled pixels, nothing at full resolution, no scales, no shortcuts.
SANA = {
    "latent_channels": 4,
    "attention_head_dim": 16,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "encoder_layers_per_block": (2, 1, 1),
    "decoder_layers_per_block": (1, 2, 1),
    "encoder_qkv_multiscales": ((), (5,), (3, 5)),
    "decoder_qkv_multiscales": ((), (3,), ()),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_act_fns": ("relu", "silu", "silu"),
    "scaling_factor": 0.41407,
}
SHUFFLED = SANA | {
    "encoder_block_out_channels": (8, 32, 32),
    "decoder_block_out_channels": (8, 32, 32),
    "encoder_layers_per_block": (0, 1, 1),
    "decoder_layers_per_block": (0, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": "ResBlock",
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": False,
    "decoder_in_shortcut": False,
    "decoder_conv_act_fn": "silu",
}
CASES = {
    "as SANA": SANA,
    "shuffled": SHUFFLED,
    "nothing at full resolution": SHUFFLED | {"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
}


def shapes_of(model):
    images = np.zeros((1, model.config.downscale, model.config.downscale, 3), np.float32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images)["params"])


def made(settings):
    """A torch autoencoder, ours, and our parameters with its weights."""
    reference = randomised(diffusers.AutoencoderDC(**settings))
    model = DCAutoencoder(DCAutoencoderConfig.from_public(dict(reference.config)))
    return reference, model, from_torch(shapes_of(model), tensors(reference))


@pytest.fixture(scope="module")
def sana():
    return made(SANA)


def run_torch(model, method, x, cotangent):
    """Output, and gradients with respect to the input and every weight."""
    model.zero_grad()
    x = nchw(x).requires_grad_()
    out = model.encode(x).latent if method == "encode" else model.decode(x).sample
    out.backward(nchw(cotangent))
    return {"output": nhwc(out), "input": nhwc(x.grad), **gradients(model)}


@functools.partial(compiled, static_argnums=(0, 1))
def run(model, method, params, x, cotangent):
    out, pull = jax.vjp(lambda params, x: model.apply({"params": params}, x, method=method), params, x)
    weights, x = pull(cotangent)
    return {"output": out, "input": x}, weights


@functools.partial(compiled, static_argnums=(0, 1))
def apply(model, method, params, x):
    return model.apply({"params": params}, x, method=method)


@pytest.mark.parametrize(("method", "shape"), [("encode", (2, 24, 16, 3)), ("decode", (2, 6, 4, 4))])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_diffusers(case, method, shape):
    reference, model, params = made(CASES[case])
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    out = (2, 6, 4, 4) if method == "encode" else (2, 24, 16, 3)
    cotangent = rng.normal(size=out).astype(np.float32)
    outputs, weights = run(model, method, params, x, cotangent)
    assert outputs["output"].dtype == jnp.float32
    error = assert_same(outputs | to_torch(weights), run_torch(reference, method, x, cotangent))
    print(f"largest relative error {error:.1e}")


@pytest.mark.parametrize("case", CASES)
def test_state_dict_round_trip(case):
    reference, model, params = made(CASES[case])
    assert to_torch(params).keys() == reference.state_dict().keys()
    assert_same(to_torch(params), tensors(reference), tolerance=0)
    again = diffusers.AutoencoderDC(**model.config.to_public())
    again.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in to_torch(params).items()})


def test_run_public_is_what_ours_computes_of_fewer_pixels_than_channels_too(sana):
    reference, model, params = sana
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, size=(1, 8, 12, 3)).astype(np.float32)
    latents = rng.normal(size=(1, 2, 3, 4)).astype(np.float32)
    with torch.no_grad():
        want = model.config.run_public(reference, nchw(images), nchw(latents))
    got = {"stored": apply(model, "encode", params, images), "images": apply(model, "decode", params, latents)}
    assert_same(got, {name: nhwc(value) for name, value in want.items()})


def test_latents_are_scaled_and_unscaled():
    config = DCAutoencoderConfig()
    assert config.deterministic and config.encoded_channels == config.latent_channels == 32 and config.downscale == 32
    stored = np.random.default_rng(0).normal(size=(1, 2, 2, 32)).astype(np.float32)
    np.testing.assert_allclose(config.latents(stored, None), stored * 0.41407, rtol=1e-6)
    np.testing.assert_allclose(config.unscaled(config.latents(stored)), stored, rtol=1e-6)


def test_encoding_depends_on_the_encoder(sana):
    _, model, params = sana
    images = np.ones((1, 8, 8, 3), np.float32)
    encode = jax.make_jaxpr(functools.partial(model.apply, method="encode"))({"params": params}, images).jaxpr
    used = {variable for equation in encode.eqns for variable in equation.invars if not hasattr(variable, "val")}
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    read = {path for path, variable in zip(paths, encode.invars, strict=False) if variable in used}
    assert read == {path for path in paths if path.startswith(model.config.encode_depends)}


def test_bfloat16_is_near_float32(sana):
    _, model, params = sana
    rng = np.random.default_rng(0)
    inputs = {"encode": rng.uniform(-1, 1, (1, 32, 32, 3)), "decode": rng.normal(size=(1, 8, 8, 4))}
    for method, x in inputs.items():
        wide, narrow = (apply(model.clone(dtype=dtype), method, params, x) for dtype in (jnp.float32, jnp.bfloat16))
        assert narrow.dtype == jnp.float32
        error = relative_error(narrow, wide)
        print(f"{method}: {error:.1e}")
        assert error < 0.03


@pytest.fixture(scope="module")
def small():
    return made(SHUFFLED)


@pytest.mark.parametrize("side", [(9, 6), (4, 5), (3, 3)])
def test_tiles_equal_diffusers(small, side):
    reference, model, params = small
    reference.enable_tiling(16, 16, 12, 12)
    latents = np.random.default_rng(0).normal(size=(2, *side, 4)).astype(np.float32)
    with torch.no_grad():
        want = nhwc(reference.decode(nchw(latents)).sample)
        reference.disable_tiling()
        whole = nhwc(reference.decode(nchw(latents)).sample)
    decode = functools.partial(apply, model, "decode", params)
    got = decode_tiled(decode, latents, model.config.downscale, tile=16, stride=12)
    assert got.shape == (2, 4 * side[0], 4 * side[1], 3)
    assert relative_error(got, want) < 1e-5
    assert (relative_error(got, whole) < 1e-5) == (max(side) <= 4)


def test_tiles_of_one_value_show_no_seams():
    def decode(latents):
        return jnp.repeat(jnp.repeat(latents[..., :3], 4, axis=1), 4, axis=2)

    latents = np.random.default_rng(0).normal(size=(1, 11, 7, 3)).astype(np.float32)
    got = compiled(functools.partial(decode_tiled, decode, downscale=4, tile=16, stride=8))(latents)
    np.testing.assert_allclose(got, decode(latents), atol=1e-6)
    with pytest.raises(ValueError, match="stride=18"):
        decode_tiled(decode, latents, 4, 16, 18)


@pytest.mark.parametrize("case", CASES)
def test_encoder_flops_are_the_compiled_ones(case):
    model = DCAutoencoder(DCAutoencoderConfig.from_public(CASES[case]))
    images = jax.ShapeDtypeStruct((2, 24, 16, 3), jnp.float32)
    encode = compiled(functools.partial(model.apply, method="encode"))
    text = encode.lower({"params": shapes_of(model)}, images).compile().as_text()
    tally = Tally(trained=lambda path: False)
    model.config.encoder_flops(tally, 2, 24, 16)
    assert tally.forward == tally.total.executed == pytest.approx(read_program(text, {"data": 1}).mxu_flops, rel=0.01)
    assert 0.25 * tally.forward < tally.total.model < tally.forward


def test_flops_count_every_kernel_of_the_encoder():
    config = DCAutoencoderConfig.from_public(SANA)
    kernels = {
        path
        for path in flatten_dict(shapes_of(DCAutoencoder(config)), sep="/")
        if path.startswith("encoder/") and path.endswith("/kernel")
    }
    counted = set()
    config.encoder_flops(Tally(trained=lambda path: bool(counted.add(path))), 1, 8, 8)
    assert counted == kernels


def test_every_weight_has_logical_axes(sana):
    _, model, _ = sana
    params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]
    shapes = flatten_dict(nn.unbox(params), sep="/")
    for name, axes in flatten_dict(nn.get_partition_spec(params), sep="/").items():
        want = {1: ("tower_norm",), 2: ("tower_in", "tower_out"), 4: (None, None, "tower_in", "tower_out")}
        assert tuple(axes) == want[len(shapes[name].shape)], name


def test_odd_image_sizes_are_refused():
    model = DCAutoencoder(DCAutoencoderConfig.from_public(SANA))
    with pytest.raises(ValueError, match=r"6 x 8 pixels.*multiples of 4"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 6, 8, 3), np.float32))


def test_config_reads_what_diffusers_writes(sana):
    as_json = {key: list(value) if isinstance(value, tuple) else value for key, value in dict(sana[0].config).items()}
    assert DCAutoencoderConfig.from_public(as_json) == sana[1].config
    assert DCAutoencoderConfig.from_public(as_json | {"downsample_block_type": "Conv"}) == sana[1].config
    assert DCAutoencoderConfig.from_public(sana[1].config.to_public()) == sana[1].config


def test_settings_left_out_are_those_of_diffusers():
    short = {"scaling_factor": 0.5, "_class_name": "AutoencoderDC"}
    with torch.device("meta"):
        full = dict(diffusers.AutoencoderDC(**short).config)
    assert DCAutoencoderConfig.from_public(short) == DCAutoencoderConfig.from_public(full)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decoder_norm_types", ["batch_norm", "rms_norm", "rms_norm"], "decoder_norm_types: 'batch_norm'"),
        ("decoder_act_fns", "relu6", "decoder_act_fns"),
        ("decoder_conv_act_fn", "mish", "decoder_conv_act_fn"),
        ("encoder_block_types", "Block", "encoder_block_types"),
        ("encoder_layers_per_block", [1, 0, 1], "only the first and the last stage"),
        ("encoder_qkv_multiscales", [[], [4], []], "odd"),
        ("decoder_block_out_channels", [16, 48, 48], "48 does not divide 4 x 16"),
        ("decoder_block_out_channels", [8, 18, 18], "heads of 16"),
        ("decoder_block_out_channels", [8, 16], "3 stages|2 stages"),
        ("upsample_block_type", "nearest", "upsample_block_type"),
        ("a_setting_of_tomorrow", 1, "a_setting_of_tomorrow"),
    ],
)
def test_unsupported_setting_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        DCAutoencoderConfig.from_public(SANA | {key: value})


def published():
    return DCAutoencoderConfig(**PUBLISHED["dc-ae-f32c32-sana-1.0"])


def test_published_settings_have_the_published_size():
    sizes = flatten_dict(jax.tree.map(lambda x: x.size, shapes_of(DCAutoencoder(published()))), sep="/")
    with torch.device("meta"):
        reference = diffusers.AutoencoderDC(**published().to_public())
    assert sum(sizes.values()) == sum(parameter.numel() for parameter in reference.parameters()) == 312_250_275


@pytest.mark.slow
def test_published_autoencoder_at_true_width():
    """All 312 million weights on a small picture, both ways."""
    reference = randomised(diffusers.AutoencoderDC(**published().to_public()))
    model = DCAutoencoder(published())
    images = np.random.default_rng(0).uniform(-1, 1, size=(1, 64, 64, 3)).astype(np.float32)
    params = from_torch(shapes_of(model), tensors(reference))
    with torch.no_grad():
        want = reference.encode(nchw(images)).latent
        want_images = reference.decode(want).sample
    encode, decode = (jax.jit(functools.partial(model.apply, method=method)) for method in ("encode", "decode"))
    got, decoded = encode({"params": params}, images), decode({"params": params}, nhwc(want))
    error = assert_same({"stored": got, "images": decoded}, {"stored": nhwc(want), "images": nhwc(want_images)})
    print(f"largest relative error {error:.1e}")
