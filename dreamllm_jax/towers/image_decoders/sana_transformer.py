"""The denoiser of SANA (diffusers' `SanaTransformer2DModel`; Xie et al., arXiv 2410.10629) and SANA-1.5 (2501.18427).

A transformer over the positions of a deeply compressed latent: linear attention among them, softmax attention to the
caption, and a feed-forward with a depthwise convolution, which is what tells positions apart. Parameters are named as
in diffusers, so that `dreamllm_jax.interop.names` maps its checkpoints.

Legend: N images, h,w,c latent height, width and channels, T positions (h x w over the patch size squared), E width,
H heads, D their width, S caption tokens, C caption channels, I channels inside the feed-forward, P patch size.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from dreamllm_jax.layers import full_attention_tpu, gated_depthwise, linear_attention
from dreamllm_jax.layers.attention import attend
from dreamllm_jax.layers.blocks import EXACT_DENSE, Conv, Dense, shard_images
from dreamllm_jax.layers.flops import Flops, Tally, convolution, dense
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.lora import LORA_A, LORA_B, LoraConfig, adapt, initial_a
from dreamllm_jax.layers.norms import rms_norm
from dreamllm_jax.layers.remat import rematerialised
from dreamllm_jax.layers.timesteps import TimestepEmbedding, timestep_embedding
from dreamllm_jax.layers.weights import LAYERS, normal, weight
from dreamllm_jax.parallel.collectives import on_shards
from dreamllm_jax.parallel.mesh import platform
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.diffusers_config import read_diffusers_config, require
from dreamllm_jax.towers.public import PublicForm

# Settings of a config.json with the only value that is implemented.
_FIXED = {
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
}
_CLOCK_WIDTH = 256  # of the sinusoids that tell the time
_OURS = ("kind", "lora")


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
    qk_norm: str | None = None
    timestep_scale: float = 1.0
    lora: SanaLora | None = None
    kind: Literal["sana_transformer"] = "sana_transformer"
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
        return module(
            latents,
            condition.sequence,
            timesteps * self.timestep_scale,
            encoder_attention_mask=condition.mask,
        ).sample

    def make(self, dtype: Any, remat: str = "none") -> "SanaTransformer":
        """The module; see there."""
        return SanaTransformer(self, dtype=dtype, remat=remat)

    def flops(
        self,
        tally: Tally,
        images: int,
        size: tuple[int, int],
        queries: int,
        condition_live: bool,
        remat: str = "none",
    ) -> None:
        """Adds one prediction for latents of this height and width, under conditions of so many tokens.

        Args:
          condition_live: whether gradients go back to the conditions.
          remat: as of `make`.
        """
        _count(self, tally, images, size, queries, condition_live, remat)


def _count(
    config: SanaTransformerConfig,
    tally: Tally,
    images: int,
    size: tuple[int, int],
    queries: int,
    condition_live: bool,
    remat: str,
) -> None:
    """See `SanaTransformerConfig.flops`."""
    width, inner, patch = config.width, config.inner, config.patch_size
    height, columns = size[0] // patch, size[1] // patch
    positions, layers = height * columns, "transformer_blocks"
    tokens, captions = images * positions, images * queries

    clock = tally.beside()
    embedder = "time_embed/emb/timestep_embedder"
    clock.product(f"{embedder}/linear_1/kernel", dense(images, _CLOCK_WIDTH, width))
    clock.product(f"{embedder}/linear_2/kernel", dense(images, width, width))
    embedded = clock.live
    clock.product("time_embed/linear/kernel", dense(images, width, 6 * width))
    tally.total += clock.total

    caption = tally.beside(condition_live)
    caption.product("caption_projection/linear_1/kernel", dense(captions, config.caption_channels, width))
    caption.product("caption_projection/linear_2/kernel", dense(captions, width, width))
    caption.live |= tally.trained("caption_norm/scale")
    tally.total += caption.total

    patches = dense(tokens, patch**2 * config.in_channels, width)
    tally.product("patch_embed/proj/kernel", patches)

    # The layers are one scan: what is live in one is live in all.
    cross_width = config.num_cross_attention_heads * config.cross_attention_head_dim
    shapes = {  # vectors, width in and out
        **{f"attn1/{name}": (tokens, width, width) for name in ("to_q", "to_k", "to_v", "to_out_0")},
        "attn2/to_q": (tokens, width, cross_width),
        "attn2/to_k": (captions, width, cross_width),
        "attn2/to_v": (captions, width, cross_width),
        "attn2/to_out_0": (tokens, cross_width, width),
        "ff/conv_inverted": (tokens, width, 2 * inner),
        "ff/conv_point": (tokens, inner, width),
    }
    names = [f"{name}/kernel" for name in shapes] + ["scale_shift_table", "ff/conv_depth/kernel"]
    if config.qk_norm:
        names += [f"{attention}/norm_{x}/scale" for attention in ("attn1", "attn2") for x in "qk"]
    adapted = [] if config.lora is None else [name for name in shapes if name.split("/")[1] in config.lora.targets]
    names += [f"{name}/{leaf}" for name in adapted for leaf in (LORA_A, LORA_B)]
    live = tally.live or clock.live or caption.live or any(tally.trained(f"{layers}/{name}") for name in names)

    layer, kernels, on_tpu = tally.beside(live), Flops(), tally.platform == "tpu" and tally.dtype == "bfloat16"
    again = live * (remat != "none")
    spacing = _spacing(config, (images, positions), queries, jnp.bfloat16) if on_tpu else None

    def product(name: str, inputs_live: bool) -> None:
        flops, path = dense(*shapes[name]), f"{layers}/{name}"
        layer.product(f"{path}/kernel", flops, live=inputs_live)
        if spacing and name.startswith("attn2"):
            zeros = flops * (spacing.width / spacing.channels - 1)
            layer.forward += zeros
            layer.total += Flops(products=zeros * (1 + inputs_live + tally.trained(f"{path}/kernel")))
        if name in adapted:
            rows, before, after = shapes[name]
            rank = config.lora.rank
            layer.product(f"{path}/{LORA_A}", dense(rows, before, rank), live=inputs_live)
            inside = inputs_live or tally.trained(f"{path}/{LORA_A}")
            layer.product(f"{path}/{LORA_B}", dense(rows, rank, after), live=inside)
            if not again and tally.trained(f"{path}/{LORA_B}"):  # see `Product`
                layer.recompute(dense(rows, before, rank))

    for name in ("to_q", "to_k", "to_v"):
        product(f"attn1/{name}", live)
    linear = 2 * dense(tokens, config.attention_head_dim, width) + dense(tokens, 1, width)
    like = jax.ShapeDtypeStruct((images, positions, width), jnp.bfloat16)
    if on_tpu and linear_attention.supported(like, config.num_attention_heads):
        forward, backward = linear_attention.kernel_flops(images, positions, width)
        kernels += Flops(linear * (1 + 2 * live), kernels=forward * (1 + again) + backward * live)
    else:
        layer.forward += linear
        layer.total += Flops(linear * (1 + 2 * live), products=linear * (1 + 2 * live))
    product("attn1/to_out_0", live)

    product("attn2/to_q", live)
    for name in ("to_k", "to_v"):
        product(f"attn2/{name}", caption.live)
    layer.live = live
    if spacing:
        one = dense(tokens, queries, 1)
        executed = one * spacing.count * spacing.width * (2 * (1 + again) + 5 * live)
        kernels += Flops(one * cross_width * (2 + 4 * live), kernels=executed)
    else:
        layer.attention(images, positions, queries, cross_width, live)
    product("attn2/to_out_0", live)

    product("ff/conv_inverted", live)
    depth = convolution(images, (height, columns), 1, 2 * inner)
    layer.total += Flops(model=depth * (1 + live + tally.trained(f"{layers}/ff/conv_depth/kernel")))
    inside = layer.forward
    product("ff/conv_point", live)
    if again:  # what the last product gives is needed for the gradient of its gate alone
        gated = clock.live or tally.trained(f"{layers}/scale_shift_table")
        layer.recompute(layer.forward if gated else inside)
    tally.total += (layer.total + kernels) * config.num_layers
    tally.forward += layer.forward * config.num_layers
    tally.live = live or embedded or tally.trained("scale_shift_table")
    tally.product("proj_out/kernel", dense(tokens, width, patch**2 * config.outputs))


def position_table(size: tuple[int, int], base: int, interpolation_scale: float, width: int) -> np.ndarray:
    """Sinusoids of columns and, after them, of rows, f32[T, width] (diffusers' `get_2d_sincos_pos_embed`).

    Args:
      size: rows and columns of patches.
      base: how many there are on a side in images of the size that the model was made for.
    """

    def waves(length: int) -> np.ndarray:
        places = np.arange(length, dtype=np.float32) / np.float32(length / base) / np.float32(interpolation_scale)
        angles = np.outer(places, 10_000.0 ** (-np.arange(width // 4) / (width / 4)))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows, columns = map(waves, size)
    both = np.broadcast_arrays(columns[None], rows[:, None])
    return np.concatenate(both, axis=-1).reshape(-1, width).astype(np.float32)


def _channels_together(x: jax.Array) -> jax.Array:
    """Lays the channels side by side in memory, as the kernels read them, and those of the gradient too. XLA would
    rather have positions there, of which there are multiples of a register's lanes, and copy at every kernel."""
    if platform() != "tpu":
        return x
    together = functools.partial(with_layout_constraint, layouts=Layout(tuple(range(x.ndim))))
    return on_shards(together, [("images", None, None)], x)  # by itself the partitioner would gather it


class Spacing(NamedTuple):
    """So many heads of so many channels, each with zeros after them up to a width that a kernel takes."""

    count: int
    channels: int
    width: int


def _spaced(x: jax.Array, axis: int, heads: Spacing | None) -> jax.Array:
    """Zeros after the channels of every head, along an axis of a weight."""
    if heads is None:
        return x
    x = jnp.moveaxis(x, axis, -1)
    split = x.reshape(*x.shape[:-1], heads.count, -1)
    split = jnp.pad(split, [(0, 0)] * (x.ndim) + [(0, heads.width - split.shape[-1])])
    # Behind a barrier, for a product of heads would be copied where one of plain channels is not.
    return jax.lax.optimization_barrier(jnp.moveaxis(split.reshape(*x.shape[:-1], -1), -1, axis))


def cross_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, heads: int) -> jax.Array:
    """Softmax attention to a caption. One of which no token counts is seen whole, as adding -10000 to all has it.

    Args:
      q: f[N,T,H*D].
      k, v: f[N,S,H*D].
      mask: bool[N,S], None for all.

    Returns:
      f[N,T,H*D] in the type of `q`.
    """
    segments = {}
    if mask is not None:
        seen = mask | ~mask.any(axis=-1, keepdims=True)
        segments = {"q_segments": jnp.ones(q.shape[:2], jnp.int32), "k_segments": seen.astype(jnp.int32)}
    split = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    return attend(*split, causal=False, **segments).reshape(q.shape)


