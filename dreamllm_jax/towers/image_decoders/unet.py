"""The denoising U-Net of Stable Diffusion 1.x, 2.x and XL (diffusers' `UNet2DConditionModel`), Rombach et al.
2112.10752 and Podell et al. 2307.01952.

Parameters are named as in diffusers, so that `dreamllm_jax.interop.names` maps its checkpoints. Legend: N images,
h,w,c latent height, width and channels, Q condition tokens, C condition width, T time embedding width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamllm_jax.layers.blocks import (
    Conv,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
    shard_images,
)
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.layers.timesteps import TimestepEmbedding, timestep_embedding
from dreamllm_jax.towers.condition import SIZES, Condition
from dreamllm_jax.towers.diffusers_config import read_diffusers_config, require
from dreamllm_jax.towers.image_decoders import unet_flops
from dreamllm_jax.towers.image_decoders.unet_transformer import Transformer2DModel, UNetLora
from dreamllm_jax.towers.public import PublicForm

PerBlock = int | tuple[int, ...]


# Settings of a config.json with the only value that is implemented.
_FIXED = {
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "cross_attention_norm": None,
    "attention_type": "default",
    "downsample_padding": 1,
    "dropout": 0.0,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "num_class_embeds": None,
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
}

_SIZES = 6  # of a picture
# Of SDXL's refiner, which is told five numbers, the last of them an aesthetic score.
_REFINER = {"cross_attention_dim": 1280, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2560}
_OURS = ("kind", "lora")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The settings of diffusers' `UNet2DConditionModel` that vary among Stable Diffusion 1.x, 2.x and XL models, and
    the adapters of its transformers (`lora`, None for none).

    `PerBlock` values are one number, or one for each level from the finest to the coarsest. `attention_head_dim` is the
    *number* of heads unless `num_attention_heads` is given: the name is a historical slip of diffusers that every
    published config keeps. `upcast_attention` has no effect, for the softmax is always float32. With
    `addition_embed_type` "text_time" the condition has a pooled vector and six sizes, each of which is embedded in
    `addition_time_embed_dim` channels: together `projection_class_embeddings_input_dim`.
    """

    sample_size: int | None = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: PerBlock = 2
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    transformer_layers_per_block: PerBlock = 1
    cross_attention_dim: int = 1280
    attention_head_dim: PerBlock = 8
    num_attention_heads: PerBlock | None = None
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    act_fn: str = "silu"
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    upcast_attention: bool = False
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    lora: UNetLora | None = None
    kind: Literal["unet"] = "unet"
    public = PublicForm(
        library="diffusers",
        torch_class="UNet2DConditionModel",
        folder="unet",
        settings=("in_channels", "out_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type"),
    )

    def __post_init__(self) -> None:
        levels = self.levels
        for key in ("in_channels", "out_channels", "norm_num_groups", "norm_eps"):
            require(getattr(self, key) > 0, f"{key} must be positive, got {getattr(self, key)}")
        require(
            min(self.block_out_channels, default=0) > 0, f"block_out_channels={self.block_out_channels} has no size"
        )
        require(
            self.sample_size is None or self.sample_size > 0, f"sample_size must be positive, got {self.sample_size}"
        )
        require(self.freq_shift in (0, 1), f"freq_shift must be 0 or 1, got {self.freq_shift}")
        for key, choices in (
            ("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D")),
            ("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D")),
        ):
            types = getattr(self, key)
            require(len(types) == levels, f"{key}={types!r} must have {levels} entries, as block_out_channels has")
            for kind in types:
                require(kind in choices, f"{key} has {kind!r}: only {' and '.join(choices)} are implemented")
        for key in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads"):
            value = getattr(self, key)
            counts = (value,) if isinstance(value, int) else value or ()
            require(
                all(isinstance(count, int) and count > 0 for count in counts) and len(counts) in (0, 1, levels),
                f"{key}={value!r} must be a positive integer or {levels} of them",
            )
        require(
            isinstance(self.cross_attention_dim, int) and self.cross_attention_dim > 0,
            f"cross_attention_dim={self.cross_attention_dim!r} must be one positive integer",
        )
        require(self.act_fn == "silu", f"act_fn={self.act_fn!r}: only 'silu' is implemented")
        added = self.addition_embed_type
        require(added in (None, "text_time"), f"addition_embed_type={added!r}: only 'text_time' is implemented")
        widths = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if added is None:
            require(
                widths == (None, None),
                f"addition_time_embed_dim and projection_class_embeddings_input_dim are {widths} without "
                "addition_embed_type='text_time'",
            )
        else:
            require(
                None not in widths and 0 < _SIZES * widths[0] < widths[1],
                f"projection_class_embeddings_input_dim={widths[1]} must be more than {_SIZES} times "
                f"addition_time_embed_dim={widths[0]}",
            )
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            require(channels % heads == 0, f"block_out_channels: {channels} cannot be split into {heads} heads")
            groups = self.norm_num_groups
            require(channels % groups == 0, f"block_out_channels: {channels} cannot be split into {groups} norm groups")

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads at each level."""
        return self.per_block(self.num_attention_heads or self.attention_head_dim)

    def per_block(self, value: PerBlock) -> tuple[int, ...]:
        """A `PerBlock` value spelt out for each level."""
        return (value,) * self.levels if isinstance(value, int) else value

    @classmethod
    def from_public(cls, settings: Mapping[str, Any]) -> "UNetConfig":
        """Reads the `config.json` of a diffusers `UNet2DConditionModel`.

        Raises:
          ValueError: naming every setting that is not implemented; the U-Net is that of SDXL's refiner.
        """
        if all(settings.get(name) == value for name, value in _REFINER.items()):
            told = ", ".join(f"{name} {value}" for name, value in _REFINER.items())
            raise ValueError(
                f"this is the refiner of Stable Diffusion XL ({told}): it only goes over the base model's pictures, "
                "told an aesthetic score in place of a target size; take the base model (stable-diffusion-xl-base-1.0)"
            )
        off = {"upcast_attention": False} if settings.get("upcast_attention", True) is None else {}  # as XL's has it
        return read_diffusers_config(cls, {**settings, **off}, _FIXED)

    def to_public(self) -> dict[str, Any]:
        """The settings of a `UNet2DConditionModel`'s config.json."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in _OURS}
        unused = ["num_attention_heads"] if self.num_attention_heads is None else []
        if self.addition_embed_type is None:
            unused += ["addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"]
        return {name: value for name, value in settings.items() if name not in unused}

    def run_public(self, module: Any, latents: Any, timesteps: Any, condition: Condition) -> Any:
        """The prediction as the public class computes it, f[N,c,h,w], i[N] and a condition of torch -> f[N,c',h,w]."""
        added = {"text_embeds": condition.pooled, **condition.extra} if self.addition_embed_type else None
        return module(latents, timesteps, condition.sequence, added_cond_kwargs=added).sample

    def make(self, dtype: Any, remat: str = "none") -> "UNet":
        """The module; see there."""
        return UNet(self, dtype=dtype, remat=remat)

    @property
    def condition_width(self) -> int:
        """Of the condition's sequence (C)."""
        return self.cross_attention_dim

    @property
    def pooled_width(self) -> int:
        """Of the condition's pooled vector; 0 for none."""
        if self.addition_embed_type is None:
            return 0
        return self.projection_class_embeddings_input_dim - _SIZES * self.addition_time_embed_dim

    @property
    def size_multiple(self) -> int:
        """Height and width of latents may be any."""
        return 1

    @property
    def largest_size(self) -> None:
        """They may be as large as they like."""
        return None

    def flops(
        self, tally: Tally, images: int, size: tuple[int, int], queries: int, condition_live: bool, remat: str = "none"
    ) -> None:
        """Adds one prediction for latents of this height and width, under conditions of so many tokens.

        Args:
          condition_live: whether gradients go back to the conditions.
          remat: as of `make`.
        """
        unet_flops.count(self, tally, images, size, queries, condition_live, remat)


