"""The dream queries that an image is painted from: a learned table, fed after every `<dream_start>`.

Legend: Q dream queries, E language model's width.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from dreamllm_jax.layers.weights import normal, weight


class DreamQueries(nn.Module):
    """DreamLLM, section 3.2."""

    num_queries: int
    width: int

    @nn.compact
    def __call__(self) -> Float[Array, "Q E"]:
        return self.param("embedding", weight(normal(0.02), None, "embed"), (self.num_queries, self.width))
