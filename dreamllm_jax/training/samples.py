"""What a model makes of held-out documents while it is trained: pictures of their words, words for their pictures."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Document, Image, Segment, Text
from dreamllm_jax.data.mixture import CorpusConfig
from dreamllm_jax.data.storage import Corpus, read_summary
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.generation.images import generate_images
from dreamllm_jax.generation.prompts import encode_prompts, length_of, require_room
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.models.dreamllm import DreamLLM

_SEARCHED = 1000  # documents of a corpus that are looked at for some that can be asked


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """What to let the model make at each look at held-out documents.

    Attributes:
      documents: of each corpus, the first ones with a picture and words, or with a question; 0 for none.
      max_tokens: longest text to write.
      steps, guidance: of painting.
    """

    documents: int = 0
    max_tokens: int = 64
    steps: int = 25
    guidance: float = 3.5

    def __post_init__(self):
        for name, least in (("documents", 0), ("max_tokens", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Question:
    """The beginning of a document, and what follows there: a text that is to be written, or an image to be painted.

    Attributes:
      name: for the log.
      template: of a conversation.
    """

    name: str
    prompt: tuple[Segment, ...]
    answer: Segment
    template: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question, answered by the model.

    Attributes:
      text: Markdown: the words of the question, and of both answers where they are texts.
      picture: u8[H, W, 3]: the image asked about; or the document's and the painted one side by side; None where there
        is none.
    """

    text: str
    picture: np.ndarray | None


def questions(name: str, document: Document, config: CorpusConfig) -> Iterator[Question]:
    """What a document can be asked; none where its corpus is not trained on for it.

    A conversation is asked for the assistant's first words. Of other documents the first image is asked for, given what
    stands before it, or else the text after it; and the text after it, given all up to the image.
    """
    segments = document.segments
    if document.kind in ("conversation", "instruct_interleaved"):
        prompt = tuple(itertools.takewhile(lambda segment: segment.role != "assistant", segments))
        if len(prompt) < len(segments) and isinstance(segments[len(prompt)], Text):
            yield Question(f"{name}/written", prompt, segments[len(prompt)], config.template)
        return
    if document.kind == "pair":
        segments = (*document.images, *document.texts)  # in whichever order they are stored
    at = next((i for i, segment in enumerate(segments) if isinstance(segment, Image)), None)
    if at is None:
        return
    words = tuple(segment for segment in segments[at + 1 : at + 2] if isinstance(segment, Text))
    if config.mode != "comprehension" and (given := segments[:at] or words):
        yield Question(f"{name}/painted", given, segments[at])
    if config.mode != "creation" and words:
        yield Question(f"{name}/written", segments[: at + 1], words[0])


class Sampler:
    """Lets a model answer the same questions again and again.

    Args:
      path: the data set of held-out documents.
      corpora: which of its corpora, and how they are trained on; empty for all.
      size: side of the painted images in pixels.

    Raises:
      FileNotFoundError: the data set or one of the corpora is not there.
      ValueError: no document is fit to be asked.
    """

    def __init__(
        self,
        config: SamplesConfig,
        path: str,
        corpora: Mapping[str, CorpusConfig],
        model: DreamLLM,
        tokenizer: Tokenizer,
        size: int,
    ):
        self._config, self._model, self._tokenizer, self._size = config, model, tokenizer, size
        corpora = dict(corpora) or {name: CorpusConfig() for name in sorted(read_summary(path)["corpora"])}
        found: list[Question] = []
        for name, how in corpora.items():
            corpus = Corpus(path, name)
            those = (list(questions(f"{name}/{i}", corpus[i], how)) for i in range(min(len(corpus), _SEARCHED)))
            fit = filter(None, ([question for question in each if self._fits(question)] for each in those))
            found += itertools.chain.from_iterable(itertools.islice(fit, config.documents))
        if not found:
            raise ValueError(
                f"validation.samples.documents={config.documents}: no document of {', '.join(corpora)} in {path} has a "
                "picture and words, or a question, that fit into the model: set it to 0"
            )
        self._to_paint = [question for question in found if isinstance(question.answer, Image)]
        self._to_write: dict[str, list[Question]] = {}
        for question in found:
            if isinstance(question.answer, Text):
                self._to_write.setdefault(question.template, []).append(question)

    def __call__(self, params: dict) -> dict[str, Sample]:
        """The answers by the questions' names; all hosts must call it."""
        config, common = self._config, (self._model, params, self._tokenizer)
        samples = {}
        if self._to_paint:
            painted = generate_images(
                *common,
                [question.prompt for question in self._to_paint],
                seeds=range(len(self._to_paint)),
                size=self._size,
                sampler=SamplerConfig(steps=config.steps),
                guidance=config.guidance,
            )
            for question, picture in zip(self._to_paint, np.asarray(painted), strict=True):
                true = self._pixels(question.answer)
                samples[question.name] = Sample(_words(question.prompt), np.concatenate([true, picture], axis=1))
        for template, asked in self._to_write.items():
            prompts = [question.prompt for question in asked]
            written = generate_texts(*common, prompts, max_tokens=config.max_tokens, template=template)
            for question, text in zip(asked, written, strict=True):
                seen = [segment for segment in question.prompt if isinstance(segment, Image)]
                words = f"{_words(question.prompt)}\n\n**Document:** {question.answer.text}\n\n**Model:** {text}"
                samples[question.name] = Sample(words.strip(), self._pixels(seen[-1]) if seen else None)
        return samples

    def _fits(self, question: Question) -> bool:
        try:
            batch = encode_prompts([question.prompt], self._tokenizer, self._model.config, question.template)
            new = max(self._config.max_tokens, self._model.config.num_queries + 2)
            require_room(self._model.config, length_of(batch), new)
        except ValueError:  # an image that cannot be decoded is one
            return False
        return True

    def _pixels(self, image: Image) -> np.ndarray:
        return images.diffusion_pixels(images.decode(image.data), self._size)


def _words(segments: tuple[Segment, ...]) -> str:
    return " ".join(segment.text if isinstance(segment, Text) else "🖼" for segment in segments)
