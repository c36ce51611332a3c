"""CLIP's vision tower (arXiv 2103.00020): an image becomes one hidden state a patch.

Legend: N images, S image size, P patches, E width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dreamllm_jax.data.images import centre_crop
from dreamllm_jax.layers.attention import attend
from dreamllm_jax.layers.flops import Tally, dense
from dreamllm_jax.layers.linear import Conv, Dense, Embedding, spread
from dreamllm_jax.layers.remat import rematerialised
from dreamllm_jax.layers.weights import LAYERS, normal, weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.public import PublicForm, reader

Array = jax.Array

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images CLIP was trained on, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


# Settings of a config.json that would change the function computed here: name -> the one value that is supported.
_SUPPORTED = {"num_channels": 3, "attention_dropout": 0.0, "dropout": 0.0}
_NORMALISATION = ("image_mean", "image_std")
_OURS = ("kind", "select_layer", *_NORMALISATION)  # that no config.json has


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """The tower's shape; names and defaults as in transformers' `CLIPVisionConfig`.

    `select_layer` chooses the hidden state that is read, as an index into transformers' `hidden_states`: 0 is the
    embeddings after their norm, i the output of layer i, -1 that of the last one (without the final norm).
    `image_mean` and `image_std` normalise pixels in [0, 1], as in transformers' `CLIPImageProcessor`.
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    kind: Literal["clip"] = "clip"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
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

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "layer_norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.initializer_range < 0 or min(self.image_std) <= 0:
            raise ValueError(
                f"initializer_range must not be negative and image_std positive, got {self.initializer_range} and "
                f"{self.image_std}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported: choose from {list(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if not -self.num_hidden_layers - 1 <= self.select_layer <= self.num_hidden_layers:
            raise ValueError(f"select_layer {self.select_layer} is beyond the {self.num_hidden_layers} layers")
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size {self.patch_size} does not fit image_size {self.image_size}")

    @property
    def width(self) -> int:
        """Of its features (F)."""
        return self.hidden_size

    def tokens(self, height: int, width: int) -> int:
        """Features of an image of so many pixels (P).

        Raises:
          ValueError: the tower takes images of `image_size` alone.
        """
        if (height, width) != (self.image_size,) * 2:
            raise ValueError(
                f"CLIP takes images of {self.image_size} x {self.image_size} pixels, not {height} x {width}"
            )
        return self.num_patches

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def fitting(self, width: int, height: int) -> tuple[int, int]:
        """Height and width, in pixels, as which every image is seen."""
        return self.image_size, self.image_size

    def pixels_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of what `preprocess` gives."""
        return height, width, 3

    # What can be stored of an image: its features. They depend on all parameters and settings.
    stored_depends = ("",)

    @property
    def stored_settings(self) -> dict[str, Any]:
        """The settings that what is stored depends on."""
        return dataclasses.asdict(self)

    def stored_shape(self, height: int, width: int) -> tuple[int, int]:
        """Shape of what is stored of an image: its features."""
        return self.tokens(height, width), self.width

    def preprocess(self, image: Image.Image, height: int, width: int) -> np.ndarray:
        """u8[height, width, 3]: the shorter side resized to that of the result (bicubic), the centre cropped, as
        `CLIPImageProcessor` does."""
        return centre_crop(image, height, width, Image.Resampling.BICUBIC)

    def make(self, dtype: Any, remat: str = "full") -> "ClipVision":
        """The module; see there."""
        return ClipVision(self, dtype=dtype, remat=remat)

    def flops(self, tally: Tally, images: int, height: int, width: int, remat: bool) -> None:
        """Adds the way to the features of so many images."""
        size, inner, patches = self.hidden_size, self.intermediate_size, self.tokens(height, width)
        tokens = images * (patches + 1)
        tally.live |= any(tally.trained(f"embeddings/{name}") for name in ("class_embedding", "position_embedding"))
        flat = dense(images * patches, 3 * self.patch_size**2, size)
        tally.product("embeddings/patch_embedding/kernel", flat, live=False)
        path = "encoder/layers"
        tally.live |= any(tally.trained(f"{path}/{name}/kernel") for name in ("self_attn/q_proj", "mlp/fc2"))
        layer = tally.beside(tally.live)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer.product(f"{path}/self_attn/{name}/kernel", dense(tokens, size, size))
        layer.attention(images, patches + 1, patches + 1, size, layer.live)
        layer.product(f"{path}/mlp/fc1/kernel", dense(tokens, size, inner))
        before_last = layer.forward
        layer.product(f"{path}/mlp/fc2/kernel", dense(tokens, inner, size))
        if remat:
            layer.recompute(before_last)
        tally.total += layer.total * self.depth

    @property
    def depth(self) -> int:
        """Layers that have to run to reach the selected hidden state."""
        return self.select_layer % (self.num_hidden_layers + 1)

    @classmethod
    def from_public(cls, config: Mapping[str, Any], select_layer: int = -2) -> "ClipVisionConfig":
        """Reads the config.json of a whole CLIP model (its `vision_config`) or of the vision tower alone.

        Raises:
          ValueError: naming a setting that is not supported.
        """
        config = config.get("vision_config") or config
        reader((cls,), config)
        for name, value in _SUPPORTED.items():
            if config.get(name, value) not in (value, None):
                raise ValueError(f"{name} = {config[name]!r} is not supported: only {value!r} is")
        for name in ("image_size", "patch_size"):
            if not isinstance(config.get(name, 1), int):
                raise ValueError(f"{name} = {config[name]!r} is not supported: only a single number is")
        names = {field.name for field in dataclasses.fields(cls)} - set(_OURS)
        return cls(**{name: config[name] for name in names if name in config}, select_layer=select_layer)

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
            if name not in ("image_processor_type", *_NORMALISATION) and settings.get(name) not in same:
                raise ValueError(f"{name} = {settings[name]!r} is not supported: only {ours!r} is")
        found = {name: tuple(settings[name]) for name in _NORMALISATION if settings.get(name)}
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
            **{name: list(getattr(self, name)) for name in _NORMALISATION},
        }

    def run_public(self, module: Any, pixels: Any) -> Any:
        """The features as the public class computes them: torch's f[N, 3, S, S] normalised pixels -> f[N, P, F]."""
        return module(pixels, output_hidden_states=True).hidden_states[self.select_layer][:, 1:]


def normalise_pixels(pixels: Array, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Array:
    """u8[..., 3] RGB -> f32[..., 3] with the mean taken off and divided by the standard deviation."""
    return (pixels.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


_ZEROS = weight(nn.initializers.zeros, "tower_norm")
_ONES = weight(nn.initializers.ones, "tower_norm")


class _Part(nn.Module):
    """What the tower's parts share: configuration, types, and the two layers they are made of."""

    config: ClipVisionConfig
    dtype: Any = jnp.float32

    def linear(self, features: int, name: str) -> Dense:
        return Dense(
            features,
            dtype=self.dtype,
            kernel_init=weight(normal(self.config.initializer_range), "tower_in", "tower_out"),
            bias_init=_ZEROS,
            name=name,
        )

    def norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(
            self.config.layer_norm_eps,
            dtype=self.dtype,
            scale_init=_ONES,
            bias_init=_ZEROS,
            use_fast_variance=False,
            name=name,
        )


class Embeddings(_Part):
    """The class token and a linear map of each patch, plus learned positions."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        config, width = self.config, self.config.hidden_size
        patches = Conv(
            width,
            (config.patch_size,) * 2,
            strides=(config.patch_size,) * 2,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=weight(normal(config.initializer_range), None, None, None, "tower_out"),
            name="patch_embedding",
        )(images).reshape(images.shape[0], -1, width)
        token = self.param("class_embedding", weight(normal(width**-0.5), "tower_norm"), (width,))
        x = jnp.concatenate([spread(token, (images.shape[0], 1, width), self.dtype), patches], axis=1)
        init = weight(normal(config.initializer_range), None, "tower_out")
        positions = Embedding(config.num_patches + 1, width, init, name="position_embedding")
        return x + spread(positions.embedding, x.shape, self.dtype)


class Attention(_Part):
    """Every patch sees every patch."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, heads = self.config.hidden_size, (*x.shape[:2], self.config.num_attention_heads, -1)
        q, k, v = (self.linear(width, name)(x).reshape(heads) for name in ("q_proj", "k_proj", "v_proj"))
        return self.linear(width, "out_proj")(attend(q, k, v, causal=False).reshape(x.shape))


class MLP(_Part):
    """Two linear layers around the activation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inner = ACTIVATIONS[self.config.hidden_act](self.linear(self.config.intermediate_size, "fc1")(x))
        return self.linear(self.config.hidden_size, "fc2")(inner)


class Layer(_Part):
    """One layer, as the body of a scan."""

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        part = (self.config, self.dtype)
        x = x + Attention(*part, name="self_attn")(self.norm("layer_norm1")(x))
        x = x + MLP(*part, name="mlp")(self.norm("layer_norm2")(x))
        return constrain(x, ("images", None, None)), None


class Encoder(_Part):
    """The stack. All layers have parameters, so that checkpoints are whole; only the first `depth` are run."""

    remat: str = "full"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, depth = self.config, self.config.depth

        def first(params):
            return jax.tree.map(lambda stack: stack[:depth], params)

        layers = nn.scan(
            rematerialised(Layer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_hidden_layers if self.is_initializing() else depth,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        if not self.is_initializing():
            if depth == 0:
                return x
            layers = nn.map_variables(layers, "params", trans_in_fn=first)
        return layers(config, self.dtype, name="layers")(x, None)[0]


class ClipVision(_Part):
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
        if images.shape[1:] != (config.image_size, config.image_size, 3):
            raise ValueError(f"images are {images.shape[1:]} where the tower takes {(config.image_size,) * 2 + (3,)}")
        if images.dtype == jnp.uint8:
            images = normalise_pixels(images, config.image_mean, config.image_std)
        images = constrain(images, ("images", None, None, None))
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


ClipVisionConfig.PUBLISHED = {
    "clip-l-224": {
        "kind": "clip",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
}
