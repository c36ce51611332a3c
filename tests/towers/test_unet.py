"""The U-Net against diffusers' `UNet2DConditionModel` on the same random weights."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.layers.lora import LORA_A, LORA_B, is_adapter
from dreamllm_jax.layers.timesteps import timestep_embedding
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.image_decoders.unet import UNet, UNetConfig
from dreamllm_jax.towers.image_decoders.unet_transformer import Transformer2DModel, UNetLora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.parity import (  # noqa: E402
    assert_same,
    compiled,
    gradients,
    merged,
    nchw,
    nhwc,
    random_weights,
    randomised,
    relative_error,
    tensors,
)

TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
FAMILIES = {
    "1.5": TINY | {"attention_head_dim": 2, "use_linear_projection": False},
    "2.x": TINY | {"attention_head_dim": (4, 2), "use_linear_projection": True, "transformer_layers_per_block": (1, 2)},
    "xl": TINY
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 3),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 43,
    },
}


def make_inputs(config, size=(4, 6), n=2, q=5):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(n, *size, config.in_channels)).astype(np.float32)
    sequence = rng.normal(size=(n, q, config.cross_attention_dim)).astype(np.float32)
    condition = Condition(sequence)
    if config.addition_embed_type:
        sizes = np.array([[1024, 683, 0, 127, 1024, 1024], [96, 64, 3, 0, 512, 768]][:n], np.float32)
        pooled = rng.normal(size=(n, config.pooled_width)).astype(np.float32)
        condition = condition.replace(pooled=pooled, extra={"time_ids": sizes})
    return latents, np.array([999, 3][:n], np.int32), condition


def named(condition):
    """The arrays of a condition, or of its gradient, by name."""
    return {"condition": condition.sequence} | (
        {"pooled": condition.pooled, **condition.extra} if condition.pooled is not None else {}
    )


def shapes_of(model, inputs):
    return nn.unbox(weights_of(model, inputs))


def weights_of(model, inputs):
    latents, timesteps, condition = inputs
    return jax.eval_shape(model.init, jax.random.key(0), latents, timesteps, condition)["params"]


def run_torch(model, latents, timesteps, condition, cotangent):
    model.zero_grad()
    latents = nchw(latents).requires_grad_()
    condition = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), condition)
    out = UNetConfig.from_public(dict(model.config)).run_public(model, latents, torch.tensor(timesteps), condition)
    out.backward(nchw(cotangent))
    given = {name: leaf.grad.numpy() for name, leaf in named(condition).items()}
    return {"output": nhwc(out), "latents": nhwc(latents.grad), **given, **gradients(model)}


@functools.partial(compiled, static_argnums=0)
def run(model, params, latents, timesteps, condition, cotangent):
    """Output, and gradients with respect to latents, condition and weights."""

    def forward(params, latents, condition):
        return model.apply({"params": params}, latents, timesteps, condition)

    out, pull = jax.vjp(forward, params, latents, condition)
    weights, latents, condition = pull(cotangent)
    return {"output": out, "latents": latents, **named(condition)}, weights


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A torch U-Net, ours with its weights, inputs, and what ours makes of them."""
    reference = randomised(diffusers.UNet2DConditionModel(**FAMILIES[request.param]))
    config = UNetConfig.from_public(dict(reference.config))
    model, inputs = UNet(config), make_inputs(config)
    params = from_torch(shapes_of(model, inputs), tensors(reference))
    cotangent = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
    return reference, model, params, (*inputs, cotangent), run(model, params, *inputs, cotangent)


def test_output_and_gradients_equal_diffusers(case):
    reference, _, _, inputs, (got, weights) = case
    assert got["output"].dtype == jnp.float32
    error = assert_same(got | to_torch(weights), run_torch(reference, *inputs))
    print(f"largest relative error {error:.1e}")


def test_state_dict_round_trip(case):
    reference, _, params, *_ = case
    assert_same(to_torch(params), tensors(reference), tolerance=0)


def test_bfloat16_is_near_float32(case):
    _, model, params, (latents, timesteps, condition, _), (want, _) = case
    apply = compiled(model.clone(dtype=jnp.bfloat16).apply)
    got = apply({"params": params}, latents, timesteps, condition)
    assert got.dtype == jnp.float32
    assert relative_error(got, want["output"]) < 0.03


@pytest.mark.parametrize("case", ["xl"], indirect=True)
def test_rematerialised_gradients_are_the_same(case):
    _, model, params, inputs, (want, weights) = case
    got, others = run(model.clone(remat="full"), params, *inputs)
    assert_same(flatten_dict({**got, **others}, sep="/"), flatten_dict({**want, **weights}, sep="/"))


