"""Free-form documents: the model writes, paints where it decides to, sees what it painted, and writes on."""

import io
import json
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Document, Image, Segment, Text
from dreamllm_jax.data.pipeline import RowShape, encode_batch
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.generation.images import paint
from dreamllm_jax.generation.text import read_image, read_prompts, read_queries, write
from dreamllm_jax.models.dreamllm import DreamLLM


def png(pixels: np.ndarray) -> bytes:
    """u8[H, W, 3] as a PNG file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.asarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def generate_document(
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
    prompt: Sequence[Segment],
    *,
    size: int,
    max_tokens: int = 256,
    max_images: int = 4,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 3.5,
) -> Iterator[Segment]:
    """Continues an interleaved document, greedily in its text, and yields each segment when it is ready.

    The text goes on until `<dream_start>`; then the queries are read, an image is painted from them and read back in by
    CLIP (DreamLLM, section 3.3); and so on until `</s>` or until a budget is used up.

    Args:
      prompt: how the document begins.
      size: pixels on a side of the painted images.
      max_tokens: budget of written tokens.
      max_images: budget of painted images.
      seed: image i is painted from the noise of `seed + i`.
    """
    ids, queries, patches = tokenizer.special, model.config.num_queries, model.config.clip.num_patches
    written = Document("interleaved", tuple(prompt))
    room = len(written.images) * (patches + 2) + 2
    room += sum(len(tokenizer.encode_text(segment.text)) for segment in written.texts)
    shape = RowShape(room, max(len(written.images), 1), 0, patches, queries, model.config.clip.image_size, 0)
    prompts = encode_batch([written], tokenizer, shape, "comprehension", complete=False)
    cache = room + max_tokens + max_images * (queries + patches + 4)
    reading = read_prompts(model, params, prompts, cache)

    left, painted = max_tokens, 0
    while left > 0:
        tokens, count, reading = write(model, params, reading, left, (ids.eos, ids.dream_start))
        new = [int(token) for token in tokens[0, : int(count[0])]]
        left -= len(new)
        if text := tokenizer.decode([token for token in new if token not in (ids.eos, ids.dream_start)]).strip():
            yield Text(text)
        if not new or new[-1] != ids.dream_start or painted == max_images:
            return
        hidden, reading = read_queries(model, params, reading, announced=True)
        picture = paint(model, params, hidden, jnp.asarray([seed + painted]), size=size, steps=steps, guidance=guidance)
        painted += 1
        encoded = png(picture[0])
        yield Image(encoded)
        seen = images.clip_pixels(images.decode(encoded), model.config.clip.image_size)
        reading = read_image(model, params, reading, jnp.asarray(seen)[None])


def save_document(segments: Sequence[Segment], directory: epath.PathLike) -> None:
    """Writes a document as `document.json` and the PNG files it names."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    listed = []
    for i, segment in enumerate(segments):
        if isinstance(segment, Text):
            listed.append({"text": segment.text})
        else:
            listed.append({"image": f"{i:03}.png"})
            (directory / f"{i:03}.png").write_bytes(segment.data)
    (directory / "document.json").write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n")
