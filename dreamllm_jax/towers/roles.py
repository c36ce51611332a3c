"""What the joined model, the objectives, the data and generation ask of a tower: the interfaces, and nothing else.

A tower is a frozen configuration (`...Role`: what is known without parameters) and the module that its `make` gives.
The classes that there are stand in `registry.py`; how public checkpoints name and describe a tower is asked by
`interop` alone, and stands in the tower's file too.

Legend: B rows, T tokens, N images, P patches, F width of features, Q dream queries, E language model's width,
V vocabulary, H x W pixels, h x w x c latents.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from dreamllm_jax.diffusion.samplers import Name, SamplerConfig, Steps
from dreamllm_jax.layers.flops import Flops, Tally
from dreamllm_jax.towers.condition import Condition, Hidden


class LanguageModelRole(Protocol):
    """A causal language model over embeddings.

    Attributes:
      width: of embeddings and hidden states (E).
      max_length: tokens of the longest document that it can read; `max_position_embeddings` of those it was trained
        on, which `rope_scaling`, if any, stretches.
      lora: adapters, None for none (`layers.lora`).
      divided: mesh axes, and the setting that they must divide.
      position_axes: of a token's position: 1, or 3 (`data.positions`).
    """

    kind: str
    vocab_size: int
    max_position_embeddings: int
    rope_scaling: Any
    lora: Any

    @property
    def width(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def position_axes(self) -> int: ...
    @property
    def divided(self) -> tuple[tuple[tuple[str, ...], str], ...]: ...
    def make(self, dtype: Any, remat: str) -> "LanguageModel": ...
    def cache(self, rows: int, length: int, dtype: Any) -> Any: ...
    def flops(self, tally: Tally, rows: int, length: int, remat: str, reached: bool) -> None: ...
    def head_flops(self, tally: Tally, tokens: int) -> None: ...


class LanguageModel(Protocol):
    """Its module. `__call__` gives the hidden states after the final norm, and the cache with this call's tokens.

    Positions have as many axes as the configuration says; one for all of them will do where they are alike, in text.
    """

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]: ...
    def __call__(
        self,
        embeddings: Float[Array, "B T E"],
        positions: Int[Array, "B T"] | Int[Array, "B T 3"],
        segment_ids: Int[Array, "B T"],
        cache: Any = None,
    ) -> tuple[Float[Array, "B T E"], Any]: ...
    def head_kernel(self) -> Float[Array, "E V"]: ...
    def logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]: ...


class VisionEncoderRole(Protocol):
    """What reads images.

    Attributes:
      width: of its features (F).
      image_size: pixels on a side of the images that it was made for; `num_patches` their features (P).
      fitting: height and width as which it best sees an image of this width and height, by itself.
      pixels_shape: of what `preprocess` gives, (H, W, 3) unless it takes images apart; its module is given these.
      stored_depends: how the paths begin of the parameters that what is stored depends on; `stored_settings` likewise.
      projector: settings of the visual projector beside the language model that it was published with; empty for the
        usual ones.
    """

    kind: str
    image_size: int
    stored_depends: tuple[str, ...]
    projector: Mapping[str, Any]

    @property
    def width(self) -> int: ...
    @property
    def num_patches(self) -> int: ...
    @property
    def stored_settings(self) -> dict[str, Any]: ...
    def tokens(self, height: int, width: int) -> int: ...
    def fitting(self, width: int, height: int) -> tuple[int, int]: ...
    def pixels_shape(self, height: int, width: int) -> tuple[int, ...]: ...
    def preprocess(self, image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "..."]: ...
    def stored_shape(self, height: int, width: int) -> tuple[int, ...]: ...
    def make(self, dtype: Any, remat: str) -> "VisionEncoder": ...
    def flops(self, tally: Tally, images: int, height: int, width: int, remat: bool) -> None: ...


class VisionEncoder(Protocol):
    """Its module. Floats are taken as normalised already; what is `stored` of images are their features."""

    def __call__(self, images: UInt8[Array, "N ..."] | Float[Array, "N ..."]) -> Float[Array, "N P F"]: ...
    def stored(self, images: UInt8[Array, "N ..."]) -> Float[Array, "N P F"]: ...


class ConnectorRole(Protocol):
    """What leads from hidden states at the queries to a condition of `features` channels, its vector of `pooled` ones.

    Attributes:
      prompt_tokens: how many of the prompt's hidden states it is given beside the queries', as `Hidden`; 0 for none.
      sees: whether, where these are of an image, it is given what the language model was given of it instead.
      condition_tokens: length of the condition of so many queries.
    """

    kind: str
    prompt_tokens: int
    sees: bool

    def require_tokens(self, tokens: int) -> None: ...
    def condition_tokens(self, tokens: int) -> int: ...
    def make_connector(self, features: int, pooled: int, dtype: Any, remat: str) -> "Connector": ...
    def flops(
        self, tally: Tally, images: int, tokens: int, inputs: int, outputs: int, pooled: int, remat: bool
    ) -> None: ...


class Connector(Protocol):
    """Its module."""

    def __call__(self, hidden: Float[Array, "N Q E"] | Hidden) -> Condition: ...


class ImageDecoderRole(Protocol):
    """What paints: its noise process, training error, samplers and sizes are its own business.

    Attributes:
      condition_width: channels of the condition's sequence; `pooled_width` of its pooled vector, 0 for none.
      encodes_features: the tower of whose features its latents are made, `vision_encoder` or, for what the language
        model is given, `visual_projector`; its module's `encode` is then given them as `features`. Empty for none.
      wants_sizes: it `preprocess`es by `data.images.paint_pixels`, and its conditions tell it of that by `with_sizes`.
      default_size: pixels on a side of the images that it was made for.
      size_multiple: what the sides of a painted image must be multiples of; `training_size_multiple` of a learned one.
      largest_size: the most that the sides of either may be; None for any.
      plain: the same decoder with the training error that held-out documents are measured by.
      draws: the randomness of one image's error, of six keys, the fourth of which is the objective's.
      within: draws moved into one of so many equal ranges of time; `time_range` says which that is.
      require_features: raises ValueError if latents cannot be made of so many features, so wide, of images of so many
        pixels on a side; asked, like `reconstruction_flops`, if it `encodes_features`.
      default_sampler: the one that it is sampled with if none is named.
      steps: a sampler's table for images of so many pixels, and the scale of the noise that it begins with.
    """

    kind: str
    default_sampler: Name
    wants_sizes: bool

    @property
    def encodes_features(self) -> Literal["", "vision_encoder", "visual_projector"]: ...
    @property
    def stored_depends(self) -> tuple[str, ...]: ...
    @property
    def condition_width(self) -> int: ...
    @property
    def pooled_width(self) -> int: ...
    @property
    def default_size(self) -> int: ...
    @property
    def size_multiple(self) -> int: ...
    @property
    def training_size_multiple(self) -> int: ...
    @property
    def largest_size(self) -> int | None: ...
    @property
    def plain(self) -> "ImageDecoderRole": ...
    @property
    def stored_settings(self) -> dict[str, Any]: ...
    def require_features(self, size: int, tokens: int, width: int) -> None: ...
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]: ...
    def latent_shape_of(self, shape: tuple[int, ...], stored: bool) -> tuple[int, ...]: ...
    def stored_shape(self, height: int, width: int) -> tuple[int, ...]: ...
    def preprocess(
        self, image: Image.Image, height: int, width: int, flip: bool = False
    ) -> UInt8[np.ndarray, "H W 3"]: ...
    def draws(self, keys: jax.Array, shape: tuple[int, ...]) -> Any: ...
    def time_range(self, part: int, parts: int) -> tuple[int, int]: ...
    def within(self, draws: Any, part: int, parts: int) -> Any: ...
    def steps(self, sampler: SamplerConfig, height: int, width: int) -> tuple[Steps, float]: ...
    def make(self, dtype: Any) -> "ImageDecoder": ...
    def flops(
        self, tally: Tally, images: int, height: int, width: int, queries: int, condition_live: bool, stored: bool
    ) -> dict[str, Flops]: ...
    def reconstruction_flops(
        self, tally: Tally, images: int, height: int, width: int, features_live: bool
    ) -> dict[str, Flops]: ...


class DenoiserRole(Protocol):
    """The network of an image decoder that denoises latents; see `towers.image_decoders.latent`.

    Its module is called with latents [N, h, w, c], timesteps [N] and a `Condition`, and gives what the decoder's noise
    process asks for, f32[N, h, w, c].

    Attributes:
      sample_size: latents on a side of the images that it was made for.
      size_multiple: what the latents' height and width must be multiples of; `largest_size` the most that they may be,
        None for any.
    """

    kind: str
    in_channels: int
    sample_size: int

    @property
    def condition_width(self) -> int: ...
    @property
    def pooled_width(self) -> int: ...
    @property
    def size_multiple(self) -> int: ...
    @property
    def largest_size(self) -> int | None: ...
    def make(self, dtype: Any, remat: str) -> Any: ...
    def flops(
        self, tally: Tally, images: int, size: tuple[int, int], queries: int, condition_live: bool, remat: str
    ) -> None: ...


class AutoencoderRole(Protocol):
    """What makes latents of pixels and pixels of latents, beside a denoiser.

    Its module has `encode`, from pixels in [-1, 1] (or features of an image) to what can be stored of an image, and
    `decode`, from unscaled latents to pixels.

    Attributes:
      feature_width: of what the language model is given of images, where latents are made of that; 0 for pixels.
      downscale: pixels along a side of the square that a latent stands for.
      encoded_channels: of what `encode` gives; `encode_depends` is how the paths begin of the parameters that it needs.
      deterministic: `latents` need no noise.
      latents, unscaled: from what `encode` gives to scaled latents; from these to what `decode` takes.
    """

    kind: str
    feature_width: int
    latent_channels: int
    deterministic: bool
    encode_depends: tuple[str, ...]

    @property
    def downscale(self) -> int: ...
    @property
    def encoded_channels(self) -> int: ...
    def latents(self, encoded: Float[Array, "N h w e"], noise: Any) -> Float[Array, "N h w c"]: ...
    def unscaled(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N h w c"]: ...
    def make(self, dtype: Any) -> Any: ...
    def encoder_flops(self, tally: Tally, images: int, height: int, width: int) -> None: ...


class ImageDecoder(Protocol):
    """Its module."""

    def stored(self, images: UInt8[Array, "N H W 3"]) -> Array: ...
    def encode(
        self, images: Array, draws: Any, stored: bool = False, features: Array | None = None
    ) -> Float[Array, "N h w c"]: ...
    def error(self, condition: Condition, latents: Float[Array, "N h w c"], draws: Any) -> Float[Array, " N"]: ...
    def denoise(
        self, latents: Float[Array, "N h w c"], time: Array, condition: Condition
    ) -> Float[Array, "N h w c"]: ...
    def decode(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N H W 3"]: ...
    def reconstruct(
        self, images: UInt8[Array, "N H W 3"], features: Float[Array, "N T E"] | None = None
    ) -> Float[Array, "N H W 3"]: ...
    def __call__(self, condition: Condition) -> None: ...