def test_odd_sizes_upsample_to_the_skip_connection(case):
    reference, model, params, *_ = case
    latents, timesteps, condition = make_inputs(model.config, size=(7, 10))
    got = compiled(model.apply)({"params": params}, latents, timesteps, condition)
    with torch.no_grad():
        theirs = jax.tree.map(torch.tensor, condition)
        want = model.config.run_public(reference, nchw(latents), torch.tensor(timesteps), theirs)
    assert relative_error(got, nhwc(want)) <= 1e-5


@pytest.mark.parametrize(("width", "flip", "shift"), [(8, True, 0), (8, False, 1), (7, True, 0)])
def test_timestep_embedding_equals_diffusers(width, flip, shift):
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = np.arange(1000)
    got = timestep_embedding(jnp.asarray(timesteps), width, flip, shift)
    want = get_timestep_embedding(torch.tensor(timesteps), width, flip, shift).numpy()
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_adapters_merge_into_the_kernels():
    config = UNetConfig(**FAMILIES["2.x"], lora=UNetLora(rank=3, alpha=6.0))
    inputs = make_inputs(config)
    params = random_weights(shapes_of(UNet(config), inputs))
    assert sum(map(is_adapter, flatten_dict(params, sep="/"))) == 2 * (4 + 4 + 2) * (1 + 2 + 2)  # transformers' layers
    whole = merged(params, config.lora.scale)
    cases = (config, params), (dataclasses.replace(config, lora=None), whole)
    got, want = (compiled(UNet(c).apply)({"params": p}, *inputs) for c, p in cases)
    assert relative_error(got, want) <= 1e-5
    few = dataclasses.replace(config, lora=UNetLora(2, 2.0, ("to_k", "proj")))
    found = {path.split("_blocks_0/")[-1] for path in flatten_dict(shapes_of(UNet(few), inputs), sep="/")}
    assert {path for path in found if path.endswith(LORA_B) and not path.startswith(("up", "down", "mid"))} == {
        f"{name}/{LORA_B}" for name in ("attn1/to_k", "attn2/to_k", "ff/net_0/proj")
    }


@pytest.mark.parametrize("family", ["2.x", "xl"])
def test_every_weight_has_logical_axes(family):
    config = UNetConfig(**FAMILIES[family], lora=UNetLora(2, 2.0))
    params = weights_of(UNet(config), make_inputs(config))
    leaves = flatten_dict(nn.get_partition_spec(params), sep="/")
    shapes = flatten_dict(nn.unbox(params), sep="/")
    for name, axes in leaves.items():
        want = {1: ("tower_norm",), 2: ("tower_in", "tower_out"), 4: (None, None, "tower_in", "tower_out")}
        adapter = {LORA_A: ("tower_in", "lora"), LORA_B: ("lora", "tower_out")}
        assert tuple(axes) == adapter.get(name.split("/")[-1], want[len(shapes[name].shape)]), name


def test_wrong_channels_are_named():
    config = UNetConfig(**TINY, attention_head_dim=2)
    latents, timesteps, condition = make_inputs(config)
    narrow = condition.replace(sequence=condition.sequence[..., :11])
    with pytest.raises(ValueError, match=r"condition have 11 channels.*12"):
        jax.eval_shape(UNet(config).init, jax.random.key(0), latents, timesteps, narrow)
    with pytest.raises(ValueError, match=r"latents have 3 channels.*4"):
        jax.eval_shape(UNet(config).init, jax.random.key(0), latents[..., :3], timesteps, condition)
    pooled = condition.replace(pooled=latents[:, 0, 0])
    with pytest.raises(ValueError, match=r"pooled vectors have 4 channels.*0"):
        jax.eval_shape(UNet(config).init, jax.random.key(0), latents, timesteps, pooled)


def test_a_condition_without_sizes_is_refused():
    config = UNetConfig(**FAMILIES["xl"])
    latents, timesteps, condition = make_inputs(config)
    with pytest.raises(ValueError, match=r"pooled vectors have 0 channels.*7"):
        jax.eval_shape(UNet(config).init, jax.random.key(0), latents, timesteps, condition.replace(pooled=None))
    for extra in ({}, {"time_ids": np.zeros((2, 5), np.float32)}):
        with pytest.raises(ValueError, match="the condition needs 6 time_ids of each picture"):
            jax.eval_shape(UNet(config).init, jax.random.key(0), latents, timesteps, condition.replace(extra=extra))


@pytest.mark.parametrize(("family", "heads", "pooled"), [("2.x", (4, 2), 0), ("xl", (1, 2), 7)])
def test_config_reads_what_diffusers_writes(family, heads, pooled):
    settings = dict(diffusers.UNet2DConditionModel(**FAMILIES[family]).config)
    config = UNetConfig.from_public(settings)
    assert config.heads == heads and config.use_linear_projection and config.pooled_width == pooled
    as_json = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    assert UNetConfig.from_public(as_json) == config
    assert hash(config) is not None
    assert UNetConfig.from_public(config.to_public()) == config
    written = dict(diffusers.UNet2DConditionModel(**config.to_public()).config)
    assert {key: written[key] for key in written if key[0] != "_"} == {
        key: settings[key] for key in settings if key[0] != "_"
    }


