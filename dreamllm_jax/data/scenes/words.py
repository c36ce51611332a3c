"""Scenes to words and back: captions, questions with their answers, and changes of a scene."""

import dataclasses
import re

from dreamllm_jax.data.scenes.world import COLOURS, KINDS, RELATIONS, SIZES, Group, Scene, looks

NUMBERS = ("a", "two", "three", "four")
COUNTED = ("One", "Two", "Three", "Four")  # as answers have them
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


def _are(group: Group) -> str:
    return f"the {named(group)} {'are' if group.count > 1 else 'is'}"


def questions(scene: Scene) -> list[tuple[str, str]]:
    """What can be asked of a scene, each with its answer."""
    found = [("What do you see?", f"{caption(scene)}.")]
    for group in scene.groups:
        found.append((f"How many {group.kind}s are there?", f"{COUNTED[group.count - 1]}."))
        found.append((f"Which colour {'are' if group.count > 1 else 'is'} the {named(group)}?", f"{group.colour}."))
    if scene.relation:
        first, second = scene.groups
        found.append((f"What is {scene.relation} the {named(second)}?", f"{told(first)}."))
        if scene.relation == "left of":
            found.append((f"What is right of the {named(first)}?", f"{told(second)}."))
    return found


def changes(scene: Scene) -> list[tuple[str, Scene]]:
    """What can happen to a scene, in words, and the scene after it; whether that is held out is not asked."""
    found = []
    for place, group in enumerate(scene.groups):
        beside = {other.colour for other in scene.groups if other != group}
        for colour in COLOURS:
            if colour != group.colour and colour not in beside:
                changed = dataclasses.replace(group, colour=colour)
                found.append((f"Now {_are(group)} {colour}.", _with(scene, place, changed)))
        for count, size in looks(scene.relation, place):
            if count != group.count:
                changed = dataclasses.replace(group, count=count, size=size)
                there = "there are" if count > 1 else "there is"
                found.append((f"Now {there} {_counted(changed)}.", _with(scene, place, changed)))
    if scene.relation:
        first, second = scene.groups
        found.append((f"Now {_are(first)} gone.", Scene((dataclasses.replace(second, size=""),))))
        if scene.relation != "inside":
            found.append(("Now they have changed places.", Scene((second, first), scene.relation)))
    return found


def _counted(group: Group) -> str:
    return " ".join(word for word in (NUMBERS[group.count - 1], group.size, named(group)) if word)


def _with(scene: Scene, place: int, group: Group) -> Scene:
    groups = list(scene.groups)
    groups[place] = group
    return dataclasses.replace(scene, groups=tuple(groups))
