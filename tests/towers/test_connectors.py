"""Connectors that are transformers equal compositions of public torch classes, in outputs and gradients."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.planning.program import read_program
from dreamllm_jax.towers.condition import Hidden
from dreamllm_jax.towers.connectors.transformer import TransformerConfig
from tests.parity import assert_same, compiled, gradients, random_weights, randomised, relative_error, tensors

N, Q, P, E, C, HEAD = 3, 5, 7, 32, 24, 8
TINY = {"num_hidden_layers": 2, "head_dim": HEAD}
OPENUNI = TransformerConfig("transformer", "siglip", **TINY, intermediate_size=40)
CONFIGS = {
    "openuni": OPENUNI,
    "openuni, projected before": dataclasses.replace(OPENUNI, hidden_size=C, depth=0),
    "openuni, projected on both sides": dataclasses.replace(OPENUNI, hidden_size=16),
    "metaquery": TransformerConfig(**TransformerConfig.PUBLISHED["metaquery"] | TINY),
    "unilip": TransformerConfig(
        **TransformerConfig.PUBLISHED["unilip-1b"] | TINY | {"intermediate_size": 48, "prompt_tokens": P}
    ),
}
# How many of the prompt's tokens are there, and where the first one stands in its document.
THERE, START = (7, 0, 4), (0, 0, 11)


class OpenUni(torch.nn.Module):
    """`proj_enc_proj` of the original and its two other orders."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size or E
        if config.hidden_size:
            self.input_projector = torch.nn.Linear(E, width)
        siglip = transformers.SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=config.intermediate_size,
            num_attention_heads=width // HEAD,
            hidden_act="gelu_pytorch_tanh",
            attn_implementation="eager",
        )
        self.layers = torch.nn.ModuleList(SiglipEncoderLayer(siglip) for _ in range(2))
        if config.depth:
            self.projector = torch.nn.Linear(width, C)

    def forward(self, x):
        x = self.input_projector(x) if hasattr(self, "input_projector") else x
        for layer in self.layers:
            x = layer(x, attention_mask=None)
        return self.projector(x) if hasattr(self, "projector") else x


class HeadNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(E // HEAD, 1, HEAD))

    def forward(self, x):
        return torch.nn.functional.normalize(x, dim=-1) * self.gamma * math.sqrt(HEAD)


class FullAttention(modeling_qwen2.Qwen2Attention):
    """Qwen2's, in both directions, with norms after the rotation."""

    def __init__(self, config):
        super().__init__(config, 0)
        self.q_norm, self.k_norm = HeadNorm(), HeadNorm()

    def forward(self, hidden_states, position_embeddings, **_):
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = modeling_qwen2.apply_rotary_pos_emb(q, k, *position_embeddings)
        out = torch.nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def qwen2_config(config):
    heads, keys = config.heads(E)
    return transformers.Qwen2Config(
        hidden_size=E,
        intermediate_size=config.intermediate_size or 4 * E,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",
        vocab_size=3,
    )


class MetaQuery(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        qwen2 = qwen2_config(config)
        self.layers = torch.nn.ModuleList(modeling_qwen2.Qwen2DecoderLayer(qwen2, i) for i in range(2))
        for layer in self.layers:
            layer.self_attn = FullAttention(qwen2)
        self.rotary = modeling_qwen2.Qwen2RotaryEmbedding(qwen2)
        linear, gelu, norm = torch.nn.Linear, torch.nn.GELU(approximate="tanh"), torch.nn.RMSNorm(C, eps=1e-5)
        self.projector = torch.nn.Sequential(linear(E, C), gelu, linear(C, C), norm)

    def forward(self, x):
        turns = self.rotary(x, torch.arange(Q)[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=turns)
        return self.projector(x)


class UniLIP(torch.nn.Module):
    """Prompt and queries as a row that begins with padding."""

    def __init__(self, config):
        super().__init__()
        model = modeling_qwen2.Qwen2Model(qwen2_config(config))
        self.layers, self.norm, self.rest = model.layers, model.norm, [model]
        self.projector = torch.nn.Linear(E, C)

    def forward(self, x):
        there = torch.arange(P + Q) >= P - torch.tensor(THERE)[:, None]
        positions = (torch.cumsum(there, 1) - 1).clamp(0) + torch.tensor(START)[:, None]
        mask = torch.where(there[:, None] & there[:, :, None], 0.0, -1e5)[:, None]
        (model,) = self.rest
        x = model(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        return self.projector(x) * there[..., None]


def given(x):
    """What a connector is given, of all tokens' hidden states, f[N, T, E]."""
    if x.shape[1] == Q:
        return x
    return Hidden(x[:, P:], x[:, :P], jnp.arange(P) >= P - jnp.asarray(THERE)[:, None])


def case(name, dtype=jnp.float32, remat="full"):
    """The connector, a function of its parameters and hidden states, and random ones of these."""
    config = CONFIGS[name]
    module = config.make_connector(C, 0, dtype, remat)
    x = np.random.default_rng(0).normal(size=(N, config.condition_tokens(Q), E)).astype(np.float32)
    template = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), jax.eval_shape(given, x)))["params"]
    return module, lambda params, x: module.apply({"params": params}, given(x)).sequence, template, x


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_torch(name):
    theirs = {"metaquery": MetaQuery, "unilip": UniLIP}.get(name, OpenUni)
    theirs, (_, ours, template, x) = randomised(theirs(CONFIGS[name])), case(name)
    cotangent = np.random.default_rng(1).normal(size=(*x.shape[:2], C)).astype(np.float32)
    inputs = torch.tensor(x, requires_grad=True)
    want = theirs(inputs)
    want.backward(torch.tensor(cotangent))

    @compiled
    def run(params, x):
        out, pullback = jax.vjp(ours, params, x)
        return out, pullback(cotangent)

    params = from_torch(template, tensors(theirs))
    out, (weights, grad) = run(params, x)
    got = {"out": out, "inputs": grad, **to_torch(weights)}
    assert_same(got, {"out": want.detach(), "inputs": inputs.grad, **gradients(theirs)})
    if name == "unilip":  # what is not there changes nothing
        there = np.arange(P + Q) >= P - np.array(THERE)[:, None]
        other = np.where(there[..., None], x, 100.0).astype(np.float32)
        np.testing.assert_array_equal(run(params, other)[0], out)
        assert not np.asarray(grad)[~there].any()


@pytest.mark.parametrize("name", ["openuni", "metaquery"])
def test_half_precision_stays_near(name):
    """Gradients too, which are sums over 1,500 tokens."""
    (_, wide, template, _), (_, narrow, _, _) = case(name), case(name, jnp.bfloat16)
    images = 300
    x = np.random.default_rng(2).normal(size=(images, Q, E)).astype(np.float32)
    params = jax.tree.map(lambda w: np.asarray(w.astype(jnp.bfloat16), np.float32), random_weights(template))

    @compiled
    def run(params):
        found = []
        for ours in (wide, narrow):
            out, pullback = jax.vjp(ours, params, x)
            assert out.dtype == (jnp.float32 if ours is wide else jnp.bfloat16)
            found.append((out.astype(jnp.float32), pullback(jnp.ones_like(out))[0]))
        return found

    (want, gradients), (got, narrow_gradients) = run(params)
    assert relative_error(got, want) < 0.02
    assert_same(to_torch(narrow_gradients), to_torch(gradients), tolerance=0.02)


@pytest.mark.parametrize(("name", "remat"), [("openuni", "full"), ("metaquery", "full"), ("unilip", "none")])
def test_flops_are_those_of_the_compiled_program(name, remat):
    module, ours, template, x = case(name, remat=remat)
    step = jax.jit(jax.grad(lambda params: jnp.square(ours(params, x)).sum()))
    program = read_program(step.lower(template).compile().as_text(), {"data": 1})
    tally = Tally(lambda path: True, platform="cpu", dtype="float32")
    module.config.flops(tally, N, Q, E, C, remat=remat == "full")
    assert tally.total.executed == pytest.approx(sum(program.flops_by_name.values()), rel=0.01)


def test_a_pooled_vector_is_of_the_mean():
    config, pooled = CONFIGS["openuni, projected before"], 6
    module = config.make_connector(C, pooled, jnp.float32, "none")
    x = np.random.default_rng(3).normal(size=(N, Q, E)).astype(np.float32)
    params = random_weights(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)))
    run = jax.jit(module.apply).lower(params, x).compile()
    got, weights = run(params, x), params["params"]["pooled_projector"]
    want = np.mean(got.sequence, axis=1) @ weights["kernel"] + weights["bias"]
    np.testing.assert_allclose(got.pooled, want, rtol=1e-5, atol=1e-6)
    tally = Tally(lambda path: False, platform="cpu", dtype="float32")
    config.flops(tally, N, Q, E, C, pooled)
    program = read_program(run.as_text(), {"data": 1})
    assert tally.total.model == pytest.approx(sum(program.flops_by_name.values()), rel=0.01)


def test_how_it_begins():
    module, _, _, x = case("metaquery")
    params = nn.unbox(compiled(module.init)(jax.random.key(0), x))["params"]
    np.testing.assert_allclose(params["projector_3"]["scale"], math.sqrt(5.5), rtol=1e-6)
    for name in ("gate_proj", "down_proj"):
        assert np.std(params["layers"]["mlp"][name]["kernel"]) == pytest.approx(0.014, rel=0.05)
    assert (np.asarray(params["layers"]["self_attn"]["q_norm"]["gamma"]) == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "llama"}, "layer must be siglip or qwen2, got 'llama'"),
        ({"layer": "siglip", "qk_norm": True}, "qk_norm and num_key_value_heads are of layer='qwen2'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive, got 0"),
        ({"depth": -1}, "depth must not be negative, got -1"),
        ({"norm_eps": math.nan}, "norm_eps must be positive, got nan"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"sees": True}, "sees=true needs prompt_tokens"),
        ({"hidden_size": 36}, "36 channels are no multiple of head_dim 8"),
        ({"num_key_value_heads": 3}, "its 4 heads are no multiple of num_key_value_heads 3"),
        ({"depth": 0}, "its layers have 32 channels, the image decoder's condition 24"),
    ],
    ids=str,
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        module = TransformerConfig(**TINY | changes).make_connector(C, 0, jnp.float32, "none")
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, Q, E)))
