"""Conversations about images, in LLaVA's layout and with the original program's additions to it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dreamllm_jax.data.corpora import media, pictures
from dreamllm_jax.data.corpora.records import Dropped, Part, Record
from dreamllm_jax.data.document import Image, Role, Text

ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "obj365": "assistant",
    "vg": "assistant",
    "system": "system",
}
PLACEHOLDERS: dict[str, Role] = {"<image>": "user", "<dream>": "assistant"}

_OTHER_PLACES = re.compile(
    r"^\s*<(video|audio|sound|speech|point)>(\s*$|(?=[A-Z]))", re.MULTILINE
)  # no tag in a sentence


@dataclasses.dataclass(frozen=True)
class Llava(pictures.ImageTable):
    """Turns of `from` and `value` in `conversations`, and one or several files in `image`.

    `<image>` in a user's turn is an image to read, `<dream>` in an assistant's one to paint. The files may also stand
    in `images`. A turn may name its own images: `"modal_info": {"<image>": ["image", [file, ...]]}`. Conversations
    without images are fine, those about videos or sounds are left out.
    """

    def record(self, row: Mapping[str, Any], part: Part) -> Record | Dropped:
        turns = row.get("conversations")
        if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
            return Dropped("fields")
        if media.tells(row, media.OTHERS) or (row.get("image") and row.get("images")):
            return Dropped("fields")
        if any(_OTHER_PLACES.search(turn["value"]) for turn in turns):
            return Dropped("placeholders")
        while turns and ROLES[turns[0]["from"]] == "assistant":  # nothing has been asked yet
            turns = turns[1:]
        answers = [turn["value"] for turn in turns if ROLES[turn["from"]] == "assistant"]
        if not answers or not all(answer.strip() for answer in answers):
            return Dropped("no_text")
        named = row.get("image") or row.get("images")
        # One image may be referred to several times, several are taken in their order.
        files = iter(named) if isinstance(named, list) else None
        segments: list[Text | Image | Dropped] = []
        shown = 0
        for turn in turns:
            role = ROLES[turn["from"]]
            own = {name: iter(info[1]) for name, info in turn.get("modal_info", {}).items()}
            if own.keys() - PLACEHOLDERS.keys():
                return Dropped("fields")
            for piece in re.split("(<image>|<dream>)", turn["value"]):
                if piece not in PLACEHOLDERS:
                    if piece:
                        segments.append(Text(piece, role))
                    continue
                if PLACEHOLDERS[piece] != role:
                    return Dropped("placeholders")
                file = next(own[piece], None) if piece in own else next(files, None) if files else named
                if file is None:
                    return Dropped("placeholders")
                image = self.read(file, part)
                segments.append(dataclasses.replace(image, role=role) if isinstance(image, Image) else image)
                shown += 1
            if any(next(rest, None) is not None for rest in own.values()):
                return Dropped("placeholders")
        if (named and not shown) or (files and next(files, None) is not None):
            return Dropped("placeholders")
        if not shown and media.tells(row, media.IMAGES):
            return Dropped("fields")
        return Record("conversation", tuple(segments))


def _is_turn(turn: object) -> bool:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("from", "value")):
        return False
    if turn["from"] not in ROLES:
        return False
    infos = turn.get("modal_info", {})
    return isinstance(infos, dict) and all(
        isinstance(info, list) and len(info) == 2 and isinstance(info[1], list) for info in infos.values()
    )
