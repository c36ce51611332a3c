"""The vision tower of SigLIP (arXiv 2303.15343) and of SigLIP 2's models of one size (arXiv 2502.14786).

Legend: N images, S image size, s patches on a side, P features, E width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.layers.linear import Embedding, spread
from dreamllm_jax.layers.weights import normal, weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.public import PublicForm, reader, require_supported
from dreamllm_jax.towers.vision_encoders.pixels import NORMALISATION
from dreamllm_jax.towers.vision_encoders.vit import Encoder, Part, VitConfig

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_OURS = ("kind", "select_layer", "resample", "packed", *NORMALISATION)  # that no config.json has


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(VitConfig):
    """The tower's shape; names and defaults as in transformers' `SiglipVisionConfig`.

    Attributes:
      select_layer: the hidden state that is read, as an index into transformers' `hidden_states`: 0 is the embeddings,
        i the output of layer i, -1 that of the last one; None is the tower's output, that through the final norm.
      image_mean, image_std: normalise pixels in [0, 1].
      resample: how pictures are squeezed to `image_size`, "bicubic" or, by SigLIP 2's files, "bilinear".
      packed: features as LLaVA-OneVision (arXiv 2408.03326) packs a picture of one tile: all of them, then all again
        with a place after each row, for the visual projector to fill (kind "newline"). (The tile shows what the whole
        picture does, and so has the same features.)
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    kind: Literal["siglip"] = "siglip"
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    select_layer: int | None = None
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    packed: bool = False
    public = PublicForm(
        library="transformers",
        torch_class="SiglipVisionModel",
        types=("siglip_vision_model", "siglip"),
        folder="siglip",
        prefix="vision_model.",
        # What is computed, the head that pools, and what a whole SigLIP has besides.
        beside=r"(.*\b)?position_ids$|(vision_model\.)?head\.|(text_model|logit_scale|logit_bias)\b",
        settings=(
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("image_size", "patch_size", "hidden_act"),
        ),
    )

    @property
    def num_patches(self) -> int:
        """Features of an image (P)."""
        return self.side**2 + self.packed * self.side * (self.side + 1)

    def preprocess(self, image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
        """The image squeezed to this size, as `SiglipImageProcessor` does."""
        return np.asarray(image.resize((width, height), _RESAMPLE[self.resample]))

    def make(self, dtype: Any, remat: str = "full") -> "SiglipVision":
        """The module; see there."""
        return SiglipVision(self, dtype=dtype, remat=remat)

    def flops(self, tally: Tally, images: int, height: int, width: int, remat: bool) -> None:
        """Adds the way to the features of so many images."""
        self.require_size(height, width)
        names = ("patch_embedding/bias", "position_embedding")
        tally.live |= any(tally.trained(f"embeddings/{name}") for name in names)
        self.count(tally, images, 0, remat)

    @classmethod
    def from_public(
        cls, config: Mapping[str, Any], select_layer: int | None = None, packed: bool = False
    ) -> "SiglipVisionConfig":
        """Reads the config.json of a whole SigLIP model (its `vision_config`) or of the vision tower alone.

        Raises:
          ValueError: naming a setting that is not supported.
        """
        config = config.get("vision_config") or config
        reader((cls,), config)
        return cls(**cls.checked(config), select_layer=select_layer, packed=packed)

    def to_public(self) -> dict[str, Any]:
        """The settings of a `SiglipVisionModel`'s config.json."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in _OURS}
        return {**settings, "vision_use_head": False}

    def with_processor(self, settings: Mapping[str, Any]) -> "SiglipVisionConfig":
        """The tower, taking pixels as the settings of its `SiglipImageProcessor` say, or of LLaVA-OneVision's, which
        does the same to a picture that is seen as one tile.

        Raises:
          ValueError: that makes other pixels of an image than `preprocess`.
        """
        chosen = ("image_processor_type", "resample", *NORMALISATION)
        require_supported(settings, {n: value for n, value in self.processor().items() if n not in chosen})
        found = {name: tuple(settings[name]) for name in NORMALISATION if settings.get(name)}
        if (resample := settings.get("resample")) is not None:
            known = {int(method): name for name, method in _RESAMPLE.items()}
            if resample not in known:
                raise ValueError(f"resample = {resample!r} is not supported: only {sorted(known)} are")
            found["resample"] = known[resample]
        return dataclasses.replace(self, **found)

    def processor(self) -> dict[str, Any]:
        """The settings of the `SiglipImageProcessor` that makes the same pixels as we."""
        return {
            "image_processor_type": "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": int(_RESAMPLE[self.resample]),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            **{name: list(getattr(self, name)) for name in NORMALISATION},
        }

    def run_public(self, module: Any, pixels: Any) -> Any:
        """The features as the public class computes them: torch's f[N, 3, S, S] normalised pixels -> f[N, P, F]."""
        if self.select_layer is None:
            states = module(pixels).last_hidden_state
        else:
            states = module(pixels, output_hidden_states=True).hidden_states[self.select_layer]
        if not self.packed:
            return states
        found = states.new_zeros(len(states), self.num_patches, self.width)
        found[:, : self.side**2] = states
        rows = found[:, self.side**2 :].unflatten(1, (self.side, self.side + 1))
        rows[:, :, : self.side] = states.unflatten(1, (self.side, self.side))
        return found


class Embeddings(Part):
    """A linear map of each patch, plus learned positions."""

    @nn.compact
    def __call__(self, images: Float[Array, "N S S 3"]) -> Float[Array, "N p E"]:
        config, width = self.config, self.config.hidden_size
        patches = self.patches(images, "patch_embedding")
        init = weight(normal(width**-0.5), None, "tower_out")
        positions = Embedding(config.side**2, width, init, name="position_embedding")
        return patches + spread(positions.embedding, patches.shape, self.dtype)


class SiglipVision(Part):
    """The tower up to the selected hidden state; parameters are named as in transformers' `SiglipVisionModel`.

    Attributes:
      config: the tower's shape.
      dtype: type of the computation; norms' statistics and softmax are float32 in any case.
      remat: what a layer keeps for the backward pass: "none" (everything) or "full" (its input).
    """

    remat: str = "full"

    @nn.compact
    def __call__(self, images: UInt8[Array, "N S S 3"] | Float[Array, "N S S 3"]) -> Float[Array, "N P E"]:
        """u8 pixels, or normalised floats -> hidden states of the patches, row by row; see `packed`.

        Raises:
          ValueError: the images are not of the tower's size.
        """
        config = self.config
        images = self.pixels(images)
        x = Embeddings(config, self.dtype, name="embeddings")(images.astype(self.dtype))
        x = constrain(x, ("images", None, None))
        x = Encoder(config, self.dtype, self.remat, name="encoder")(x)
        if config.select_layer is None or self.is_initializing():  # in every checkpoint, whatever is read
            normed = self.norm("post_layernorm")(x)
            x = normed if config.select_layer is None else x
        return pack(x) if config.packed else x

    def stored(self, images: UInt8[Array, "N S S 3"]) -> Float[Array, "N P E"]:
        """What can be stored of images: their features."""
        return self(images)


def pack(x: Float[Array, "N p E"]) -> Float[Array, "N P E"]:
    """The features of s x s patches, and once more with zeros after each row."""
    side = round(x.shape[1] ** 0.5)
    rows = jnp.pad(x.reshape(x.shape[0], side, side, -1), ((0, 0), (0, 0), (0, 1), (0, 0)))
    return jnp.concatenate([x, rows.reshape(x.shape[0], -1, x.shape[2])], axis=1)


_BASE = {"kind": "siglip"}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SECOND = {**_BASE, "resample": "bilinear"}
SiglipVisionConfig.PUBLISHED = {
    "siglip-so400m-384": {**_BASE, **_SO400M, "patch_size": 14, "image_size": 384},
    "siglip2-so400m-384": {**_SECOND, **_SO400M, "patch_size": 14, "image_size": 384},
    "siglip2-so400m-512": {**_SECOND, **_SO400M, "image_size": 512},
    "siglip2-base-224": {**_SECOND, "image_size": 224},
    "siglip2-base-256": {**_SECOND, "image_size": 256},
    "siglip2-large-256": {**_SECOND, **_LARGE, "image_size": 256},
    "siglip2-large-384": {**_SECOND, **_LARGE, "image_size": 384},
}
