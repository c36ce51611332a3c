"""Projectors, the small trainable maps between towers: of what is seen to the language model (visual projector), and of
its hidden states to the image decoder (connector).

Legend: N images, T tokens (patches or queries) of an image, I width in, O width out.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.layers.flops import Tally, convolution, dense
from dreamllm_jax.layers.linear import Conv, Dense
from dreamllm_jax.layers.weights import normal, weight
from dreamllm_jax.towers.condition import Condition

_INIT = normal(0.02)


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """A map from one tower's width to another's.

    Attributes:
      kind: "linear" (one layer), "mlp" (`depth` layers with exact GELU between), or "conv" (one 3x3 convolution, always
        with bias, over the tokens as a square).
      depth: number of linear layers; 1 but for "mlp".
      post_layernorm: a LayerNorm after the last layer.
      layer_norm_eps: its epsilon (the original takes it from the CLIP tower).
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    prompt_tokens: ClassVar[int] = 0
    sees: ClassVar[bool] = False

    kind: Literal["linear", "mlp", "conv"] = "linear"
    depth: int = 1
    post_layernorm: bool = False
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be positive, got {self.layer_norm_eps}")
        if self.kind not in ("linear", "mlp", "conv"):
            raise ValueError(f"kind must be linear, mlp or conv, got {self.kind!r}")
        if (self.kind == "mlp") != (self.depth > 1) or self.depth < 1:
            raise ValueError(
                f"an mlp projector has a depth of 2 or more, the others 1: got {self.kind!r} with depth {self.depth}"
            )

    def require_tokens(self, tokens: int) -> None:
        """Raises ValueError if images of so many tokens cannot be mapped."""
        if self.kind == "conv" and math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"a conv projector needs a square number of tokens, got {tokens}")

    def condition_tokens(self, tokens: int) -> int:
        """Of the condition of so many queries."""
        return tokens

    def make(self, features: int, dtype: jnp.dtype, **names: str) -> "Projector":
        """The visual projector, to vectors of the language model."""
        return Projector(self, features, use_bias=True, dtype=dtype, **names)

    def make_connector(self, features: int, pooled: int, dtype: jnp.dtype, **names: str) -> "ProjectorConnector":
        """The connector, to a condition of this width and a pooled vector of that, 0 for none."""
        return ProjectorConnector(self, features, use_bias=False, dtype=dtype, pooled=pooled, **names)

    def flops(self, tally: Tally, images: int, tokens: int, inputs: int, outputs: int, pooled: int = 0) -> None:
        """Adds the products of `images` of so many tokens."""
        if pooled:
            beside = tally.beside(tally.live)
            beside.product("pooled_projector/kernel", dense(images, inputs, pooled))
            tally.total += beside.total
        if self.kind == "conv":
            tally.product("projector/kernel", convolution(images, (math.isqrt(tokens),) * 2, inputs, outputs))
            return
        for i in range(self.depth):
            name = "projector" if self.kind == "linear" else f"projector_{2 * i}"
            tally.product(f"{name}/kernel", dense(images * tokens, outputs if i else inputs, outputs))


class Projector(nn.Module):
    """DreamLLM, section 3; `LinearProjector`, `MLPProjector` and `ConvProjector` of the original.

    Raises:
      ValueError: "conv" for a number of tokens that is no square.
    """

    config: ProjectorConfig
    features: int
    use_bias: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N T I"]) -> Float[Array, "N T O"]:
        x = self._convolve(x) if self.config.kind == "conv" else self._multiply(x)
        if self.config.post_layernorm:
            x = nn.LayerNorm(
                epsilon=self.config.layer_norm_eps,
                dtype=self.dtype,
                use_fast_variance=False,  # which cancels where means are large
                scale_init=weight(nn.initializers.ones, "tower_norm"),
                bias_init=weight(nn.initializers.zeros, "tower_norm"),
                name="post_layernorm",
            )(x)
        return x

    def _multiply(self, x: Float[Array, "N T I"]) -> Float[Array, "N T O"]:
        for i in range(self.config.depth):
            # Numbered as torch counts a Sequential, where every second entry is the activation.
            name = "projector" if self.config.kind == "linear" else f"projector_{2 * i}"
            x = nn.gelu(x, approximate=False) if i else x
            x = Dense(
                self.features,
                use_bias=self.use_bias,
                dtype=self.dtype,
                kernel_init=weight(_INIT, "tower_in", "tower_out"),
                bias_init=weight(nn.initializers.zeros, "tower_norm"),
                name=name,
            )(x)
        return x

    def _convolve(self, x: Float[Array, "N T I"]) -> Float[Array, "N T O"]:
        self.config.require_tokens(x.shape[1])
        side = math.isqrt(x.shape[1])
        grid = Conv(
            self.features,
            (3, 3),
            padding=1,
            dtype=self.dtype,
            kernel_init=weight(_INIT, None, None, "tower_in", "tower_out"),
            bias_init=weight(nn.initializers.zeros, "tower_norm"),
            name="projector",
        )(x.reshape(x.shape[0], side, side, -1))
        return grid.reshape(*x.shape[:2], -1)


class ProjectorConnector(Projector):
    """A projector of the hidden states at the dream queries.

    A pooled vector is another projection, with bias, of their mean: so DreamLLM's fork has it for Stable Diffusion 3.5.
    """

    pooled: int = 0

    @nn.compact
    def __call__(self, hidden: Float[Array, "N T I"]) -> Condition:
        return Condition(super().__call__(hidden), pooled=self._pool(hidden) if self.pooled else None)

    def _pool(self, hidden: Float[Array, "N T I"]) -> Float[Array, "N P"]:
        return Dense(
            self.pooled,
            dtype=self.dtype,
            kernel_init=weight(_INIT, "tower_in", "tower_out"),
            bias_init=weight(nn.initializers.zeros, "tower_norm"),
            name="pooled_projector",
        )(jnp.mean(hidden.astype(jnp.float32), axis=1))


ProjectorConfig.PUBLISHED = {"linear": {"kind": "linear"}, "mlp": {"kind": "mlp", "depth": 2}, "conv": {"kind": "conv"}}
