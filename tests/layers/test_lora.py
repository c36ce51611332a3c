"""Adapters begin as nothing, learn alone, and merge into the kernels without a change."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.layers.lora import PRODUCTS, LoraConfig, adapters_of, is_adapter, merge
from dreamllm_jax.model import abstract_params
from dreamllm_jax.towers.language_models.decoder import Decoder
from tests.parity import random_weights, relative_error
from tests.tiny import logits_of, tiny_config

PLAIN = dataclasses.replace(tiny_config().language_model, num_hidden_layers=3, attention_bias=True)
LORA = LoraConfig(rank=4, alpha=6.0)
ADAPTED = dataclasses.replace(PLAIN, lora=LORA)


def logits(config, params):
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 64)
    with jax.default_matmul_precision("highest"):
        return np.asarray(Decoder(config).apply({"params": params}, tokens, method=logits_of))


def shapes(config):
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    init = jax.eval_shape(
        lambda key, tokens: Decoder(config).init(key, tokens, method=logits_of), jax.random.key(0), tokens
    )
    return nn.unbox(init["params"])


@pytest.fixture
def adapted():
    """Random weights with random adapters."""
    return random_weights(shapes(ADAPTED))


def without(params):
    return unflatten_dict(
        {path: x for path, x in flatten_dict(params, sep="/").items() if not is_adapter(path)}, sep="/"
    )


def test_every_layer_has_an_adapter_for_each_target():
    paths = {path: leaf.shape for path, leaf in flatten_dict(shapes(ADAPTED), sep="/").items() if is_adapter(path)}
    assert len(paths) == 2 * len(PRODUCTS)
    assert paths["layers/self_attn/o_proj/lora_a"] == (3, 32, 4) and paths["layers/mlp/up_proj/lora_b"] == (3, 4, 48)
    few = dataclasses.replace(PLAIN, lora=LoraConfig(4, 6.0, ("q_proj", "v_proj")))
    assert {path.split("/")[2] for path in flatten_dict(shapes(few), sep="/") if is_adapter(path)} == {
        "q_proj",
        "v_proj",
    }


def test_a_fresh_adapter_adds_nothing(adapted):
    params = nn.unbox(
        Decoder(ADAPTED).init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32), method=logits_of)["params"]
    )
    np.testing.assert_array_equal(logits(ADAPTED, params), logits(PLAIN, without(params)))
    first = flatten_dict(params, sep="/")["layers/mlp/down_proj/lora_a"]
    assert np.std(first) == pytest.approx(48**-0.5, rel=0.1)
    assert relative_error(logits(ADAPTED, adapted), logits(PLAIN, without(adapted))) > 0.1


def test_merged_kernels_do_the_same(adapted):
    leaves = flatten_dict(adapted, sep="/")
    merged = {
        path: merge(leaf, *(leaves[name] for name in adapters_of(path)), LORA.scale) if "_proj/kernel" in path else leaf
        for path, leaf in leaves.items()
    }
    got = logits(PLAIN, without(unflatten_dict(merged, sep="/")))
    assert relative_error(got, logits(ADAPTED, adapted)) < 1e-5


def test_the_whole_model_names_their_axes():
    from tests.tiny import tiny_config

    config = tiny_config()
    config = dataclasses.replace(config, language_model=dataclasses.replace(config.language_model, lora=LORA))
    leaves = flatten_dict(abstract_params(config)["language_model"], sep="/")
    assert leaves["layers/self_attn/q_proj/lora_a"].names == ("layers", "embed", "lora")
    assert leaves["layers/self_attn/k_proj/lora_b"].names == ("layers", "lora", "kv_heads")
    assert leaves["layers/mlp/down_proj/lora_a"].names == ("layers", "mlp", "lora")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0, "alpha": 1.0}, "rank and alpha must be positive"),
        ({"rank": 4, "alpha": 8.0, "targets": ("q_prj",)}, "targets must be some of q_proj, .*, got q_prj"),
        ({"rank": 4, "alpha": 8.0, "targets": ()}, "got none"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_a_config_json_does_not_tell_of_them():
    assert "lora" not in json.dumps(ADAPTED.to_public())
