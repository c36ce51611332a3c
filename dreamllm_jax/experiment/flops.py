"""FLOPs of one training step, from the configuration alone.

Counted are matrix products and convolutions, 2 FLOPs a multiply-accumulate, of the whole batch on all chips together; a
convolution's taps on padding do not count. The backward pass has a product for the gradient of every trained weight,
and one for the gradient of every input that depends on a trained weight: through frozen layers gradients pass on their
way to trained ones, and nothing flows into the layers before the first of them.

Two totals differ:

    model       what the mathematics asks for, without recomputation, attention over the full square of queries and
                keys. Model FLOPs utilisation is defined on it (PaLM, arXiv 2204.02311, appendix B):
                MFU = model FLOPs / (seconds * chips * peak FLOP/s)
    executed    what the compiled program computes: recomputation (`model.remat`, chunks of attention) and rotary
                embedding's product with a permutation included; without the tiles above the diagonal that a causal
                attention kernel skips
"""

import dataclasses
import re
from collections.abc import Callable

import jax

from dreamllm_jax.experiment.experiment import Experiment
from dreamllm_jax.layers import full_attention_tpu, splash
from dreamllm_jax.layers.attention import MAX_SCORES
from dreamllm_jax.layers.lora import LORA_A, LORA_B
from dreamllm_jax.layers.remat import kept_by
from dreamllm_jax.towers.autoencoders.kl import AutoencoderConfig
from dreamllm_jax.towers.autoencoders.pixel import PixelAutoencoderConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.image_decoders.unet import UNetConfig
from dreamllm_jax.towers.language_models.llama import LlamaConfig
from dreamllm_jax.towers.vision_encoders.clip import ClipVisionConfig