def spaced_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, heads: Spacing, interpret: bool = False
) -> jax.Array:
    """The same by `full_attention`, of heads with zeros after each. A mask is a further channel of queries and keys,
    which takes 10000 from the scores, as diffusers does."""
    scale = heads.channels**-0.5
    if mask is not None:
        lane = jnp.zeros((heads.count, heads.width), q.dtype).at[:, heads.channels].set(1).reshape(-1)
        away = jnp.where(mask, 0, -1e4 / scale).astype(k.dtype)
        q, k = q + lane, k + away[..., None] * lane
    return full_attention_tpu.full_attention(q, k, v, heads.count, interpret, scale)


def _spacing(
    config: SanaTransformerConfig, queries: tuple[int, int], keys: int, dtype: Any, masked: bool = False
) -> Spacing | None:
    """How the heads of the attention of [N, T] queries to so many keys are spaced for its kernel; None if it does not
    take them, or no channel is left for a mask."""
    dim, count = config.cross_attention_head_dim, config.num_cross_attention_heads
    width = next((width for width in (64, 128) if width >= dim + masked), None)
    if dtype != jnp.bfloat16 or width is None:
        return None
    q, k = (jax.ShapeDtypeStruct((queries[0], n, count * width), dtype) for n in (queries[1], keys))
    return Spacing(count, dim, width) if full_attention_tpu.supported(q, k, count) else None


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3,))
def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Layer normalisation without weights, scaled by 1 + `scale` and shifted, in float32.

    Args:
      x: f[N,T,E].
      shift, scale: f32[N,E].
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + eps) * (1 + scale[:, None]) + shift[:, None]
    return y.astype(x.dtype)


