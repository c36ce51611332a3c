"""LLaVA-OneVision's visual projector (arXiv 2408.03326): linear layers, and a learned vector after each row of patches.

Legend: N images, P features, s patches on a side, I width in, O width out.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.weights import weight
from dreamllm_jax.towers.connectors.projector import Projector, ProjectorConfig


@dataclasses.dataclass(frozen=True)
class NewlineConfig(ProjectorConfig):
    """`depth` linear layers with exact GELU between, of features that their tower has `packed`."""

    kind: Literal["newline"] = "newline"
    depth: int = 2

    def __post_init__(self):
        if self.depth < 1 or self.layer_norm_eps <= 0:
            raise ValueError(f"depth and layer_norm_eps must be positive, got {self.depth} and {self.layer_norm_eps}")

    def require_tokens(self, tokens: int) -> None:
        """Raises ValueError if images of so many features are not packed."""
        _side(tokens)

    def make(self, features: int, dtype: jnp.dtype, **names: str) -> "NewlineProjector":
        """The visual projector, to vectors of the language model."""
        return NewlineProjector(self, features, use_bias=True, dtype=dtype, **names)


def _side(tokens: int) -> int:
    """s of s^2 + s (s + 1) features."""
    side = (math.isqrt(1 + 8 * tokens) - 1) // 4
    if tokens < 1 or side * (2 * side + 1) != tokens:
        raise ValueError(
            f"a visual projector of kind 'newline' needs features with places for its vector, got {tokens}: "
            "model.vision_encoder.packed=true makes them"
        )
    return side


def _row_ends(tokens: int) -> Bool[np.ndarray, " P"]:
    """Which of the features are places after a row."""
    side = _side(tokens)
    return np.concatenate([np.zeros(side**2, bool), np.tile(np.arange(side + 1) == side, side)])


class NewlineProjector(Projector):
    """Parameters are named as a `Projector`'s, and `image_newline` as in transformers' `LlavaOnevisionModel`."""

    @nn.compact
    def __call__(self, x: Float[Array, "N P I"]) -> Float[Array, "N P O"]:
        ends = _row_ends(x.shape[1])
        x = super().__call__(x)
        init = weight(nn.initializers.normal(self.features**-0.5), "tower_norm")
        newline = self.param("image_newline", init, (self.features,))
        return jnp.where(ends[:, None], spread(newline, x.shape, x.dtype), x)


NewlineConfig.PUBLISHED = {"newline": {"kind": "newline"}}
