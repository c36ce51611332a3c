"""Painting: hidden states at the dream queries -> pictures.

Legend: N images, Q dream queries, E language model's width, H x W pixels.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dreamllm_jax.data.document import Image, Segment, Text
from dreamllm_jax.data.images import black, paint_sizes, size_of
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion.samplers import SamplerConfig, guided, sample
from dreamllm_jax.generation.text import begin, read_queries
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.parallel.collectives import replicate
from dreamllm_jax.towers.autoencoders.tiles import decode_tiled

DEFAULT = SamplerConfig()


@functools.partial(jax.jit, static_argnames=("model", "size", "sampler"))
def _sample(model, params, groups, seeds, guiding, size: tuple[int, int], sampler: SamplerConfig):
    joined, config = model.bind({"params": params}), model.config.image_decoder
    decoder = joined.image_decoder

    def condition_of(hidden):
        condition = joined.condition(hidden)
        if not config.wants_sizes:
            return condition
        whole = jnp.asarray(paint_sizes(size[::-1], *size))  # of a picture that nothing was done to
        return condition.with_sizes(jnp.tile(whole, (len(condition.sequence), 1)))

    *against, condition = map(condition_of, groups)
    if not against:
        denoiser = functools.partial(decoder.denoise, condition=condition)
    else:
        against = [jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), one, condition) for one in against]
        scales, rescale, interval = guiding
        first, end = config.time_range(0, 1)
        between = tuple(first + share * (end - first) for share in interval)
        denoiser = guided(decoder.denoise, (*against, condition), scales[-len(against) :], rescale, between)
    keys = jax.vmap(jax.random.key)(seeds)
    return sample(denoiser, keys, config.latent_shape(*size), *config.steps(sampler, *size))


@functools.partial(jax.jit, static_argnames="model")
def _decode(model, params, latents):
    return model.bind({"params": params}).image_decoder.decode(latents).astype(jnp.float32)


@jax.jit
def _levels(pixels):
    return replicate(jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0, 255)).astype(jnp.uint8))


def decode(
    model: DreamLLM, params: dict, latents: Float[Array, "N h w c"], size: tuple[int, int]
) -> UInt8[Array, "N H W 3"]:
    """The pictures, of this height and width, that latents stand for.

    Those with a side of more than twice what the image decoder was made for are decoded in tiles of that size, which
    overlap by a quarter: else the activations at full resolution would take more memory than all the rest.
    """
    config, decoded = model.config.image_decoder, functools.partial(_decode, model, params)
    side = config.default_size
    if max(size) <= 2 * side:
        return _levels(decoded(latents))
    small = config.latent_shape(side, side)[0]
    downscale = side // small
    return _levels(decode_tiled(decoded, latents, downscale, tile=side, stride=(small - small // 4) * downscale))


@functools.partial(jax.jit, static_argnames="model")
def _null_hidden(model, params):
    return jax.tree.map(lambda x: x[None], model.bind({"params": params}).null_hidden())


def paint(
    model: DreamLLM,
    params: dict,
    hidden: Float[Array, "N Q E"],
    seeds: Array,
    *,
    size: int | tuple[int, int] | None = None,
    sampler: SamplerConfig = DEFAULT,
    guidance: float = 3.5,
    rescale: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    negative: Float[Array, "N Q E"] | None = None,
    image_guidance: float = 1.0,
    blind: Float[Array, "N Q E"] | None = None,
) -> UInt8[Array, "N H W 3"]:
    """Paints an image from the language model's hidden states at each image's queries.

    Args:
      hidden: as from `generation.text.read_queries`.
      seeds: u32[N], one an image; an image depends on its own seed and hidden states alone.
      size: pixels, (height, width) or on both sides; None for the size that the image decoder was made for.
      guidance: classifier-free guidance scale; 1 leaves it out.
      rescale: of guidance, see `diffusion.samplers.guided`.
      guidance_interval: between which shares of the timesteps there is guidance; 0 is the picture, 1 the noise.
      negative: hidden states that guidance leads away from; None for those of the document without a prompt.
      image_guidance, blind: guidance by images, from hidden states of `negative`'s prompts with black images instead,
        see `diffusion.samplers.guided`; None leaves it out.

    Raises:
      ValueError: a size that is not a multiple of the image decoder's, no interval, a sampler that it does not have.
    """
    size = require_size(model, size)
    require_interval(guidance_interval)
    require_sampler(model, sampler)
    if guidance == 1.0 and blind is None:
        groups = (hidden,)
    else:
        negative = _null_hidden(model, params) if negative is None else negative
        groups = (negative, hidden) if blind is None else (blind, negative, hidden)
    seeds = jnp.asarray(seeds, jnp.uint32)
    guiding = jax.tree.map(jnp.float32, ((image_guidance, guidance), rescale, tuple(guidance_interval)))
    latents = _sample(model, params, groups, seeds, guiding, size, sampler)
    return decode(model, params, latents, size)


def read_asked(
    model: DreamLLM, params: dict, tokenizer: Tokenizer, prompts: Sequence[Sequence[Segment]], seeds: Sequence[int]
) -> Float[Array, "N Q E"]:
    """The hidden states to paint each prompt's image from; those of prompts that are all alike are read once.

    Args:
      prompts, seeds: see `generate_images`; a prompt without text asks for what guidance leads away from.
    """
    alike = not model.config.dream_queries.redrawn and all(list(one) == list(prompts[0]) for one in prompts)
    given, seeds = (prompts[:1], seeds[:1]) if alike else (prompts, seeds)
    reading = begin(model, params, tokenizer, given, model.config.num_queries + 2, writes=False, asked=True)
    hidden = read_queries(model, params, reading, seeds=jnp.asarray(seeds, jnp.uint32))[0]
    return jax.tree.map(lambda x: jnp.repeat(x, len(prompts), axis=0), hidden) if alike else hidden


def generate_images(
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Segment]],
    *,
    seeds: Sequence[int],
    size: int | tuple[int, int] | None = None,
    sampler: SamplerConfig = DEFAULT,
    guidance: float = 3.5,
    rescale: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    negative: Sequence[Segment] = (),
    image_guidance: float = 1.0,
) -> UInt8[Array, "N H W 3"]:
    """Paints one image for each prompt, all in one batch; each depends on its prompt and seed alone, up to rounding.

    Args:
      prompts: texts, or texts with images of what is to be painted. A model that is asked in words of its own
        (`DreamLLMConfig.prompting`) is asked in these; prompts with images are then edits.
      seeds: one a prompt.
      size, sampler, guidance, rescale, guidance_interval: see `paint`.
      negative: what guidance leads away from; nothing for the document without a prompt. In words of its own too, or in
        those for neither caption nor instruction, and with the images of each prompt.
      image_guidance: the scale of a second guidance, by the images of prompts: from what guidance leads away from with
        black images to the same with the images (InstructPix2Pix, MetaQuery). 1 leaves it out.

    Raises:
      ValueError: a prompt too long for the model, a size that cannot be painted, no interval, a sampler that the image
        decoder does not have, or guidance by images of a model without words of its own.
      ImageError: an image of a prompt cannot be decoded.
    """
    require_size(model, size)
    require_interval(guidance_interval)
    require_sampler(model, sampler)
    by_words = model.config.prompting is not None
    if image_guidance != 1.0 and not by_words:
        raise ValueError(
            f"image_guidance={image_guidance:g} is of a model that is asked to edit in words of its own "
            "(model.prompting), and this one is not: leave it at 1"
        )

    def hidden(given: Sequence[Sequence[Segment]]) -> Float[Array, "N Q E"]:
        return read_asked(model, params, tokenizer, given, seeds)

    dual = image_guidance != 1.0 and any(isinstance(segment, Image) for prompt in prompts for segment in prompt)
    against = {"guidance": guidance, "rescale": rescale, "guidance_interval": guidance_interval}
    if by_words and (dual or guidance != 1.0):
        words = [segment for segment in negative if isinstance(segment, Text)]
        read = [[segment for segment in prompt if isinstance(segment, Image)] for prompt in prompts]
        against["negative"] = hidden([[*images, *words] for images in read])
        if dual:
            blind = [[Image(black(size_of(image.data))) for image in images] for images in read]
            against |= {"blind": hidden([[*images, *words] for images in blind]), "image_guidance": image_guidance}
    elif guidance != 1.0 and (negative or model.config.dream_queries.redrawn):
        against["negative"] = hidden([negative] * len(prompts))
    return paint(model, params, hidden(prompts), jnp.asarray(seeds, jnp.uint32), size=size, sampler=sampler, **against)


def require_size(model: DreamLLM, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels of such a size, see `paint`.

    Raises:
      ValueError: the model cannot paint such a picture.
    """
    decoder = model.config.image_decoder
    least, size = decoder.size_multiple, decoder.default_size if size is None else size
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < least or height % least or width % least:
        raise ValueError(f"the sides of a painted image must be multiples of {least} pixels, got {height} x {width}")
    if (most := decoder.largest_size) is not None and max(height, width) > most:
        raise ValueError(f"this image decoder paints at most {most} pixels on a side, got {height} x {width}")
    return height, width


def require_interval(interval: tuple[float, float]) -> None:
    """Raises `ValueError` unless guidance can be confined to these shares of the timesteps."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval must be two ascending numbers from 0 to 1, got {low} and {high}")


def require_sampler(model: DreamLLM, sampler: SamplerConfig) -> None:
    """Raises `ValueError` unless the image decoder paints by this sampler and its settings."""
    decoder = model.config.image_decoder
    decoder.steps(sampler, *(decoder.default_size,) * 2)
