"""Scenes to words and back: captions, questions with their answers, and changes of a scene."""

import random
import re

from dreamllm_jax.scenes.world import COLOURS, KINDS, RELATIONS, SIZES, Group, Scene

NUMBERS = ("a", "two", "three", "four")
TOLD = (*RELATIONS, "right of")
_THING = rf"({'|'.join(NUMBERS)})(?: ({'|'.join(SIZES)}))? ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})(s?)"
_CAPTION = re.compile(rf"{_THING}(?: ({'|'.join(TOLD)}) {_THING})?")


def told(group: Group) -> str:
    """As `two red keys`, `a small red key`."""
    words = [NUMBERS[group.count - 1], group.size, group.colour, named(group)]
    return " ".join(word for word in words if word)


def named(group: Group) -> str:
    """Its kind, as one or several."""
    return group.kind + ("s" if group.count > 1 else "")


def caption(scene: Scene, turned: bool = False) -> str:
    """The scene in words; `turned`: what is left of another is told as that which the other is right of."""
    first, *others = map(told, scene.groups)
    if not others:
        return first
    if turned and scene.relation == "left of":
        return f"{others[0]} right of {first}"
    return f"{first} {scene.relation} {others[0]}"


def parse(text: str) -> Scene | None:
    """The scene that a caption tells; None if it is none, or tells what there cannot be."""
    found = _CAPTION.fullmatch(text.strip().rstrip("."))
    if not found:
        return None
    parts = found.groups()
    groups = [_group(*parts[:5])]
    relation = parts[5] or ""
    if relation:
        groups.append(_group(*parts[6:]))
    if relation == "right of":
        groups, relation = groups[::-1], "left of"
    if None in groups:
        return None
    return Scene(tuple(group for group in groups if group), relation)


def _group(number: str, size: str | None, colour: str, kind: str, plural: str) -> Group | None:
    count = NUMBERS.index(number) + 1
    return Group(count, size or "", colour, kind) if bool(plural) == (count > 1) else None
