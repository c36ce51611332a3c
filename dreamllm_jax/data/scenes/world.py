"""A small world with exact answers: scenes of one or two groups of things, and which of them are held out.

A scene is a few facts; its picture (`drawing`) and its words (`words`) follow from them, so that what a model paints or
writes is right or wrong.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator

KINDS = ("apple", "bell", "book", "cat", "crown", "drop", "gift", "heart", "key", "mushroom", "shirt", "star")
COLOURS = ("red", "grey", "yellow", "green", "blue", "purple")
COUNTS = (1, 2, 3, 4)
SIZES = ("small", "big")  # of a single thing beside others; more of them are of one size
RELATIONS = ("left of", "above", "inside")  # of the first group to the second; "right of" is told of the same picture
INSIDE = (1, 2)  # how many fit inside of another

# What is held out: one kind in each colour, three of anything with two of another, and mushrooms above anything.
APART = (
    ("red", "key"),
    ("grey", "heart"),
    ("yellow", "cat"),
    ("green", "star"),
    ("blue", "apple"),
    ("purple", "crown"),
)
COUNTED = {2, 3}
NEVER_ABOVE = "mushroom"


@dataclasses.dataclass(frozen=True, order=True)
class Group:
    """Things that are alike. `size` is "" where it is not told: of several, and of one alone, inside or around."""

    count: int
    size: str
    colour: str
    kind: str


@dataclasses.dataclass(frozen=True, order=True)
class Scene:
    """One group and no relation, or two groups of different kinds and colours, and how the first is to the second."""

    groups: tuple[Group, ...]
    relation: str = ""


def held_out(scene: Scene) -> set[str]:
    """Which of the rules "colour", "count" and "relation" keep a scene from being learnt; none of most scenes."""
    rules = {"colour"} if any((group.colour, group.kind) in APART for group in scene.groups) else set()
    if {group.count for group in scene.groups} == COUNTED:
        rules.add("count")
    if scene.relation == "above" and scene.groups[0].kind == NEVER_ABOVE:
        rules.add("relation")
    return rules


def looks(relation: str, place: int) -> list[tuple[int, str]]:
    """The (count, size) that a scene's first (0) or second (1) group may have in a relation."""
    if relation == "inside":
        return [(1, "")] if place else [(count, "") for count in INSIDE]
    if relation:
        return [(1, size) for size in SIZES] + [(count, "") for count in COUNTS[1:]]
    return [(count, "") for count in COUNTS]


def every_scene() -> Iterator[Scene]:
    """All scenes that there are: some four hundred thousand."""
    things = list(itertools.product(COLOURS, KINDS))
    for count, size in looks("", 0):
        for colour, kind in things:
            yield Scene((Group(count, size, colour, kind),))
    for relation in RELATIONS:
        for (count, size), (others, other_size) in itertools.product(looks(relation, 0), looks(relation, 1)):
            for (colour, kind), (other_colour, other_kind) in itertools.product(things, things):
                if colour != other_colour and kind != other_kind:
                    first, second = (
                        Group(count, size, colour, kind),
                        Group(others, other_size, other_colour, other_kind),
                    )
                    yield Scene((first, second), relation)


SHARES = {"": 0.2, "left of": 0.4, "above": 0.2, "inside": 0.2}


def draw_scene(rng: random.Random) -> Scene:
    """A scene, held out or not."""
    (relation,) = rng.choices(list(SHARES), list(SHARES.values()))
    colours, kinds = rng.sample(COLOURS, 2), rng.sample(KINDS, 2)
    places = range(2 if relation else 1)
    groups = tuple(Group(*_look(rng, relation, place), colours[place], kinds[place]) for place in places)
    return Scene(groups, relation)


def _look(rng: random.Random, relation: str, place: int) -> tuple[int, str]:
    count = rng.choice(sorted({count for count, _ in looks(relation, place)}))
    return rng.choice([look for look in looks(relation, place) if look[0] == count])