_KERNEL = nn.initializers.lecun_normal()
_ONES = weight(nn.initializers.ones, "tower_norm")
_ZEROS = weight(nn.initializers.zeros, "tower_norm")


class Product(nn.Module):
    """A linear layer, perhaps adapted.

    Attributes:
      convolution: the kernel is stored as that of a 1x1 convolution.
      parts: the outputs come in so many equal parts: made apart, neither they nor their gradients are copied.
      bias_apart: the bias is not added, but given after the parts.
      before: what is multiplied, made of what is given.
      inputs, outputs: they are heads with zeros after each, of which the kernel knows nothing.
    """

    features: int
    use_bias: bool = True
    convolution: bool = False
    parts: int = 1
    bias_apart: bool = False
    before: Callable[..., jax.Array] = lambda x: x
    inputs: Spacing | None = None
    outputs: Spacing | None = None
    lora: LoraConfig | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, *given: jax.Array) -> list[jax.Array]:
        """f[...,i] -> f[...,features / parts] of every part."""
        width = jax.eval_shape(self.before, *given).shape[-1]
        width = width if self.inputs is None else self.inputs.count * self.inputs.channels
        shape, axes = (width, self.features), ("tower_in", "tower_out")
        if self.convolution:
            kernel = self.param("kernel", weight(_KERNEL, None, None, *axes), (1, 1, *shape))
        else:
            kernel = self.param("kernel", weight(_KERNEL, *axes), shape)
        adapters = []
        if self.lora is not None:
            a = self.param(LORA_A, weight(initial_a, "tower_in", "lora"), (shape[0], self.lora.rank))
            b = self.param(LORA_B, weight(nn.initializers.zeros, "lora", "tower_out"), (self.lora.rank, shape[1]))
            adapters = [a, b]

        def multiply(given: tuple[jax.Array, ...], kernel: jax.Array, adapters: list[jax.Array]) -> list[jax.Array]:
            x = self.before(*given)
            kernel = _spaced(kernel.reshape(shape).astype(self.dtype), 0, self.inputs)
            outputs = [x @ part for part in self._parts(kernel)]
            if adapters:
                a, b = (x.astype(self.dtype) for x in adapters)
                a, parts = _spaced(a, 0, self.inputs), self._parts(b)
                outputs = [y + adapt(x, a, part, self.lora.scale) for y, part in zip(outputs, parts, strict=True)]
            return outputs

        # What is made of the kernel, and before it, is made again: a scan would keep it for every layer.
        outputs = jax.checkpoint(multiply, prevent_cse=False)(given, kernel, adapters)
        outputs = list(map(_channels_together, outputs))
        bias = self.param("bias", _ZEROS, shape[1:]) if self.use_bias else None
        if self.use_bias and not self.bias_apart:
            biases = self._parts(bias)
            outputs = [y + spread(bias, y.shape, y.dtype) for y, bias in zip(outputs, biases, strict=True)]
        return [*outputs, bias] if self.bias_apart else outputs

    def _parts(self, x: jax.Array) -> list[jax.Array]:
        return jnp.split(_spaced(x, x.ndim - 1, self.outputs), self.parts, axis=-1)


