"""The denoiser of Stable Diffusion 3 and 3.5, MMDiT (diffusers' `SD3Transformer2DModel`), Esser et al. 2403.03206.

Image and condition are two streams of tokens, each with its own weights, that meet in one attention. A vector made of
the time and of the pooled condition shifts, scales and gates both. In 3.5 medium the first layers have a second
attention, of the image to itself.

Parameters are named as in diffusers. Legend: N images, h,w,c latent height, width and channels, T image tokens
(patches), Q condition tokens, C condition width, P pooled width, E width.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamllm_jax.layers.attention import attend_packed
from dreamllm_jax.layers.blocks import Conv, Dense, moments, shard_images
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.lora import LoraConfig, chosen
from dreamllm_jax.layers.norms import rms_norm
from dreamllm_jax.layers.positions import line_table
from dreamllm_jax.layers.remat import rematerialised
from dreamllm_jax.layers.timesteps import TimestepEmbedding, timestep_embedding
from dreamllm_jax.layers.weights import LAYERS, weight
from dreamllm_jax.parallel.mesh import platform
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.diffusers_config import read_diffusers_config, require
from dreamllm_jax.towers.image_decoders import mmdit_flops
from dreamllm_jax.towers.public import PublicForm

Array = jax.Array

_EPS = 1e-6
_OURS = ("kind", "lora")


@dataclasses.dataclass(frozen=True)
class MMDiTLora(LoraConfig):
    """Adapters of the denoiser's products (`layers.lora`): of the attentions, where the condition's have `add` in their
    names, and `proj` and `net_2` of both feed-forwards."""

    products: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("proj", "net_2"),
    )
    targets: tuple[str, ...] = products


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """The settings of diffusers' `SD3Transformer2DModel`, all of them, and its adapters (`lora`, None for none).

    `sample_size` is the side of the latents that it was made for, `pos_embed_max_size` the side, in patches, of the
    table of positions, from whose middle each image takes its part.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    lora: MMDiTLora | None = None
    kind: Literal["mmdit"] = "mmdit"
    clock_width: ClassVar[int] = 256  # of the sinusoids that tell the time
    public = PublicForm(
        library="diffusers",
        torch_class="SD3Transformer2DModel",
        folder="transformer",
        settings=(
            *("patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads"),
            *("joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size", "dual_attention_layers", "qk_norm"),
        ),
    )

    def __post_init__(self) -> None:
        optional = ("dual_attention_layers", "qk_norm", *_OURS)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in optional and not (field.name == "out_channels" and value is None):
                require(isinstance(value, int) and value > 0, f"{field.name}={value!r} must be a positive integer")
        require(
            self.caption_projection_dim == self.width,
            f"caption_projection_dim={self.caption_projection_dim} must be num_attention_heads * attention_head_dim = "
            f"{self.width}",
        )
        require(self.width % 4 == 0, f"the width {self.width} must be a multiple of 4, for sines and cosines of 2 axes")
        require(
            self.sample_size % self.patch_size == 0,
            f"sample_size={self.sample_size} must be a multiple of patch_size={self.patch_size}",
        )
        dual = self.dual_attention_layers
        require(
            dual == tuple(range(len(dual))) and len(dual) <= self.num_layers,
            f"dual_attention_layers={dual!r}: only the first so many of the {self.num_layers} layers are implemented",
        )
        require(
            self.qk_norm in (None, "rms_norm"), f"qk_norm={self.qk_norm!r}: only null and 'rms_norm' are implemented"
        )

    @property
    def width(self) -> int:
        """Of the tokens of both streams (E)."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def condition_width(self) -> int:
        """Channels of the condition's sequence (C)."""
        return self.joint_attention_dim

    @property
    def pooled_width(self) -> int:
        """Of the condition's pooled vector (P)."""
        return self.pooled_projection_dim

    @property
    def made_channels(self) -> int:
        """Of the prediction."""
        return self.out_channels or self.in_channels

    @property
    def size_multiple(self) -> int:
        """What the latents' height and width must be multiples of."""
        return self.patch_size

    @property
    def largest_size(self) -> int:
        """Of the latents' height and width: the table of positions goes no further."""
        return self.patch_size * self.pos_embed_max_size

    @property
    def stacks(self) -> tuple[tuple[int, int, bool, bool], ...]:
        """Layers of one kind that follow each other: first, end, whether they have the second attention, whether the
        condition ends there."""
        dual, last = len(self.dual_attention_layers), self.num_layers - 1
        edges = sorted({0, dual, last, self.num_layers})
        return tuple((first, end, first < dual, first == last) for first, end in itertools.pairwise(edges))

    @classmethod
    def from_public(cls, settings: Mapping[str, Any]) -> "MMDiTConfig":
        """Reads the `config.json` of a diffusers `SD3Transformer2DModel`.

        Raises:
          ValueError: naming every setting that is not implemented.
        """
        return read_diffusers_config(cls, settings, {})

    def to_public(self) -> dict[str, Any]:
        """The settings of a `SD3Transformer2DModel`'s config.json."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _OURS}

    def run_public(self, module: Any, latents: Any, timesteps: Any, condition: Condition) -> Any:
        """The prediction as the public class computes it, f[N,c,h,w], f[N] of torch -> f[N,c',h,w]."""
        return module(latents, condition.sequence, condition.pooled, timesteps).sample

    def make(self, dtype: Any, remat: str = "none") -> "MMDiT":
        """The module; see there."""
        return MMDiT(self, dtype=dtype, remat=remat)

    def flops(
        self, tally: Tally, images: int, size: tuple[int, int], queries: int, condition_live: bool, remat: str = "none"
    ) -> None:
        """Adds one prediction for latents of this height and width, under conditions of so many tokens.

        Args:
          condition_live: whether gradients go back to the conditions, sequence and pooled.
          remat: as of `make`.
        """
        mmdit_flops.count(self, tally, images, size, queries, condition_live, remat)


class _Part(nn.Module):
    """What the parts of a layer share."""

    config: MMDiTConfig
    dtype: Any = jnp.float32

    def linear(self, features: int, name: str) -> Dense:
        return Dense(features, dtype=self.dtype, lora=chosen(self.config.lora, name), name=name)


class Modulation(_Part):
    """Vectors for each image that shift, scale and gate its tokens (adaLN, Peebles & Xie 2212.09748).

    What the product gives is widened to float32, so that the sums over all tokens that its gradients are are float32.
    """

    chunks: int = 6

    @nn.compact
    def __call__(self, clock: Array) -> list[Array]:
        """f32[N,E] -> so many f32[N,1,E]."""
        made = self.linear(self.chunks * self.config.width, "linear")(clock).astype(jnp.float32)
        return jnp.split(made[:, None], self.chunks, axis=-1)


# Elementwise steps keep what they are given, in its narrow type, and compute the rest again going backward.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@_recomputed
def _modulated(x: Array, *pairs: tuple[Array, Array]) -> list[Array]:
    """Layer normalisation without weights; for each shift and scale what they make of it, all in the type of `x`."""
    mean, variance = moments(x, (-1,))
    normalised = (x - mean) * jax.lax.rsqrt(variance + _EPS)
    return [(normalised * (1 + scale) + shift).astype(x.dtype) for shift, scale in pairs]


@_recomputed
def _gated(x: Array, gate: Array, change: Array) -> Array:
    """The residual with a change, gated in float32."""
    return (x + gate * change.astype(jnp.float32)).astype(x.dtype)


@_recomputed
def head_norm(x: Array, scale: Array) -> Array:
    """RMS normalisation of each head's channels, f[N,T,E], f[D] -> f[N,T,E]; its statistics are float32.

    A TPU would lay out heads of 64 anew to sum over them. There a product with ones adds up the squares of a head where
    they lie, another gives each channel its head's factor; of float32 both keep 16 bits, twice what bfloat16 has.
    """
    heads, dim = x.shape[-1] // scale.size, scale.size
    if platform() != "tpu" or x.dtype != jnp.bfloat16:
        return rms_norm(x.reshape(*x.shape[:-1], heads, dim), scale, _EPS).reshape(x.shape)
    member = jnp.repeat(jnp.eye(heads, dtype=jnp.float32), dim, axis=0)  # [E, heads]
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGH)
    x32 = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(product(jnp.square(x32), member) / dim + _EPS)
    weights = spread(jnp.tile(scale, heads), x.shape, jnp.float32)
    return (x32 * product(factor, member.T) * weights).astype(x.dtype)


