"""Scenes as documents of every kind: what is learnt, and what is held out of all of it."""

import random
from collections.abc import Iterator, Sequence

from PIL import Image as Picture

from dreamllm_jax.data import images
from dreamllm_jax.data.corpora.compose import ANSWER, REQUESTS
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.scenes.drawing import SIDE, draw
from dreamllm_jax.data.scenes.words import caption, changes, questions
from dreamllm_jax.data.scenes.world import Scene, draw_scene, held_out

HELD_OUT = "unseen"  # the corpus of scenes that are held out,
UNSEEN = 300  # of which so many are drawn, to be asked for
DEFAULT = 8000  # scenes that are learnt


def compose(count: int, size: int = SIDE, seed: int = 0) -> dict[str, list[Document]]:
    """Documents of `count` scenes, none of them held out, by the name of their corpus; pictures of `size` pixels.

    The corpora are `pairs` (each scene once, with its caption), `interleaved` (a scene, a change of it told in words,
    the changed scene, and so on twice), `edits` (a scene, a change and the changed scene), `conversations` (questions
    about a scene, and a wish for its picture), `text` (captions and what may happen) and `unseen` (pairs of
    `UNSEEN` scenes that are held out).

    Raises:
      ValueError: there are not so many scenes; a size that cannot be drawn.
    """
    rng = random.Random(seed)
    seen, unseen = _draw(rng, count)
    some = seen[: max(count // 4, 1)]
    stories = [_story(rng, scene, 2) for scene in some]
    return {
        "pairs": [_pair(rng, scene, size) for scene in seen],
        "interleaved": [Document("interleaved", tuple(_told(story, size))) for story in stories],
        "edits": [_edit(_story(rng, scene, 1), size) for scene in some],
        "conversations": [document for scene in some for document in _conversations(rng, scene, size)],
        "text": [Document("text", (Text(" ".join(text for text, _ in story)),)) for story in stories],
        HELD_OUT: [_pair(rng, scene, size) for scene in unseen],
    }


def texts(corpora: dict[str, list[Document]]) -> list[str]:
    """All that is told in what is learnt: for a tokenizer."""
    return [text.text for name, some in corpora.items() if name != HELD_OUT for one in some for text in one.texts]


def _draw(rng: random.Random, count: int) -> tuple[list[Scene], list[Scene]]:
    seen: dict[Scene, None] = {}
    unseen: dict[Scene, None] = {}
    tries = 0
    while len(seen) < count or len(unseen) < UNSEEN:
        tries += 1
        if tries > 100 * (count + UNSEEN):
            raise ValueError(f"there are not {count:,} scenes to learn: about {len(seen):,}")
        scene = draw_scene(rng)
        some, most = (unseen, UNSEEN) if held_out(scene) else (seen, count)
        if len(some) < most:
            some[scene] = None
    return list(seen), list(unseen)


def _picture(scene: Scene, size: int, role: str = "") -> Image:
    return Image(images.to_png(Picture.fromarray(draw(scene, size))), role)


def _pair(rng: random.Random, scene: Scene, size: int) -> Document:
    return Document("pair", (Text(caption(scene, rng.random() < 0.5)), _picture(scene, size)))


def _story(rng: random.Random, scene: Scene, length: int) -> list[tuple[str, Scene]]:
    """Sentences, each with the scene as it is then."""
    story = [(f"{caption(scene)}.", scene)]
    for _ in range(length):
        following = [(text, after) for text, after in changes(story[-1][1]) if not held_out(after)]
        story.append(rng.choice(following))
    return story


def _told(story: Sequence[tuple[str, Scene]], size: int) -> Iterator[Text | Image]:
    for text, scene in story:
        yield Text(text)
        yield _picture(scene, size)


def _edit(story: Sequence[tuple[str, Scene]], size: int) -> Document:
    (_, before), (change, after) = story
    return Document("edit", (_picture(before, size), Text(change), _picture(after, size)))


def _conversations(rng: random.Random, scene: Scene, size: int) -> Iterator[Document]:
    question, answer = rng.choice(questions(scene))
    asked = _picture(scene, size, "user"), Text(f"\n{question}", "user")
    yield Document("conversation", (*asked, Text(answer, "assistant")))
    wish = Text(rng.choice(REQUESTS).format(caption(scene, rng.random() < 0.5)), "user")
    yield Document("conversation", (wish, Text(f"{ANSWER} ", "assistant"), _picture(scene, size, "assistant")))
