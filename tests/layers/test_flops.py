"""What attention kernels say that they compute is what is counted, forward and backward."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from dreamllm_jax.layers import attention, full_attention_tpu
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.towers.vision_encoders.clip import ClipVisionConfig
from dreamllm_jax.towers.vision_encoders.intern_vit import InternVitConfig

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,  # 17 positions
}
TOWERS = {"clip": ClipVisionConfig(**SHAPE, select_layer=-2), "intern_vit": InternVitConfig(**SHAPE, downsample=2)}
IMAGES = 3


def declared(jaxpr, times=1):
    """FLOPs of the kernels in a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            total += times * equation.params["cost_estimate"].flops
        else:
            for inner in jaxprs_in_params(equation.params):
                total += declared(inner, times * equation.params.get("length", 1))
    return total


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS.keys())
def test_kernels_of_vision_encoders(monkeypatch, config, trained, remat):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(full_attention_tpu, "QUERY_ROWS", 16)
    tower, images = config.make(jnp.bfloat16, remat), jnp.zeros((IMAGES, 16, 16, 3), jnp.bfloat16)
    params = nn.unbox(jax.eval_shape(tower.init, jax.random.key(0), images))

    def loss(params):
        return tower.apply(params, images).astype(jnp.float32).sum()

    program = jax.make_jaxpr(jax.grad(loss) if trained else loss)(params).jaxpr
    counted = Tally(lambda _: trained)
    config.flops(counted, IMAGES, 16, 16, remat != "none")
    layers = 2 if config.kind == "clip" else 3
    rows = 32  # of two blocks
    forward = layers * 2 * 2 * IMAGES * rows * 17 * 128
    assert counted.total.kernels == declared(program)
    assert counted.total.kernels == forward * (1 + trained * (2.5 + (remat == "full")))
    elsewhere = Tally(lambda _: trained, platform="cpu")
    config.flops(elsewhere, IMAGES, 16, 16, remat != "none")
    assert elsewhere.total.kernels == 0 and math.isclose(elsewhere.total.model, counted.total.model)
