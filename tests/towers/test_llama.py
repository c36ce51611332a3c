import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.interop.language_model import hf_settings
from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.layers.rope import RopeScaling
from dreamllm_jax.towers.language_models.decoder import Decoder
from dreamllm_jax.towers.language_models.llama import LlamaConfig
from tests.parity import assert_same, gradients, random_weights, randomised, relative_error, tensors
from tests.tiny import logits_of

TINY = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "multi_head": {},
    "grouped_queries": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "one_key_head_and_biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 8,
    },
    "llama3": {"rope_parameters": LLAMA3},
}


def pair(**changes):
    """A random PyTorch model, ours, and its weights for ours."""
    config = transformers.LlamaConfig(**{**TINY, **changes})
    theirs = randomised(transformers.LlamaForCausalLM(config))
    ours = Decoder(LlamaConfig.from_public(config.to_dict()))
    return theirs, ours, {"params": from_torch(shapes_of(ours)["params"], by_our_names(tensors(theirs)))}


def shapes_of(ours):
    return nn.unbox(jax.eval_shape(lambda: ours.init(jax.random.key(0), tokens_of(1, 2), method=logits_of)))


def by_our_names(named):
    return {name.removeprefix("model."): value for name, value in named.items()}


def tokens_of(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, TINY["vocab_size"], (rows, length)).astype(np.int32)


def ranges(segment_ids):
    """Positions that restart with every segment."""
    starts = np.diff(segment_ids, axis=1, prepend=-1) != 0
    index = np.arange(segment_ids.shape[1])
    return (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(variant):
    theirs, ours, params = pair(**VARIANTS[variant])
    tokens = tokens_of(2, 12)
    cotangent = np.random.default_rng(1).normal(size=(2, 12, TINY["vocab_size"])).astype(np.float32)

    embeddings = theirs.model.embed_tokens(torch.from_numpy(tokens))
    embeddings.retain_grad()
    output = theirs(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
    output.logits.backward(torch.from_numpy(cotangent))

    @jax.jit
    def run(params, shift):
        def forward(params, shift):
            bound = ours.bind(params)
            positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
            hidden, _ = bound(bound.embed(tokens) + shift, positions, jnp.ones((2, 12), jnp.int32))
            return bound.logits(hidden), hidden

        logits, pullback, hidden = jax.vjp(forward, params, shift, has_aux=True)
        return logits, hidden, pullback(cotangent)

    logits, hidden, (weights, inputs) = run(params, jnp.zeros(embeddings.shape))
    assert logits.dtype == jnp.float32
    got = {"logits": logits, "hidden": hidden, "inputs": inputs, **to_torch(weights["params"])}
    want = {
        "logits": output.logits.detach(),
        "hidden": output.hidden_states[-1].detach(),
        "inputs": embeddings.grad,
        **by_our_names(gradients(theirs)),
    }
    assert_same(got, want)


def test_dynamic_scaling_starts_beyond_the_trained_length():
    theirs, ours, params = pair(**{**VARIANTS["dynamic"], "max_position_embeddings": 64})
    tokens = tokens_of(2, 12)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)).logits
    got = jax.jit(ours.apply, static_argnames="method")(params, tokens, method=logits_of)
    assert relative_error(got, want) <= 1e-5


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # the lowest version knows no other
def test_dynamic_scaling_follows_what_each_row_has_read():
    """As transformers with its cache does for a row alone, whatever rows lie beside it."""
    theirs, ours, params = pair(**VARIANTS["dynamic"])
    tokens, step = tokens_of(2, 14), jax.jit(run.__wrapped__, static_argnums=0)
    cache, theirs_cache = ours.config.cache(2, 64), transformers.DynamicCache()
    for start, stop in ((0, 10), (10, 11), (11, 14)):
        with torch.no_grad():
            want = theirs.model(torch.from_numpy(tokens[:1, start:stop]), past_key_values=theirs_cache)
        segments = np.stack([np.ones(stop - start), np.arange(stop - start) < 1]).astype(np.int32)
        positions = np.stack([np.arange(start, stop), cache.length[1] + np.arange(stop - start)])
        got, cache = step(ours, params, tokens[:, start:stop], positions, segments, cache)
        assert relative_error(got[0], want.last_hidden_state[0]) <= 1e-5


@pytest.mark.parametrize(
    "rope",
    [{"rope_theta": 10000.0}, {"rope_theta": 500000.0, **LLAMA3, "original_max_position_embeddings": 1024}],
)
def test_frequencies_at_true_width(rope):
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(rope_parameters={"rope_type": "default", **rope}))
    got = LlamaConfig.from_public({"rope_parameters": rope}).rope_frequencies(2048)
    np.testing.assert_allclose(got, theirs.inv_freq, rtol=1e-6)


