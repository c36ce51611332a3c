"""The denoiser of SANA (diffusers' `SanaTransformer2DModel`; Xie et al., arXiv 2410.10629) and SANA-1.5 (2501.18427).

A transformer over the positions of a deeply compressed latent: linear attention among them, softmax attention to the
caption, and a feed-forward with a depthwise convolution, which is what tells positions apart. Parameters are named as
in diffusers, so that `dreamllm_jax.interop.names` maps its checkpoints.

Legend: N images, h,w,c latent height, width and channels, T positions (h x w over the patch size squared), E width,
H heads, D their width, S caption tokens, C caption channels, I channels inside the feed-forward, P patch size.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.layers import gated_depthwise, linear_attention
from dreamllm_jax.layers.blocks import EXACT_DENSE, Conv, Dense, shard_images
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.layers.lora import LoraConfig, chosen
from dreamllm_jax.layers.norms import modulated_norm
from dreamllm_jax.layers.positions import position_table
from dreamllm_jax.layers.remat import rematerialised
from dreamllm_jax.layers.spaced_heads import (
    Product,
    RMSNorm,
    Spacing,
    channels_together,
    cross_attention,
    find_spacing,
    spaced_attention,
)
from dreamllm_jax.layers.timesteps import TimestepEmbedding, timestep_embedding
from dreamllm_jax.layers.weights import LAYERS, normal, weight
from dreamllm_jax.parallel.mesh import platform
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.diffusers_config import read_diffusers_config, require
from dreamllm_jax.towers.image_decoders import sana_flops
from dreamllm_jax.towers.public import PublicForm

# Settings of a config.json with the only value that is implemented.
_FIXED = {
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
}
_OURS = ("kind", "lora", "narrow_positions")


@dataclasses.dataclass(frozen=True)
class SanaLora(LoraConfig):
    """Adapters of the denoiser's products (`layers.lora`): those of both attentions, and of the feed-forward."""

    products: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out_0", "conv_inverted", "conv_point")
    targets: tuple[str, ...] = products


