"""Qwen2 and Qwen3 equal their classes in transformers, and their files mean here what they mean there."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.interop.language_model import hf_settings
from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.towers.language_models.qwen2 import Qwen2Config
from dreamllm_jax.towers.language_models.qwen3 import Qwen3Config
from tests.parity import assert_same, compiled, gradients, randomised, relative_error, tensors
from tests.tiny import logits_of

TINY = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
THETA = {"rope_type": "default", "rope_theta": 1e6}
FAMILIES = {
    "qwen2": (Qwen2Config, transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 12}),
}
VARIANTS = [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]


def config_of(family: str, **changes):
    """A tiny configuration of transformers."""
    _, config, _, own = FAMILIES[family]
    return config(**{**TINY, "rope_parameters": THETA, **own, **changes})


def shapes_of(ours):
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.eval_shape(lambda: ours.init(jax.random.key(0), tokens, method=logits_of)))["params"]


def named(theirs):
    return {name.removeprefix("model."): value for name, value in theirs.items()}


def compare(config, family: str, length: int = 11) -> float:
    """The largest relative error of the logits and of every gradient."""
    ours, _, module, _ = FAMILIES[family]
    theirs = randomised(module(config))
    decoder = ours.from_public(config.to_dict()).make(jnp.float32, "none")
    params = from_torch(shapes_of(decoder), named(tensors(theirs)))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, length)).astype(np.int32)
    cotangent = rng.normal(size=(2, length, config.vocab_size)).astype(np.float32)

    @compiled
    def run(params):
        logits, pullback = jax.vjp(lambda params: decoder.apply({"params": params}, tokens, method=logits_of), params)
        return logits, pullback(cotangent)[0]

    logits, found = run(params)
    want = theirs(torch.from_numpy(tokens).long(), use_cache=False).logits
    want.backward(torch.from_numpy(cotangent))
    errors = relative_error(logits, want.detach().numpy()), assert_same(to_torch(found), named(gradients(theirs)))
    return max(errors)


@pytest.mark.parametrize(("family", "tied"), VARIANTS)
def test_logits_and_gradients_equal_transformers(family, tied):
    assert compare(config_of(family, tie_word_embeddings=tied), family) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 2.5}])
def test_what_is_written_is_the_same_model_to_transformers_and_to_us(family, scaling):
    ours, theirs, _, _ = FAMILIES[family]
    config = config_of(family, rope_parameters=THETA | scaling, tie_word_embeddings=True)
    read = ours.from_public(config.to_dict())
    assert (read.kind, read.rope_theta, read.tie_word_embeddings) == (family, 1e6, True)
    settings = json.loads(json.dumps(hf_settings(read, SpecialTokens.last_of(29), "float32")))
    assert ours.from_public({"model_type": family, **settings}) == read
    again = theirs(**settings)
    assert again.rope_parameters.items() >= config.rope_parameters.items()
    assert all(getattr(again, name) == getattr(config, name) for name in TINY)


def test_a_file_of_transformers_4_is_read():
    """As Qwen2.5-0.5B and Qwen3-0.6B were published, but for their sizes."""
    common = {**TINY, "hidden_act": "silu", "attention_dropout": 0.0, "rope_theta": 1000000.0, "use_cache": True}
    second = {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False, "max_window_layers": 1}
    assert Qwen2Config.from_public({**common, **second, "use_mrope": False}) == Qwen2Config(**TINY, rope_theta=1e6)
    third = {"model_type": "qwen3", "head_dim": 16, "sliding_window": None, "rope_scaling": None}
    got = Qwen3Config.from_public({**common, **third, "use_sliding_window": False, "attention_bias": False})
    assert got == Qwen3Config(**TINY, rope_theta=1e6, head_dim=16)
    assert Qwen3Config.from_public({**TINY, "model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_is_refused_unless_it_has_no_effect(family):
    ours, theirs, _, _ = FAMILIES[family]
    plain, kinds = {**TINY, "sliding_window": 16}, ["full_attention", "sliding_attention"]

    def has_effect(settings):
        """As transformers understands the file, for documents of up to `max_position_embeddings` tokens."""
        config = theirs(**settings)
        return "sliding_attention" in config.layer_types and (config.sliding_window or 64) < 64

    for harmless in (
        {},  # not used unless the file says so
        {"use_sliding_window": False, "layer_types": kinds},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True},  # 28 layers before the first that has one
        {"use_sliding_window": True, "max_window_layers": 1, "layer_types": kinds[:1] * 2},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 64},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
    ):
        assert ours.from_public(plain | harmless) == ours(**TINY) and not has_effect(plain | harmless)
    for harmful in (
        {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "layer_types": kinds},
    ):
        assert has_effect(plain | harmful)
        with pytest.raises(ValueError, match="sliding_window = 16 is not supported"):
            ours.from_public(plain | harmful)
    stretched = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "max_window_layers": 0, "sliding_window": 100}
    with pytest.raises(ValueError, match="sliding_window = 100 is not supported"):
        ours.from_public({**TINY, **stretched, "use_sliding_window": True})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen2Config(**TINY, attention_bias=False), "Qwen2ForCausalLM has no attention_bias=False"),
        (Qwen2Config(**TINY, attention_out_bias=None), "Qwen2ForCausalLM has no attention_out_bias=None"),
        (Qwen2Config(**TINY, mlp_bias=True), "Qwen2ForCausalLM has no mlp_bias=True"),
        (Qwen2Config(**TINY, qk_norm=True), "Qwen2ForCausalLM has no qk_norm=True"),
        (Qwen3Config(**TINY, qk_norm=False), "Qwen3ForCausalLM has no qk_norm=False"),
        (Qwen3Config(**TINY, attention_out_bias=True), "Qwen3ForCausalLM has biases at all projections"),
        (Qwen3Config(**TINY, embedding_scale=2.0), r"Qwen3ForCausalLM has no embedding_scale=2\.0"),
    ],
)
def test_what_the_public_class_does_not_know_is_not_written(config, message):
    with pytest.raises(ValueError, match=message):
        config.to_public()


# Parameters without the embedding, and whether its matrix is the head's too, as the model cards say.
BILLIONS = {
    "qwen25-0.5b": (0.36, True),
    "qwen25-1.5b": (1.31, True),
    "qwen25-3b": (2.77, True),
    "qwen25-7b": (6.53, False),
    "qwen25-14b": (13.1, False),
    "qwen3-0.6b": (0.44, True),
    "qwen3-1.7b": (1.4, True),
    "qwen3-4b": (3.6, True),
    "qwen3-8b": (6.95, False),
    "qwen3-14b": (13.2, False),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_published_shapes_are_of_the_sizes_that_were_told(name):
    family = Qwen3Config if name.startswith("qwen3") else Qwen2Config
    settings = dict(family.PUBLISHED[name])
    assert settings.pop("kind") == family.kind
    config = family(**settings)
    shapes = shapes_of(config.make(jnp.bfloat16))
    sizes = {path: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(part)) for path, part in shapes.items()}
    assert ("lm_head" not in sizes) == BILLIONS[name][1]
    tables = sizes.pop("embed_tokens") + sizes.pop("lm_head", 0)
    assert tables == config.vocab_size * config.hidden_size * (1 if BILLIONS[name][1] else 2)
    assert config.vocab_size % 128 == 0 and config.head_dim == (64 if name == "qwen25-0.5b" else 128)
    assert sum(sizes.values()) / 1e9 == pytest.approx(BILLIONS[name][0], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [("qwen2", "qwen25-0.5b"), ("qwen3", "qwen3-0.6b")])
def test_one_layer_at_true_width(family, name):
    ours = FAMILIES[family][0]
    settings = {**ours.PUBLISHED[name], "vocab_size": 8, "num_hidden_layers": 1, "kind": family}
    config = FAMILIES[family][1](**ours(**settings).to_public())
    assert compare(config, family, length=16) <= 1e-5
