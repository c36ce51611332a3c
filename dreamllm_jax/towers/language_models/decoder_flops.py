"""The FLOPs of a language model's layers (`decoder.py`), counted along their forward pass."""

from typing import TYPE_CHECKING

from dreamllm_jax.layers import splash
from dreamllm_jax.layers.flops import Flops, Tally, dense
from dreamllm_jax.layers.lora import LORA_A, LORA_B
from dreamllm_jax.layers.remat import kept_by

if TYPE_CHECKING:
    from dreamllm_jax.towers.language_models.decoder import DecoderConfig


def _splash_share(length: int, head_dim: int, window: int) -> float:
    """What the causal kernel computes of all scores: tiles that are not wholly masked, and padding."""
    tiles, block = splash.tiles_of(length)
    seen = sum(i + 1 - max(0, (i * block - window + 1) // block if window else 0) for i in range(tiles))
    padding = (tiles * block / length) ** 2 * splash.padded(head_dim) / head_dim
    return padding * seen / tiles**2


def _layer_shapes(config: "DecoderConfig") -> dict[str, tuple[int, int]]:
    """Widths in and out of a layer's products."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "self_attn/q_proj": (width, queries),
        "self_attn/k_proj": (width, keys),
        "self_attn/v_proj": (width, keys),
        "self_attn/o_proj": (queries, width),
        "mlp/gate_proj": (width, inner),
        "mlp/up_proj": (width, inner),
        "mlp/down_proj": (inner, width),
    }


def count(config: "DecoderConfig", tally: Tally, rows: int, length: int, remat: str, reached: bool) -> None:
    """See `DecoderConfig.flops`."""
    tokens, dim, kinds = rows * length, config.head_dim, len(config.pattern)
    query_width, key_width = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes = _layer_shapes(config)
    products = {f"{name}/kernel": dense(tokens, *shape) for name, shape in shapes.items()}
    if config.lora is not None:
        for name, (inputs, outputs) in shapes.items():
            if name.split("/")[1] in config.lora.targets:
                products[f"{name}/{LORA_A}"] = dense(tokens, inputs, config.lora.rank)
                products[f"{name}/{LORA_B}"] = dense(tokens, config.lora.rank, outputs)
    paths = ["layers"] if kinds == 1 else [f"layers/{kind}_of_{kinds}" for kind in range(kinds)]
    # The layers are one scan: what is live in one is live in all.
    names = [*products, "input_layernorm/scale", "post_attention_layernorm/scale"]
    names += ["self_attn/q_norm/scale", "self_attn/k_norm/scale"] if config.qk_norm else []
    tally.live |= any(tally.trained(f"{path}/{name}") for path in paths for name in names)
    rotation = dense(tokens, dim, query_width + key_width)  # halves swapped by a permutation matrix
    scores, kept = 2.0 * rows * length**2 * query_width, kept_by(remat)
    has_kernel = tally.platform == "tpu" and splash.supports(length, length)
    for path, kind in zip(paths, config.pattern, strict=True):
        layer = tally.beside(tally.live and reached)
        layer.trained = tally.trained if reached else lambda _: False
        for name, flops in products.items():
            layer.product(f"{path}/{name}", flops)
        layer.total += Flops(products=rotation * (1 + layer.live))
        share = _splash_share(length, dim, kind.window)
        if has_kernel:
            layer.causal_kernel(rows, length, query_width, share)
        else:
            layer.attention(rows, length, length, query_width, layer.live, causal=True)
        if remat != "none":
            if "attention" not in kept:
                layer.recompute(sum(flops for name, flops in products.items() if name.startswith("self_attn")))
                layer.recompute(rotation)
                if has_kernel:
                    layer.total += Flops(kernels=share * 2 * scores * layer.live)
                else:
                    layer.recompute(2 * scores)
            elif not has_kernel:  # its queries, keys and values are kept, its output is not
                layer.recompute(scores * (1 + layer.trained(f"{path}/self_attn/o_proj/kernel")))
            for part in ("gate", "up"):
                if part not in kept:
                    again = (flops for name, flops in products.items() if name.startswith(f"mlp/{part}_proj"))
                    layer.recompute(sum(again))
        tally.total += layer.total * (config.num_hidden_layers // kinds)
    tally.live |= tally.trained("norm/scale")
