"""The MMDiT against diffusers' `SD3Transformer2DModel` on the same random weights."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.layers.lora import LORA_A, LORA_B, is_adapter
from dreamllm_jax.planning.program import read_program
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.image_decoders import mmdit
from dreamllm_jax.towers.image_decoders.mmdit import PUBLISHED, MMDiTConfig, MMDiTLora

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
    "in_channels": 3,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 12,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 10,
    "out_channels": 2,
    "pos_embed_max_size": 9,
}
FAMILIES = {
    "3": TINY | {"num_layers": 2},
    "3.5": TINY | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
}


def make_inputs(config, size=(6, 10), n=2, q=5):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(n, *size, config.in_channels)).astype(np.float32)
    sequence = rng.normal(size=(n, q, config.condition_width)).astype(np.float32)
    pooled = rng.normal(size=(n, config.pooled_width)).astype(np.float32)
    timesteps = np.array([99.0, 3.7, 0.5, 0.0], np.float32)  # at 999 the last bit of a frequency is worth 6e-5 radians
    return latents, timesteps[:n], Condition(sequence, pooled=pooled)


def make_cotangent(config, latents):
    shape = (*latents.shape[:-1], config.made_channels)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def shapes_of(model, inputs):
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])


def stored(model):
    """Name -> value of everything in a checkpoint: the parameters and the table of positions."""
    return {**tensors(model), "pos_embed.pos_embed": model.pos_embed.pos_embed.numpy()}


def run_torch(config, model, latents, timesteps, condition, cotangent):
    model.zero_grad()
    leaves = nchw(latents), torch.tensor(condition.sequence), torch.tensor(condition.pooled)
    latents, sequence, pooled = (leaf.requires_grad_() for leaf in leaves)
    out = config.run_public(model, latents, torch.tensor(timesteps), Condition(sequence, pooled=pooled))
    out.backward(nchw(cotangent))
    found = {"output": nhwc(out), "latents": nhwc(latents.grad)}
    found |= {"sequence": sequence.grad.numpy(), "pooled": pooled.grad.numpy(), **gradients(model)}
    return found | {"pos_embed.pos_embed": np.zeros(model.pos_embed.pos_embed.shape, np.float32)}


@functools.partial(compiled, static_argnums=0)
def run(model, params, latents, timesteps, condition, cotangent):
    """Output, and gradients with respect to latents, condition and weights."""

    def forward(params, latents, condition):
        return model.apply({"params": params}, latents, timesteps, condition)

    out, pull = jax.vjp(forward, params, latents, condition)
    weights, latents, condition = pull(cotangent)
    return {"output": out, "latents": latents, "sequence": condition.sequence, "pooled": condition.pooled}, weights


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A torch model, ours with its weights, inputs, and what ours makes of them."""
    reference = randomised(diffusers.SD3Transformer2DModel(**FAMILIES[request.param]))
    config = MMDiTConfig.from_public(dict(reference.config))
    model, inputs = config.make(jnp.float32), make_inputs(config)
    params = from_torch(shapes_of(model, inputs), stored(reference))
    inputs = (*inputs, make_cotangent(config, inputs[0]))
    return reference, model, params, inputs, run(model, params, *inputs)


def test_output_and_gradients_equal_diffusers(case):
    reference, model, _, inputs, (got, weights) = case
    assert got["output"].dtype == jnp.float32
    error = assert_same(got | to_torch(weights), run_torch(model.config, reference, *inputs))
    print(f"largest relative error {error:.1e}")


def test_state_dict_round_trip(case):
    reference, _, params, *_ = case
    assert_same(to_torch(params), {name: x.numpy() for name, x in reference.state_dict().items()}, tolerance=0)


@pytest.mark.parametrize("case", ["3.5"], indirect=True)
def test_bfloat16_is_near_float32(case):
    _, model, params, inputs, (want, want_weights) = case
    got, weights = run(model.clone(dtype=jnp.bfloat16), params, *inputs)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert got["output"].dtype == jnp.float32 and max(errors.values()) < 0.03
    total, want_total = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(y)]) for y in (weights, want_weights))
    assert relative_error(total, want_total) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("case", ["3.5"], indirect=True)
def test_recomputing_gives_the_same(case):
    _, model, params, inputs, (want, want_weights) = case
    got, weights = run(model.clone(remat="full"), params, *inputs)
    assert_same(got | to_torch(weights), want | to_torch(want_weights))


