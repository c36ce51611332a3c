"""Qwen2.5-VL's vision tower (arXiv 2502.13923): pictures of any size, most layers seeing windows alone.

Patches are rotated by row and column; most layers attend within windows, a few over the whole image; a merger makes one
feature, as wide as the language model's embeddings, of every 2 x 2 patches. So the visual projector after it is the
identity. Every size of images is a program of its own, in which windows are a fixed order of the patches.

Legend: N images, H x W pixels, T patches, P merged ones (features), U patches merged into one, E width, F width of
features, G windows, M features of a whole window.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dreamllm_jax.data.images import nearest
from dreamllm_jax.layers.attention import attend
from dreamllm_jax.layers.flops import Flops, Tally, dense
from dreamllm_jax.layers.linear import Dense
from dreamllm_jax.layers.norms import rms_norm
from dreamllm_jax.layers.remat import rematerialised
from dreamllm_jax.layers.rope import apply_rope
from dreamllm_jax.layers.weights import LAYERS, normal, weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.public import PublicForm, reader, require_supported
from dreamllm_jax.towers.vision_encoders import qwen25_vl_layout as layout
from dreamllm_jax.towers.vision_encoders.clip import MEAN, STD
from dreamllm_jax.towers.vision_encoders.pixels import NORMALISATION, normalised, require_beginning

Array = jax.Array

_FRAMES = 2  # of a video, that a patch spans: those of an image are alike
_EPS = 1e-6  # of all norms

# Settings of a config.json that would change the function computed here: name -> the one value that is supported.
_SUPPORTED = {"hidden_act": "silu", "in_channels": 3, "in_chans": 3, "temporal_patch_size": _FRAMES}
_BUDGET = ("min_pixels", "max_pixels")
_OURS = ("kind", "image_size", "sizes", *NORMALISATION, *_BUDGET)  # that no config.json has


@dataclasses.dataclass(frozen=True)
class Qwen25VisionConfig:
    """The tower's shape; names and defaults as in transformers' `Qwen2_5_VLVisionConfig`, the published 7B's.

    Attributes:
      out_hidden_size: the language model's width.
      spatial_merge_size: patches along a side of the square that becomes one feature.
      window_size: pixels along a window.
      fullatt_block_indexes: the layers that see the whole image.
      image_size: pixels on a side of the images to see, where rows say nothing else (`rows.see`).
      min_pixels, max_pixels: of an image.
      sizes: heights and widths one of which a picture is given where it is free to choose, as in generation; empty for
        any that keeps its shape, within these bounds. Each size is compiled by itself.
      image_mean, image_std: normalise pixels in [0, 1].
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings
    projector: ClassVar[Mapping[str, Any]] = MappingProxyType({"kind": "identity"})

    kind: Literal["qwen25_vl"] = "qwen25_vl"
    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    patch_size: int = 14
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    initializer_range: float = 0.02
    image_size: int = 448
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16384
    sizes: tuple[tuple[int, int], ...] = ()
    image_mean: tuple[float, float, float] = MEAN
    image_std: tuple[float, float, float] = STD
    public = PublicForm(
        library="transformers",
        torch_class="Qwen2_5_VisionTransformerPretrainedModel",
        types=("qwen2_5_vl_vision", "qwen2_5_vl"),
        folder="visual",
        settings=(
            *("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size"),
            *("spatial_merge_size", "window_size", "fullatt_block_indexes"),
        ),
    )

    def __post_init__(self):
        for name in (
            *("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size"),
            *("spatial_merge_size", "min_pixels"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        require_beginning(self)
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of 4 * num_heads ({self.num_heads}): a head's channels "
                "are turned in pairs, half of them by row and half by column"
            )
        if self.window_size < self.size_multiple:
            raise ValueError(f"window_size {self.window_size} is less than a feature's {self.size_multiple} pixels")
        if wrong := [index for index in self.fullatt_block_indexes if not 0 <= index < self.depth]:
            raise ValueError(f"fullatt_block_indexes has {wrong[0]}, but there are {self.depth} layers, from 0")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is less than min_pixels {self.min_pixels}")
        for size in ((self.image_size, self.image_size), *self.sizes):
            self.tokens(*size)

    @property
    def width(self) -> int:
        """Of its features (F)."""
        return self.out_hidden_size

    @property
    def size_multiple(self) -> int:
        """What sides of images must be multiples of: pixels along the square that a feature stands for."""
        return self.patch_size * self.spatial_merge_size

    def tokens(self, height: int, width: int) -> int:
        """Features of an image of so many pixels (P).

        Raises:
          ValueError: an image that is not made of whole features, or of too few or too many pixels.
        """
        multiple = self.size_multiple
        if height % multiple or width % multiple or not self.min_pixels <= height * width <= self.max_pixels:
            raise ValueError(
                f"Qwen2.5-VL takes images whose sides are multiples of {multiple} pixels, of {self.min_pixels} "
                f"(min_pixels) to {self.max_pixels} (max_pixels) in all, not {height} x {width}"
            )
        return height * width // multiple**2

    def fitting(self, width: int, height: int) -> tuple[int, int]:
        """Height and width, in pixels, as which an image of this size is best seen."""
        if self.sizes:
            return self.sizes[nearest((width, height), self.sizes, cropped=False)]
        return layout.smart_resize(height, width, self.size_multiple, self.min_pixels, self.max_pixels)

    def pixels_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of what `preprocess` gives."""
        return height, width, 3

    @property
    def num_patches(self) -> int:
        """Features of a square of `image_size`."""
        return self.tokens(self.image_size, self.image_size)

    # What can be stored of an image: its features. They depend on all parameters and settings.
    stored_depends = ("",)

    @property
    def stored_settings(self) -> dict[str, Any]:
        """The settings that what is stored depends on."""
        return dataclasses.asdict(self)

    def stored_shape(self, height: int, width: int) -> tuple[int, int]:
        """Shape of what is stored of an image: its features."""
        return self.tokens(height, width), self.width

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the features of such an image."""
        return height // self.size_multiple, width // self.size_multiple

    def windows(self, height: int, width: int) -> np.ndarray:
        """i32[G, M] the features of each window of such an image, see `qwen25_vl_layout.windows`."""
        return layout.windows(self.grid(height, width), self.window_size // self.size_multiple)

    def preprocess(self, image: Image.Image, height: int, width: int) -> np.ndarray:
        """u8[height, width, 3]: resized (bicubic) and never cropped, as `Qwen2VLImageProcessor` does."""
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))

    def make(self, dtype: Any, remat: str = "full") -> "Qwen25Vision":
        """The module; see there."""
        return Qwen25Vision(self, dtype=dtype, remat=remat)

    def flops(self, tally: Tally, images: int, height: int, width: int, remat: bool) -> None:
        """Adds the way to the features of so many images."""
        size, inner, unit = self.hidden_size, self.intermediate_size, self.spatial_merge_size**2
        features, windows = images * self.tokens(height, width), self.windows(height, width)
        tokens = features * unit
        tally.product("patch_embed/proj/kernel", dense(tokens, 3 * self.patch_size**2, size), live=False)
        tally.live |= any(tally.trained(f"blocks/{name}") for name in ("attn/qkv/kernel", "mlp/down_proj/kernel"))
        full = len(set(self.fullatt_block_indexes))
        for layers, groups, seen in (
            (full, images, tokens // images),
            (self.depth - full, images * len(windows), windows.shape[1] * unit),
        ):
            layer = tally.beside(tally.live)
            layer.product("blocks/attn/qkv/kernel", dense(tokens, size, 3 * size))
            rotation = dense(tokens, size // self.num_heads, 2 * size)  # halves swapped by a permutation matrix
            layer.total += Flops(products=rotation * (1 + layer.live))
            layer.forward += rotation
            layer.attention(groups, seen, seen, size, layer.live)
            layer.product("blocks/attn/proj/kernel", dense(tokens, size, size))
            for name in ("gate_proj", "up_proj"):
                layer.product(f"blocks/mlp/{name}/kernel", dense(tokens, size, inner))
            before_last = layer.forward
            layer.product("blocks/mlp/down_proj/kernel", dense(tokens, inner, size))
            if remat:
                layer.recompute(before_last)
            tally.total += layer.total * layers
        tally.product("merger/mlp_0/kernel", dense(features, unit * size, unit * size))
        tally.product("merger/mlp_2/kernel", dense(features, unit * size, self.width))

    @classmethod
    def from_public(cls, config: Mapping[str, Any]) -> "Qwen25VisionConfig":
        """Reads the config.json of a whole model (its `vision_config`) or of the vision tower alone.

        Raises:
          ValueError: naming a setting that is not supported.
        """
        config = config.get("vision_config") or config
        reader((cls,), config)
        require_supported(config, _SUPPORTED)
        rope = config.get("rope_parameters") or {}
        if (theta := rope.get("rope_theta", layout.THETA)) != layout.THETA:
            raise ValueError(f"rope_theta = {theta} is not supported: only {layout.THETA} is")
        names = {field.name for field in dataclasses.fields(cls)} - set(_OURS)
        # transformers' own defaults, where they are not the published ones.
        values = {"hidden_size": 3584} | {name: config[name] for name in names if config.get(name) is not None}
        values["fullatt_block_indexes"] = tuple(values.get("fullatt_block_indexes", cls.fullatt_block_indexes))
        return cls(**values, **_square(values))

    def to_public(self) -> dict[str, Any]:
        """The settings of a config.json of the tower alone."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in _OURS}
        known = {name: value for name, value in _SUPPORTED.items() if name != "in_chans"}
        return settings | known | {"tokens_per_second": 2}  # of videos: as published

    def with_processor(self, settings: Mapping[str, Any]) -> "Qwen25VisionConfig":
        """The tower, taking pictures as the settings of its `Qwen2VLImageProcessor` say.

        Raises:
          ValueError: that makes other pixels of an image than `preprocess`.
        """
        require_supported(settings, {n: value for n, value in self.processor().items() if n not in _CHOSEN})
        found = {name: tuple(settings[name]) for name in NORMALISATION if settings.get(name)}
        edges = settings.get("size") or {}
        for name, edge in zip(_BUDGET, ("shortest_edge", "longest_edge"), strict=True):  # as they are called now
            if pixels := settings.get(name) or edges.get(edge):
                found[name] = pixels
        return dataclasses.replace(self, **found, **_square(dataclasses.asdict(self) | found))

    def processor(self) -> dict[str, Any]:
        """The settings of the `Qwen2VLImageProcessor` that makes the same pixels as we."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "patch_size": self.patch_size,
            "temporal_patch_size": _FRAMES,
            "merge_size": self.spatial_merge_size,
            **{name: list(getattr(self, name)) for name in NORMALISATION},
        }

    def run_public(self, module: Any, pixels: Any) -> Any:
        """The features as the public class computes them: torch's f[N, 3, H, W] normalised pixels -> f[N, P, F]."""
        import torch

        count, _, *size = pixels.shape
        side, unit = self.patch_size, self.spatial_merge_size
        h, w = (length // self.size_multiple for length in size)
        split = pixels.reshape(count, 3, h, unit, side, w, unit, side)
        patches = split.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
        patches = patches.expand(*patches.shape[:6], _FRAMES, side, side).reshape(count * h * w * unit**2, -1)
        grid = torch.tensor([[1, h * unit, w * unit]] * count)
        return module(patches, grid_thw=grid).pooler_output.reshape(count, h * w, -1)


_CHOSEN = {"image_processor_type", "size", *_BUDGET, *NORMALISATION}  # of the processor's settings


def _square(settings: Mapping[str, Any]) -> dict[str, int]:
    """A side of images to see that the settings allow, as near to the usual one as may be."""
    have = {field.name: field.default for field in dataclasses.fields(Qwen25VisionConfig)} | settings
    side = have["image_size"]
    multiple = have["patch_size"] * have["spatial_merge_size"]
    return {"image_size": layout.smart_resize(side, side, multiple, have["min_pixels"], have["max_pixels"])[0]}


_ZEROS = weight(nn.initializers.zeros, "tower_norm")
_ONES = weight(nn.initializers.ones, "tower_norm")


class _Part(nn.Module):
    """What the tower's parts share: configuration, types, and the layers they are made of."""

    config: Qwen25VisionConfig
    dtype: Any = jnp.float32

    def linear(self, features: int, name: str) -> Dense:
        return Dense(
            features,
            dtype=self.dtype,
            kernel_init=weight(normal(self.config.initializer_range), "tower_in", "tower_out"),
            bias_init=_ZEROS,
            name=name,
        )


class Norm(nn.Module):
    """Root mean square normalisation and its scale."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.param("scale", _ONES, (x.shape[-1],)), _EPS)


class PatchProduct(_Part):
    """The convolution over frames, rows and columns: as an image's frames are alike, one product with their sum."""

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        """f[N, T, C] -> f[N, T, E]."""
        config = self.config
        shape = (_FRAMES, config.patch_size, config.patch_size, 3, config.hidden_size)
        init = weight(normal(config.initializer_range), *[None] * 4, "tower_out")
        kernel = jnp.sum(self.param("kernel", init, shape).astype(jnp.float32), axis=0)
        return patches.astype(self.dtype) @ kernel.reshape(-1, config.hidden_size).astype(self.dtype)


class PatchEmbed(_Part):
    """The patches of images, in the order in which features are read."""

    @nn.compact
    def __call__(self, images: Array, order: np.ndarray) -> Array:
        """f[N, H, W, 3], i32[P] -> f[N, T, E]."""
        count, height, width, channels = images.shape
        side, unit, multiple = self.config.patch_size, self.config.spatial_merge_size, self.config.size_multiple
        split = images.reshape(count, height // multiple, unit, side, width // multiple, unit, side, channels)
        features = split.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(count, len(order), -1)
        patches = features[:, order].reshape(count, len(order) * unit**2, -1)
        return PatchProduct(self.config, self.dtype, name="proj")(patches)


class Attention(_Part):
    """Every patch sees every patch, or those of its window.

    Attributes:
      size: height and width of the images.
    """

    size: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Array, full: Array, turns: tuple[Array, Array]) -> Array:
        config = self.config
        there = np.repeat(config.windows(*self.size) >= 0, config.spatial_merge_size**2, axis=1)
        qkv = self.linear(3 * config.hidden_size, "qkv")(x).reshape(*x.shape[:2], 3, config.num_heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = apply_rope(q, *turns), apply_rope(k, *turns)
        whole = functools.partial(attend, causal=False)
        out = jax.lax.cond(full, whole, functools.partial(layout.attend_within, windows=there), q, k, v)
        return self.linear(config.hidden_size, "proj")(out.reshape(x.shape))


class MLP(_Part):
    """A gated linear unit, with biases."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate, up = (self.linear(self.config.intermediate_size, name)(x) for name in ("gate_proj", "up_proj"))
        return self.linear(self.config.hidden_size, "down_proj")(nn.silu(gate) * up)


class Layer(_Part):
    """One layer, as the body of a scan; `size` as of `Attention`."""

    size: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Array, full: Array, turns: tuple[Array, Array]) -> tuple[Array, None]:
        part = (self.config, self.dtype)
        x = x + Attention(*part, self.size, name="attn")(Norm(name="norm1")(x), full, turns)
        x = x + MLP(*part, name="mlp")(Norm(name="norm2")(x))
        return constrain(x, ("images", None, None)), None


class Merger(_Part):
    """One feature of the patches of a square."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inner = self.config.hidden_size * self.config.spatial_merge_size**2
        x = Norm(name="ln_q")(x).reshape(len(x), -1, inner)
        return self.linear(self.config.width, "mlp_2")(nn.gelu(self.linear(inner, "mlp_0")(x), approximate=False))


class Qwen25Vision(_Part):
    """The tower; parameters are named as in transformers' `Qwen2_5_VisionTransformerPretrainedModel`.

    Attributes:
      config: the tower's shape.
      dtype: type of the computation; norms' statistics, rotations and softmax are float32 in any case.
      remat: what a layer keeps for the backward pass: "none" (everything) or "full" (its input).
    """

    remat: str = "full"

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """u8[N, H, W, 3] pixels, or f[N, H, W, 3] normalised ones -> f[N, P, F] features, row by row.

        Raises:
          ValueError: the tower does not take images of this size.
        """
        config, part = self.config, (self.config, self.dtype)
        _, height, width, _ = images.shape
        config.tokens(height, width)
        images = constrain(normalised(images, config), ("images", None, None, None))
        windows, size = config.windows(height, width), (height, width)
        order = windows[windows >= 0]
        turns = layout.rotations(
            config.grid(*size), order, config.spatial_merge_size, config.hidden_size // config.num_heads
        )
        x = constrain(PatchEmbed(*part, name="patch_embed")(images, order), ("images", None, None))
        layers = nn.scan(
            rematerialised(Layer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        full = jnp.isin(jnp.arange(config.depth), jnp.asarray(config.fullatt_block_indexes, jnp.int32))
        x, _ = layers(*part, size, name="blocks")(x, full, tuple(jnp.asarray(turn)[None] for turn in turns))
        return Merger(*part, name="merger")(x)[:, np.argsort(order)]

    def stored(self, images: Array) -> Array:
        """What can be stored of images: their features."""
        return self(images)


def _published(width: int) -> dict[str, Any]:
    return {"kind": "qwen25_vl", "out_hidden_size": width}


Qwen25VisionConfig.PUBLISHED = {"qwen25-vl-3b": _published(2048), "qwen25-vl-7b": _published(3584)}
