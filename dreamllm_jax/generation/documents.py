"""Free-form documents: the model writes, paints where it decides to, sees what it painted, and writes on."""

import base64
import dataclasses
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath

from dreamllm_jax.common.directories import read_json
from dreamllm_jax.data import images
from dreamllm_jax.data.chat_template import ends_of
from dreamllm_jax.data.document import Image, Segment, Text
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.generation.images import (
    DEFAULT,
    generate_images,
    paint,
    read_asked,
    require_interval,
    require_sampler,
    require_size,
)
from dreamllm_jax.generation.prompts import Painted, Written, bucket
from dreamllm_jax.generation.text import STRETCH, Reading, Sampling, begin, read_image, read_queries, write
from dreamllm_jax.model import DreamLLM


@dataclasses.dataclass(frozen=True)
class Event:
    """Something new in one of the documents.

    Attributes:
      row: which document.
      segment: a text or a painted image.
      complete: whether the segment is; a text that is not comes again, longer; an image that is not is being painted,
        and empty.
    """

    row: int
    segment: Written | Painted
    complete: bool


@dataclasses.dataclass
class _Document:
    """A document that grows."""

    seed: int
    painted: int  # the prompt's included: image i is painted from the noise of seed + i
    tokens_left: int
    images_left: int
    tokens: tuple[int, ...] = ()  # of the text that grows
    state: str = "writing"  # or "asking" for an image, or "done"


def generate_documents(
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Segment]],
    *,
    size: int | tuple[int, int] | None = None,
    max_tokens: int = 256,
    max_images: int = 4,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    sampler: SamplerConfig = DEFAULT,
    guidance: float = 3.5,
    rescale: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    template: str = "",
    allowed: int | None = None,
) -> Iterator[Event]:
    """Continues documents, all in one batch, and yields what is new as it comes.

    A document's text goes on until `<dream_start>`; then the queries are read, an image is painted from them and read
    back in by the vision encoder (DreamLLM, section 3.3); and so on until `</s>`, the end of a
    turn in the template, or until a budget is used up. All
    documents that ask for an image after the same stretch of tokens are painted together. A document depends on its own
    prompt and seed alone, up to rounding, and continued from where it once was (its segments as a prompt) it goes on as
    it would have.

    Args:
      prompts: how the documents begin.
      max_tokens: budget of written tokens of each document.
      max_images: budget of painted images of each.
      seeds: one a document; 0, 1, ... if not given. The i-th image of a document is painted from seed + i.
      sampling: how tokens are chosen; None for the most probable ones.
      size, sampler, guidance, rescale, guidance_interval: of painting, see `images.paint`.
      template: see `prompts.encode_prompts`.
      allowed: tokens of a document, images and budgets included; None for as many as the model can read.

    Raises:
      ValueError: the documents could become longer than the model can read or is allowed, a size that cannot be
        painted, no interval, no budget, a sampler that the image decoder does not have.
      ImageError: an image of a prompt cannot be decoded.
    """
    encoder, (height, width) = model.config.vision_encoder, require_size(model, size)
    require_interval(guidance_interval)
    require_sampler(model, sampler)
    if max_tokens < 1 or max_images < 0:
        raise ValueError(f"max_tokens must be positive and max_images not negative, got {max_tokens} and {max_images}")
    ids, ends = tokenizer.special, ends_of(template, tokenizer)
    patches = encoder.tokens(*encoder.fitting(width, height))
    each = len(ids.painted(model.config.num_queries)) + len(ids.seen(patches))
    seeds = range(len(prompts)) if seeds is None else seeds
    new, of_rows = max_tokens + max_images * each, jnp.asarray(seeds, jnp.uint32)
    reading = begin(model, params, tokenizer, prompts, new, template, allowed, seeds=of_rows)
    documents = [
        _Document(seed, sum(isinstance(segment, Painted) for segment in prompt), max_tokens, max_images)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]

    def those(state: str) -> np.ndarray:
        return np.array([document.state == state for document in documents])

    while not those("done").all():
        if (writing := those("writing")).any():
            stop = (*ends, ids.dream_start)
            tokens, count, reading = write(model, params, reading, STRETCH, stop, sampling, jnp.asarray(writing))
            tokens, count = jax.device_get((tokens, count))
            for row in np.flatnonzero(writing):
                yield from _written(documents[row], int(row), tokens[row, : count[row]].tolist(), tokenizer, ends)
        if (asking := those("asking")).any():
            yield from (Event(row, Painted(b""), False) for row in np.flatnonzero(asking).tolist())
            guiding = {"guidance": guidance, "rescale": rescale, "guidance_interval": guidance_interval}
            painting = {"size": size, "sampler": sampler, **guiding}
            pictures, reading = _paint(model, params, tokenizer, reading, documents, asking, **painting)
            for row, picture in pictures.items():
                yield Event(row, picture, True)


