"""The dream queries that an image is painted from: a learned table, fed after every `<dream_start>`, or noise.

Legend: Q dream queries, E language model's width, V vocabulary.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from dreamllm_jax.layers.weights import normal, weight

Init = Literal["normal", "width", "vocabulary"]
_OF_SEED = 2**32 - 1  # folded into a picture's key; samplers fold the numbers of their steps
_VARIANCE = 1e-9  # of new rows, as a share of the old ones' (transformers' `resize_token_embeddings`)


@dataclasses.dataclass(frozen=True)
class QueriesConfig:
    """How the dream queries begin.

    Attributes:
      init: "normal" of this `deviation`; "width", of 1 / sqrt(width) (OpenUni, arXiv 2505.23661); "vocabulary", as rows
        that are new in the language model's (MetaQuery, arXiv 2504.06256): the mean of its rows, and a little noise.
      deviation: of "normal".
      redrawn: there is no table: each image has queries of its own, drawn anew in each step and, when it is painted, of
        its seed (noisy query tokens, WeMMU, arXiv 2512.02536).
    """

    init: Init = "normal"
    deviation: float = 0.02
    redrawn: bool = False

    def __post_init__(self):
        if not self.deviation > 0:
            raise ValueError(f"dream_queries.deviation must be positive, got {self.deviation}")
        if self.redrawn and self.init == "vocabulary":
            raise ValueError("dream_queries.redrawn: what is drawn anew has init normal or width, not vocabulary")

    def deviation_of(self, width: int) -> float:
        """The standard deviation of queries of this width."""
        return 1 / math.sqrt(width) if self.init == "width" else self.deviation

    def draw(self, key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "Q E"]:
        """Queries that are drawn anew."""
        return self.deviation_of(shape[1]) * jax.random.normal(key, shape)

    def of_seed(self, seed: UInt32[Array, ""], shape: tuple[int, int]) -> Float[Array, "Q E"]:
        """Those of the picture with this seed."""
        return self.draw(jax.random.fold_in(jax.random.key(seed), _OF_SEED), shape)


class DreamQueries(nn.Module):
    """DreamLLM, section 3.2."""

    num_queries: int
    width: int
    deviation: float = 0.02

    @nn.compact
    def __call__(self) -> Float[Array, "Q E"]:
        return self.param("embedding", weight(normal(self.deviation), None, "embed"), (self.num_queries, self.width))


def from_vocabulary(rows: Float[Array, "V E"], num_queries: int, key: Key[Array, ""]) -> Float[Array, "Q E"]:
    """Queries as transformers begins new rows of a vocabulary (`_init_added_embeddings_weights_with_mean`): normal, of
    the mean of its rows and 1e-9 of their covariance."""
    mean = rows.mean(axis=0, dtype=jnp.float32)
    noise = jax.random.normal(key, (num_queries, len(rows))) * math.sqrt(_VARIANCE / len(rows))
    return mean + noise @ (rows - mean)
