"""The denoiser of SANA against diffusers' `SanaTransformer2DModel` on the same random weights."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.layers import gated_depthwise, linear_attention, spaced_heads
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.layers.lora import LORA_A, LORA_B, is_adapter
from dreamllm_jax.planning.program import read_program
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.image_decoders import sana_transformer
from dreamllm_jax.towers.image_decoders.sana_transformer import PUBLISHED, SanaLora, SanaTransformerConfig

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
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 64,
    "caption_channels": 10,
    "sample_size": 4,
}
# Every option on, and the published ones.
FAMILIES = {
    "all": TINY
    | {
        "patch_size": 2,
        "qk_norm": "rms_norm_across_heads",
        "interpolation_scale": 0.5,
        "attention_bias": True,
        "timestep_scale": 0.5,
        "out_channels": 6,
        "cross_attention_head_dim": 10,
    },
    "1.0": TINY,
}


def make_inputs(config, size=(4, 6), n=2, tokens=5, masked=True):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(n, *size, config.in_channels)).astype(np.float32)
    sequence = rng.normal(size=(n, tokens, config.caption_channels)).astype(np.float32)
    mask = np.arange(tokens) < np.array([tokens, tokens - 2])[:n, None] if masked else None
    return latents, np.array([999, 3.5][:n], np.float32), Condition(sequence, mask)


def shapes_of(model, inputs):
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])


def run_torch(config, model, latents, timesteps, condition, cotangent):
    model.zero_grad()
    latents, sequence = nchw(latents).requires_grad_(), torch.tensor(condition.sequence, requires_grad=True)
    mask = None if condition.mask is None else torch.tensor(condition.mask)
    out = config.run_public(model, latents, torch.tensor(timesteps), Condition(sequence, mask))
    out.backward(nchw(cotangent))
    return {"output": nhwc(out), "latents": nhwc(latents.grad), "condition": sequence.grad.numpy(), **gradients(model)}


@functools.partial(compiled, static_argnums=0)
def run(model, params, latents, timesteps, condition, cotangent):
    """Output, and gradients with respect to latents, condition and weights."""

    def forward(params, latents, sequence):
        return model.apply({"params": params}, latents, timesteps, condition.replace(sequence=sequence))

    out, pull = jax.vjp(forward, params, latents, condition.sequence)
    weights, latents, sequence = pull(cotangent)
    return {"output": out, "latents": latents, "condition": sequence}, weights


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A torch transformer, ours with its weights, inputs, and what ours makes of them."""
    reference = randomised(diffusers.SanaTransformer2DModel(**FAMILIES[request.param]))
    config = SanaTransformerConfig.from_public(dict(reference.config))
    model, inputs = config.make(jnp.float32), make_inputs(config, masked=request.param == "all")
    params = from_torch(shapes_of(model, inputs), tensors(reference))
    cotangent = np.random.default_rng(1).normal(size=(*inputs[0].shape[:3], config.outputs)).astype(np.float32)
    return reference, model, params, (*inputs, cotangent), run(model, params, *inputs, cotangent)


def test_output_and_gradients_equal_diffusers(case):
    reference, model, _, inputs, (got, weights) = case
    assert got["output"].dtype == jnp.float32
    error = assert_same(got | to_torch_shaped(weights, reference), run_torch(model.config, reference, *inputs))
    print(f"largest relative error {error:.1e}")


def to_torch_shaped(params, reference):
    """Names and shapes as torch has them, exactly."""
    got, want = to_torch(params), tensors(reference)
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in want.items()}
    return got


def test_state_dict_round_trip(case):
    reference, _, params, *_ = case
    assert_same(to_torch_shaped(params, reference), tensors(reference), tolerance=0)


def test_bfloat16_is_near_float32(case):
    _, model, params, inputs, (want, weights) = case
    got, narrow = run(model.clone(dtype=jnp.bfloat16), params, *inputs)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    print(errors)
    assert got["output"].dtype == jnp.float32 and max(errors.values()) < 0.04
    assert relative_error(*(np.concatenate([x.ravel() for x in jax.tree.leaves(w)]) for w in (narrow, weights))) < 0.04


def test_recomputed_gradients_are_the_same(case):
    _, model, params, inputs, (want, weights) = case
    got, again = run(model.clone(remat="full"), params, *inputs)
    assert_same(got | to_torch(again), want | to_torch(weights))


