"""Connectors that are transformers: layers over the hidden states at the dream queries, each of which sees all others.

Published programs differ in settings alone: OpenUni (arXiv 2505.23661), MetaQuery (arXiv 2504.06256) and UniLIP (arXiv
2507.23278), whose layers see the prompt's hidden states too. Parameters are named as in their state dicts, where that
is one rule: `layers.0.self_attn.q_proj`, and projections as torch counts a Sequential.

Legend: N images, Q queries, P tokens of the prompt, T all tokens, E language model's width, W width of the layers,
H heads, K key heads, D head dimension, C channels of the condition.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dreamllm_jax.layers import linear
from dreamllm_jax.layers.blocks import LayerNorm
from dreamllm_jax.layers.flops import Flops, Tally, dense
from dreamllm_jax.layers.norms import rms_norm
from dreamllm_jax.layers.remat import rematerialised
from dreamllm_jax.layers.rope import apply_rope, rope_frequencies
from dreamllm_jax.layers.spaced_heads import find_spacing, self_attention
from dreamllm_jax.layers.weights import LAYERS, normal, weight
from dreamllm_jax.parallel.collectives import gather_weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.condition import Condition, Hidden

_GLOROT = nn.initializers.glorot_uniform()
_OUTPUT_EPS = 1e-5  # of the norm at the end


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Layers over the hidden states, and linear layers around them.

    Attributes:
      layer: "siglip" (LayerNorms, no positions, biases everywhere, a feed-forward of two layers around tanh-GELU) or
        "qwen2" (RMSNorms, rotary positions, biases of queries, keys and values, a gated feed-forward).
      hidden_size: width of the layers (W), to which a linear layer then leads; None for the hidden states' own.
      intermediate_size: of the feed-forward; None for four times the layers' width.
      head_dim: channels of a head; the width says how many heads there are.
      num_key_value_heads: None for as many as query heads.
      norm_eps: of the layers' norms.
      rope_theta: base of the rotations, "qwen2" alone.
      qk_norm: after they are rotated, queries and keys are put to unit length and scaled, each head and channel by its
        own number; "qwen2" alone.
      final_norm: a norm after the last layer.
      depth: linear layers behind, with tanh-GELU between; 0 for layers that are as wide as the condition.
      output_scale: what the scale of an RMSNorm at the end begins with; None for no norm.
      initializer_range: standard deviation of what the kernels begin with; None for Glorot's uniform distribution.
      prompt_tokens: how many of the prompt's hidden states come before the queries'.
      sees: whether, where these are of an image, what the language model was given of it stands in their place.
      copied: where a model is put together of public towers, the layers and the norm after them begin as the language
        model's last ones, which must be alike; "qwen2" alone.
    """

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    kind: Literal["transformer"] = "transformer"
    layer: Literal["siglip", "qwen2"] = "qwen2"
    num_hidden_layers: int = 6
    hidden_size: int | None = None
    intermediate_size: int | None = None
    head_dim: int = 64
    num_key_value_heads: int | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qk_norm: bool = False
    final_norm: bool = False
    depth: int = 1
    output_scale: float | None = None
    initializer_range: float | None = None
    prompt_tokens: int = 0
    sees: bool = False
    copied: bool = False

    def __post_init__(self):
        if self.layer not in ("siglip", "qwen2"):
            raise ValueError(f"layer must be siglip or qwen2, got {self.layer!r}")
        for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "head_dim", "num_key_value_heads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("depth", "prompt_tokens", "initializer_range"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.layer == "siglip" and (self.qk_norm or self.num_key_value_heads):
            raise ValueError("qk_norm and num_key_value_heads are of layer='qwen2'")
        if self.layer == "qwen2" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs")
        if self.copied and (self.layer == "siglip" or self.qk_norm or self.hidden_size):
            raise ValueError(
                "copied=true needs layers as a language model has them: layer='qwen2', no qk_norm, no hidden_size"
            )
        if self.sees and not self.prompt_tokens:
            raise ValueError("sees=true needs prompt_tokens, for it is the prompt's images that are seen")
        if self.hidden_size:
            self.heads(self.hidden_size)

    def require_tokens(self, tokens: int) -> None:
        """Nothing: any number will do."""

    def condition_tokens(self, tokens: int) -> int:
        """Of the condition of so many queries."""
        return self.prompt_tokens + tokens

    def heads(self, width: int) -> tuple[int, int]:
        """Heads and key heads (H, K) of layers of this width.

        Raises:
          ValueError: the width cannot be divided so.
        """
        heads, rest = divmod(width, self.head_dim)
        if rest:
            raise ValueError(f"connector: {width} channels are no multiple of head_dim {self.head_dim}")
        keys = self.num_key_value_heads or heads
        if heads % keys:
            raise ValueError(f"connector: its {heads} heads are no multiple of num_key_value_heads {keys}")
        return heads, keys

    @property
    def projections(self) -> list[str]:
        """Names of the linear layers behind, numbered as torch counts a Sequential if there are several modules."""
        if self.depth == 1 and self.output_scale is None:
            return ["projector"]
        return [f"projector_{2 * i}" for i in range(self.depth)]

    def make_connector(
        self, features: int, pooled: int, dtype: jnp.dtype, remat: str, **names: str
    ) -> "TransformerConnector":
        """The connector, to a condition of this width and a pooled vector of that, 0 for none."""
        return TransformerConnector(self, dtype, features, pooled, remat, **names)

    def products(self, width: int) -> dict[str, tuple[int, int]]:
        """Widths in and out of a layer's products, by name; the last one is the last that is computed."""
        heads, keys = (count * self.head_dim for count in self.heads(width))
        inner, siglip = self.intermediate_size or 4 * width, self.layer == "siglip"
        attention = {"q_proj": (width, heads), "k_proj": (width, keys), "v_proj": (width, keys)}
        attention["out_proj" if siglip else "o_proj"] = (heads, width)
        up = ("fc1",) if siglip else ("gate_proj", "up_proj")
        feed_forward = dict.fromkeys(up, (width, inner)) | {"fc2" if siglip else "down_proj": (inner, width)}
        return {f"self_attn/{name}": shape for name, shape in attention.items()} | {
            f"mlp/{name}": shape for name, shape in feed_forward.items()
        }

    def flops(
        self, tally: Tally, images: int, tokens: int, inputs: int, outputs: int, pooled: int = 0, remat: bool = False
    ) -> None:
        """Adds the products of `images` of so many queries."""
        width, length = self.hidden_size or inputs, self.condition_tokens(tokens)
        vectors = images * length
        if self.hidden_size:
            tally.product("input_projector/kernel", dense(vectors, inputs, width))
        products = self.products(width)
        # The layers are one scan: what is live in one is live in all.
        tally.live |= any(tally.trained(f"layers/{name}/kernel") for name in products)
        layer, heads = tally.beside(tally.live), self.heads(width)[0]
        shape = (heads, self.head_dim), (images, length), length
        spacing = find_spacing(*shape, jnp.bfloat16, self.prompt_tokens > 0)
        for name in products:
            if name == "self_attn/" + ("out_proj" if self.layer == "siglip" else "o_proj"):
                if self.layer == "qwen2":  # halves swapped by a permutation matrix
                    turned = sum(self.heads(width)) * self.head_dim
                    rotation = dense(vectors, self.head_dim, turned)
                    layer.forward += rotation
                    layer.total += Flops(products=rotation * (1 + layer.live))
                flat = heads * self.head_dim
                layer.attention(images, length, length, flat, layer.live, heads=spacing or 0, again=remat)
            before = layer.forward
            layer.product(f"layers/{name}/kernel", dense(vectors, *products[name]))
        if remat:
            layer.recompute(before)
        tally.total += layer.total * self.num_hidden_layers
        tally.live |= self.final_norm and tally.trained("norm/scale")
        if pooled:
            beside = tally.beside(tally.live)
            beside.product("pooled_projector/kernel", dense(images, width, pooled))
            tally.total += beside.total
        for i, name in enumerate(self.projections):
            tally.product(f"{name}/kernel", dense(vectors, outputs if i else width, outputs))


