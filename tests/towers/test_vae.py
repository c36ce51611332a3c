"""The autoencoders: `Autoencoder` against diffusers' `AutoencoderKL` on the same random weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.towers.autoencoders.kl import Autoencoder, AutoencoderConfig, sample_moments
from dreamllm_jax.towers.autoencoders.pixel import PixelAutoencoder, PixelAutoencoderConfig
from dreamllm_jax.towers.image_decoders.mmdit import MMDiTConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion_3 import StableDiffusion3Config

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.parity import assert_same, compiled, gradients, nchw, nhwc, randomised, relative_error, tensors  # noqa: E402

TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}


def shapes_of(model):
    images = np.zeros((1, model.config.downscale, model.config.downscale, 3), np.float32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images)["params"])


def run_torch(model, method, x, cotangent):
    """Output, and gradients with respect to the input and every weight."""
    model.zero_grad()
    x = nchw(x).requires_grad_()
    out = model.encode(x).latent_dist.parameters if method == "encode" else model.decode(x).sample
    out.backward(nchw(cotangent))
    return {"output": nhwc(out), "input": nhwc(x.grad), **gradients(model)}


@functools.partial(compiled, static_argnums=(0, 1))
def run(model, method, params, x, cotangent):
    out, pull = jax.vjp(lambda params, x: model.apply({"params": params}, x, method=method), params, x)
    weights, x = pull(cotangent)
    return {"output": out, "input": x}, weights


WITHOUT = {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}  # as of Stable Diffusion 3


@pytest.fixture(scope="module", params=[{}, WITHOUT], ids=["", "without"])
def pair(request):
    """A torch autoencoder, ours, and our parameters with its weights."""
    reference = randomised(diffusers.AutoencoderKL(**TINY | request.param))
    model = Autoencoder(AutoencoderConfig.from_public(dict(reference.config)))
    return reference, model, from_torch(shapes_of(model), tensors(reference))


@pytest.mark.parametrize(
    ("method", "shape", "out_shape"),
    [("encode", (2, 12, 8, 3), (2, 6, 4, 8)), ("decode", (2, 6, 4, 4), (2, 12, 8, 3))],
)
def test_output_and_gradients_equal_diffusers(pair, method, shape, out_shape):
    reference, model, params = pair
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=size).astype(np.float32) for size in (shape, out_shape))
    outputs, weights = run(model, method, params, x, cotangent)
    assert outputs["output"].dtype == jnp.float32
    error = assert_same(outputs | to_torch(weights), run_torch(reference, method, x, cotangent))
    print(f"largest relative error {error:.1e}")


def test_state_dict_round_trip(pair):
    reference, _, params = pair
    assert_same(to_torch(params), tensors(reference), tolerance=0)


def test_init_touches_both_halves(pair):
    _, model, params = pair
    quant = {"quant_conv", "post_quant_conv"} if model.config.use_quant_conv else set()
    assert params.keys() == {"encoder", "decoder"} | quant
    out = jax.eval_shape(model.apply, {"params": params}, np.zeros((1, 8, 4, 3), np.float32))
    assert out.shape == (1, 8, 4, 3)


def today(tensors):
    return {AutoencoderConfig.public.ours(name): tensor for name, tensor in tensors.items()}


def test_old_attention_names_load(pair):
    reference, _, params = pair
    new = tensors(reference)
    legacy = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in new.items():
        for now, then in legacy.items():
            if f".{now}." in name:
                name = name.replace(now, then)
                tensor = tensor[..., None, None] if name.endswith("weight") else tensor
        old[name] = tensor
    assert old.keys() != new.keys()

    renamed = today(old)
    theirs = dict(old)
    reference._fix_state_dict_keys_on_load(theirs)
    assert renamed.keys() == theirs.keys() == new.keys()
    jax.tree.map(np.testing.assert_array_equal, from_torch(params, renamed), params)
    assert today(new) == new


def test_bfloat16_is_near_float32(pair):
    reference, model, params = pair
    latents = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    with torch.no_grad():
        want = nhwc(reference.decode(nchw(latents)).sample)
    decode = functools.partial(model.clone(dtype=jnp.bfloat16).apply, method="decode")
    got = compiled(decode)({"params": params}, latents)
    assert got.dtype == jnp.float32
    assert relative_error(got, want) < 0.05


def test_latents_are_shifted_and_scaled_and_back():
    config = AutoencoderConfig.from_public(TINY | WITHOUT | {"scaling_factor": 1.5})
    encoded, noise = np.random.default_rng(0).normal(size=(2, 1, 3, 3, 8)).astype(np.float32)
    latents = config.latents(encoded, noise[..., :4])
    drawn = sample_moments(encoded, noise[..., :4])
    np.testing.assert_allclose(latents, (drawn - 0.1) * 1.5, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(config.unscaled(latents), drawn, rtol=1e-6, atol=1e-6)
    assert AutoencoderConfig.from_public(config.to_public()) == config


def test_sample_moments_equals_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    rng = np.random.default_rng(0)
    moments = (20 * rng.normal(size=(2, 3, 5, 8))).astype(np.float32)  # some log-variances beyond both limits
    torch.manual_seed(1)
    want = DiagonalGaussianDistribution(nchw(moments)).sample()
    torch.manual_seed(1)
    noise = nhwc(torch.randn(2, 4, 3, 5))
    assert relative_error(sample_moments(moments, noise), nhwc(want)) <= 1e-6


def test_every_weight_has_logical_axes(pair):
    _, model, _ = pair
    params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]
    shapes = flatten_dict(nn.unbox(params), sep="/")
    for name, axes in flatten_dict(nn.get_partition_spec(params), sep="/").items():
        want = {1: ("tower_norm",), 2: ("tower_in", "tower_out"), 4: (None, None, "tower_in", "tower_out")}
        assert tuple(axes) == want[len(shapes[name].shape)], name


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_pixel_autoencoder_gives_the_images_back(patch_size):
    config = PixelAutoencoderConfig(patch_size)
    model = PixelAutoencoder(config, jnp.bfloat16)
    images = np.random.default_rng(0).uniform(-1, 1, size=(2, 8, 4, 3)).astype(np.float32)
    assert not model.init(jax.random.key(0), images)
    moments = model.apply({}, images, method="encode")
    assert moments.shape == (2, 8 // config.downscale, 4 // config.downscale, 2 * config.latent_channels)
    latents = sample_moments(moments, np.ones((*moments.shape[:-1], config.latent_channels), np.float32))
    np.testing.assert_allclose(latents, moments[..., : config.latent_channels], atol=1e-6)
    decoded = model.apply({}, moments[..., : config.latent_channels], method="decode")
    np.testing.assert_array_equal(decoded, images)
    np.testing.assert_array_equal(model.apply({}, images), images)


def test_pixel_latent_holds_a_patch():
    images = np.random.default_rng(0).uniform(-1, 1, size=(1, 4, 6, 3)).astype(np.float32)
    moments = PixelAutoencoder(PixelAutoencoderConfig(2)).apply({}, images, method="encode")
    np.testing.assert_array_equal(moments[0, 1, 2, :12].reshape(2, 2, 3), images[0, 2:4, 4:6])


def test_configs_share_what_callers_read():
    published = AutoencoderConfig()
    assert (published.downscale, published.latent_channels, published.scaling_factor) == (8, 4, 0.18215)
    pixels = PixelAutoencoderConfig(4)
    assert (pixels.downscale, pixels.latent_channels, pixels.scaling_factor) == (4, 48, 1.0)


@pytest.mark.parametrize("model", [Autoencoder(AutoencoderConfig(**TINY)), PixelAutoencoder(PixelAutoencoderConfig(2))])
def test_odd_image_sizes_are_refused(model):
    with pytest.raises(ValueError, match=r"7 x 8 pixels.*multiples of 2"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 7, 8, 3), np.float32))


def test_config_reads_what_diffusers_writes(pair):
    settings = dict(pair[0].config)
    as_json = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    assert AutoencoderConfig.from_public(as_json) == pair[1].config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latents_mean", [0.1] * 4),
        ("mid_block_add_attention", False),
        ("down_block_types", ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("act_fn", "gelu"),
        ("norm_num_groups", 3),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_unsupported_setting_is_named(key, value):
    with pytest.raises(ValueError, match="norm groups" if value == 3 else key):
        AutoencoderConfig.from_public(TINY | {key: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "weights", "side"),
    [(AutoencoderConfig(), 83_653_863, 32), (StableDiffusion3Config(MMDiTConfig()).autoencoder, 83_819_683, 16)],
    ids=["4 channels", "16 channels"],
)
def test_published_autoencoder_at_true_width(config, weights, side):
    """All 84 million weights on a small image, both ways."""
    torch.manual_seed(0)
    reference = diffusers.AutoencoderKL(**config.to_public()).eval()
    assert sum(parameter.numel() for parameter in reference.parameters()) == weights
    model, channels = Autoencoder(config), config.latent_channels
    images = np.random.default_rng(0).uniform(-1, 1, size=(1, side, side, 3)).astype(np.float32)
    params = from_torch(shapes_of(model), tensors(reference))
    with torch.no_grad():
        want = reference.encode(nchw(images)).latent_dist.parameters
        want_images = reference.decode(want[:, :channels]).sample
    got = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode"))(params, images)
    decoded = jax.jit(lambda params, x: model.apply({"params": params}, x, method="decode"))(
        params, nhwc(want)[..., :channels]
    )
    error = assert_same({"moments": got, "images": decoded}, {"moments": nhwc(want), "images": nhwc(want_images)})
    print(f"largest relative error {error:.1e}")
