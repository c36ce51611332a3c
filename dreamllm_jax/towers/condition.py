"""What an image decoder is given to paint from.

Legend: N images, Q tokens, C their width, P pooled width.
"""

from collections.abc import Mapping

from flax import struct
from jaxtyping import Array, Bool, Float


@struct.dataclass
class Hidden:
    """What a connector with `prompt_tokens` is given instead of the hidden states at the queries alone.

    `mask` says which of the prompt's are there: of the same document, `<dream_start>` being the last.
    """

    queries: Float[Array, "N Q E"]
    prompt: Float[Array, "N P E"]
    mask: Bool[Array, "N P"]


SIZES = "time_ids"  # the name of pictures' sizes in `Condition.extra`, as diffusers has it


@struct.dataclass
class Condition:
    """A connector's result, one for each image.

    Attributes:
      sequence: what the denoiser attends to.
      mask: which of its tokens count; None for all.
      pooled: one vector an image, of decoders that want one.
      extra: arrays [N, ...] under the names that a decoder knows, such as sizes or source latents.
    """

    sequence: Float[Array, "N Q C"]
    mask: Bool[Array, "N Q"] | None = None
    pooled: Float[Array, "N P"] | None = None
    extra: Mapping[str, Array] = struct.field(default_factory=dict)

    def with_sizes(self, sizes: Float[Array, "N 6"]) -> "Condition":
        """With the sizes of `data.images.paint_sizes`."""
        return self.replace(extra={**self.extra, SIZES: sizes})
