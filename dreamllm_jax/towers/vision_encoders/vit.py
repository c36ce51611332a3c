"""What vision transformers of CLIP's kind have in common: a square picture in patches, and pre-norm layers in which
every patch sees every patch.

Legend: N images, S image size, P patches, E width.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamllm_jax.layers.attention import attend_packed
from dreamllm_jax.layers.flops import Tally, dense
from dreamllm_jax.layers.linear import Conv, Dense
from dreamllm_jax.layers.remat import rematerialised
from dreamllm_jax.layers.weights import LAYERS, normal, weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.public import require_supported
from dreamllm_jax.towers.vision_encoders.pixels import NORMALISATION, normalised, require_beginning

Array = jax.Array

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
}
# Settings of a config.json that would change the function computed here: name -> the one value that is supported.
_SUPPORTED = {"num_channels": 3, "attention_dropout": 0.0, "dropout": 0.0}


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """The shape that such towers have; names and defaults as in transformers' `CLIPVisionConfig`.

    `image_mean` and `image_std` normalise pixels in [0, 1].
    """

    projector: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    select_layer: int | None = -2
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "layer_norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        require_beginning(self)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported: choose from {list(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if not -self.num_hidden_layers - 1 <= (self.select_layer or 0) <= self.num_hidden_layers:
            raise ValueError(f"select_layer {self.select_layer} is beyond the {self.num_hidden_layers} layers")
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size {self.patch_size} does not fit image_size {self.image_size}")

    @property
    def width(self) -> int:
        """Of its features (F)."""
        return self.hidden_size

    def require_size(self, height: int, width: int) -> None:
        """Raises ValueError for images of any other size than `image_size`."""
        if (height, width) != (self.image_size,) * 2:
            raise ValueError(
                f"a vision encoder of kind {self.kind!r} takes images of {self.image_size} x {self.image_size} pixels, "
                f"not {height} x {width}"
            )

    def tokens(self, height: int, width: int) -> int:
        """Features of an image of so many pixels (P).

        Raises:
          ValueError: the tower takes images of `image_size` alone.
        """
        self.require_size(height, width)
        return self.num_patches

    @property
    def num_patches(self) -> int:
        return self.side**2

    @property
    def side(self) -> int:
        """Patches on a side of an image."""
        return self.image_size // self.patch_size

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

    @property
    def depth(self) -> int:
        """Layers that have to run to reach the selected hidden state."""
        if self.select_layer is None:
            return self.num_hidden_layers
        return self.select_layer % (self.num_hidden_layers + 1)

    def count(self, tally: Tally, images: int, more: int, remat: bool) -> None:
        """Adds the way to the features of so many images, which go through the layers with so many tokens beside their
        patches; `tally.live` says whether a gradient goes to what is added to the patches."""
        size, inner, patches = self.hidden_size, self.intermediate_size, self.side**2
        tokens = images * (patches + more)
        flat = dense(images * patches, 3 * self.patch_size**2, size)
        tally.product("embeddings/patch_embedding/kernel", flat, live=False)
        path = "encoder/layers"
        tally.live |= any(tally.trained(f"{path}/{name}/kernel") for name in ("self_attn/q_proj", "mlp/fc2"))
        layer = tally.beside(tally.live)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer.product(f"{path}/self_attn/{name}/kernel", dense(tokens, size, size))
        length = patches + more
        layer.attention(images, length, length, size, layer.live, heads=self.num_attention_heads, again=remat)
        layer.product(f"{path}/mlp/fc1/kernel", dense(tokens, size, inner))
        before_last = layer.forward
        layer.product(f"{path}/mlp/fc2/kernel", dense(tokens, inner, size))
        if remat:
            layer.recompute(before_last)
        tally.total += layer.total * self.depth

    @classmethod
    def checked(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a config.json that are ours too.

        Raises:
          ValueError: naming one that is not supported.
        """
        require_supported(config, _SUPPORTED)
        for name in ("image_size", "patch_size"):
            if not isinstance(config.get(name, 1), int):
                raise ValueError(f"{name} = {config[name]!r} is not supported: only a single number is")
        names = {field.name for field in dataclasses.fields(VitConfig)} - {"select_layer", *NORMALISATION}
        return {name: config[name] for name in sorted(names) if name in config}


_ZEROS = weight(nn.initializers.zeros, "tower_norm")
_ONES = weight(nn.initializers.ones, "tower_norm")


class Part(nn.Module):
    """What the tower's parts share: configuration, types, and the two layers they are made of."""

    config: Any
    dtype: Any = jnp.float32

    def linear(self, features: int, name: str, bias: bool = True) -> Dense:
        return Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=weight(normal(self.config.initializer_range), "tower_in", "tower_out"),
            bias_init=_ZEROS,
            name=name,
        )

    def pixels(self, images: Array) -> Array:
        """u8[N, S, S, 3] pixels normalised, or f[N, S, S, 3] as they are.

        Raises:
          ValueError: the images are not of the tower's size.
        """
        wanted = (self.config.image_size, self.config.image_size, 3)
        if images.shape[1:] != wanted:
            raise ValueError(f"images are {images.shape[1:]} where the tower takes {wanted}")
        return constrain(normalised(images, self.config), ("images", None, None, None))

    def patches(self, images: Array, name: str, bias: bool = True) -> Array:
        """f[N, P, E], a linear map of each patch, row by row."""
        patch = (self.config.patch_size,) * 2
        patches = Conv(
            self.config.hidden_size,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=weight(normal(self.config.initializer_range), None, None, None, "tower_out"),
            bias_init=_ZEROS,
            name=name,
        )(images)
        return patches.reshape(images.shape[0], -1, self.config.hidden_size)

    def norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(
            self.config.layer_norm_eps,
            dtype=self.dtype,
            scale_init=_ONES,
            bias_init=_ZEROS,
            use_fast_variance=False,
            name=name,
        )


class Attention(Part):
    """Every patch sees every patch."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = self.config.hidden_size
        q, k, v = (self.linear(width, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        return self.linear(width, "out_proj")(attend_packed(q, (k,), (v,), self.config.num_attention_heads))


class MLP(Part):
    """Two linear layers around the activation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inner = ACTIVATIONS[self.config.hidden_act](self.linear(self.config.intermediate_size, "fc1")(x))
        return self.linear(self.config.hidden_size, "fc2")(inner)


class Layer(Part):
    """One layer, as the body of a scan."""

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        part = (self.config, self.dtype)
        x = x + Attention(*part, name="self_attn")(self.norm("layer_norm1")(x))
        x = x + MLP(*part, name="mlp")(self.norm("layer_norm2")(x))
        return constrain(x, ("images", None, None)), None


class Encoder(Part):
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