def test_num_attention_heads_wins():
    assert UNetConfig(**TINY, attention_head_dim=8, num_attention_heads=(1, 2)).heads == (1, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text"),
        ("addition_embed_type", "text_time"),
        ("addition_time_embed_dim", 6),
        ("resnet_time_scale_shift", "scale_shift"),
        ("dual_cross_attention", True),
        ("time_cond_proj_dim", 256),
        ("mid_block_type", "UNetMidBlock2D"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"]),
        ("cross_attention_dim", [12, 12]),
        ("act_fn", "gelu"),
        ("attention_head_dim", [2, 2, 2]),
        ("attention_head_dim", 3),
        ("norm_num_groups", 5),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_unsupported_setting_is_named(key, value):
    named = {3: "block_out_channels", 5: "block_out_channels", "text_time": "projection_class_embeddings_input_dim"}
    named = named.get(value, key) if isinstance(value, int | str) else key
    with pytest.raises(ValueError, match=named):
        UNetConfig.from_public(TINY | {"attention_head_dim": 2, key: value})


def test_the_refiner_is_refused_by_name():
    settings = {
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": 4,
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    }
    with pytest.raises(ValueError, match=r"^this is the refiner of Stable Diffusion XL .*take the base model.*$"):
        UNetConfig.from_public(settings)
    other = UNetConfig.from_public(settings | {"projection_class_embeddings_input_dim": 2816})
    assert other.pooled_width == 1280


def test_switched_off_settings_are_accepted():
    off = {"class_embed_type": None, "mid_block_only_cross_attention": False, "_class_name": "UNet2DConditionModel"}
    settings = FAMILIES["1.5"]
    assert UNetConfig.from_public(settings | off) == UNetConfig(**settings)


@pytest.mark.slow
def test_stable_diffusion_xl_transformer_at_true_width():
    """One of the ten blocks of its coarsest level: outputs, and the gradients of inputs, condition and weights."""
    width, heads, context = 1280, 20, 2048
    reference = randomised(
        diffusers.Transformer2DModel(
            heads,
            width // heads,
            width,
            num_layers=1,
            cross_attention_dim=context,
            use_linear_projection=True,
            norm_num_groups=32,
        )
    )
    rng = np.random.default_rng(0)
    x, condition = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 4, 4, width), (1, 8, context)))
    inputs, given = nchw(x).requires_grad_(), torch.tensor(condition, requires_grad=True)
    (out,) = reference(inputs, encoder_hidden_states=given, return_dict=False)
    out.backward(nchw(x))
    want = {"output": nhwc(out), "inputs": nhwc(inputs.grad), "condition": given.grad.numpy(), **gradients(reference)}

    model = Transformer2DModel(heads, 1, 32, use_linear_projection=True)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x, condition)["params"])
    params = from_torch(shapes, tensors(reference))
    run = jax.jit(lambda params, *given: jax.vjp(lambda p, *xs: model.apply({"params": p}, *xs), params, *given))
    got, pull = run(params, x, condition)
    weights, *given = pull(x)
    error = assert_same(
        {"output": got, **dict(zip(("inputs", "condition"), given, strict=True)), **to_torch(weights)}, want
    )
    print(f"largest relative error {error:.1e}")


@pytest.mark.slow
def test_stable_diffusion_2_1_at_true_width():
    """Every block with one layer in place of two, on small latents: the output and the gradient to the condition."""
    config = UNetConfig(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
    whole = shapes_of(UNet(config), make_inputs(config, n=1))
    assert sum(leaf.size for leaf in jax.tree.leaves(whole)) == 865_910_724
    config = dataclasses.replace(config, layers_per_block=1)
    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel(**config.to_public()).eval()
    reference.requires_grad_(False)
    latents, timesteps, condition = make_inputs(config, size=(16, 16), n=1, q=16)
    cotangent = np.random.default_rng(1).normal(size=latents.shape).astype(np.float32)

    leaf = torch.tensor(condition.sequence, requires_grad=True)
    out = reference(nchw(latents), torch.tensor(timesteps), leaf).sample
    out.backward(nchw(cotangent))

    model = UNet(config)
    params = from_torch(shapes_of(model, (latents, timesteps, condition)), tensors(reference))
    params, want = jax.tree.map(jnp.array, params), {"output": nhwc(out), "condition": leaf.grad.numpy()}
    del reference, out, leaf

    @jax.jit
    def output_and_gradient(params, condition):
        got, pull = jax.vjp(lambda c: model.apply({"params": params}, latents, timesteps, c), condition)
        return got, pull(jnp.asarray(cotangent))[0]

    got, gradient = output_and_gradient(params, condition)
    error = assert_same({"output": got, **named(gradient)}, want)
    print(f"largest relative error {error:.1e}")