class _Level(nn.Module):
    """What the blocks of one resolution have in common; `level` counts from the finest."""

    config: UNetConfig
    level: int
    cross_attention: bool = True
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @property
    def layers(self) -> int:
        return self.config.per_block(self.config.layers_per_block)[self.level]

    def layer(self, i: int, x: jax.Array, temb: jax.Array, condition: jax.Array) -> jax.Array:
        """The i-th resnet and, where the block has cross-attention, its transformer."""
        x = self.resnet(i, x, temb)
        return self.transformer(i, x, condition) if self.cross_attention else x

    def rematerialised(self, block: type[nn.Module]) -> type[nn.Module]:
        """The block, keeping its inputs alone for the backward pass where `remat` says so."""
        return block if self.remat == "none" else nn.remat(block)

    def resnet(self, i: int, x: jax.Array, temb: jax.Array) -> jax.Array:
        config = self.config
        channels = config.block_out_channels[self.level]
        resnet = self.rematerialised(ResnetBlock2D)
        return resnet(channels, config.norm_num_groups, config.norm_eps, self.dtype, name=f"resnets_{i}")(x, temb)

    def transformer(self, i: int, x: jax.Array, condition: jax.Array) -> jax.Array:
        config = self.config
        return self.rematerialised(Transformer2DModel)(
            heads=config.heads[self.level],
            layers=config.per_block(config.transformer_layers_per_block)[self.level],
            norm_num_groups=config.norm_num_groups,
            use_linear_projection=config.use_linear_projection,
            dtype=self.dtype,
            lora=config.lora,
            name=f"attentions_{i}",
        )(x, condition)