def small():
    config = LlamaConfig(**{**TINY, "num_key_value_heads": 2}, rope_scaling=RopeScaling("linear", 1.5))
    ours = Decoder(config, remat="none")
    return ours, random_weights(shapes_of(ours))


@functools.partial(jax.jit, static_argnums=0)
def run(ours, params, tokens, positions, segment_ids, cache):
    bound = ours.bind(params)
    return bound(bound.embed(tokens), positions, segment_ids, cache)


def hidden_of(ours, params, tokens, segment_ids=None, cache=None):
    segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
    return run(ours, params, tokens, ranges(segment_ids), segment_ids, cache)


def test_packed_documents_are_as_if_alone():
    ours, params = small()
    a, b, c = tokens_of(1, 5, 1), tokens_of(1, 6, 2), tokens_of(1, 3, 3)
    row = np.concatenate([a, b, np.zeros((1, 2), np.int32), c], axis=1)
    segment_ids = np.repeat([1, 2, 0, 3], [5, 6, 2, 3])[None].astype(np.int32)
    packed, _ = hidden_of(ours, params, row, segment_ids)
    for document, start in ((a, 0), (b, 5), (c, 13)):
        alone, _ = hidden_of(ours, params, document)
        assert relative_error(packed[:, start : start + document.shape[1]], alone) <= 1e-6


def test_padding_and_other_documents_get_exactly_no_gradient():
    ours, params = small()
    segment_ids = np.repeat([1, 2, 0], [5, 6, 3])[None].astype(np.int32)
    x = np.random.default_rng(0).normal(size=(1, 14, TINY["hidden_size"])).astype(np.float32)

    @jax.jit
    def loss(x):
        hidden, _ = ours.apply(params, x, ranges(segment_ids), segment_ids)
        return jnp.square(hidden[segment_ids == 2]).sum()

    grad = np.asarray(jax.grad(loss)(x))
    assert grad[segment_ids == 2].all()
    assert not grad[segment_ids != 2].any()


def test_an_all_padding_row_stays_finite():
    ours, params = small()
    segment_ids = np.stack([np.ones(6), np.zeros(6)]).astype(np.int32)

    @jax.jit
    def loss(params):
        hidden, _ = hidden_of(ours, params, tokens_of(2, 6), segment_ids)
        return jnp.square(hidden[0]).sum()

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss)(params)))


def test_the_cache_changes_nothing_for_ragged_rows():
    ours, params = small()
    rows, lengths = 3, np.array([9, 6, 8])
    tokens = tokens_of(rows, 9)
    whole, _ = hidden_of(ours, params, tokens, (np.arange(9) < lengths[:, None]).astype(np.int32))
    # How many tokens each row reads in each call: a prompt, single steps (the second row rests in one), a longer piece.
    calls = np.array([[5, 2, 4], [1, 0, 1], [1, 1, 1], [2, 3, 2]])
    assert (calls.sum(0) == lengths).all()

    step = jax.jit(run.__wrapped__, static_argnums=0, donate_argnums=5)
    cache = ours.config.cache(rows, 10)
    done, got = np.zeros(rows, int), [[] for _ in range(rows)]
    for counts in calls:
        width = counts.max()
        piece, segment_ids = np.full((rows, width), 7, np.int32), np.zeros((rows, width), np.int32)
        for row, count in enumerate(counts):
            piece[row, :count] = tokens[row, done[row] : done[row] + count]
            segment_ids[row, :count] = 1
        positions = (done[:, None] + np.arange(width)).astype(np.int32)
        hidden, cache = step(ours, params, piece, positions, segment_ids, cache)
        for row, count in enumerate(counts):
            got[row].append(hidden[row, :count])
        done += counts
    np.testing.assert_array_equal(cache.length, lengths)
    np.testing.assert_array_equal(cache.segment_ids, np.arange(10) < lengths[:, None])
    for row, length in enumerate(lengths):
        assert relative_error(np.concatenate(got[row]), whole[row, :length]) <= 1e-6


def test_a_full_cache_drops_what_does_not_fit():
    ours, params = small()
    _, full = hidden_of(ours, params, tokens_of(1, 4), cache=ours.config.cache(1, 4))
    _, over = hidden_of(ours, params, tokens_of(1, 4), cache=full)
    np.testing.assert_array_equal(over.k, full.k)