@dataclasses.dataclass(frozen=True)
class SanaTransformerConfig:
    """The settings of diffusers' `SanaTransformer2DModel`, and its adapters.

    Attributes:
      sample_size: latents on a side that it was made for.
      out_channels: of the prediction; None for as many as `in_channels`.
      cross_attention_dim: width of the projected caption, which is that of the transformer.
      mlp_ratio: I / E, rounded down.
      attention_bias: whether the linear attention's q, k and v have biases; all other products have but the last.
      interpolation_scale: positions are told by sinusoids, stretched so much; None for no such table.
      narrow_positions: these are rounded to bfloat16, whatever the model computes in.
      qk_norm: "rms_norm_across_heads" normalises queries and keys (SANA-1.5).
      timestep_scale: timesteps are multiplied by it.
      lora: low-rank adapters of the layers' products, None for none.
    """

    in_channels: int = 32
    out_channels: int | None = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    narrow_positions: bool = False
    qk_norm: str | None = None
    timestep_scale: float = 1.0
    lora: SanaLora | None = None
    kind: Literal["sana_transformer"] = "sana_transformer"
    clock_width: ClassVar[int] = 256  # of the sinusoids that tell the time
    public = PublicForm(
        library="diffusers",
        torch_class="SanaTransformer2DModel",
        folder="transformer",
        settings=(
            *("in_channels", "num_attention_heads", "attention_head_dim", "num_layers", "num_cross_attention_heads"),
            *("cross_attention_head_dim", "caption_channels", "mlp_ratio", "patch_size", "qk_norm"),
        ),
    )

    def __post_init__(self) -> None:
        for key in (
            *("in_channels", "num_attention_heads", "attention_head_dim", "num_layers", "num_cross_attention_heads"),
            *("cross_attention_head_dim", "caption_channels", "mlp_ratio", "sample_size", "patch_size", "norm_eps"),
        ):
            require(getattr(self, key) > 0, f"{key}={getattr(self, key)!r} must be positive")
        require(
            self.cross_attention_dim == self.width,
            f"cross_attention_dim={self.cross_attention_dim!r}: only num_attention_heads * attention_head_dim = "
            f"{self.width} is implemented",
        )
        require(
            self.qk_norm in (None, "rms_norm_across_heads"),
            f"qk_norm={self.qk_norm!r}: only null and 'rms_norm_across_heads' are implemented",
        )
        require(
            self.interpolation_scale is None or (self.interpolation_scale > 0 and self.width % 4 == 0),
            f"interpolation_scale={self.interpolation_scale!r} must be positive, and the width {self.width} a multiple "
            "of four",
        )
        require(
            self.sample_size % self.patch_size == 0,
            f"sample_size={self.sample_size} is not a multiple of patch_size={self.patch_size}",
        )

    @property
    def width(self) -> int:
        """Of the transformer (E)."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def cross_heads(self) -> tuple[int, int]:
        """Heads of the attention to the caption, and their width."""
        return self.num_cross_attention_heads, self.cross_attention_head_dim

    @property
    def inner(self) -> int:
        """Channels inside the feed-forward (I)."""
        return int(self.mlp_ratio * self.width)

    @property
    def outputs(self) -> int:
        """Channels of the prediction."""
        return self.out_channels or self.in_channels

    @property
    def condition_width(self) -> int:
        """Channels of the condition's sequence (C)."""
        return self.caption_channels

    @property
    def pooled_width(self) -> int:
        """Of the condition's pooled vector: it takes none."""
        return 0

    @property
    def size_multiple(self) -> int:
        """What a latent's height and width must be multiples of."""
        return self.patch_size

    @property
    def largest_size(self) -> None:
        """They may be as large as they like."""
        return None

    @classmethod
    def from_public(cls, settings: Mapping[str, Any]) -> "SanaTransformerConfig":
        """Reads the `config.json` of a diffusers `SanaTransformer2DModel`.

        Raises:
          ValueError: naming every setting that is not implemented.
        """
        return read_diffusers_config(cls, settings, _FIXED)

    def to_public(self) -> dict[str, Any]:
        """The settings of a `SanaTransformer2DModel`'s config.json."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in _OURS}

    def run_public(self, module: Any, latents: Any, timesteps: Any, condition: Condition) -> Any:
        """The prediction as the public class computes it, f[N,c,h,w], f[N] of torch -> f[N,c',h,w]; the condition holds
        torch's tensors too."""
        timesteps = timesteps * self.timestep_scale
        return module(latents, condition.sequence, timesteps, encoder_attention_mask=condition.mask).sample

    def make(self, dtype: Any, remat: str = "none") -> "SanaTransformer":
        """The module; see there."""
        return SanaTransformer(self, dtype=dtype, remat=remat)

    def flops(
        self, tally: Tally, images: int, size: tuple[int, int], queries: int, condition_live: bool, remat: str = "none"
    ) -> None:
        """Adds one prediction for latents of this height and width, under conditions of so many tokens.

        Args:
          condition_live: whether gradients go back to the conditions.
          remat: as of `make`.
        """
        sana_flops.count(self, tally, images, size, queries, condition_live, remat)


class _Part(nn.Module):
    """What the parts of a layer share."""

    config: SanaTransformerConfig
    dtype: Any = jnp.float32

    def product(
        self, given: jax.Array | tuple[jax.Array, ...], name: str, features: int, **settings: Any
    ) -> list[jax.Array]:
        """The parts (`Product`) of what the product of this name makes of what is given."""
        given = given if isinstance(given, tuple) else (given,)
        return Product(features, lora=chosen(self.config.lora, name), dtype=self.dtype, name=name, **settings)(*given)

    def normalise(self, name: str, x: jax.Array, heads: Spacing | None = None) -> jax.Array:
        """Queries or keys, where the config asks for it."""
        return x if self.config.qk_norm is None else RMSNorm(heads, name=name)(x)


class LinearAttention(_Part):
    """Of every position to every position (`SanaLinearAttnProcessor2_0`)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,T,E] -> f[N,T,E]."""
        config, heads = self.config, self.config.num_attention_heads
        q, k, v = (
            self.product(x, name, config.width, use_bias=config.attention_bias)[0] for name in ("to_q", "to_k", "to_v")
        )
        q, k = self.normalise("norm_q", q), self.normalise("norm_k", k)
        if platform() == "tpu" and linear_attention.supported(q, heads):
            out = linear_attention.linear_attention(q, k, v, heads)
        else:
            out = linear_attention.linear_attention_xla(q, k, v, heads)
        return self.product(out, "to_out_0", config.width)[0]


class CrossAttention(_Part):
    """Of every position to the caption (`SanaAttnProcessor2_0`)."""

    @nn.compact
    def __call__(self, x: jax.Array, caption: jax.Array, mask: jax.Array | None) -> jax.Array:
        """f[N,T,E], f[N,S,E], bool[N,S] -> f[N,T,E]."""
        config, width = self.config, x.shape[-1]
        inner = math.prod(config.cross_heads)
        spacing = None
        if platform() == "tpu":
            spacing = find_spacing(config.cross_heads, x.shape[:2], caption.shape[1], self.dtype, mask is not None)
        q, k, v = (
            self.product(y, f"to_{name}", inner, outputs=spacing)[0]
            for name, y in zip("qkv", (x, caption, caption), strict=True)
        )
        q, k = self.normalise("norm_q", q, spacing), self.normalise("norm_k", k, spacing)
        if spacing is None:
            out = cross_attention(q, k, v, mask, config.num_cross_attention_heads)
        else:
            out = spaced_attention(q, k, v, mask, spacing)
        return self.product(out, "to_out_0", width, inputs=spacing)[0]


class _Taps(nn.Module):
    """The parameters of a depthwise 3x3 convolution, and the bias before it (`gated_depthwise.stack_taps`)."""

    @nn.compact
    def __call__(self, bias: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", weight(init, None, None, None, "tower_out"), (3, 3, 1, bias.size))
        return gated_depthwise.stack_taps(bias, kernel, self.param("bias", Conv.bias_init, bias.shape))


# Other than the autoencoder's layer of this name (`autoencoders/dc_blocks.py`): see there.
class GLUMBConv(_Part):
    """The feed-forward: wider, a depthwise convolution, one half gated by the other, and back (Mix-FFN)."""

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
        """f[N,T,E] of so many lines and columns -> f[N,T,E]."""
        inner = self.config.inner
        values, gates, bias = self.product(x, "conv_inverted", 2 * inner, convolution=True, parts=2, bias_apart=True)
        taps = _Taps(name="conv_depth")(bias)
        on_tpu = platform() == "tpu" and gated_depthwise.supported(values, size)
        gate = gated_depthwise.gated_depthwise if on_tpu else gated_depthwise.gated_depthwise_xla
        return self.product(
            (values, gates, taps),
            "conv_point",
            self.config.width,
            use_bias=False,
            convolution=True,
            before=lambda *given: gate(*given, size),
        )[0]


class SanaTransformerBlock(_Part):
    """A layer, as the body of a scan; `size` is rows and columns of patches."""

    size: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(
        self, x: jax.Array, caption: jax.Array, mask: jax.Array | None, time: jax.Array
    ) -> tuple[jax.Array, None]:
        """f[N,T,E], f32[N,S,E], bool[N,S], f32[N,6,E] -> f[N,T,E]."""
        config, part = self.config, (self.config, self.dtype)
        table = self.param("scale_shift_table", _table(config.width), (6, config.width))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(table.astype(jnp.float32) + time, 1, 0)

        def gated(gate: jax.Array, y: jax.Array) -> jax.Array:
            return (gate[:, None] * y.astype(jnp.float32)).astype(self.dtype)

        h = channels_together(modulated_norm(x, shift1, scale1, config.norm_eps))
        x = x + gated(gate1, LinearAttention(*part, name="attn1")(h))
        x = x + CrossAttention(*part, name="attn2")(x, caption.astype(self.dtype), mask)
        h = channels_together(modulated_norm(x, shift2, scale2, config.norm_eps))
        h = GLUMBConv(*part, name="ff")(h, self.size)
        return channels_together(shard_images(x + gated(gate2, h))), None


def _table(width: int) -> nn.initializers.Initializer:
    return weight(normal(width**-0.5), None, "tower_norm")


class _Clock(nn.Module):
    """`emb` of `AdaLayerNormSingle`."""

    width: int

    @nn.compact
    def __call__(self, timesteps: jax.Array) -> jax.Array:
        waves = timestep_embedding(timesteps, SanaTransformerConfig.clock_width)
        return TimestepEmbedding(self.width, name="timestep_embedder")(waves)


class AdaLayerNormSingle(nn.Module):
    """The time, and what all layers' scales, shifts and gates are made of; float32."""

    width: int

    @nn.compact
    def __call__(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f32[N] -> f32[N,6,E], f32[N,E]."""
        embedded = _Clock(self.width, name="emb")(timesteps)
        common = Dense(6 * self.width, kernel_init=EXACT_DENSE, name="linear")(nn.silu(embedded))
        return common.reshape(-1, 6, self.width), embedded


class PatchEmbed(_Part):
    """A linear map of each patch, and its place if the config asks for it."""

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        """f[N,h,w,c] -> f[N,T,E]."""
        config, patch = self.config, (self.config.patch_size,) * 2
        x = Conv(config.width, patch, patch, padding="VALID", dtype=self.dtype, name="proj")(latents)
        size, x = x.shape[1:3], x.reshape(len(x), -1, config.width)
        if config.interpolation_scale is None:
            return x
        base = config.sample_size // config.patch_size
        table = position_table(size, base, config.width, config.interpolation_scale)
        if config.narrow_positions:
            table = table.astype(jnp.bfloat16).astype(np.float32)
        return (x + table).astype(self.dtype)


class CaptionProjection(nn.Module):
    """The two-layer perceptron on the caption (`PixArtAlphaTextProjection`)."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[N,S,C] -> f[N,S,E]."""
        h = nn.gelu(Dense(self.width, dtype=self.dtype, name="linear_1")(x), approximate=True)
        return Dense(self.width, dtype=self.dtype, name="linear_2")(h)


class SanaTransformer(nn.Module):
    """Predicts the velocity (or what else it was trained for) in noisy latents, under a condition.

    Attributes:
      config: its shape.
      dtype: type of the computation; the time, norms' statistics, the softmax and all sums over positions are float32
        in any case.
      remat: what a layer keeps for the backward pass: "none" (everything) or "full" (its input).
    """

    config: SanaTransformerConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, latents: jax.Array, timesteps: jax.Array, condition: Condition) -> jax.Array:
        """f[N,h,w,c], f32[N], a condition f[N,S,C] with or without a mask -> f32[N,h,w,c'].

        Raises:
          ValueError: channels or a size that are not of the config, or a condition with more than sequence and mask.
        """
        config = self.config
        self._require(latents, condition)
        size = tuple(side // config.patch_size for side in latents.shape[1:3])
        time, embedded = AdaLayerNormSingle(config.width, name="time_embed")(
            timesteps.astype(jnp.float32) * config.timestep_scale
        )
        caption = shard_images(condition.sequence.astype(self.dtype))
        caption = CaptionProjection(config.width, self.dtype, name="caption_projection")(caption)
        # What is added up over the layers is its gradient.
        caption = RMSNorm(name="caption_norm")(caption).astype(jnp.float32)

        x = PatchEmbed(config, self.dtype, name="patch_embed")(shard_images(latents.astype(self.dtype)))
        layers = nn.scan(
            rematerialised(SanaTransformerBlock, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        x, _ = layers(config, self.dtype, size, name="transformer_blocks")(x, caption, condition.mask, time)

        table = self.param("scale_shift_table", _table(config.width), (2, config.width)).astype(jnp.float32)
        x = modulated_norm(x, table[0] + embedded, table[1] + embedded, 1e-6)
        x = Dense(config.patch_size**2 * config.outputs, dtype=self.dtype, name="proj_out")(x)
        x = x.reshape(len(x), *size, config.patch_size, config.patch_size, config.outputs)
        return x.swapaxes(2, 3).reshape(*latents.shape[:3], config.outputs).astype(jnp.float32)

    def _require(self, latents: jax.Array, condition: Condition) -> None:
        config = self.config
        for name, got, want in (
            ("latents", latents.shape[-1], config.in_channels),
            ("condition", condition.sequence.shape[-1], config.caption_channels),
        ):
            require(got == want, f"the {name} have {got} channels where the SANA transformer's config says {want}")
        require(
            not any(side % config.patch_size for side in latents.shape[1:3]),
            f"latents of {latents.shape[1]} x {latents.shape[2]} cannot be cut into patches of {config.patch_size}",
        )
        require(
            condition.pooled is None and not condition.extra,
            "the SANA transformer takes a condition of a sequence and a mask: choose a connector without a pooled "
            "vector or extra arrays",
        )


_SMALL = {
    "kind": "sana_transformer",
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
_LARGE = {"kind": "sana_transformer", "num_layers": 20}
_NORMED = {"qk_norm": "rms_norm_across_heads"}
# Name -> settings.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sana-0.6b-512": _SMALL | {"sample_size": 16},
    "sana-0.6b-1024": _SMALL | {"sample_size": 32},
    "sana-1.6b-512": _LARGE | {"sample_size": 16},
    "sana-1.6b-1024": _LARGE | {"sample_size": 32},
    "sana-1.5-1.6b-1024": _LARGE | _NORMED | {"sample_size": 32},
    "sana-1.5-4.8b-1024": _LARGE | _NORMED | {"num_layers": 60, "sample_size": 32},
}