def paint_reply(
    model: DreamLLM, params: dict, tokenizer: Tokenizer, conversation: Sequence[Segment], seed: int, **painting: Any
) -> Iterator[Event]:
    """The picture that a model which is asked in words of its own (`DreamLLMConfig.prompting`) paints for the last turn
    of a conversation: from its text, or as an edit of its images.

    Args:
      seed: as of `generate_documents`.
      painting: settings of `generate_images`.

    Raises:
      ValueError, ImageError: see there.
    """
    last = max((i for i, segment in enumerate(conversation) if segment.role == "assistant"), default=-1)
    seeds = [seed + sum(isinstance(segment, Painted) for segment in conversation)]
    yield Event(0, Painted(b""), False)
    (pixels,) = generate_images(model, params, tokenizer, [conversation[last + 1 :]], seeds=seeds, **painting)
    yield Event(0, Painted(png(pixels)), True)


def _written(
    document: _Document, row: int, new: list[int], tokenizer: Tokenizer, ends: Sequence[int]
) -> Iterator[Event]:
    dream_start = tokenizer.special.dream_start
    new = new[: document.tokens_left]
    document.tokens_left -= len(new)
    last = new[-1]
    if last == dream_start and document.images_left:
        document.state = "asking"
    elif last in (*ends, dream_start) or not document.tokens_left:
        document.state = "done"
    document.tokens += tuple(token for token in new if token not in (*ends, dream_start))
    complete = document.state != "writing"
    if document.tokens:
        yield Event(row, Written(tokenizer.decode(document.tokens).strip(), tokens=document.tokens), complete)
    if complete:
        document.tokens = ()


def _paint(
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
    reading: Reading,
    documents: list[_Document],
    asking: np.ndarray,
    **painting,
) -> tuple[dict[int, Painted], Reading]:
    """Paints an image for each document that asks, and lets it read it."""
    each = jnp.asarray([document.seed + document.painted for document in documents], jnp.uint32)
    hidden, reading = read_queries(model, params, reading, announced=True, active=jnp.asarray(asking), seeds=each)
    rows = np.flatnonzero(asking)
    padded = np.resize(rows, bucket(len(rows)))
    seeds = each[padded]
    if painting["guidance"] != 1.0 and (model.config.prompting or model.config.dream_queries.redrawn):
        painting["negative"] = read_asked(model, params, tokenizer, [()] * len(padded), seeds)
    pixels = paint(model, params, jax.tree.map(lambda x: x[padded], hidden), seeds, **painting)
    encoder, pictures = model.config.vision_encoder, {}
    size = encoder.fitting(pixels.shape[2], pixels.shape[1])
    seen = np.zeros((len(documents), *encoder.pixels_shape(*size)), np.uint8)
    for row, picture in zip(rows.tolist(), np.asarray(pixels), strict=False):
        pictures[row] = Painted(png(picture))
        seen[row] = encoder.preprocess(images.decode(pictures[row].data), *size)
        document = documents[row]
        document.painted += 1
        document.images_left -= 1
        document.state = "writing" if document.tokens_left else "done"
    return pictures, read_image(model, params, reading, jnp.asarray(seen), jnp.asarray(asking), size)


def png(pixels: np.ndarray) -> bytes:
    """u8[H, W, 3] as a PNG file."""
    return images.to_png(PIL.Image.fromarray(np.asarray(pixels)))


DOCUMENT, PAGE = "document.json", "document.html"
_STYLE = "body{font:17px/1.6 Georgia,serif;max-width:680px;margin:2em auto;padding:0 1em}img{max-width:100%}"


def save_document(segments: Sequence[Segment], directory: epath.PathLike) -> None:
    """Writes a document as `document.json`, the image files it names, and the self-contained page `document.html`."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    listed, page = [], []
    for i, segment in enumerate(segments):
        if isinstance(segment, Text):
            tokens = {"tokens": list(segment.tokens)} if isinstance(segment, Written) else {}
            listed.append({"text": segment.text, **tokens})
            page.append(f"<p>{html.escape(segment.text)}</p>")
        else:
            listed.append({"image": f"{i:03}.png", "painted": isinstance(segment, Painted)})
            data = images.to_png(images.decode(segment.data))
            (directory / f"{i:03}.png").write_bytes(data)
            page.append(f'<p><img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt=""></p>')
    (directory / DOCUMENT).write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n")
    (directory / PAGE).write_text(
        f'<!doctype html><html><head><meta charset="utf-8"><title>Document</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(page)}</body></html>\n"
    )


def load_document(directory: epath.PathLike) -> list[Segment]:
    """The segments of a saved document, to be continued.

    Raises:
      FileNotFoundError, ValueError: there is none, or something else.
    """
    directory = epath.Path(directory)
    if not (directory / DOCUMENT).exists():
        raise FileNotFoundError(f"{directory / DOCUMENT} is missing: no generated document there")
    try:
        return [_loaded(directory, item) for item in read_json(directory / DOCUMENT)]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / DOCUMENT} is no generated document: {error!r}") from None


def _loaded(directory: epath.Path, item: Mapping[str, Any]) -> Segment:
    if "text" not in item:
        kind = Painted if item["painted"] else Image
        return kind((directory / item["image"]).read_bytes())
    if "tokens" in item:
        return Written(item["text"], tokens=tuple(item["tokens"]))
    return Text(item["text"])
