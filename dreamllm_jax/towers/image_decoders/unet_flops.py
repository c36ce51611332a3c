"""The FLOPs of Stable Diffusion's U-Net (`unet.py`), counted along its forward pass."""

import math
from typing import TYPE_CHECKING

from dreamllm_jax.layers.blocks import count_resnet, count_self_attention
from dreamllm_jax.layers.flops import Tally, convolution, dense

if TYPE_CHECKING:
    from dreamllm_jax.towers.image_decoders.unet import UNetConfig


def count(
    config: "UNetConfig",
    tally: Tally,
    images: int,
    size: tuple[int, int],
    queries: int,
    condition_live: bool,
    remat: str,
) -> None:
    """See `UNetConfig.flops`."""
    widths = config.block_out_channels
    layers = config.per_block(config.layers_per_block)
    depths = config.per_block(config.transformer_layers_per_block)

    clock = tally.beside()
    clock.product("time_embedding/linear_1/kernel", dense(images, widths[0], 4 * widths[0]))
    clock.product("time_embedding/linear_2/kernel", dense(images, 4 * widths[0], 4 * widths[0]))
    tally.total += clock.total
    live = clock.live
    if config.addition_embed_type:
        added = tally.beside(condition_live)
        inputs = config.projection_class_embeddings_input_dim
        added.product("add_embedding/linear_1/kernel", dense(images, inputs, 4 * widths[0]))
        added.product("add_embedding/linear_2/kernel", dense(images, 4 * widths[0], 4 * widths[0]))
        tally.total += added.total
        live |= added.live
    time = (4 * widths[0], live)

    def resnet(name: str, inputs: int, outputs: int) -> None:
        count_resnet(tally, name, images, size, inputs, outputs, time)
        if remat != "none":  # what comes after the first convolution is not needed again
            tally.recompute(convolution(images, size, inputs, outputs))

    def transformer(name: str, level: int) -> None:
        width, tokens, before = widths[level], images * math.prod(size), tally.forward
        heads, again = config.heads[level], remat != "none"
        tally.product(f"{name}/proj_in/kernel", dense(tokens, width, width))
        for i in range(depths[level]):
            block = f"{name}/transformer_blocks_{i}"
            attend = images, math.prod(size), width, heads
            count_self_attention(tally, f"{block}/attn1", *attend, config.lora, again)
            tally.linear(f"{block}/attn2/to_q", tokens, width, width, config.lora)
            context = tally.beside(condition_live)
            for projection in ("to_k", "to_v"):
                shape = images * queries, config.cross_attention_dim, width
                context.linear(f"{block}/attn2/{projection}", *shape, config.lora, live=condition_live)
            before -= context.forward
            tally.total += context.total
            tally.attention(images, math.prod(size), queries, width, context.live, heads=heads, again=again)
            tally.linear(f"{block}/attn2/to_out_0", tokens, width, width, config.lora)
            tally.linear(f"{block}/ff/net_0/proj", tokens, width, 8 * width, config.lora)
            tally.linear(f"{block}/ff/net_2", tokens, 4 * width, width, config.lora)
        if again:
            tally.recompute(tally.forward - before)
        tally.product(f"{name}/proj_out/kernel", dense(tokens, width, width))

    tally.product("conv_in/kernel", convolution(images, size, config.in_channels, widths[0]))
    width, skips = widths[0], [widths[0]]
    for level, kind in enumerate(config.down_block_types):
        for i in range(layers[level]):
            resnet(f"down_blocks_{level}/resnets_{i}", width, widths[level])
            width = widths[level]
            if kind.startswith("CrossAttn"):
                transformer(f"down_blocks_{level}/attentions_{i}", level)
            skips.append(width)
        if level < config.levels - 1:
            halved = convolution(images, size, width, width, stride=2)
            tally.product(f"down_blocks_{level}/downsamplers_0/conv/kernel", halved)
            size = size[0] // 2, size[1] // 2  # exactly, in training
            skips.append(width)

    resnet("mid_block/resnets_0", width, width)
    transformer("mid_block/attentions_0", config.levels - 1)
    resnet("mid_block/resnets_1", width, width)

    for block, kind in enumerate(config.up_block_types):
        level = config.levels - 1 - block
        for i in range(layers[level] + 1):
            resnet(f"up_blocks_{block}/resnets_{i}", width + skips.pop(), widths[level])
            width = widths[level]
            if kind.startswith("CrossAttn"):
                transformer(f"up_blocks_{block}/attentions_{i}", level)
        if level:  # even and odd rows and columns: four convolutions of 2x2
            doubled = 4 * convolution(images, size, width, width, kernel=2, padding=(1, 0))
            size = 2 * size[0], 2 * size[1]
            tally.product(f"up_blocks_{block}/upsamplers_0/conv/kernel", doubled)
    tally.product("conv_out/kernel", convolution(images, size, width, config.out_channels))