class DownBlock(_Level):
    """`CrossAttnDownBlock2D` or `DownBlock2D`; all but the coarsest level end by halving the resolution."""

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, condition: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Returns the output and every intermediate that the upward path takes as a skip connection."""
        skips = []
        for i in range(self.layers):
            x = self.layer(i, x, temb, condition)
            skips.append(x)
        if self.level < self.config.levels - 1:
            x = Downsample2D(dtype=self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(_Level):
    """`UNetMidBlock2DCrossAttn`."""

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, condition: jax.Array) -> jax.Array:
        return self.resnet(1, self.layer(0, x, temb, condition), temb)


class UpBlock(_Level):
    """`CrossAttnUpBlock2D` or `UpBlock2D`; all but the finest level end by doubling the resolution."""

    @nn.compact
    def __call__(self, x: jax.Array, skips: list[jax.Array], temb: jax.Array, condition: jax.Array) -> jax.Array:
        """Takes its skip connections from the end of `skips`; upsamples to the size of the one left last."""
        for i in range(self.layers + 1):
            x = self.layer(i, jnp.concatenate([x, skips.pop()], axis=-1), temb, condition)
        if self.level > 0:
            x = Upsample2D(self.dtype, name="upsamplers_0")(x, skips[-1].shape[1:3])
        return x


class UNet(nn.Module):
    """Predicts the noise (or the velocity: the network is the same) in noisy latents, under a condition."""

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, latents: jax.Array, timesteps: jax.Array, given: Condition) -> jax.Array:
        """f[N,h,w,c], i32[N], a condition of f[N,Q,C] -> f32[N,h,w,c'].

        Raises:
          ValueError: if the latents' or the condition's channels are not those of the config, or it has a mask.
        """
        require(given.mask is None, "Stable Diffusion's U-Net attends to all of its condition: it knows no mask")
        config, condition = self.config, given.sequence
        pooled = 0 if given.pooled is None else given.pooled.shape[-1]
        for name, got, want in (
            ("latents", latents.shape[-1], config.in_channels),
            ("condition", condition.shape[-1], config.cross_attention_dim),
            ("pooled vectors", pooled, config.pooled_width),
        ):
            require(got == want, f"the {name} have {got} channels where the U-Net's config says {want}")
        finest = config.block_out_channels[0]
        temb = timestep_embedding(timesteps, finest, config.flip_sin_to_cos, config.freq_shift)
        temb = TimestepEmbedding(4 * finest, name="time_embedding")(temb)
        if config.addition_embed_type:
            temb += TimestepEmbedding(4 * finest, name="add_embedding")(self.added(given))
        condition = shard_images(condition.astype(self.dtype))

        def block(cls: type[_Level], level: int, name: str, kind: str = "CrossAttn") -> _Level:
            return cls(config, level, kind.startswith("CrossAttn"), self.dtype, self.remat, name=name)

        x = Conv(finest, dtype=self.dtype, name="conv_in")(shard_images(latents.astype(self.dtype)))
        skips = [x]
        for level, kind in enumerate(config.down_block_types):
            x, more = block(DownBlock, level, f"down_blocks_{level}", kind)(x, temb, condition)
            skips += more
        x = block(MidBlock, config.levels - 1, "mid_block")(x, temb, condition)
        for i, kind in enumerate(config.up_block_types):
            x = block(UpBlock, config.levels - 1 - i, f"up_blocks_{i}", kind)(x, skips, temb, condition)
        norm = GroupNorm(
            num_groups=config.norm_num_groups, epsilon=config.norm_eps, dtype=self.dtype, name="conv_norm_out"
        )
        return Conv(config.out_channels, dtype=self.dtype, name="conv_out")(nn.silu(norm(x))).astype(jnp.float32)

    def added(self, given: Condition) -> jax.Array:
        """The pooled vectors and the embedded sizes, f32[N,A] (Podell et al., section 2.2)."""
        config, sizes = self.config, given.extra.get(SIZES)
        require(
            sizes is not None and sizes.shape[1:] == (_SIZES,), f"the condition needs {_SIZES} {SIZES} of each picture"
        )
        width = config.addition_time_embed_dim
        waves = timestep_embedding(sizes.reshape(-1), width, config.flip_sin_to_cos, config.freq_shift)
        return jnp.concatenate([given.pooled.astype(jnp.float32), waves.reshape(len(sizes), -1)], axis=-1)
