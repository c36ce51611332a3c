"""How the turns of a conversation are written: the templates by name, and what they make of a conversation."""

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from dreamllm_jax.data.document import Image, Segment, Text

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# That it is InternVL, and who made it.
INTERNVL_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)


@dataclasses.dataclass(frozen=True)
class Template:
    """Turns in plain text, each stretch of which between images and `</s>` is encoded by itself.

    Attributes:
      system: the system's text where a conversation brings none.
      first: what stands before the user's first words, with `{}` for the system's text, if there is any.
      user: what stands before the user's words otherwise.
      assistant: what follows them; a space stands between it and the answer, be that text or an image.
      end: what follows the assistant's text, before `</s>`.
      bos_each_turn: whether `<s>` begins every turn of the user, or only the first.
    """

    system: str
    first: str
    user: str
    assistant: str
    end: str
    bos_each_turn: bool


@dataclasses.dataclass(frozen=True)
class Said:
    """A stretch of text, taken literally. What stands between two special tokens is encoded as one."""

    text: str
    learn: bool = False


@dataclasses.dataclass(frozen=True)
class Control:
    """A special token, as the template writes it."""

    token: str
    learn: bool = False


Piece = Said | Control | Image
Turn = tuple[str, tuple[Segment, ...]]  # a role, and what it says: texts with images between


def turns_of(segments: Sequence[Segment]) -> list[Turn]:
    """The turns of a conversation; texts that follow each other in one are joined."""
    turns = []
    for role, said in groupby(segments, lambda segment: segment.role):
        parts: list[Segment] = []
        for segment in said:
            if isinstance(segment, Text) and parts and isinstance(parts[-1], Text):
                parts[-1] = Text(parts[-1].text + segment.text, role)
            else:
                parts.append(segment)
        turns.append((role, tuple(parts)))
    return turns


class ChatTemplate(Protocol):
    """A template that marks turns by special tokens."""

    end: str | None  # the token that ends the assistant's turns

    def pieces(self, turns: Sequence[Turn], opened: bool) -> list[Piece]:
        """What is written; the assistant's words are learned, and what ends its turns.

        Args:
          opened: the assistant is to go on: its last turn does not end, or a new one begins.

        Raises:
          TemplateError: the template does not write that conversation as it is.
        """


class TemplateError(ValueError):
    """A conversation that a template cannot write."""


@dataclasses.dataclass(frozen=True)
class ChatML:
    """`<|im_start|>role`, a new line, what is said, `<|im_end|>`, a new line: Qwen's, InternVL's, SmolLM's turns.

    Attributes:
      system: the system's text where a conversation brings none; empty for no turn of the system's.
      images_first: LLaVA-OneVision's way: a space follows the role, then the images, then each text in a new line; and
        no new line stands between turns.
    """

    system: str = ""
    images_first: bool = False
    start: str = "<|im_start|>"
    end: str = "<|im_end|>"

    def pieces(self, turns: Sequence[Turn], opened: bool) -> list[Piece]:
        if self.system and turns[0][0] != "system":
            turns = [("system", (Text(self.system, "system"),)), *turns]
        written: list[Piece] = []
        for role, said in turns:
            learn = role == "assistant"
            written += [Control(self.start), Said(f"{role} " if self.images_first else f"{role}\n")]
            if self.images_first and not learn:
                said = sorted(said, key=lambda segment: isinstance(segment, Text))
            elif self.images_first:
                written.append(Said("\n"))
            for segment in said:
                if isinstance(segment, Image):
                    written.append(segment)
                else:
                    line = "\n" if self.images_first and not learn else ""
                    written += [Said(line), Said(segment.text, learn)]
            written += [Control(self.end, learn), Said("" if self.images_first else "\n")]
        if opened and turns[-1][0] == "assistant":
            return written[:-2]
        return [*written, Control(self.start), Said("assistant\n")] if opened else written


TEMPLATES: dict[str, Template | ChatML] = {
    # FastChat's vicuna_v1.1.
    "vicuna_v1": Template(VICUNA_SYSTEM, "{} USER: ", "USER: ", " ASSISTANT:", "", False),
    # Llama 2 (Touvron et al. 2023), as its reference code writes dialogues.
    "llama_2": Template("", "[INST] <<SYS>>\n{}\n<</SYS>>\n\n", "[INST] ", " [/INST]", " ", True),
    # Of these the chat templates in their tokenizers' files, for turns without tools and thoughts.
    "chatml": ChatML(),  # Qwen3's, among others
    "qwen2": ChatML("You are a helpful assistant."),  # and Qwen2.5-VL's
    "qwen2_5": ChatML("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "internvl3": ChatML(INTERNVL_SYSTEM),  # its program's, `internvl2_5`
    "llava_onevision": ChatML(images_first=True),
    "smollm2": ChatML("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
}
CHAT_TEMPLATE = "chat_template"  # the one that comes with the tokenizer
NAMES = (*TEMPLATES, CHAT_TEMPLATE)
