"""CLIP's vision tower (arXiv 2103.00020): an image becomes one hidden state a patch.

Legend: N images, S image size, P patches, E width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dreamllm_jax.data.images import centre_crop
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.layers.linear import Embedding, spread
from dreamllm_jax.layers.weights import normal, weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.public import PublicForm, reader
from dreamllm_jax.towers.vision_encoders.pixels import NORMALISATION
from dreamllm_jax.towers.vision_encoders.vit import Encoder, Part, VitConfig

Array = jax.Array

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images CLIP was trained on, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

_OURS = ("kind", "select_layer", *NORMALISATION)  # that no config.json has


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(VitConfig):
    """The tower's shape; names and defaults as in transformers' `CLIPVisionConfig`.

    `select_layer` chooses the hidden state that is read, as an index into transformers' `hidden_states`: 0 is the
    embeddings after their norm, i the output of layer i, -1 that of the last one (without the final norm).
    `image_mean` and `image_std` normalise pixels in [0, 1], as in transformers' `CLIPImageProcessor`.
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    kind: Literal["clip"] = "clip"
    select_layer: int = -2
    image_mean: tuple[float, float, float] = MEAN
    image_std: tuple[float, float, float] = STD
    public = PublicForm(
        library="transformers",
        torch_class="CLIPVisionModel",
        types=("clip_vision_model", "clip"),
        folder="clip",
        prefix="vision_model.",
        # What is computed, and what a whole CLIP has besides.
        beside=r"(.*\b)?position_ids$|(text_model|(text|visual)_projection|logit_scale)\b",
        settings=(
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("image_size", "patch_size", "hidden_act"),
        ),
    )

    def preprocess(self, image: Image.Image, height: int, width: int) -> np.ndarray:
        """u8[height, width, 3]: the shorter side resized to that of the result (bicubic), the centre cropped, as
        `CLIPImageProcessor` does."""
        return centre_crop(image, height, width, Image.Resampling.BICUBIC)

    def make(self, dtype: Any, remat: str = "full") -> "ClipVision":
        """The module; see there."""
        return ClipVision(self, dtype=dtype, remat=remat)

    def flops(self, tally: Tally, images: int, height: int, width: int, remat: bool) -> None:
        """Adds the way to the features of so many images."""
        self.require_size(height, width)
        tally.live |= any(tally.trained(f"embeddings/{name}") for name in ("class_embedding", "position_embedding"))
        self.count(tally, images, 1, remat)

    @classmethod
    def from_public(cls, config: Mapping[str, Any], select_layer: int = -2) -> "ClipVisionConfig":
        """Reads the config.json of a whole CLIP model (its `vision_config`) or of the vision tower alone.

        Raises:
          ValueError: naming a setting that is not supported.
        """
        config = config.get("vision_config") or config
        reader((cls,), config)
        return cls(**cls.checked(config), select_layer=select_layer)

    def to_public(self) -> dict[str, Any]:
        """The settings of a `CLIPVisionModel`'s config.json."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _OURS}

    def with_processor(self, settings: Mapping[str, Any]) -> "ClipVisionConfig":
        """The tower, taking pixels as the settings of its `CLIPImageProcessor` say.

        Raises:
          ValueError: that makes other pixels of an image than `preprocess`.
        """
        for name, ours in self.processor().items():
            size = self.image_size
            same = (ours, None, *((size,) if name in ("size", "crop_size") else ()))  # sizes were plain numbers once
            if name not in ("image_processor_type", *NORMALISATION) and settings.get(name) not in same:
                raise ValueError(f"{name} = {settings[name]!r} is not supported: only {ours!r} is")
        found = {name: tuple(settings[name]) for name in NORMALISATION if settings.get(name)}
        return dataclasses.replace(self, **found)

    def processor(self) -> dict[str, Any]:
        """The settings of the `CLIPImageProcessor` that makes the same pixels as we."""
        size = self.image_size
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,  # bicubic
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            **{name: list(getattr(self, name)) for name in NORMALISATION},
        }

    def run_public(self, module: Any, pixels: Any) -> Any:
        """The features as the public class computes them: torch's f[N, 3, S, S] normalised pixels -> f[N, P, F]."""
        return module(pixels, output_hidden_states=True).hidden_states[self.select_layer][:, 1:]


class Embeddings(Part):
    """The class token and a linear map of each patch, plus learned positions."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        config, width = self.config, self.config.hidden_size
        patches = self.patches(images, "patch_embedding", bias=False)
        token = self.param("class_embedding", weight(normal(width**-0.5), "tower_norm"), (width,))
        x = jnp.concatenate([spread(token, (images.shape[0], 1, width), self.dtype), patches], axis=1)
        init = weight(normal(config.initializer_range), None, "tower_out")
        positions = Embedding(config.num_patches + 1, width, init, name="position_embedding")
        return x + spread(positions.embedding, x.shape, self.dtype)


class ClipVision(Part):
    """The tower up to the selected hidden state; parameters are named as in transformers' `CLIPVisionModel`.

    Attributes:
      config: the tower's shape.
      dtype: type of the computation; norms' statistics and softmax are float32 in any case.
      remat: what a layer keeps for the backward pass: "none" (everything) or "full" (its input).
    """

    remat: str = "full"

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """u8[N, S, S, 3] pixels, or f[N, S, S, 3] normalised ones -> f[N, P, E] hidden states of the patches, row by
        row, no class token.

        Raises:
          ValueError: the images are not of the tower's size.
        """
        config = self.config
        images = self.pixels(images)
        part = (config, self.dtype)
        x = Embeddings(*part, name="embeddings")(images.astype(self.dtype))
        x = constrain(x, ("images", None, None))
        x = self.norm("pre_layrnorm")(x)
        x = Encoder(*part, self.remat, name="encoder")(x)
        if self.is_initializing():
            self.norm("post_layernorm")(x)  # not on the way to any hidden state, but in every checkpoint
        return x[:, 1:]

    def stored(self, images: Array) -> Array:
        """What can be stored of images: their features."""
        return self(images)


_LARGE = {
    "kind": "clip",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
ClipVisionConfig.PUBLISHED = {
    "clip-l-224": {**_LARGE, "image_size": 224},
    "clip-l-336": {**_LARGE, "image_size": 336},
}