def test_heads_are_normed_where_they_lie(monkeypatch):
    """As on a TPU, by products: output and both gradients."""
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(3, 7, 5 * 8)), jnp.bfloat16) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=8), jnp.float32)

    def results(x, cotangent):
        out, pull = jax.vjp(mmdit.head_norm, x, scale)
        return out, *pull(cotangent)

    want = results(x.astype(jnp.float32), cotangent.astype(jnp.float32))
    monkeypatch.setattr(mmdit, "platform", lambda: "tpu")
    got = results(x, cotangent)
    assert got[0].dtype == jnp.bfloat16
    for one, other in zip(got, want, strict=True):
        assert relative_error(one.astype(jnp.float32), other) < 0.003


def test_fresh_table_of_positions_equals_diffusers():
    reference = diffusers.SD3Transformer2DModel(**TINY)
    model = MMDiTConfig(**TINY).make(jnp.float32)
    inputs = make_inputs(model.config)
    made = jax.jit(lambda key: model.init(key, *inputs)["params"]["pos_embed"]["pos_embed"])(jax.random.key(0))
    np.testing.assert_allclose(nn.unbox(made), reference.pos_embed.pos_embed.numpy(), atol=1e-6)


ADAPTED = MMDiTConfig(**FAMILIES["3.5"], lora=MMDiTLora(rank=3, alpha=6.0))


def test_adapters_merge_into_the_kernels():
    config = dataclasses.replace(ADAPTED, num_layers=2)
    model, inputs = config.make(jnp.float32), make_inputs(config)
    params = random_weights(shapes_of(model, inputs))
    # The attention of both streams, the second attention, and both feed-forwards; the last layer leaves some out.
    assert sum(map(is_adapter, flatten_dict(params, sep="/"))) == 2 * (8 + 4 + 4 + 7 + 2)
    plain = dataclasses.replace(config, lora=None).make(jnp.float32)
    whole = merged(params, config.lora.scale)
    got, want = (compiled(m.apply)({"params": p}, *inputs) for m, p in ((model, params), (plain, whole)))
    assert relative_error(got, want) <= 1e-5
    few = dataclasses.replace(config, lora=MMDiTLora(2, 2.0, ("add_k_proj", "net_2")))
    found = flatten_dict(shapes_of(few.make(jnp.float32), inputs), sep="/")
    assert {path.split("/", 2)[2] for path in found if path.endswith(LORA_B)} == {
        f"{name}/{LORA_B}" for name in ("attn/add_k_proj", "ff/net_2", "ff_context/net_2")
    }


def test_every_weight_has_logical_axes():
    config = ADAPTED
    params = jax.eval_shape(config.make(jnp.float32).init, jax.random.key(0), *make_inputs(config))["params"]
    leaves, shapes = flatten_dict(nn.get_partition_spec(params), sep="/"), flatten_dict(nn.unbox(params), sep="/")
    stacks = {path.split("/")[1] for path in leaves if path.startswith("transformer_blocks/")}
    assert stacks == {"0_to_1", "1_to_2", "2_to_3"}
    for name, axes in leaves.items():
        scanned = name.startswith("transformer_blocks/")
        want = {1: ("tower_norm",), 2: ("tower_in", "tower_out"), 4: (None, None, "tower_in", "tower_out")}
        want[3] = (None, None, "tower_norm")
        adapter = {LORA_A: ("tower_in", "lora"), LORA_B: ("lora", "tower_out")}
        want = adapter.get(name.split("/")[-1], want[len(shapes[name].shape) - scanned])
        assert tuple(axes) == ("layers",) * scanned + want, name


TRAINED = {"frozen": lambda _: False, "trained": lambda _: True, "adapters": is_adapter}


