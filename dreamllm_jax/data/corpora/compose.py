"""Captioned pictures to documents of every kind."""

import random
from collections.abc import Sequence

from PIL import ImageOps

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Document, Image, Kind, Segment, Text

QUESTIONS = ("What is in the picture?", "What do you see?", "Name what this shows.")
REQUESTS = ("Paint this: {}.", "Show me: {}.", "Make a picture of this: {}.")
ANSWER = "Here it is:"
INSTRUCTION = "Show these one after the other: {}."

# What is done to a picture, and what that is called.
EDITS = ((ImageOps.mirror, "Mirror it."), (ImageOps.flip, "Turn it upside down."), (ImageOps.invert, "Invert it."))

CORPORA = ("pairs", "image_image", "edits", "interleaved", "instructions", "conversations", "text")


def compose(
    pairs: Sequence[tuple[bytes, str]], seed: int = 0, names: Sequence[str] = CORPORA
) -> dict[str, list[Document]]:
    """Documents of all kinds from (encoded image, caption) pairs, by the name of their corpus; or those of `names`.

    The corpora are `pairs`, `image_image` (a picture and its mirror image), `edits` (a picture, what is to be done to
    it, and the result), `interleaved` (two or three captions, each
    followed by its picture), `instructions` (the same on the user's demand), `conversations` (asking about a picture
    and asking for one) and `text`.
    """
    rng = random.Random(seed)
    corpora: dict[str, list[Document]] = {name: [] for name in CORPORA}

    def add(name: str, kind: Kind, *segments: Segment) -> None:
        corpora[name].append(Document(kind, segments))

    for index, (data, caption) in enumerate(pairs):
        add("pairs", "pair", Text(caption), Image(data))
        if "image_image" in names:
            mirrored = images.to_png(ImageOps.mirror(images.decode(data)))
            add("image_image", "image_image", Image(data), Image(mirrored))
        if "edits" in names:
            change, instruction = EDITS[index % len(EDITS)]
            changed = images.to_png(change(images.decode(data)))
            add("edits", "edit", Image(data), Text(instruction), Image(changed))
        others = [pair for pair in pairs if pair[1] != caption]
        story = [(data, caption), *rng.sample(others, min(1 + index % 2, len(others)))]
        add("interleaved", "interleaved", *_tell(story, ""))
        listed = " and ".join(text for _, text in story)
        instruction = Text(INSTRUCTION.format(listed), "user")
        add("instructions", "instruct_interleaved", instruction, *_tell(story, "assistant"))
        question = Image(data, "user"), Text(f"\n{QUESTIONS[index % len(QUESTIONS)]}", "user")
        add("conversations", "conversation", *question, Text(f"{caption}.", "assistant"))
        request = Text(REQUESTS[index % len(REQUESTS)].format(caption), "user")
        add("conversations", "conversation", request, Text(f"{ANSWER} ", "assistant"), Image(data, "assistant"))
        add("text", "text", Text(f"Here are {listed}."))
    return {name: corpora[name] for name in names}


def _tell(story: Sequence[tuple[bytes, str]], role: str) -> tuple[Segment, ...]:
    return tuple(segment for data, text in story for segment in (Text(f"{text}.", role), Image(data, role)))
