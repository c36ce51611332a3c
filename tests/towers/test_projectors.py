"""Projectors equal the original's in outputs and gradients."""

import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.towers.connectors.projector import Projector, ProjectorConfig
from tests.parity import assert_same, compiled, gradients, randomised, tensors

torch = pytest.importorskip("torch")

N, T, WIDTH_IN, WIDTH_OUT = 2, 9, 6, 10


class TorchProjector(torch.nn.Module):
    def __init__(self, config: ProjectorConfig, bias: bool):
        super().__init__()
        if config.kind == "conv":
            self.projector = torch.nn.Conv2d(WIDTH_IN, WIDTH_OUT, 3, padding=1)
        elif config.kind == "linear":
            self.projector = torch.nn.Linear(WIDTH_IN, WIDTH_OUT, bias)
        else:
            layers = [torch.nn.Linear(WIDTH_IN, WIDTH_OUT, bias)]
            for _ in range(1, config.depth):
                layers += [torch.nn.GELU(), torch.nn.Linear(WIDTH_OUT, WIDTH_OUT, bias)]
            self.projector = torch.nn.Sequential(*layers)
        if config.post_layernorm:
            self.post_layernorm = torch.nn.LayerNorm(WIDTH_OUT, eps=config.layer_norm_eps)

    def forward(self, x):
        if isinstance(self.projector, torch.nn.Conv2d):
            side = math.isqrt(T)
            x = self.projector(x.permute(0, 2, 1).reshape(N, WIDTH_IN, side, side)).flatten(2).permute(0, 2, 1)
        else:
            x = self.projector(x)
        return self.post_layernorm(x) if hasattr(self, "post_layernorm") else x


@pytest.mark.parametrize(
    ("config", "bias"),
    [
        (ProjectorConfig(), True),
        (ProjectorConfig("mlp", 3, post_layernorm=True, layer_norm_eps=1e-3), False),
        (ProjectorConfig("conv"), False),
    ],
    ids=["linear", "mlp", "conv"],
)
def test_parity(config, bias):
    theirs, ours = randomised(TorchProjector(config, bias)), Projector(config, WIDTH_OUT, bias)
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(N, T, width)).astype(np.float32) for width in (WIDTH_IN, WIDTH_OUT))
    template = nn.unbox(jax.eval_shape(ours.init, jax.random.key(0), x))["params"]
    params = from_torch(template, tensors(theirs))

    @compiled
    def run(params, x):
        out, pullback = jax.vjp(lambda params, x: ours.apply({"params": params}, x), params, x)
        return out, *pullback(cotangent)

    out, weights, grad = run(params, x)
    inputs = torch.tensor(x, requires_grad=True)
    want = theirs(inputs)
    want.backward(torch.tensor(cotangent))
    got = {"out": np.asarray(out), "inputs": np.asarray(grad), **to_torch(weights)}
    assert_same(got, {"out": want.detach().numpy(), "inputs": inputs.grad.numpy(), **gradients(theirs)})


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="an mlp projector has a depth of 2 or more"):
        ProjectorConfig("linear", 2)
    with pytest.raises(ValueError, match="kind must be linear, mlp or conv, got 'sam'"):
        ProjectorConfig("sam")
    with pytest.raises(ValueError, match="needs a square number of tokens, got 8"):
        Projector(ProjectorConfig("conv"), 4, True).init(jax.random.key(0), np.zeros((1, 8, 4), np.float32))