def test_a_caption_of_which_nothing_counts_is_seen_whole(case):
    reference, model, params, (latents, timesteps, condition, _), _ = case
    none = condition.replace(mask=np.zeros(condition.sequence.shape[:2], bool))
    got = compiled(model.apply)({"params": params}, latents, timesteps, none)
    whole = compiled(model.apply)({"params": params}, latents, timesteps, condition.replace(mask=None))
    assert relative_error(got, whole) <= 1e-6
    with torch.no_grad():
        theirs = Condition(torch.tensor(condition.sequence), torch.zeros(none.mask.shape))
        want = model.config.run_public(reference, nchw(latents), torch.tensor(timesteps), theirs)
    assert relative_error(got, nhwc(want)) <= 1e-3  # -10000 costs them the scores' last digits


def monkeypatch_kernels(monkeypatch, config):
    heads = config.num_cross_attention_heads
    spacing = spaced_heads.Spacing(heads, config.cross_attention_head_dim, 64)
    for module in (sana_transformer, spaced_heads):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    monkeypatch.setattr(sana_transformer, "find_spacing", lambda *_: spacing)
    for module in (gated_depthwise, linear_attention):
        monkeypatch.setattr(module, "supported", lambda *_: True)
    for module, name in (
        (sana_transformer, "spaced_attention"),
        (gated_depthwise, "gated_depthwise"),
        (linear_attention, "linear_attention"),
    ):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all"], indirect=True)
def test_spaced_heads_and_kernels_are_the_same(case, monkeypatch):
    """What a TPU executes, in float32 and emulated: heads with zeros after each, a mask as one of their channels."""
    _, model, params, (latents, timesteps, condition, cotangent), _ = case
    size = (16, 16) if model.config.patch_size == 2 else (4, 8)
    rng = np.random.default_rng(2)
    latents = rng.normal(size=(2, *size, model.config.in_channels)).astype(np.float32)
    cotangent = rng.normal(size=(2, *size, model.config.outputs)).astype(np.float32)
    inputs = latents, timesteps, condition, cotangent
    want, plain = run(model, params, *inputs)
    monkeypatch_kernels(monkeypatch, model.config)
    jax.clear_caches()  # `run` is traced anew
    got, weights = run(model, params, *inputs)
    jax.clear_caches()
    assert_same(got | to_torch(weights), want | to_torch(plain))


ADAPTED = SanaTransformerConfig(**FAMILIES["all"], lora=SanaLora(rank=3, alpha=6.0))


def adapted():
    model, inputs = ADAPTED.make(jnp.float32), make_inputs(ADAPTED)
    return model, inputs, random_weights(shapes_of(model, inputs))


def test_adapters_merge_into_the_kernels():
    model, inputs, params = adapted()
    assert sum(map(is_adapter, flatten_dict(params, sep="/"))) == 2 * (4 + 4 + 2)
    plain = dataclasses.replace(ADAPTED, lora=None).make(jnp.float32)
    whole = merged(params, ADAPTED.lora.scale)
    got, want = (compiled(m.apply)({"params": p}, *inputs) for m, p in ((model, params), (plain, whole)))
    assert relative_error(got, want) <= 1e-5


def test_adapters_begin_as_nothing_and_only_where_they_are_wanted():
    few = dataclasses.replace(ADAPTED, lora=SanaLora(2, 2.0, ("to_q", "conv_point")))
    model, inputs = few.make(jnp.float32), make_inputs(few)
    params = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"], sep="/")
    found = {path for path in params if path.endswith(LORA_B)}
    assert found == {f"transformer_blocks/{name}/lora_b" for name in ("attn1/to_q", "attn2/to_q", "ff/conv_point")}
    assert all(params[path].init is nn.initializers.zeros for path in found)
    with pytest.raises(ValueError, match=r"targets must be some of to_q.*q_proj"):
        SanaLora(2, 2.0, ("q_proj",))


def compiled_flops(model, params, inputs, trained):
    """Of the products of a program with the gradients to the condition and to the weights that are trained."""
    flat = flatten_dict(params, sep="/")

    def loss(chosen, sequence, latents, timesteps, condition):
        tree = unflatten_dict(flat | chosen, sep="/")
        out = model.apply({"params": tree}, latents, timesteps, condition.replace(sequence=sequence))
        return jnp.square(out).sum()

    chosen = {path: x for path, x in flat.items() if trained(path)}
    latents, timesteps, condition = inputs
    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(chosen, condition.sequence, latents, timesteps, condition)
    return read_program(lowered.compile().as_text(), {"data": 1}).mxu_flops


@pytest.mark.parametrize(("trained", "remat"), [("everything", "full"), ("adapters", "none"), ("nothing", "none")])
@pytest.mark.slow
def test_flops_are_the_compiled_ones(trained, remat):
    _, inputs, params = adapted()
    chosen = {"everything": lambda _: True, "adapters": is_adapter, "nothing": lambda _: False}[trained]
    tally = Tally(chosen, platform="cpu", dtype="float32")
    ADAPTED.flops(tally, 2, (4, 6), 5, True, remat)
    want = compiled_flops(ADAPTED.make(jnp.float32, remat), params, inputs, chosen)
    assert tally.total.executed == pytest.approx(want, rel=0.01)


