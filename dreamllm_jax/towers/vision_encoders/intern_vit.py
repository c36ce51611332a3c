"""InternViT, InternVL's vision tower (arXiv 2312.14238, 2504.10479): a picture is seen in tiles, and each square of
2 x 2 patches becomes one feature.

As OpenGVLab's `modeling_intern_vit.py` and transformers' `InternVLVisionModel` have it.

Legend: N images, T tiles of an image, S pixels on a side of a tile, P features of an image, F their width, E width.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from dreamllm_jax.layers.attention import attend_packed
from dreamllm_jax.layers.blocks import LayerNorm
from dreamllm_jax.layers.flops import Tally, dense
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.norms import rms_norm
from dreamllm_jax.layers.remat import rematerialised
from dreamllm_jax.layers.weights import LAYERS, normal, weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.public import PublicForm, reader, require_supported
from dreamllm_jax.towers.vision_encoders import tiles, vit
from dreamllm_jax.towers.vision_encoders.pixels import NORMALISATION, normalised, require_beginning

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]

_QK_EPS = 1e-6

# Settings of a config.json that would change the function computed here: name -> the one value that is supported.
_SUPPORTED = {
    **dict.fromkeys(("attention_dropout", "dropout", "hidden_dropout_prob", "projection_dropout"), 0.0),
    "num_channels": 3,
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
# The same of a whole model, and of one whose pictures are seen in tiles.
_WHOLE = {
    "select_layer": -1,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "ps_version": "v2",
}
_TILED = {"use_thumbnail": True, "min_dynamic_patch": 1}
_OLDER = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "initializer_factor": "layer_scale_init_value",
}
_OURS = ("kind", "downsample", "max_tiles", *NORMALISATION)  # that no config.json of the tower has


@dataclasses.dataclass(frozen=True)
class InternVitConfig:
    """The tower's shape; names and defaults as in transformers' `InternVLVisionConfig`.

    Attributes:
      image_size: pixels on a side of a tile (S); larger pictures are seen as several and a small one of the whole.
      norm_type: "layer_norm", or "rms_norm" of the larger tower.
      attention_bias: whether queries, keys and values have biases.
      use_qk_norm: normalise queries and keys, over all heads.
      layer_scale_init_value: what the factors begin with by which attention and feed-forward are multiplied.
      downsample: patches on a side of the square that becomes one feature (InternVL's 1 / `downsample_ratio`).
      max_tiles: the most that a picture of a prompt is seen as, beside the whole; 1 to squeeze all into one. What
        documents are trained on is said by the row's groups of slots.
      image_mean, image_std: normalise pixels in [0, 1].
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    projector: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    kind: Literal["intern_vit"] = "intern_vit"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    layer_norm_eps: float = 1e-6
    attention_bias: bool = False
    use_qk_norm: bool = False
    layer_scale_init_value: float = 0.1
    initializer_range: float = 0.02
    downsample: int = 2
    max_tiles: int = 12
    image_mean: tuple[float, float, float] = MEAN
    image_std: tuple[float, float, float] = STD
    public = PublicForm(
        library="transformers",
        torch_class="InternVLVisionModel",
        types=("internvl_vision", "internvl", "internvl_chat", "intern_vit_6b", "unilip_internvl"),
        folder="intern_vit",
        renamed=(  # in InternVL's own layout
            (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
            (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
            (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
            (r"^encoder\.layers\.", "encoder.layer."),
            (r"\.attn\.proj\.", ".attention.projection_layer."),
            (r"\.attn\.", ".attention."),
            (r"\.norm1\.", ".layernorm_before."),
            (r"\.norm2\.", ".layernorm_after."),
            (r"\.ls(\d)$", r".lambda_\1"),
        ),
        stacked=((r"\.attention\.qkv\.", (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")),),
        settings=(
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
            *("norm_type", "layer_norm_eps"),
        ),
    )

    def __post_init__(self):
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
        for name in (*names, "downsample", "max_tiles"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        require_beginning(self)
        for name, known in (("hidden_act", vit.ACTIVATIONS), ("norm_type", ("layer_norm", "rms_norm"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not supported: choose from {list(known)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if not 0 < self.patch_size <= self.image_size or self._side % self.downsample:
            raise ValueError(
                f"image_size {self.image_size} is not made of squares of downsample={self.downsample} patches of "
                f"patch_size={self.patch_size}"
            )

    @property
    def _side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def width(self) -> int:
        """Of its features (F)."""
        return self.hidden_size * self.downsample**2

    @property
    def num_patches(self) -> int:
        """Features of a tile."""
        return (self._side // self.downsample) ** 2

    def tokens(self, height: int, width: int) -> int:
        """Features of an image of so many pixels (P): those of its tiles, and of the whole where these are several.

        Raises:
          ValueError: it is not made of whole tiles.
        """
        return tiles.count(height, width, self.image_size) * self.num_patches

    def fitting(self, width: int, height: int) -> tuple[int, int]:
        """Height and width, in pixels, as which an image of this width and height is best seen."""
        return tiles.fitting(width, height, self.image_size, self.max_tiles)

    def pixels_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of what `preprocess` gives."""
        number, side = tiles.count(height, width, self.image_size), self.image_size
        return (number, side, side, 3) if number > 1 else (side, side, 3)

    def preprocess(self, image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "..."]:
        """The tiles of the image, squeezed to this size, and all of it; see `tiles.cut`."""
        return tiles.cut(image, height, width, self.image_size)

    # What can be stored of an image: its features. They depend on all parameters and settings.
    stored_depends = ("",)

    @property
    def stored_settings(self) -> dict[str, Any]:
        """The settings that what is stored depends on."""
        settings = dataclasses.asdict(self)
        del settings["max_tiles"]
        return settings

    def stored_shape(self, height: int, width: int) -> tuple[int, int]:
        """Shape of what is stored of an image: its features."""
        return self.tokens(height, width), self.width

    def make(self, dtype: Any, remat: str = "full") -> "InternVit":
        """The module; see there."""
        return InternVit(self, dtype=dtype, remat=remat)

    def flops(self, tally: Tally, images: int, height: int, width: int, remat: bool) -> None:
        """Adds the way to the features of so many images."""
        size, inner, patches = self.hidden_size, self.intermediate_size, self._side**2
        number = images * tiles.count(height, width, self.image_size)
        tokens = number * (patches + 1)
        tally.live |= any(tally.trained(f"embeddings/{name}") for name in ("cls_token", "position_embeddings"))
        flat = dense(number * patches, 3 * self.patch_size**2, size)
        tally.product("embeddings/patch_embeddings/projection/kernel", flat, live=False)
        path = "encoder/layer"
        tally.live |= any(
            tally.trained(f"{path}/{name}") for name in ("attention/q_proj/kernel", "mlp/fc2/kernel", "lambda_1")
        )
        layer, heads = tally.beside(tally.live), self.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            layer.product(f"{path}/attention/{name}/kernel", dense(tokens, size, size))
            if name == "v_proj":
                layer.attention(number, patches + 1, patches + 1, size, layer.live, heads=heads, again=remat)
        layer.product(f"{path}/mlp/fc1/kernel", dense(tokens, size, inner))
        last = dense(tokens, inner, size)
        layer.product(f"{path}/mlp/fc2/kernel", last)
        if remat:  # the last product's result is needed by the gradient of its factor alone
            layer.recompute(layer.forward - last * (not tally.trained(f"{path}/lambda_2")))
        tally.total += layer.total * self.num_hidden_layers

    @classmethod
    def from_public(cls, config: Mapping[str, Any], select_layer: int = -1) -> "InternVitConfig":
        """Reads the config.json of a whole InternVL, in InternVL's layout or transformers', or of the tower alone.

        Raises:
          ValueError: naming a setting that is not supported.
        """
        reader((cls,), config)
        if select_layer != -1:
            raise ValueError(f"select_layer={select_layer} is not supported: InternViT is read at its last layer")
        alone = config.get("vision_config") or config
        tiled = config.get("dynamic_image_size", config.get("model_type") != "internvl_chat")
        require_supported(alone, _SUPPORTED)
        require_supported(config, _WHOLE | (_TILED if tiled else {}))
        read = {_OLDER.get(name, name): value for name, value in alone.items()}
        for name in ("image_size", "patch_size"):
            sides = read.get(name, [1])
            sides = set(sides) if isinstance(sides, list | tuple) else {sides}
            if len(sides) > 1:
                raise ValueError(f"{name} = {read[name]!r} is not supported: only squares are")
            read |= {name: sides.pop()} if name in read else {}
        if config.get("force_image_size", read.get("image_size")) not in (read.get("image_size"), None):
            raise ValueError(
                f"force_image_size = {config['force_image_size']!r} is not supported: only the tower's own image_size "
                f"{read.get('image_size')!r} is"
            )
        if (ratio := config.get("downsample_ratio")) is not None:
            read["downsample"] = round(1 / ratio)
            if read["downsample"] * ratio != 1:
                raise ValueError(f"downsample_ratio = {ratio!r} is not supported: only one over a whole number is")
        if not tiled:
            read["max_tiles"] = 1
        elif "max_dynamic_patch" in config:
            read["max_tiles"] = config["max_dynamic_patch"]
        names = {field.name for field in dataclasses.fields(cls)} - {"kind", *NORMALISATION}
        return cls(**{name: read[name] for name in names if name in read})

    def to_public(self) -> dict[str, Any]:
        """The settings of an `InternVLVisionModel`'s config.json."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in _OURS}
        return {**settings, "image_size": [self.image_size] * 2, "patch_size": [self.patch_size] * 2}

    def with_processor(self, settings: Mapping[str, Any]) -> "InternVitConfig":
        """The tower, taking pixels as the settings of its image processor say: a `GotOcr2ImageProcessor`, or the one
        beside InternVL's own layout, of which its program reads the normalisation alone.

        Raises:
          ValueError: that makes other pixels of an image than `preprocess`.
        """
        side = self.image_size
        for name, ours in self.processor().items():
            same = (ours, None, *((side,) if name == "size" else ()))
            checked = name not in ("image_processor_type", "crop_to_patches", "max_patches", *NORMALISATION)
            if checked and settings.get(name) not in same:
                raise ValueError(f"{name} = {settings[name]!r} is not supported: only {ours!r} is")
        found = {name: tuple(settings[name]) for name in NORMALISATION if settings.get(name)}
        found |= {"max_tiles": settings["max_patches"]} if settings.get("max_patches") else {}
        return dataclasses.replace(self, **found)

    def processor(self) -> dict[str, Any]:
        """The settings of the `GotOcr2ImageProcessor` that makes the same pixels as we."""
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": 3,  # bicubic
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": self.max_tiles,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            **{name: list(getattr(self, name)) for name in NORMALISATION},
        }

    def run_public(self, module: Any, pixels: Any) -> Any:
        """The features as the public classes compute them: torch's f[N, 3, S, S] normalised pixels -> f[N, P, F]."""
        states, by, side = module(pixels).last_hidden_state[:, 1:], self.downsample, self._side
        squares = states.unflatten(1, (side // by, by, side // by, by)).transpose(2, 3)
        return squares.flatten(3).flatten(1, 2)


def gather_squares(x: Float[Array, "N p E"], by: int) -> Float[Array, "N P F"]:
    """The hidden states of each square of `by` x `by` patches, row by row, as one feature: InternVL's pixel shuffle
    ("v2")."""
    side = round(x.shape[1] ** 0.5)
    squares = x.reshape(x.shape[0], side // by, by, side // by, by, x.shape[2]).swapaxes(2, 3)
    return squares.reshape(x.shape[0], (side // by) ** 2, by * by * x.shape[2])


_ZEROS = weight(nn.initializers.zeros, "tower_norm")
_ONES = weight(nn.initializers.ones, "tower_norm")


class RMSNorm(nn.Module):
    """See `layers.norms.rms_norm`."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.param("scale", _ONES, x.shape[-1:]), self.eps)


class _Part(vit.Part):
    """What the tower's parts share: configuration, types, and the layers they are made of."""

    def norm(self, name: str) -> nn.Module:
        eps = self.config.layer_norm_eps
        return (
            LayerNorm(eps, self.dtype, name=name) if self.config.norm_type == "layer_norm" else RMSNorm(eps, name=name)
        )

    def scaled(self, x: Array, name: str) -> Array:
        """Multiplied by a learned factor for each channel."""
        init = weight(nn.initializers.constant(self.config.layer_scale_init_value), "tower_norm")
        return x * spread(self.param(name, init, x.shape[-1:]), x.shape, x.dtype)


class PatchEmbeddings(_Part):
    """A linear map of each patch."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        return self.patches(images, "projection")


class Embeddings(_Part):
    """The class token and the patches, plus learned positions."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        width, init = self.config.hidden_size, normal(self.config.initializer_range)
        patches = PatchEmbeddings(self.config, self.dtype, name="patch_embeddings")(images)
        token = self.param("cls_token", weight(init, None, None, "tower_norm"), (1, 1, width))
        x = jnp.concatenate([spread(token, (images.shape[0], 1, width), self.dtype), patches], axis=1)
        positions = self.param("position_embeddings", weight(init, None, None, "tower_out"), (1, *x.shape[1:]))
        return x + spread(positions, x.shape, self.dtype)


class Attention(_Part):
    """Every patch of a tile sees every patch of it."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        projections = (f"{name}_proj" for name in "qkv")
        q, k, v = (self.linear(config.hidden_size, name, config.attention_bias)(x) for name in projections)
        if config.use_qk_norm:
            q, k = RMSNorm(_QK_EPS, name="q_norm")(q), RMSNorm(_QK_EPS, name="k_norm")(k)
        seen = attend_packed(q, (k,), (v,), config.num_attention_heads)
        return self.linear(config.hidden_size, "projection_layer")(seen)


class Layer(_Part):
    """One layer, as the body of a scan."""

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        part = (self.config, self.dtype)
        x = x + self.scaled(Attention(*part, name="attention")(self.norm("layernorm_before")(x)), "lambda_1")
        x = x + self.scaled(vit.MLP(*part, name="mlp")(self.norm("layernorm_after")(x)), "lambda_2")
        return constrain(x, ("images", None, None)), None


class Encoder(_Part):
    """The stack."""

    remat: str = "full"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers = nn.scan(
            rematerialised(Layer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        return layers(self.config, self.dtype, name="layer")(x, None)[0]


class InternVit(_Part):
    """The tower; parameters are named as in transformers' `InternVLVisionModel`.

    Attributes:
      config: the tower's shape.
      dtype: type of the computation; norms' statistics and softmax are float32 in any case.
      remat: what a layer keeps for the backward pass: "none" (everything) or "full" (its input).
    """

    remat: str = "full"

    @nn.compact
    def __call__(self, images: UInt8[Array, "N ... S S 3"] | Float[Array, "N ... S S 3"]) -> Float[Array, "N P F"]:
        """[N, S, S, 3] or, of several tiles, [N, T, S, S, 3] u8 pixels or f normalised ones -> features of each tile's
        squares of patches, row by row, one tile after the other.

        Raises:
          ValueError: the tiles are not of the tower's size.
        """
        config, count, tile = self.config, images.shape[0], (self.config.image_size, self.config.image_size, 3)
        if images.ndim not in (4, 5) or images.shape[-3:] != tile:
            raise ValueError(f"images are {images.shape[1:]} where the tower takes {tile}, or tiles of that")
        x = constrain(normalised(images, config).reshape(-1, *tile), ("images", None, None, None))
        x = Embeddings(config, self.dtype, name="embeddings")(x.astype(self.dtype))
        x = constrain(x, ("images", None, None))
        x = Encoder(config, self.dtype, self.remat, name="encoder")(x)
        return gather_squares(x[:, 1:], config.downsample).reshape(count, -1, config.width)

    def stored(self, images: UInt8[Array, "N ... S S 3"]) -> Float[Array, "N P F"]:
        """What can be stored of images: their features."""
        return self(images)


InternVitConfig.PUBLISHED = {"internvit-300m-448": {"kind": "intern_vit", "attention_bias": True}}
