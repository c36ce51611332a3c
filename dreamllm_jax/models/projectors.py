"""The small trainable parts between the towers: projectors and dream queries.

Legend: N images, T tokens (patches or queries) of an image, I width in, O width out, Q dream queries, E llama width.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """A map from one tower's width to another's.

    Attributes:
      kind: "linear" (one layer) or "mlp" (`depth` layers with exact GELU between).
      depth: number of linear layers; 1 for "linear".
      post_layernorm: a LayerNorm after the last layer.
      layer_norm_eps: its epsilon (the original takes it from the CLIP tower).
    """

    kind: Literal["linear", "mlp"] = "linear"
    depth: int = 1
    post_layernorm: bool = False
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if (self.kind == "linear") != (self.depth == 1) or self.depth < 1:
            raise ValueError(f"a linear projector has depth 1, an mlp one of 2 or more: {self.kind=}, {self.depth=}")


class Projector(nn.Module):
    """Linear or MLP projector (DreamLLM, section 3; `LinearProjector`, `MLPProjector` of the original)."""

    config: ProjectorConfig
    features: int
    use_bias: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N T I"]) -> Float[Array, "N T O"]:
        for i in range(self.config.depth):
            # Numbered as torch counts a Sequential, where every second entry is the activation.
            name = "projector" if self.config.kind == "linear" else f"projector_{2 * i}"
            x = nn.gelu(x, approximate=False) if i else x
            x = nn.Dense(
                self.features,
                use_bias=self.use_bias,
                dtype=self.dtype,
                kernel_init=nn.with_logical_partitioning(_INIT, ("tower_in", "tower_out")),
                bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("tower_norm",)),
                name=name,
            )(x)
        if self.config.post_layernorm:
            x = nn.LayerNorm(
                epsilon=self.config.layer_norm_eps,
                dtype=self.dtype,
                scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("tower_norm",)),
                bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("tower_norm",)),
                name="post_layernorm",
            )(x)
        return x


class DreamQueries(nn.Module):
    """The learned queries fed after every `<dream_start>`."""

    num_queries: int
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "Q E"]:
        init = nn.with_logical_partitioning(_INIT, (None, "embed"))
        queries = self.param("dream_queries", init, (self.num_queries, self.features))
        return queries.astype(self.dtype)