PARTS = ("llm", "clip", "vae", "unet", "head")


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of a part of a step.

    Attributes:
      model: forward and backward.
      masked: the part of `model` whose attention scores a causal mask throws away.
      products: executed by XLA's own products and convolutions.
      kernels: executed by attention kernels, which XLA cannot look into.
    """

    model: float = 0.0
    masked: float = 0.0
    products: float = 0.0
    kernels: float = 0.0

    @property
    def executed(self) -> float:
        return self.products + self.kernels

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Flops":
        return Flops(*(value * times for value in dataclasses.astuple(self)))


def model_flops(experiment: Experiment) -> float:
    """Model FLOPs of one step: see the module."""
    return sum(part.model for part in step_flops(experiment).values())


def step_flops(experiment: Experiment, platform: str = "tpu") -> dict[str, Flops]:
    """FLOPs of one step by part.

    `clip` and `unet` include the projector behind and before them, `head` is the product with the vocabulary. Slots for
    images count whether filled or not, though the program skips chunks that are empty on every chip.

    Args:
      platform: what the step is compiled for; "tpu" has an attention kernel.
    """
    model, rows, objective = experiment.model, experiment.rows, experiment.objective
    llama, rules = model.llama, experiment.parameters.trainable

    def trained(path: str) -> bool:
        return next((train for pattern, train in rules if re.fullmatch(pattern, path)), False)

    seen, painted = rows.per_step * rows.see_slots, rows.per_step * rows.dream_slots * (objective.dm_weight > 0)
    learns_text = objective.lm_weight > 0
    flops = dict.fromkeys(PARTS, Flops())

    # What is read.
    features_live = False
    if seen:
        clip = _Tally(trained)
        if "features" not in experiment.data.stored:
            _clip(clip, model.clip, seen, model.remat != "none")
        _projector(
            clip, "visual_projector", model.visual_projector, seen, model.clip.num_patches, model.clip.hidden_size,
            llama.hidden_size,
        )  # fmt: skip
        flops["clip"], features_live = clip.total, clip.live

    # The language model, and its document without a prompt.
    live = trained("llama/embed_tokens/embedding") or features_live
    live |= rows.dream_slots > 0 and trained("queries/dream_queries")
    reached = learns_text or (painted > 0 and not objective.detach_condition)  # by a gradient
    hidden = _llama(_Tally(trained, live), llama, rows.per_step, rows.length, model.remat, reached, platform)
    flops["llm"] = hidden.total
    if painted and objective.drop_prob:
        length = len(model.special_tokens.null_document(model.num_queries))
        reached = not objective.detach_condition
        null = _llama(_Tally(trained, live), llama, rows.microbatches, length, model.remat, reached, platform)
        flops["llm"] += null.total

    if learns_text:
        head = _Tally(trained, hidden.live)
        path = "llama/embed_tokens/embedding" if llama.tie_word_embeddings else "llama/lm_head/kernel"
        head.product(path, _dense(rows.per_step * rows.length, llama.hidden_size, llama.vocab_size))
        flops["head"] = head.total

    # What is painted.
    if painted:
        side = rows.dream_size // model.vae.downscale
        kernels = platform == "tpu" and model.dtype == "bfloat16"
        vae = _Tally(trained, kernels=kernels)
        if "moments" not in experiment.data.stored:
            _autoencoder(vae, model.vae, painted, rows.dream_size)
        condition = _Tally(trained, hidden.live and not objective.detach_condition)
        _projector(
            condition, "condition_projector", model.condition_projector, painted, model.num_queries, llama.hidden_size,
            model.unet.cross_attention_dim,
        )  # fmt: skip
        unet = _unet(_Tally(trained, vae.live, kernels), model.unet, painted, side, model.num_queries, condition.live)
        flops["vae"], flops["unet"] = vae.total, condition.total + unet.total
    return flops


class _Tally:
    """Adds up the products along a tower.

    `live` says whether what has been computed so far depends on a trained weight, so that gradients go back to it;
    `forward` is what the forward pass has executed.
    """

    def __init__(self, trained: Callable[[str], bool], live: bool = False, kernels: bool = False):
        self.trained, self.live, self.kernels = trained, live, kernels
        self.forward, self.total = 0.0, Flops()

    def product(self, path: str, flops: float, live: bool | None = None) -> None:
        """A product of activations (of the tower so far, or as `live` says) with the weight at `path`."""
        live, trained = self.live if live is None else live, self.trained(path)
        self.forward += flops
        self.total += Flops(model=flops * (1 + live + trained), products=flops * (1 + live + trained))
        self.live |= live or trained

    def attention(
        self, batch: int, queries: int, keys: int, width: int, keys_live: bool, causal: bool = False, heads: int = 0
    ) -> None:
        """Scores and their product with the values.

        The backward pass has four products: towards weights, values, queries and keys. A kernel, if there is one (for
        `heads`, in bfloat16), computes all of them and the scores again. Without a kernel many scores are taken in
        chunks, computed again in the backward pass.
        """
        one = 2.0 * batch * queries * keys * width
        flops = one * (2 + (self.live or keys_live) + 2 * keys_live + self.live)
        self.live |= keys_live
        self.forward += 2 * one
        masked = flops * (1 - 1 / queries) / 2 if causal else 0.0
        q, k = (jax.ShapeDtypeStruct((batch, length, width), "bfloat16") for length in (queries, keys))
        if self.kernels and heads and full_attention_tpu.supported(q, k, heads):
            self.total += Flops(flops, masked, kernels=one * (2 + 5 * self.live))
        else:
            self.total += Flops(flops, masked, flops)
            self.recompute(one * (queries * keys > MAX_SCORES))

    def causal_kernel(self, batch: float, length: int, width: int, share: float) -> None:
        """The same by `models.splash`, which computes a `share` of it.

        Its backward pass computes the scores again, as a fifth product.
        """
        square = 2.0 * batch * length**2 * width
        flops = square * (2 + 4 * self.live)
        self.total += Flops(flops, flops * (1 - 1 / length) / 2, kernels=share * square * (2 + 5 * self.live))

    def recompute(self, flops: float) -> None:
        """Executes products again, if there is a backward pass."""
        self.total += Flops(products=flops * self.live)


def _splash_share(length: int, head_dim: int) -> float:
    """What the causal kernel computes of all scores: the tiles that are not wholly above the diagonal, and padding."""
    tiles = splash.padded(length) // splash.block_of(length)
    padding = (splash.padded(length) / length) ** 2 * splash.padded(head_dim) / head_dim
    return padding * (tiles + 1) / (2 * tiles)


def _dense(tokens: float, inputs: int, outputs: int) -> float:
    return 2.0 * tokens * inputs * outputs


def _convolution(
    images: int, side: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: tuple = (1, 1)
) -> float:
    """Of a square: pairs of an output and a tap on the input, in either dimension."""
    positions = range(0, side + sum(padding) - kernel + 1, stride)
    taps = sum(padding[0] <= start + tap < padding[0] + side for start in positions for tap in range(kernel))
    return 2.0 * images * taps**2 * inputs * outputs


def _layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
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


def _llama(
    tally: _Tally, config: LlamaConfig, rows: int, length: int, remat: str, reached: bool, platform: str
) -> _Tally:
    """The layers; `reached` says whether a gradient comes from above."""
    path, tokens, dim = "llama/layers", rows * length, config.head_dim
    query_width, key_width = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes = _layer_shapes(config)
    products = {name: _dense(tokens, *shape) for name, shape in shapes.items()}
    adapters = {}
    if config.lora is not None:
        for name, (inputs, outputs) in shapes.items():
            if name.split("/")[1] in config.lora.targets:
                adapters[f"{name}/{LORA_A}"] = _dense(tokens, inputs, config.lora.rank)
                adapters[f"{name}/{LORA_B}"] = _dense(tokens, config.lora.rank, outputs)
    # The layers are one scan: what is live in one is live in all.
    names = [f"{name}/kernel" for name in products] + ["input_layernorm/scale", "post_attention_layernorm/scale"]
    names += list(adapters)
    tally.live |= any(tally.trained(f"{path}/{name}") for name in names)
    layer = _Tally(tally.trained if reached else lambda _: False, tally.live and reached)
    for name, flops in products.items():
        layer.product(f"{path}/{name}/kernel", flops)
    for name, flops in adapters.items():
        layer.product(f"{path}/{name}", flops)

    rotation = _dense(tokens, dim, query_width + key_width)  # halves swapped by a permutation matrix
    layer.total += Flops(products=rotation * (1 + layer.live))
    has_kernel, share = platform == "tpu" and splash.supports(length, length), _splash_share(length, dim)
    if has_kernel:
        layer.causal_kernel(rows, length, query_width, share)
    else:
        layer.attention(rows, length, length, query_width, layer.live, causal=True)

    if remat != "none":
        kept = kept_by(remat)
        scores = 2.0 * rows * length**2 * query_width
        if "attention" not in kept:
            again = {**products, **adapters}
            layer.recompute(sum(flops for name, flops in again.items() if name.startswith("self_attn")) + rotation)
            if has_kernel:
                layer.total += Flops(kernels=share * 2 * scores * layer.live)
            else:
                layer.recompute(2 * scores)
        elif not has_kernel:  # its queries, keys and values are kept, its output is not
            layer.recompute(scores * (1 + layer.trained(f"{path}/self_attn/o_proj/kernel")))
        for name in ("gate", "up"):
            if name not in kept:
                parts = (products | adapters).items()
                layer.recompute(sum(flops for part, flops in parts if part.startswith(f"mlp/{name}_proj")))
    tally.total += layer.total * config.num_hidden_layers
    tally.live |= tally.trained("llama/norm/scale")
    return tally


def _clip(tally: _Tally, config: ClipVisionConfig, images: int, remat: bool) -> _Tally:
    width, inner, tokens = config.hidden_size, config.intermediate_size, images * (config.num_patches + 1)
    tally.live |= any(tally.trained(f"clip/embeddings/{name}") for name in ("class_embedding", "position_embedding"))
    patches = _dense(images * config.num_patches, 3 * config.patch_size**2, width)
    tally.product("clip/embeddings/patch_embedding/kernel", patches, live=False)
    path = "clip/encoder/layers"
    tally.live |= any(tally.trained(f"{path}/{name}/kernel") for name in ("self_attn/q_proj", "mlp/fc2"))
    layer = _Tally(tally.trained, tally.live)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer.product(f"{path}/self_attn/{name}/kernel", _dense(tokens, width, width))
    layer.attention(images, config.num_patches + 1, config.num_patches + 1, width, layer.live)
    layer.product(f"{path}/mlp/fc1/kernel", _dense(tokens, width, inner))
    before_last = layer.forward
    layer.product(f"{path}/mlp/fc2/kernel", _dense(tokens, inner, width))
    if remat:
        layer.recompute(before_last)
    tally.total += layer.total * config.depth
    return tally


def _projector(
    tally: _Tally, path: str, config: ProjectorConfig, images: int, tokens: int, inputs: int, outputs: int
) -> None:
    if config.kind == "conv":
        tally.product(f"{path}/projector/kernel", _convolution(images, round(tokens**0.5), inputs, outputs))
        return
    for i in range(config.depth):
        name = "projector" if config.kind == "linear" else f"projector_{2 * i}"
        tally.product(f"{path}/{name}/kernel", _dense(images * tokens, outputs if i else inputs, outputs))


def _resnet(
    tally: _Tally, path: str, images: int, side: int, inputs: int, outputs: int, time: tuple[int, bool] | None = None
) -> None:
    """`time` is the width of the time embedding, and whether it is live."""
    live = tally.live
    tally.product(f"{path}/conv1/kernel", _convolution(images, side, inputs, outputs))
    if time:
        tally.product(f"{path}/time_emb_proj/kernel", _dense(images, time[0], outputs), live=time[1])
    tally.product(f"{path}/conv2/kernel", _convolution(images, side, outputs, outputs))
    if inputs != outputs:
        tally.product(f"{path}/conv_shortcut/kernel", _dense(images * side**2, inputs, outputs), live=live)


def _autoencoder(tally: _Tally, config: AutoencoderConfig | PixelAutoencoderConfig, images: int, side: int) -> _Tally:
    """The encoder; that in pixel space multiplies nothing."""
    if isinstance(config, PixelAutoencoderConfig):
        return tally
    widths, moments, path = config.block_out_channels, 2 * config.latent_channels, "vae/encoder"
    tally.product(f"{path}/conv_in/kernel", _convolution(images, side, config.in_channels, widths[0]))
    inputs = widths[0]
    for level, width in enumerate(widths):
        block = f"{path}/down_blocks_{level}"
        for i in range(config.layers_per_block):
            _resnet(tally, f"{block}/resnets_{i}", images, side, inputs, width)
            inputs = width
        if level < len(widths) - 1:
            halved = _convolution(images, side, width, width, stride=2, padding=(0, 1))
            tally.product(f"{block}/downsamplers_0/conv/kernel", halved)
            side //= 2
    _resnet(tally, f"{path}/mid_block/resnets_0", images, side, inputs, inputs)
    _self_attention(tally, f"{path}/mid_block/attentions_0", images, side**2, inputs, heads=1)
    _resnet(tally, f"{path}/mid_block/resnets_1", images, side, inputs, inputs)
    tally.product(f"{path}/conv_out/kernel", _convolution(images, side, inputs, moments))
    tally.product("vae/quant_conv/kernel", _dense(images * side**2, moments, moments))
    return tally


def _self_attention(tally: _Tally, path: str, images: int, tokens: int, width: int, heads: int) -> None:
    live, product = tally.live, _dense(images * tokens, width, width)
    for name in ("to_q", "to_k", "to_v"):
        tally.product(f"{path}/{name}/kernel", product, live=live)
    tally.attention(images, tokens, tokens, width, tally.live, heads=heads)
    tally.product(f"{path}/to_out_0/kernel", product)


def _unet(tally: _Tally, config: UNetConfig, images: int, side: int, queries: int, condition_live: bool) -> _Tally:
    widths, path = config.block_out_channels, "unet"
    layers = config.per_block(config.layers_per_block)
    depths = config.per_block(config.transformer_layers_per_block)

    clock = _Tally(tally.trained)
    clock.product(f"{path}/time_embedding/linear_1/kernel", _dense(images, widths[0], 4 * widths[0]))
    clock.product(f"{path}/time_embedding/linear_2/kernel", _dense(images, 4 * widths[0], 4 * widths[0]))
    time = (4 * widths[0], clock.live)
    tally.total += clock.total

    def resnet(name: str, inputs: int, outputs: int) -> None:
        _resnet(tally, f"{path}/{name}", images, side, inputs, outputs, time)

    def transformer(name: str, level: int) -> None:
        width, tokens = widths[level], images * side**2
        tally.product(f"{path}/{name}/proj_in/kernel", _dense(tokens, width, width))
        for i in range(depths[level]):
            block = f"{path}/{name}/transformer_blocks_{i}"
            _self_attention(tally, f"{block}/attn1", images, side**2, width, config.heads[level])
            tally.product(f"{block}/attn2/to_q/kernel", _dense(tokens, width, width))
            context = _Tally(tally.trained, condition_live)
            for projection in ("to_k", "to_v"):
                product = _dense(images * queries, config.cross_attention_dim, width)
                context.product(f"{block}/attn2/{projection}/kernel", product, live=condition_live)
            tally.total += context.total
            tally.attention(images, side**2, queries, width, context.live, heads=config.heads[level])
            tally.product(f"{block}/attn2/to_out_0/kernel", _dense(tokens, width, width))
            tally.product(f"{block}/ff/net_0/proj/kernel", _dense(tokens, width, 8 * width))
            tally.product(f"{block}/ff/net_2/kernel", _dense(tokens, 4 * width, width))
        tally.product(f"{path}/{name}/proj_out/kernel", _dense(tokens, width, width))

    tally.product(f"{path}/conv_in/kernel", _convolution(images, side, config.in_channels, widths[0]))
    width, skips = widths[0], [widths[0]]
    for level, kind in enumerate(config.down_block_types):
        for i in range(layers[level]):
            resnet(f"down_blocks_{level}/resnets_{i}", width, widths[level])
            width = widths[level]
            if kind.startswith("CrossAttn"):
                transformer(f"down_blocks_{level}/attentions_{i}", level)
            skips.append(width)
        if level < config.levels - 1:
            halved = _convolution(images, side, width, width, stride=2)
            tally.product(f"{path}/down_blocks_{level}/downsamplers_0/conv/kernel", halved)
            side //= 2  # exactly, in training
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
            doubled = 4 * _convolution(images, side, width, width, kernel=2, padding=(1, 0))
            side *= 2
            tally.product(f"{path}/up_blocks_{block}/upsamplers_0/conv/kernel", doubled)
    tally.product(f"{path}/conv_out/kernel", _convolution(images, side, width, config.out_channels))
    return tally