def test_every_weight_has_logical_axes():
    model, inputs, _ = adapted()
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    shapes = flatten_dict(nn.unbox(params), sep="/")
    products = "tower_in", "tower_out"
    for name, axes in flatten_dict(nn.get_partition_spec(params), sep="/").items():
        layers = name.startswith("transformer_blocks/")
        want = {1: ("tower_norm",), 2: products, 4: (None, None, *products)}[len(shapes[name].shape) - layers]
        leaf = name.split("/")[-1]
        want = {LORA_A: ("tower_in", "lora"), LORA_B: ("lora", "tower_out")}.get(leaf, want)
        want = {"scale_shift_table": (None, "tower_norm")}.get(leaf, want)
        want = (None, None, None, "tower_out") if name.endswith("conv_depth/kernel") else want
        assert tuple(axes) == ("layers",) * layers + want, name


def test_config_reads_what_diffusers_writes():
    settings = dict(diffusers.SanaTransformer2DModel(**FAMILIES["all"]).config)
    config = SanaTransformerConfig.from_public(settings)
    assert (config.width, config.inner, config.outputs, config.size_multiple) == (64, 160, 6, 2)
    assert (config.condition_width, config.pooled_width) == (10, 0)
    assert SanaTransformerConfig.from_public(config.to_public()) == config and hash(config) is not None
    written = dict(diffusers.SanaTransformer2DModel(**config.to_public()).config)
    assert {key: written[key] for key in written if key[0] != "_"} == {
        key: settings[key] for key in settings if key[0] != "_"
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guidance_embeds", True),
        ("norm_elementwise_affine", True),
        ("dropout", 0.1),
        ("qk_norm", "layer_norm"),
        ("cross_attention_dim", 23),
        ("sample_size", 5),
        ("interpolation_scale", 0.0),
        ("num_layers", 0),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_unsupported_setting_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        SanaTransformerConfig.from_public(FAMILIES["all"] | {key: value})


def test_what_it_cannot_use_is_refused():
    config = SanaTransformerConfig(**FAMILIES["all"])
    model, (latents, timesteps, condition) = config.make(jnp.float32), make_inputs(config)

    def refused(match, latents, condition):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(model.init, jax.random.key(0), latents, timesteps, condition)

    refused(r"latents have 3 channels.*4", latents[..., :3], condition)
    refused(r"condition have 9 channels.*10", latents, condition.replace(sequence=condition.sequence[..., :9]))
    refused(r"4 x 5 cannot be cut into patches of 2", latents[:, :, :5], condition)
    refused("pooled", latents, condition.replace(pooled=np.zeros((2, 4), np.float32)))
    refused("extra", latents, condition.replace(extra={"sizes": np.zeros(2, np.float32)}))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("sana-0.6b-512", 592), ("sana-1.6b-1024", 1_604), ("sana-1.5-1.6b-1024", 1_605), ("sana-1.5-4.8b-1024", 4_722)],
)
def test_published_shapes_have_as_many_weights_as_diffusers_has(name, millions):
    config = SanaTransformerConfig(**PUBLISHED[name])
    shapes = shapes_of(config.make(jnp.bfloat16), make_inputs(config, size=(2, 2), n=1))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    with torch.device("meta"):
        reference = diffusers.SanaTransformer2DModel(**config.to_public())
    assert count == sum(parameter.numel() for parameter in reference.parameters())
    assert round(count / 1e6) == millions


@pytest.mark.slow
def test_one_layer_at_true_width():
    """SANA-1.5 as published, but for the number of layers: the output and every gradient."""
    config = SanaTransformerConfig(**PUBLISHED["sana-1.5-1.6b-1024"] | {"num_layers": 1})
    reference = randomised(diffusers.SanaTransformer2DModel(**config.to_public()))
    model, inputs = config.make(jnp.float32), make_inputs(config, size=(4, 4), n=1, tokens=7)
    params = from_torch(shapes_of(model, inputs), tensors(reference))
    # A frequency's last bit, which libraries round differently, weighs with the time.
    inputs = inputs[0], np.array([100.0], np.float32), inputs[2]
    cotangent = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
    got, weights = run(model, params, *inputs, cotangent)
    error = assert_same(got | to_torch(weights), run_torch(config, reference, *inputs, cotangent))
    print(f"largest relative error {error:.1e}")