def _gathered(inputs: Array, kernel: Array, bias: Array | None, *, dtype: Any) -> tuple[Array, Array, Array | None]:
    inputs, kernel, bias = linear.Dense.promote_dtype(inputs, kernel, bias, dtype=dtype)
    return inputs, gather_weight(kernel, ("tower_in", "tower_out")), bias


class _Dense(linear.Dense):
    """A linear layer whose kernel is gathered where it is used, for every chip has images of its own."""

    promote_dtype: Any = staticmethod(_gathered)
    bias_init: nn.initializers.Initializer = weight(nn.initializers.zeros, "tower_norm")


class _RMSNorm(nn.Module):
    eps: float
    initial: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = weight(nn.initializers.constant(self.initial), "tower_norm")
        return rms_norm(x, self.param("scale", init, x.shape[-1:]), self.eps)


class _HeadNorm(nn.Module):
    """Each head to length sqrt(D), then scaled by its own numbers; those lie as MetaQuery stores them, f[H, 1, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "N T H D"]) -> Float[Array, "N T H D"]:
        gamma = self.param("gamma", weight(nn.initializers.ones, None, None, "tower_norm"), (x.shape[2], 1, x.shape[3]))
        wide = x.astype(jnp.float32)
        # 1 / max(|x|, 1e-12), with a gradient at 0 too.
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(wide), axis=-1, keepdims=True), 1e-24))
        return (wide * inverse * gamma[:, 0].astype(jnp.float32) * math.sqrt(x.shape[-1])).astype(x.dtype)


class _Part(nn.Module):
    config: TransformerConfig
    dtype: Any

    def linear(self, features: int, name: str, use_bias: bool) -> _Dense:
        std = self.config.initializer_range
        init = weight(_GLOROT if std is None else normal(std), "tower_in", "tower_out")
        return _Dense(features, use_bias=use_bias, dtype=self.dtype, kernel_init=init, name=name)

    def norm(self, name: str) -> nn.Module:
        if self.config.layer == "siglip":
            return LayerNorm(self.config.norm_eps, self.dtype, name=name)
        return _RMSNorm(self.config.norm_eps, name=name)


class Attention(_Part):
    """Every token sees every token that is there."""

    @nn.compact
    def __call__(self, x: Array, rotations: tuple[Array, Array] | None, mask: Array | None) -> Array:
        config, width = self.config, x.shape[-1]
        heads, keys = config.heads(width)

        def project(name: str, count: int) -> Array:
            return self.linear(count * config.head_dim, name, True)(x).reshape(*x.shape[:2], count, config.head_dim)

        q, k, v = project("q_proj", heads), project("k_proj", keys), project("v_proj", keys)
        if rotations is not None:
            q, k = apply_rope(q, *rotations), apply_rope(k, *rotations)
        if config.qk_norm:
            q, k = _HeadNorm(name="q_norm")(q), _HeadNorm(name="k_norm")(k)
        out = self_attention(q, k, v, mask).reshape(*x.shape[:2], -1)
        siglip = config.layer == "siglip"
        return self.linear(width, "out_proj" if siglip else "o_proj", siglip)(out)


class MLP(_Part):
    """The feed-forward of either kind of layer."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        inner = self.config.intermediate_size or 4 * width
        if self.config.layer == "siglip":
            return self.linear(width, "fc2", True)(nn.gelu(self.linear(inner, "fc1", True)(x), approximate=True))
        gate, up = (self.linear(inner, name, False)(x) for name in ("gate_proj", "up_proj"))
        return self.linear(width, "down_proj", False)(nn.silu(gate) * up)