class _Part(nn.Module):
    """What the parts of a layer share."""

    config: SanaTransformerConfig
    dtype: Any = jnp.float32

    def product(
        self, given: jax.Array | tuple[jax.Array, ...], name: str, features: int, **settings: Any
    ) -> list[jax.Array]:
        """The parts (`Product`) of what the product of this name makes of what is given."""
        given = given if isinstance(given, tuple) else (given,)
        lora = self.config.lora
        lora = lora if lora is not None and name in lora.targets else None
        return Product(features, lora=lora, dtype=self.dtype, name=name, **settings)(*given)

    def normalise(self, name: str, x: jax.Array, heads: Spacing | None = None) -> jax.Array:
        """Queries or keys, where the config asks for it."""
        return x if self.config.qk_norm is None else RMSNorm(heads, name=name)(x)


class RMSNorm(nn.Module):
    """Root mean square normalisation of the last axis, with a scale; `heads` as of a product's outputs."""

    heads: Spacing | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, eps = x.shape[-1], 1e-5
        share = 1.0 if self.heads is None else self.heads.channels / self.heads.width  # of channels that are there
        scale = self.param("scale", _ONES, (round(width * share),))

        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            # The mean of squares over all channels is `share` times that over those that are there.
            return rms_norm(x, _spaced(scale * share**0.5, 0, self.heads), eps * share)

        return jax.checkpoint(norm, prevent_cse=False)(x, scale)


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
        inner = config.num_cross_attention_heads * config.cross_attention_head_dim
        spacing = None
        if platform() == "tpu":
            spacing = _spacing(config, x.shape[:2], caption.shape[1], self.dtype, mask is not None)
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
        return gated_depthwise.stack_taps(bias, kernel, self.param("bias", _ZEROS, bias.shape))


def _gated(gate: Callable[..., jax.Array], size: tuple[int, int], *given: jax.Array) -> jax.Array:
    return gate(*given, size)


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
            before=functools.partial(_gated, gate, size),
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

        h = _channels_together(modulated_norm(x, shift1, scale1, config.norm_eps))
        x = x + gated(gate1, LinearAttention(*part, name="attn1")(h))
        x = x + CrossAttention(*part, name="attn2")(x, caption.astype(self.dtype), mask)
        h = _channels_together(modulated_norm(x, shift2, scale2, config.norm_eps))
        h = GLUMBConv(*part, name="ff")(h, self.size)
        return _channels_together(shard_images(x + gated(gate2, h))), None


def _table(width: int) -> nn.initializers.Initializer:
    return weight(normal(width**-0.5), None, "tower_norm")


class _Clock(nn.Module):
    """`emb` of `AdaLayerNormSingle`."""

    width: int

    @nn.compact
    def __call__(self, timesteps: jax.Array) -> jax.Array:
        waves = timestep_embedding(timesteps, _CLOCK_WIDTH)
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
        return (x + position_table(size, base, config.interpolation_scale, config.width)).astype(self.dtype)


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
