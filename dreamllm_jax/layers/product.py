"""A language model's products: their kernels are stored in parts and gathered where they are used; perhaps adapted."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.lora import LORA_A, LORA_B, LoraConfig, adapt, initial_a
from dreamllm_jax.layers.weights import normal, weight
from dreamllm_jax.parallel.collectives import gather_weight

Array = jax.Array


class Linear(nn.Module):
    """A product with a kernel that is stored as a matrix and gathered where it is used.

    Inputs and outputs may have several axes, heads and their dimension: on TPU, reshaping the kernel instead of them
    spares copies of activations.
    """

    inputs: tuple[int, ...]
    features: tuple[int, ...]
    use_bias: bool
    axes: tuple[str, str]
    std: float
    dtype: Any
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = math.prod(self.inputs), math.prod(self.features)
        kernel = self.param("kernel", weight(normal(self.std), *self.axes), shape)
        kernel = kernel.astype(self.dtype)
        if x.size >= kernel.size:  # of a few tokens, as while generating, the products travel instead
            kernel = gather_weight(kernel, self.axes)
        kernel = kernel.reshape(*self.inputs, *self.features)
        out = jnp.tensordot(x, kernel, axes=len(self.inputs))
        if self.use_bias:
            zeros = weight(nn.initializers.zeros, self.axes[1])
            bias = self.param("bias", zeros, shape[1:])
            out = out + spread(bias.reshape(self.features), out.shape, self.dtype)
        if self.lora is not None:
            a, b = self._adapter(*shape)
            out = out + adapt(x, a, b, self.lora.scale, axes=len(self.inputs))
        return out

    def _adapter(self, width_in: int, width_out: int) -> tuple[Array, Array]:
        rank, (axis_in, axis_out) = self.lora.rank, self.axes
        first = weight(initial_a, axis_in, "lora")
        zeros = weight(nn.initializers.zeros, "lora", axis_out)
        a = self.param(LORA_A, first, (width_in, rank)).astype(self.dtype)
        b = self.param(LORA_B, zeros, (rank, width_out)).astype(self.dtype)
        a, b = gather_weight(a, (axis_in, "lora")), gather_weight(b, ("lora", axis_out))
        return a.reshape(*self.inputs, rank), b.reshape(rank, *self.features)
