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
      pre_layernorm: a LayerNorm before the first layer (InternVL's `mlp1`).
      post_layernorm: a LayerNorm after the last layer.
      layer_norm_eps: their epsilon (the original takes it from the CLIP tower).
      bias: whether linear layers have biases; None for as the original has it: the visual projector's do, the
        connector's do not.
      pooled_bias: whether the layers on the way to a pooled vector have biases, for image decoders that want one.
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    prompt_tokens: ClassVar[int] = 0
    sees: ClassVar[bool] = False

    kind: Literal["linear", "mlp", "conv"] = "linear"
    depth: int = 1
    pre_layernorm: bool = False
    post_layernorm: bool = False
    layer_norm_eps: float = 1e-5
    bias: bool | None = None
    pooled_bias: bool = True

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
        return Projector(self, features, use_bias=self.bias is not False, dtype=dtype, **names)

    def make_connector(
        self, features: int, pooled: int, dtype: jnp.dtype, remat: str, **names: str
    ) -> "ProjectorConnector":
        """The connector, to a condition of this width and a pooled vector of that, 0 for none."""
        return ProjectorConnector(self, features, use_bias=bool(self.bias), dtype=dtype, pooled=pooled, **names)

    def flops(
        self, tally: Tally, images: int, tokens: int, inputs: int, outputs: int, pooled: int = 0, remat: bool = False
    ) -> None:
        """Adds the products of `images` of so many tokens; there is nothing that is worth computing again."""
        if pooled:
            beside = tally.beside(tally.live)
            for i, name in enumerate(_names("pooled_projector", self.depth)):
                beside.product(f"{name}/kernel", dense(images, pooled if i else inputs, pooled))
            tally.total += beside.total
        tally.live |= self.pre_layernorm and tally.trained("pre_layernorm/scale")
        if self.kind == "conv":
            tally.product("projector/kernel", convolution(images, (math.isqrt(tokens),) * 2, inputs, outputs))
            return
        for i, name in enumerate(_names("projector", self.depth)):
            tally.product(f"{name}/kernel", dense(images * tokens, outputs if i else inputs, outputs))


def _names(name: str, depth: int) -> list[str]:
    """Of linear layers: numbered as torch counts a Sequential, where every second entry is the activation."""
    return [name] if depth == 1 else [f"{name}_{2 * i}" for i in range(depth)]


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
        x = self._norm("pre_layernorm")(x) if self.config.pre_layernorm else x
        if self.config.kind == "conv":
            x = self._convolve(x)
        else:
            x = self._multiply(x, "projector", self.config.depth, self.features, self.use_bias)
        return self._norm("post_layernorm")(x) if self.config.post_layernorm else x

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(
            epsilon=self.config.layer_norm_eps,
            dtype=self.dtype,
            use_fast_variance=False,  # which cancels where means are large
            scale_init=weight(nn.initializers.ones, "tower_norm"),
            bias_init=weight(nn.initializers.zeros, "tower_norm"),
            name=name,
        )

    def _multiply(
        self, x: Float[Array, "... I"], name: str, depth: int, features: int, use_bias: bool
    ) -> Float[Array, "... O"]:
        for i, layer in enumerate(_names(name, depth)):
            x = nn.gelu(x, approximate=False) if i else x
            x = Dense(
                features,
                use_bias=use_bias,
                dtype=self.dtype,
                kernel_init=weight(_INIT, "tower_in", "tower_out"),
                bias_init=weight(nn.initializers.zeros, "tower_norm"),
                name=layer,
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

    A pooled vector is another projection of their mean, as deep (of "conv" one layer) and without norms: so the
    original has it for Stable Diffusion XL, and its fork for 3.5.
    """

    pooled: int = 0

    @nn.compact
    def __call__(self, hidden: Float[Array, "N T I"]) -> Condition:
        return Condition(super().__call__(hidden), pooled=self._pool(hidden) if self.pooled else None)

    def _pool(self, hidden: Float[Array, "N T I"]) -> Float[Array, "N P"]:
        mean = jnp.mean(hidden.astype(jnp.float32), axis=1)
        config = self.config
        return self._multiply(mean, "pooled_projector", config.depth, self.pooled, config.pooled_bias)


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """The visual projector after a vision encoder whose features are as wide as the language model's embeddings."""

    kind: Literal["identity"] = "identity"

    def require_tokens(self, tokens: int) -> None:
        """Nothing: any number will do."""

    def make(self, features: int, dtype: jnp.dtype, **names: str) -> "Identity":
        """The module, which has no parameters."""
        return Identity(features, **names)

    def flops(self, tally: Tally, images: int, tokens: int, inputs: int, outputs: int) -> None:
        """Adds nothing."""


class Identity(nn.Module):
    """Gives what it is given.

    Raises:
      ValueError: features of another width.
    """

    features: int

    def __call__(self, x: Float[Array, "N T I"]) -> Float[Array, "N T I"]:
        if x.shape[-1] != self.features:
            raise ValueError(
                f"the vision encoder's features have {x.shape[-1]} channels, the language model's embeddings "
                f"{self.features}: a visual projector of kind 'identity' cannot join them"
            )
        return x


ProjectorConfig.PUBLISHED = {"linear": {"kind": "linear"}, "mlp": {"kind": "mlp", "depth": 2}, "conv": {"kind": "conv"}}
