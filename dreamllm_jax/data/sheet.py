"""A page of documents as the model will see them: what is learned, where images are read and painted."""

import base64
import functools
import html
import os
from collections.abc import Callable
from pathlib import Path

from dreamllm_jax.data import images, storage
from dreamllm_jax.data.batch import RowShape
from dreamllm_jax.data.document import Document, Image
from dreamllm_jax.data.prompting import Prompting
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokens import Mode, encode_document
from dreamllm_jax.data.writing import Encoded

_STYLE = """
body { font: 15px/1.7 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; overflow-wrap: anywhere; }
section { border-top: 1px solid #ccc; padding: 1em 0; }
h2 { font-size: 1em; color: #666; }
span { background: #eee; border-radius: 3px; padding: 1px 0; white-space: pre-wrap; }
span.learned { background: #bfe5bf; }
span.special { color: #05a; }
figure { display: inline-block; margin: 4px; max-width: 100%; vertical-align: middle; }
figure { text-align: center; font-size: 12px; color: #666; }
img { height: 112px; max-width: 100%; object-fit: contain; box-sizing: border-box; border: 3px solid #ccc; }
.dream img { border-color: #e8a33d; }
"""


def write_sheet(
    directory: str | os.PathLike,
    corpus: str,
    to: str | os.PathLike,
    count: int,
    shape: RowShape,
    mode: Mode = "joint",
    tokenizer: str = "",
    prompting: Prompting | None = None,
) -> None:
    """Writes one self-contained HTML page with `count` documents, taken evenly from the whole corpus.

    Args:
      prompting: of the model that they are for, see `encode_document`.

    Raises:
      FileNotFoundError: no such data set or corpus, or no tokenizer.
    """
    documents = storage.Corpus(directory, corpus)
    text_tokenizer = storage.open_tokenizer(directory, tokenizer)
    count = min(count, len(documents))
    chosen = [index * len(documents) // count for index in range(count)]
    encode = functools.partial(encode_document, tokenizer=text_tokenizer, shape=shape, mode=mode, prompting=prompting)
    body = [_section(index, documents[index], encode, text_tokenizer) for index in chosen]
    legend = (
        "<p><span class=learned>learned</span> <span>given</span>; images in a grey frame are read, in an orange one "
        "painted.</p>"
    )
    title = f"{html.escape(corpus)}: {count} of {len(documents):,} documents, mode {mode}"
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{legend}"
    )
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    Path(to).write_text(page + "".join(body))


def _section(index: int, document: Document, encode: Callable[..., Encoded], tokenizer: Tokenizer) -> str:
    try:
        encoded = encode(document, draw=(index % 2) / 2)
    except ValueError as error:
        return f"<section><h2>{index}</h2>left out: {html.escape(str(error))}</section>"
    head = (
        f"{index}: {document.kind}, {len(encoded.tokens)} tokens, {len(encoded.see)} read, {len(encoded.dream)} painted"
    )
    return f"<section><h2>{head}</h2>{_body(encoded, tokenizer)}</section>"


def _body(encoded: Encoded, tokenizer: Tokenizer) -> str:
    pictures = {placed.at: ("see", placed.image) for placed in encoded.see}
    pictures |= {placed.at: ("dream", placed.image) for placed in encoded.dream}
    special = {value: name for name, value in vars(tokenizer.special).items()}
    parts = []
    for place, (token, weight) in enumerate(zip(encoded.tokens.tolist(), encoded.loss_weights.tolist(), strict=True)):
        if place in pictures:
            parts.append(_figure(*pictures[place]))
        if token == tokenizer.special.im_patch:
            continue
        piece = special.get(token) or tokenizer.fast.id_to_token(token).replace("▁", " ")
        kinds = " ".join(name for name, on in (("learned", weight > 0), ("special", token in special)) if on)
        parts.append(f'<span class="{kinds}">{html.escape(piece)}</span>')
    return "".join(parts)


def _figure(kind: str, image: Image) -> str:
    try:
        small = images.to_jpeg(images.decode(image.data), 112)
    except images.ImageError as error:
        return f"<figure class={kind}>[{kind}: {html.escape(str(error))}]</figure>"
    data = base64.b64encode(small).decode()
    return f'<figure class={kind}><img src="data:image/jpeg;base64,{data}"><br>{kind}</figure>'
