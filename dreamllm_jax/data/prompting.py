"""How a model is asked to paint: the words around a caption, or around an instruction and the images that it is about.

OpenUni (arXiv 2505.23661), MetaQuery (arXiv 2504.06256) and UniLIP (arXiv 2507.23278) ask in a conversation, of which
the assistant's turn begins with the picture; DreamLLM's captions stand alone.
"""

import dataclasses
from collections.abc import Sequence

from dreamllm_jax.data.document import Image, Segment, Text
from dreamllm_jax.data.templates import NAMES


@dataclasses.dataclass(frozen=True)
class Prompting:
    """Captions and edits as the user's turn. `{text}` is where the caption or the instruction stands, `{image}` where
    the images do.

    Attributes:
      template: of the conversation, one of `templates.NAMES`.
      system: the system's words; empty for the template's own.
      paint: of a caption.
      paint_null: of none, from which guidance leads away.
      edit: of an instruction with images.
      edit_null: of images alone.
      answer: what the assistant says before the picture.
      max_tokens: where a caption or an instruction is cut; 0 where it still fits the row.
    """

    template: str
    system: str = ""
    paint: str = "{text}"
    paint_null: str = ""
    edit: str = "{image}{text}"
    edit_null: str = "{image}"
    answer: str = ""
    max_tokens: int = 0

    def __post_init__(self):
        if self.template not in NAMES:
            raise ValueError(f"prompting.template must be one of {', '.join(NAMES)}, got {self.template!r}")
        for name, places in (
            ("paint", ("{text}",)),
            ("edit", ("{text}", "{image}")),
            ("paint_null", ()),
            ("edit_null", ("{image}",)),
        ):
            text = getattr(self, name)
            for place in ("{text}", "{image}"):
                if text.count(place) != places.count(place):
                    there = " and ".join(places) or "neither {text} nor {image}"
                    raise ValueError(f"prompting.{name} must have {there}, once, got {text!r}")
        if self.max_tokens < 0:
            raise ValueError(f"prompting.max_tokens must not be negative, got {self.max_tokens}")

    def turns(self, text: str | None, images: Sequence[Image] = ()) -> tuple[Segment, ...]:
        """What is said to the model: the system's words, if they are other ones than the template's, and the user's.

        Args:
          text: a caption or, with images, an instruction; None for neither, as where guidance leads away from.
        """
        words = (self.edit_null if images else self.paint_null) if text is None else self.edit if images else self.paint
        parts = [part.replace("{text}", text or "") for part in words.split("{image}")]
        said: list[Segment] = [Text(parts[0], "user")] if parts[0] else []
        said += [dataclasses.replace(image, role="user") for image in images]
        said += [Text(part, "user") for part in parts[1:] if part]
        if not any(isinstance(segment, Text) for segment in said):
            said.append(Text("", "user"))
        return (Text(self.system, "system"), *said) if self.system else tuple(said)


PUBLISHED = {
    "openuni": Prompting(
        "chatml",
        paint="Generate an image: {text}",
        paint_null="Generate an image.",
        edit="{image}\n{text}",
        edit_null="{image}\nKeep the image as it is.",
        max_tokens=128,
    ),
    "metaquery": Prompting(
        "qwen2",  # llava_onevision over LLaVA-OneVision
        system="You will be given an image or its caption. Please describe the content of the image in detail in your "
        "own words.",
        answer="\n",
        max_tokens=256,
    ),
    "unilip": Prompting(
        "chatml",
        paint="Generate an image: {text}",
        paint_null="Generate an image.",
        edit="Edit the image: {text}\n{image}",
        edit_null="Edit the image.\n{image}",
    ),
}