@pytest.mark.parametrize(
    "name", [name if name == "frozen" else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED]
)
def test_flops_are_the_compiled_ones(name):
    """Towards the condition alone, and towards the weights, or the adapters, too."""
    trained = TRAINED[name]
    config = dataclasses.replace(ADAPTED if name == "adapters" else MMDiTConfig(**FAMILIES["3.5"]), num_layers=4)
    model, (latents, timesteps, condition) = config.make(jnp.float32), make_inputs(config, size=(16, 8), n=4, q=32)
    params = shapes_of(model, (latents, timesteps, condition))

    flat = flatten_dict(params, sep="/")

    def loss(chosen, condition, rest):
        weights = unflatten_dict(rest | chosen, sep="/")
        return jnp.sum(jnp.square(model.apply({"params": weights}, latents, timesteps, condition)))

    chosen = {path: x for path, x in flat.items() if trained(path)}
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(chosen, condition, flat).compile().as_text()
    tally = Tally(trained, platform="cpu")
    config.flops(tally, 4, (16, 8), 32, condition_live=True)
    assert tally.total.executed == pytest.approx(read_program(text, {"data": 1}).mxu_flops, 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda latents, c: (latents, c.replace(mask=np.ones(c.sequence.shape[:2], bool))), "has a mask"),
        (lambda latents, c: (latents, c.replace(extra={"size": latents})), "size.*knows nothing"),
        (lambda latents, c: (latents, c.replace(pooled=None)), "needs the condition's pooled vector"),
        (lambda latents, c: (latents, c.replace(pooled=c.pooled[:, 1:])), "pooled vectors have 9 channels.*10"),
        (lambda latents, c: (latents, c.replace(sequence=c.sequence[..., 1:])), "tokens have 11 channels.*12"),
        (lambda latents, c: (latents[..., 1:], c), "latents have 2 channels.*3"),
        (lambda latents, c: (latents[:, 1:], c), "5 high.*patch_size=2"),
        (lambda latents, c: (np.tile(latents, (1, 1, 2, 1)), c), "20 wide.*at most 18"),
    ],
)
def test_what_it_cannot_use_is_named(change, message):
    config = MMDiTConfig(**TINY)
    latents, timesteps, condition = make_inputs(config)
    latents, condition = change(latents, condition)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(config.make(jnp.float32).init, jax.random.key(0), latents, timesteps, condition)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_reads_what_diffusers_writes(family):
    settings = dict(diffusers.SD3Transformer2DModel(**FAMILIES[family]).config)
    config = MMDiTConfig.from_public(settings)
    as_json = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    assert MMDiTConfig.from_public(as_json) == config and hash(config) is not None
    written = dict(diffusers.SD3Transformer2DModel(**config.to_public()).config)
    assert {key: written[key] for key in written if key[0] != "_"} == {
        key: settings[key] for key in settings if key[0] != "_"
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dual_attention_layers", [1, 2]),
        ("dual_attention_layers", [0, 1, 2, 3, 4]),
        ("qk_norm", "layer_norm"),
        ("caption_projection_dim", 25),
        ("pos_embed_max_size", None),
        ("patch_size", 3),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_unsupported_setting_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        MMDiTConfig.from_public(TINY | {key: value})


@pytest.mark.parametrize(("name", "weights"), [("sd3-medium", 2_028_328_000), ("sd35-medium", 2_243_171_520)])
def test_published_models_have_their_sizes(name, weights):
    """As many parameters as diffusers' class has, made without memory; its table of positions is none of them."""
    config = MMDiTConfig(**PUBLISHED[name])
    with torch.device("meta"):
        reference = diffusers.SD3Transformer2DModel(**config.to_public())
    assert sum(parameter.numel() for parameter in reference.parameters()) == weights
    shapes = flatten_dict(shapes_of(config.make(jnp.float32), make_inputs(config, size=(64, 64), n=1)), sep="/")
    assert shapes.pop("pos_embed/pos_embed").shape == (1, config.pos_embed_max_size**2, config.width)
    assert sum(shape.size for shape in shapes.values()) == weights


@pytest.mark.slow
def test_a_layer_of_each_kind_at_true_width():
    """Of Stable Diffusion 3.5 medium three layers on small latents: the output and the gradients to the condition."""
    settings = PUBLISHED["sd35-medium"] | {"num_layers": 3, "dual_attention_layers": (0,), "pos_embed_max_size": 16}
    config = MMDiTConfig(**settings)
    reference = randomised(diffusers.SD3Transformer2DModel(**config.to_public())).requires_grad_(False)
    inputs = make_inputs(config, size=(16, 16), n=1, q=64)
    cotangent = make_cotangent(config, inputs[0])
    sequence, pooled = (torch.tensor(x, requires_grad=True) for x in (inputs[2].sequence, inputs[2].pooled))
    condition = Condition(sequence, pooled=pooled)
    out = config.run_public(reference, nchw(inputs[0]), torch.tensor(inputs[1]), condition)
    out.backward(nchw(cotangent))
    want = {"output": nhwc(out), "sequence": sequence.grad.numpy(), "pooled": pooled.grad.numpy()}

    model = config.make(jnp.float32)
    params = from_torch(shapes_of(model, inputs), stored(reference))
    del reference

    @jax.jit
    def output_and_gradient(params, condition):
        got, pull = jax.vjp(lambda c: model.apply({"params": params}, *inputs[:2], c), condition)
        (gradient,) = pull(jnp.asarray(cotangent))
        return {"output": got, "sequence": gradient.sequence, "pooled": gradient.pooled}

    error = assert_same(output_and_gradient(params, inputs[2]), want)
    print(f"largest relative error {error:.1e}")
