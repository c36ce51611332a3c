"""The FLOPs of SANA's denoiser (`sana_transformer.py`), counted along its forward pass.

A layer is counted once and taken as often as there are layers. Executed are more than the model's own: adapters' and
whole layers' products that are made again, zeros between heads, and all that the kernels do; a depthwise convolution
is none of the matrix unit's.
"""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dreamllm_jax.layers import linear_attention
from dreamllm_jax.layers.flops import Flops, Tally, convolution, dense
from dreamllm_jax.layers.lora import LORA_A, LORA_B
from dreamllm_jax.layers.spaced_heads import find_spacing

if TYPE_CHECKING:
    from dreamllm_jax.towers.image_decoders.sana_transformer import SanaTransformerConfig


def count(
    config: "SanaTransformerConfig",
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
    clock.product(f"{embedder}/linear_1/kernel", dense(images, config.clock_width, width))
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
    cross_width = math.prod(config.cross_heads)
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
    spacing = find_spacing(config.cross_heads, (images, positions), queries, jnp.bfloat16) if on_tpu else None

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
            if not again and tally.trained(f"{path}/{LORA_B}"):  # see `spaced_heads.Product`
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
    layer.attention(images, positions, queries, cross_width, live, heads=spacing or 0, again=again)
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