def test_remat_changes_no_number():
    ours, params = small()
    tokens = tokens_of(2, 7)

    def outcome(policy):
        model = ours.clone(remat=policy)
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(hidden_of(model, p, tokens)[0]).sum()))(params)

    want = outcome("none")
    for policy in ("dots", "attention+gate", "offload", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), outcome(policy), want)
    with pytest.raises(ValueError, match="unknown remat policy 'ful'"):
        outcome("ful")


def test_half_precision_stays_near():
    ours, params = small()
    tokens = tokens_of(2, 7)
    half = ours.clone(dtype=jnp.bfloat16)
    hidden, _ = hidden_of(half, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert half.bind(params).logits(hidden).dtype == jnp.float32
    assert relative_error(hidden.astype(jnp.float32), hidden_of(ours, params, tokens)[0]) < 0.03


def test_tied_model_has_no_head_of_its_own():
    ours = Decoder(LlamaConfig(**TINY, tie_word_embeddings=True))
    params = random_weights(shapes_of(ours))
    assert "lm_head" not in params["params"]
    kernel = ours.bind(params).head_kernel()
    np.testing.assert_array_equal(kernel, params["params"]["embed_tokens"]["embedding"].T)


def test_config_is_read_in_old_and_new_style():
    old = {**TINY, "model_type": "llama", "hidden_act": "silu", "rope_theta": 5e5, "sliding_window": None}
    want = LlamaConfig(**TINY, rope_theta=5e5)
    assert LlamaConfig.from_public({**old, "rope_scaling": None}) == want
    new = {**TINY, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert LlamaConfig.from_public(new) == want
    scaled = dataclasses.replace(want, rope_scaling=RopeScaling("dynamic", 2.0))
    assert LlamaConfig.from_public({**old, "rope_scaling": {"type": "dynamic", "factor": 2.0}}) == scaled
    assert (
        LlamaConfig.from_public({**new, "rope_parameters": {"rope_theta": 5e5, **{"type": "dynamic", "factor": 2.0}}})
        == scaled
    )
    assert LlamaConfig.from_public(transformers.LlamaConfig().to_dict()) == LlamaConfig()
    assert LlamaConfig.from_public({**old, "sliding_window": 4096}) == want  # wider than any row
    first = LlamaConfig.from_public({name: TINY[name] for name in TINY if name != "num_key_value_heads"})
    assert (first.num_key_value_heads, first.head_dim, first.rope_theta) == (4, 8, 10000.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_the_same_model_to_transformers_and_to_us(variant):
    theirs = transformers.LlamaConfig(**{**TINY, **VARIANTS[variant]})
    ours = LlamaConfig.from_public(theirs.to_dict())
    written = json.loads(json.dumps({"model_type": "llama", **hf_settings(ours, SpecialTokens.last_of(29), "float32")}))
    assert LlamaConfig.from_public(written) == ours
    read = transformers.LlamaConfig(**written)
    assert torch.equal(LlamaRotaryEmbedding(read).inv_freq, LlamaRotaryEmbedding(theirs).inv_freq)
    assert read.rope_parameters.items() >= theirs.rope_parameters.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported: only 'silu' is"),
        ({"sliding_window": 16}, "sliding_window = 16 is not supported"),
        ({"rope_theta": 0}, "rope_theta must be positive, got 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be positive, got nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be positive, got inf"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of rope_type 'linear' must be a positive number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "are of different types",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported"),
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_type 'llama3' needs low_freq_factor"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_config_refuses_what_it_cannot_honour(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_public({**TINY, **changes})


@pytest.mark.slow
def test_one_layer_at_the_width_of_7b():
    config = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=8)
    theirs = randomised(transformers.LlamaModel(config))
    assert isinstance(theirs.layers[0], LlamaDecoderLayer)
    ours = Decoder(LlamaConfig.from_public(config.to_dict()))
    template = {name: value for name, value in shapes_of(ours)["params"].items() if name != "lm_head"}
    params = {"params": from_torch(template, tensors(theirs))}
    rng = np.random.default_rng(0)
    inputs, cotangent = rng.normal(size=(2, 1, 64, 4096)).astype(np.float32)

    embeddings = torch.from_numpy(inputs).requires_grad_()
    output = theirs(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    output.backward(torch.from_numpy(cotangent))

    @jax.jit
    def run(params, inputs):
        positions, segments = jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32)
        hidden, pullback = jax.vjp(lambda p, x: ours.apply(p, x, positions, segments)[0], params, inputs)
        return hidden, pullback(cotangent)

    hidden, (weights, grad) = run(params, inputs)
    got = {"hidden": hidden, "inputs": grad, **to_torch(weights["params"])}
    want = {"hidden": output.detach(), "inputs": embeddings.grad, **gradients(theirs)}
    assert_same(got, want)