class _Scale(nn.Module):
    """The weight of a norm of a head's channels, and the norm."""

    dim: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """f[N,T,E] -> f[N,T,E]."""
        return head_norm(x, self.param("scale", weight(nn.initializers.ones, "tower_norm"), (self.dim,)))


class JointAttention(_Part):
    """Attention of the image's tokens to themselves and, if there are any, to the condition's, and the other way round.

    Attributes:
      last: the condition's tokens attend to nothing.
    """

    last: bool = False

    def project(self, x: Array, names: tuple[str, str, str], norms: tuple[str, str]) -> tuple[Array, Array, Array]:
        q, k, v = (self.linear(self.config.width, name)(x) for name in names)
        if self.config.qk_norm:
            q, k = (_Scale(self.config.attention_head_dim, name=name)(y) for name, y in zip(norms, (q, k), strict=True))
        return q, k, v

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> tuple[Array, Array | None]:
        """f[N,T,E], f[N,Q,E] -> the same; None for a condition that is not there or ends."""
        width, heads = self.config.width, self.config.num_attention_heads
        q, *pair = self.project(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        keys, values = ((y,) for y in pair)
        if context is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            context_q, k, v = self.project(context, names, ("norm_added_q", "norm_added_k"))
            keys, values = (*keys, k), (*values, v)
        out = self.linear(width, "to_out_0")(attend_packed(q, keys, values, heads))
        if context is None or self.last:
            return out, None
        return out, self.linear(width, "to_add_out")(attend_packed(context_q, keys, values, heads))


class FeedForward(_Part):
    """Four times as wide, and back, around GELU in its approximation by tanh."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.linear(x.shape[-1], "net_2")(_recomputed(nn.gelu)(_Proj(self.config, self.dtype, name="net_0")(x)))


class _Proj(_Part):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.linear(4 * x.shape[-1], "proj")(x)


class Block(_Part):
    """One layer, as the body of a scan.

    Attributes:
      dual: whether the image attends to itself a second time.
      last: whether the condition ends here.
    """

    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], clock: Array) -> tuple[tuple[Array, Array], None]:
        """(f[N,T,E], f[N,Q,E]), f32[N,E] -> the same two."""
        (x, context), part = carry, (self.config, self.dtype)
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = Modulation(
            *part, 9 if self.dual else 6, name="norm1"
        )(clock)
        theirs = Modulation(*part, 2 if self.last else 6, name="norm1_context")(clock)
        pair = theirs[1::-1] if self.last else theirs[:2]
        first, *again = _modulated(x, (shift, scale), *([second[:2]] if self.dual else []))
        change, context_change = JointAttention(*part, self.last, name="attn")(first, *_modulated(context, pair))
        x = _gated(x, gate, change)
        if self.dual:
            x = _gated(x, second[2], JointAttention(*part, name="attn2")(*again)[0])
        x = _gated(x, gate_ff, FeedForward(*part, name="ff")(*_modulated(x, (shift_ff, scale_ff))))
        if not self.last:
            gate, shift_ff, scale_ff, gate_ff = theirs[2:]
            context = _gated(context, gate, context_change)
            change = FeedForward(*part, name="ff_context")(*_modulated(context, (shift_ff, scale_ff)))
            context = _gated(context, gate_ff, change)
        return (shard_images(x), shard_images(context)), None


class Layers(_Part):
    """All layers, scanned kind by kind."""

    remat: str = "none"

    @nn.compact
    def __call__(self, x: Array, context: Array, clock: Array) -> Array:
        carry = (x, context)
        for first, end, dual, last in self.config.stacks:
            stack = nn.scan(
                rematerialised(Block, self.remat),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=end - first,
                metadata_params={nn.PARTITION_NAME: LAYERS},
            )
            carry, _ = stack(self.config, self.dtype, dual, last, name=f"{first}_to_{end}")(carry, clock)
        return carry[0]


class PatchEmbed(_Part):
    """Patches as tokens, plus the middle of a table of sinusoids that is stored with the weights and never learned."""

    @nn.compact
    def __call__(self, latents: Array) -> Array:
        """f[N,h,w,c] -> f[N,T,E]."""
        config, side, patch = self.config, self.config.pos_embed_max_size, self.config.patch_size
        conv = Conv(config.width, (patch, patch), strides=patch, padding=0, dtype=self.dtype, name="proj")
        x = conv(latents.astype(self.dtype))
        _, height, width, _ = x.shape
        table = self.param(
            "pos_embed", weight(self._sinusoids, None, None, "tower_norm", fixed=True), (1, side**2, config.width)
        )
        top, left = (side - height) // 2, (side - width) // 2
        table = jax.lax.stop_gradient(table).reshape(side, side, config.width)
        positions = table[top : top + height, left : left + width].astype(jnp.float32)
        return (x + positions).astype(self.dtype).reshape(x.shape[0], -1, config.width)

    def _sinusoids(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        config, side = self.config, self.config.pos_embed_max_size
        line = jnp.asarray(line_table(side, config.sample_size // config.patch_size, config.width // 2), dtype)
        columns, rows = (jnp.broadcast_to(y, (side, side, line.shape[-1])) for y in (line[None], line[:, None]))
        return jnp.concatenate([columns, rows], axis=-1).reshape(shape)


class Clock(_Part):
    """What modulates every layer: the time and the pooled condition, in float32."""

    @nn.compact
    def __call__(self, timesteps: Array, pooled: Array) -> Array:
        """f32[N], f[N,P] -> f32[N,E]."""
        width = self.config.width
        time = TimestepEmbedding(width, name="timestep_embedder")(
            timestep_embedding(timesteps, MMDiTConfig.clock_width)
        )
        return time + TimestepEmbedding(width, name="text_embedder")(pooled.astype(jnp.float32))


class MMDiT(_Part):
    """Predicts the velocity (noise less data) of noisy latents, under a condition.

    Attributes:
      config: the network's shape.
      dtype: type of the computation; norms' statistics, modulation and softmax are float32 in any case.
      remat: what a layer keeps for the backward pass: "none" (everything), "attention" (what its kernels give) or
        "full" (its input).
    """

    remat: str = "none"

    @nn.compact
    def __call__(self, latents: Array, timesteps: Array, condition: Condition) -> Array:
        """f[N,h,w,c], f32[N] from 0 to 1000, sequence [N,Q,C] and pooled [N,P] -> f32[N,h,w,c'].

        Raises:
          ValueError: the condition has a mask, extras or no pooled vector, something has other channels than the config
            says, or the latents are no multiple of patches or larger than the table of positions.
        """
        config, patch = self.config, self.config.patch_size
        self._check(latents, condition)
        n, height, width, _ = latents.shape
        x = PatchEmbed(config, self.dtype, name="pos_embed")(shard_images(latents))
        clock = nn.silu(Clock(config, self.dtype, name="time_text_embed")(timesteps, shard_images(condition.pooled)))
        context = self.linear(config.width, "context_embedder")(shard_images(condition.sequence))
        x = Layers(config, self.dtype, self.remat, name="transformer_blocks")(shard_images(x), context, clock)
        scale, shift = Modulation(config, self.dtype, 2, name="norm_out")(clock)
        (x,) = _modulated(x, (shift, scale))
        x = self.linear(patch**2 * config.made_channels, "proj_out")(x).astype(jnp.float32)
        x = x.reshape(n, height // patch, width // patch, patch, patch, -1).swapaxes(2, 3)
        return shard_images(x.reshape(n, height, width, -1))

    def _check(self, latents: Array, condition: Condition) -> None:
        config = self.config
        require(condition.mask is None, "the condition has a mask, which an MMDiT cannot use: give it every token")
        require(not condition.extra, f"the condition has {sorted(condition.extra)}, of which an MMDiT knows nothing")
        require(condition.pooled is not None, "an MMDiT needs the condition's pooled vector, and there is none")
        for name, got, want in (
            ("latents", latents.shape[-1], config.in_channels),
            ("condition's tokens", condition.sequence.shape[-1], config.condition_width),
            ("condition's pooled vectors", condition.pooled.shape[-1], config.pooled_width),
        ):
            require(got == want, f"the {name} have {got} channels where the MMDiT's config says {want}")
        patch, most = config.patch_size, config.largest_size
        for name, got in zip(("high", "wide"), latents.shape[1:3], strict=True):
            require(got % patch == 0, f"the latents are {got} {name}, which is no multiple of patch_size={patch}")
            require(got <= most, f"the latents are {got} {name}; pos_embed_max_size allows at most {most}")


_MEDIUM = {
    "kind": "mmdit",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
}
# Of stabilityai's stable-diffusion-3-medium-diffusers and stable-diffusion-3.5-medium.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd3-medium": _MEDIUM | {"pos_embed_max_size": 192},
    "sd35-medium": _MEDIUM
    | {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
}
