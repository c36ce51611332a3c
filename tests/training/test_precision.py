"""Gradients in bfloat16: sums over many tokens, pixels and images are as good as float32's."""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.layers import linear
from dreamllm_jax.layers.lora import LoraConfig
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.towers.language_models.decoder import rms_norm
from dreamllm_jax.training.step import loss_and_gradients
from tests.tiny import MLP, make_batch, random_document, row_shape, tiny_config, tiny_params

ROWS, LENGTH, IMAGES = 2, 2048, 16
OBJECTIVE = JointConfig(dm_weight=0.1, drop_prob=0.5, loss_chunk=512, image_chunk=16)

# What the towers' branches end with.
LAST = re.compile("(o_proj|down_proj|out_proj|fc2|conv2|to_out_0|net_2|proj_out)/kernel")
# The same bias in all keys changes no softmax: this gradient is 0.
NONE = "vision_encoder/encoder/layers/self_attn/k_proj/bias"


def long_batch(config):
    """Rows of text in which every second token is the same one, after some documents with images."""
    rng = np.random.default_rng(0)
    documents = [[random_document(rng, config, "sdtt") for _ in range(IMAGES)] for _ in range(ROWS)]
    batch = make_batch(config, documents, shape=row_shape(config, LENGTH, IMAGES, IMAGES))
    for row in range(ROWS):
        start = int((batch.segment_ids[row] > 0).sum())
        count, text = LENGTH - start, slice(start, LENGTH)
        batch.tokens[row, text] = np.where(np.arange(count) % 2, rng.integers(6, 50, count), 5)
        batch.positions[row, text] = np.arange(count) % 64
        batch.segment_ids[row, text] = IMAGES + 1 + np.arange(count) // 64
        batch.loss_weights[row, text] = np.arange(count) % 64 > 0
    return batch


def plausible_params(config):
    """Products keep the size of what goes in, and all that bfloat16 cannot say is left out of the comparison.

    Branches add little to the residual stream, as in trained towers: then what is rounded in one hardly blurs the next.
    """
    rng, params = np.random.default_rng(1), flatten_dict(tiny_params(config), sep="/")
    for path, value in params.items():
        name = path.rsplit("/", 1)[-1]
        if name in ("kernel", "lora_a", "lora_b"):
            inputs = np.prod(value.shape[1:-1] if "/layers/" in path else value.shape[:-1])
            smaller = 0.1 if name == "lora_b" else 0.5 if re.search("vision_encoder/.*/[qk]_proj", path) else 1.0
            value = rng.normal(size=value.shape) * inputs**-0.5 * (0.3 if LAST.search(path) else smaller)
        elif name == "scale":
            value = np.ones(value.shape)
        else:
            value = rng.normal(size=value.shape) * (0.05 if name == "bias" else 0.5)
        params[path] = np.asarray(jnp.asarray(value, jnp.bfloat16).astype(jnp.float32))
    return params


@pytest.mark.slow
def test_every_gradient_of_the_joint_step_is_near_float32():
    config = tiny_config(visual_projector=MLP, connector=MLP)
    llama = dataclasses.replace(
        config.language_model, attention_bias=True, mlp_bias=True, lora=LoraConfig(rank=4, alpha=8.0)
    )
    unet = dataclasses.replace(
        config.image_decoder.denoiser, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=4
    )
    decoder = dataclasses.replace(config.image_decoder, denoiser=unet)
    config = dataclasses.replace(config, language_model=llama, image_decoder=decoder)
    batch, params = long_batch(config), plausible_params(config)

    def gradients(dtype):
        objective = OBJECTIVE.make(DreamLLM(dataclasses.replace(config, dtype=dtype)))
        step = jax.jit(lambda params, batch, draws: loss_and_gradients(objective, params, {}, batch, draws)[1])
        return jax.device_get(step(params, batch, objective.draws(jax.random.key(0), batch)))

    with ThreadPoolExecutor() as pool:
        wide, narrow = pool.map(gradients, ("float32", "bfloat16"))
    left_out = {path for path in wide if path.startswith("image_decoder/autoencoder/")} | {NONE}
    errors = {path: _errors(wide[path], narrow[path]) for path in wide.keys() - left_out if wide[path].any()}
    assert not {path: error for path, error in errors.items() if error[0] > 0.02 or error[1] > 0.01}


def _errors(wide, narrow):
    """The relative L2 error, and that of the norm."""
    norm = np.linalg.norm(wide)
    return np.linalg.norm(narrow - wide) / norm, abs(np.linalg.norm(narrow) / norm - 1)


def ones(*shape):
    return jnp.ones(shape, jnp.bfloat16)


def _gradient_of_ones(function, weight):
    """The gradient of a weight for gradients 1 of all that comes of it."""
    out, pullback = jax.vjp(function, weight)
    (gradient,) = pullback(jnp.ones_like(out))
    assert out.dtype == jnp.bfloat16 and gradient.dtype == jnp.float32
    return gradient


def test_sums_over_tokens_do_not_stop_growing():
    """16,384 ones: in bfloat16 they come to 256."""
    count, width = 16_384, 4
    tokens, weights = jnp.zeros((4, count // 4), jnp.int32), jnp.ones((width,), jnp.float32)

    def layer(module, x):
        params = module.init(jax.random.key(0), x)["params"]
        return lambda bias: module.apply({"params": {**params, "bias": bias}}, x)

    pixels = ones(1, 128, 128, width)
    sums = {
        "embedding": _gradient_of_ones(lambda t: linear.look_up(t, tokens, jnp.bfloat16), jnp.ones((3, width)))[0],
        "queries": _gradient_of_ones(lambda q: linear.spread(q, (count, width), jnp.bfloat16), weights),
        "scale": _gradient_of_ones(lambda s: rms_norm(ones(count, width), s, 0.0), weights),
        "bias": _gradient_of_ones(layer(linear.Dense(width, dtype=jnp.bfloat16), ones(count, width)), weights),
        "pixels": _gradient_of_ones(layer(linear.Conv(width, (3, 3), dtype=jnp.bfloat16), pixels), weights),
    }
    for name, total in sums.items():
        np.testing.assert_array_equal(total, np.full(width, count, np.float32), err_msg=name)
