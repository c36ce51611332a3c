"""The decoder's settings are what other families are made of: their classes in PyTorch give the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.towers.language_models.decoder import Decoder, DecoderConfig, LayerKind
from tests.parity import assert_same, gradients, randomised, relative_error, tensors
from tests.tiny import logits_of

COMMON = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WINDOW, THETA = 3, 1e4
# Two kinds of layers, by turns: those that see three tokens, and those that see all.
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}


def qwen2():
    """Biases of queries, keys and values; a pattern of two kinds."""
    config = transformers.Qwen2Config(**COMMON, **ALTERNATING, use_sliding_window=True)
    return transformers.Qwen2ForCausalLM(config), {
        "attention_bias": True,
        "attention_out_bias": False,
        "pattern": (LayerKind(window=WINDOW), LayerKind(rope_theta=THETA)),
    }


def gemma():
    """Norms that multiply by 1 + scale, scaled embeddings, a gate of GELU, a tied head."""
    config = transformers.GemmaConfig(**COMMON, head_dim=8, hidden_activation="gelu_pytorch_tanh", pad_token_id=None)
    return transformers.GemmaForCausalLM(config), {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_unit_offset": True,
        "embedding_scale": 32**0.5,
        "tie_word_embeddings": True,
        "head_dim": 8,
    }


def shapes_of(ours):
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.eval_shape(lambda: ours.init(jax.random.key(0), tokens, method=logits_of)))["params"]


def named(theirs):
    return {name.removeprefix("model."): value for name, value in theirs.items()}


@pytest.mark.parametrize("family", [qwen2, gemma])
def test_logits_and_gradients_equal_the_family_s_class(family):
    theirs, settings = family()
    theirs = randomised(theirs)
    config = DecoderConfig(**COMMON, rms_norm_eps=theirs.config.rms_norm_eps, rope_theta=THETA, **settings)
    ours = Decoder(config)
    params = from_torch(shapes_of(ours), named(tensors(theirs)))
    tokens = np.random.default_rng(0).integers(0, 29, (2, 11)).astype(np.int32)
    assert config.num_hidden_layers > WINDOW  # what lies beyond one window is seen through others

    def loss(params):
        logits = ours.apply({"params": params}, tokens, method=logits_of)
        return jnp.mean(jnp.square(logits)), logits

    (_, got), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    want = theirs(torch.tensor(tokens).long()).logits
    want.square().mean().backward()
    assert relative_error(got, want.detach().numpy()) < 1e-5
    assert_same(to_torch(found), named(gradients(theirs)), tolerance=3e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_pattern_reads_on_with_a_cache_as_at_once(remat):
    kinds = (LayerKind(window=WINDOW), LayerKind(), LayerKind(window=5, rope_theta=500.0))
    config = DecoderConfig(**{**COMMON, "num_hidden_layers": 6}, pattern=kinds)
    ours = config.make(jnp.float32, remat)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.3, shapes_of(ours))
    tokens = rng.integers(0, 29, (2, 12)).astype(np.int32)
    apply = jax.jit(ours.apply, static_argnames="method")
    at_once = apply({"params": params}, tokens, method=logits_of)

    def read_on(decoder, tokens):
        cache, found = config.cache(2, 12), []
        for start, stop in ((0, 7), (7, 8), (8, 12)):
            positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
            hidden, cache = decoder(decoder.embed(tokens[:, start:stop]), positions, jnp.ones_like(positions), cache)
            found.append(decoder.logits(hidden))
        return jnp.concatenate(found, axis=1)

    np.testing.assert_allclose(apply({"params": params}, tokens, method=read_on), at_once, rtol=1e-4, atol=1e-5)
    changed = apply({"params": params}, np.where(np.arange(12) == 0, 1 - tokens % 2, tokens), method=logits_of)
    assert np.abs(changed[:, -1] - at_once[:, -1]).max() > 0  # the kind without a window sees the first token


def test_layers_that_do_not_fill_a_pattern_are_refused():
    with pytest.raises(ValueError, match="pattern has 3 kinds of layers, of which num_hidden_layers=4 is no multiple"):
        DecoderConfig(**COMMON, pattern=(LayerKind(),) * 3)
    with pytest.raises(ValueError, match="window must not be negative"):
        LayerKind(window=-1)
