"""The FLOPs of Stable Diffusion 3's denoiser (`mmdit.py`), counted along its forward pass."""

from typing import TYPE_CHECKING

from dreamllm_jax.layers.flops import Tally, dense

if TYPE_CHECKING:
    from dreamllm_jax.towers.image_decoders.mmdit import MMDiTConfig


def count(
    config: "MMDiTConfig",
    tally: Tally,
    images: int,
    size: tuple[int, int],
    queries: int,
    condition_live: bool,
    remat: str,
) -> None:
    """See `MMDiTConfig.flops`."""
    width, heads, patch = config.width, config.num_attention_heads, config.patch_size
    tokens = (size[0] // patch) * (size[1] // patch)

    def perceptron(name: str, inputs: int, live: bool) -> bool:
        part = tally.beside(live)
        part.product(f"time_text_embed/{name}/linear_1/kernel", dense(images, inputs, width))
        part.product(f"time_text_embed/{name}/linear_2/kernel", dense(images, width, width))
        tally.total += part.total
        return part.live

    clock = perceptron("timestep_embedder", config.clock_width, False)
    clock |= perceptron("text_embedder", config.pooled_projection_dim, condition_live)
    context = tally.beside(condition_live)
    context.product("context_embedder/kernel", dense(images * queries, config.joint_attention_dim, width))
    tally.total += context.total
    tally.product("pos_embed/proj/kernel", dense(images * tokens, patch**2 * config.in_channels, width), live=False)
    tally.live |= clock or context.live

    def layer_of(live: bool, path: str, dual: bool, last: bool) -> Tally:
        layer = tally.beside(live)
        layer.product(f"{path}/norm1/linear/kernel", dense(images, width, (9 if dual else 6) * width), live=clock)
        context_chunks = 2 if last else 6
        layer.product(f"{path}/norm1_context/linear/kernel", dense(images, width, context_chunks * width), live=clock)

        def products(names: tuple[str, ...], count: int) -> None:
            for name in names:
                layer.linear(f"{path}/{name}", images * count, width, width, config.lora)

        own = tuple(f"attn/{name}" for name in ("to_q", "to_k", "to_v", "to_out_0"))
        theirs = ("attn/add_k_proj", "attn/add_v_proj", *(() if last else ("attn/add_q_proj", "attn/to_add_out")))
        products(own, tokens)
        products(theirs, queries)
        before, again = layer.forward, remat not in ("none", "attention")
        for count in (tokens,) if last else (tokens, queries):
            layer.attention(images, count, (tokens, queries), width, layer.live, heads=heads, again=again)
        if dual:
            layer.attention(images, tokens, tokens, width, layer.live, heads=heads, again=again)
        scores = layer.forward - before
        products(tuple(name.replace("attn", "attn2") for name in own) if dual else (), tokens)
        for name, count in (("ff", tokens),) if last else (("ff", tokens), ("ff_context", queries)):
            layer.linear(f"{path}/{name}/net_0/proj", images * count, width, 4 * width, config.lora)
            layer.linear(f"{path}/{name}/net_2", images * count, 4 * width, width, config.lora)
        if remat != "none":
            layer.recompute(layer.forward - (scores if remat == "attention" else 0))
        return layer

    for first, end, dual, last in config.stacks:
        kind = f"transformer_blocks/{first}_to_{end}", dual, last
        # In a scan what is live behind one layer is live before all.
        tally.live |= layer_of(False, *kind).live
        tally.total += layer_of(tally.live, *kind).total * (end - first)
    tally.product("norm_out/linear/kernel", dense(images, width, 2 * width), live=clock)
    tally.product("proj_out/kernel", dense(images * tokens, width, patch**2 * config.made_channels))