class Layer(_Part):
    """One pre-norm layer, as the body of a scan."""

    @nn.compact
    def __call__(self, x: Array, rotations: Any, mask: Array | None) -> tuple[Array, None]:
        siglip, part = self.config.layer == "siglip", (self.config, self.dtype)
        first, second = ("layer_norm1", "layer_norm2") if siglip else ("input_layernorm", "post_attention_layernorm")
        x = x + Attention(*part, name="self_attn")(self.norm(first)(x), rotations, mask)
        x = x + MLP(*part, name="mlp")(self.norm(second)(x))
        return constrain(x, ("images", None, None)), None


class TransformerConnector(_Part):
    """The condition is what the layers give of the queries, after what they give of the prompt's tokens if they see it.

    Rotary positions count from the first token: attention knows their differences alone, which are the document's.
    A pooled vector is a projection of the mean over the queries.

    Raises:
      ValueError: widths that do not fit each other.
    """

    features: int
    pooled: int = 0
    remat: str = "full"

    @nn.compact
    def __call__(self, hidden: Float[Array, "N Q E"] | Hidden) -> Condition:
        config, mask, x, pooled = self.config, None, hidden, None
        if isinstance(hidden, Hidden):
            x = jnp.concatenate([hidden.prompt, hidden.queries], axis=1)
            mask = jnp.concatenate([hidden.mask, jnp.ones(hidden.queries.shape[:2], bool)], axis=1)
        x = x.astype(self.dtype)
        if config.hidden_size:
            x = self.linear(config.hidden_size, "input_projector", True)(x)
        if not config.depth and x.shape[-1] != self.features:
            raise ValueError(
                f"connector: its layers have {x.shape[-1]} channels, the image decoder's condition {self.features}: "
                "with depth=0, hidden_size must be that"
            )
        x = self._layers(x, mask)
        x = self.norm("norm")(x) if config.final_norm else x
        if self.pooled:
            mean = jnp.mean(x[:, config.prompt_tokens :].astype(jnp.float32), axis=1)
            pooled = self.linear(self.pooled, "pooled_projector", True)(mean)
        for i, name in enumerate(config.projections):
            x = self.linear(self.features, name, True)(nn.gelu(x, approximate=True) if i else x)
        if config.output_scale is not None:
            x = _RMSNorm(_OUTPUT_EPS, config.output_scale, name=f"projector_{max(2 * config.depth - 1, 0)}")(x)
        if mask is not None:  # nothing depends on what is not there
            x = jnp.where(mask[..., None], x, 0)
        return Condition(x, mask, pooled)

    def _layers(self, x: Float[Array, "N T W"], mask: Bool[Array, "N T"] | None) -> Float[Array, "N T W"]:
        config, rotations = self.config, None
        config.heads(x.shape[-1])
        if config.layer == "qwen2":
            frequencies = rope_frequencies(config.head_dim, config.rope_theta, None, x.shape[1], x.shape[1])
            angles = (np.arange(x.shape[1], dtype=np.float32)[:, None] * frequencies)[None]
            rotations = jnp.cos(angles), jnp.sin(angles)
        layers = nn.scan(
            rematerialised(Layer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        return layers(config, self.dtype, name="layers")(x, rotations, mask)[0]


_UNILIP = {
    "kind": "transformer",
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "final_norm": True,
    "prompt_tokens": 512,
    "sees": True,
    "copied": True,
}
# UniLIP's layers are those of the language models of InternVL3-1B and -2B.
TransformerConfig.PUBLISHED = {
    "openuni-b": {"kind": "transformer", "layer": "siglip", "intermediate_size": 3072},
    "openuni-l": {"kind": "transformer", "layer": "siglip", "intermediate_size": 8960},
    "metaquery": {
        "kind": "transformer",
        "num_hidden_layers": 24,
        "qk_norm": True,
        "depth": 2,
        "output_scale": math.sqrt(5.5),
        "initializer_range": 0.014,
    },
    "unilip-1b": {**_UNILIP, "intermediate_size": 4864},
    "unilip-2b": {**_UNILIP, "intermediate_size": 8960, "head_dim": 128},
}
