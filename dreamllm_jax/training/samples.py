"""What a model makes of held-out documents while it is trained: pictures of their words, words for their pictures."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Document, Image, Segment, Text
from dreamllm_jax.data.settings import CorpusConfig
from dreamllm_jax.data.storage import Corpus, learnt
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.experiment.settings import SamplesConfig
from dreamllm_jax.generation.images import generate_images
from dreamllm_jax.generation.prompts import encode_prompts, require_fits
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.model import DreamLLM, DreamLLMConfig

_SEARCHED = 1000  # documents of a corpus that are looked at for some that can be asked


@dataclasses.dataclass(frozen=True)
class Question:
    """The beginning of a document, and what follows there: a text that is to be written, or an image to be painted.

    Attributes:
      name: of corpus, document and task.
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
    """What a document can be asked; nothing that the mode of its corpus leaves out of training.

    A conversation is asked for the assistant's first words, an edit for its last image. Of other documents the first
    image is asked for, given what stands before it, or else the text after it; and the text after it, given all up to
    the image.
    """
    segments, written = document.segments, config.mode != "creation"
    if document.kind in ("conversation", "instruct_interleaved"):
        prompt = tuple(itertools.takewhile(lambda segment: segment.role != "assistant", segments))
        if written and len(prompt) < len(segments) and isinstance(segments[len(prompt)], Text):
            yield Question(f"{name}/written", prompt, segments[len(prompt)], config.template)
        return
    if document.kind == "edit":
        *read, target = document.images
        if config.mode != "comprehension":
            yield Question(f"{name}/painted", (*read, *document.texts), target)
        return
    if document.kind == "pair":
        segments = (*document.images, *document.texts)  # in whichever order they are stored
    at = next((i for i, segment in enumerate(segments) if isinstance(segment, Image)), None)
    if at is None:
        return
    words = tuple(segment for segment in segments[at + 1 : at + 2] if isinstance(segment, Text))
    if config.mode != "comprehension" and (given := segments[:at] or words):
        yield Question(f"{name}/painted", given, segments[at])
    if written and words:
        yield Question(f"{name}/written", segments[: at + 1], words[0])


def find_questions(
    config: SamplesConfig,
    path: str,
    corpora: Mapping[str, CorpusConfig],
    model: DreamLLMConfig,
    tokenizer: Tokenizer,
) -> list[Question]:
    """Questions to the first held-out documents that have some which the model has room for.

    Args:
      path: the data set of held-out documents.
      corpora: which of its corpora, and how they are trained on; empty for all.

    Raises:
      FileNotFoundError: the data set or one of the corpora is not there.
      ValueError: no document can be asked.
    """

    def fits(question: Question) -> bool:
        try:
            paints = isinstance(question.answer, Image)
            batch = encode_prompts([question.prompt], tokenizer, model, question.template, asked=paints)
            require_fits(model, batch, max(config.max_tokens, model.num_queries + 2))
        except ValueError:  # an image that cannot be decoded is one
            return False
        return True

    corpora = dict(corpora) or {name: CorpusConfig() for name in learnt(path)}
    found: list[Question] = []
    for name, how in corpora.items():
        documents = Corpus(path, name).first(_SEARCHED)
        asked = (questions(f"{name}/{i}", document, how) for i, document in documents)
        fitting = filter(None, ([question for question in each if fits(question)] for each in asked))
        found += itertools.chain.from_iterable(itertools.islice(fitting, config.documents))
    if not found:
        raise ValueError(
            f"validation.samples.documents={config.documents}: no document of {', '.join(corpora)} in {path} has a "
            "picture and words, or a question, that fit into the model: set it to 0"
        )
    return found


def answer(
    asked: Sequence[Question],
    config: SamplesConfig,
    size: tuple[int, int],
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
) -> dict[str, Sample]:
    """The model's answers by the questions' names, the same whenever it is the same model; all hosts must call it.

    Args:
      size: height and width of the painted images in pixels.
    """

    def pixels(image: Image) -> np.ndarray:
        return model.config.image_decoder.preprocess(images.decode(image.data), *size)

    samples = {}
    if to_paint := [question for question in asked if isinstance(question.answer, Image)]:
        painted = generate_images(
            model,
            params,
            tokenizer,
            [question.prompt for question in to_paint],
            seeds=range(len(to_paint)),
            size=size,
            sampler=SamplerConfig(steps=config.steps),
            guidance=config.guidance,
            guidance_interval=config.guidance_interval,
        )
        for question, picture in zip(to_paint, np.asarray(painted), strict=True):
            beside = np.concatenate([pixels(question.answer), picture], axis=1)
            samples[question.name] = Sample(_words(question.prompt), beside)
    to_write = [question for question in asked if isinstance(question.answer, Text)]
    for template in dict.fromkeys(question.template for question in to_write):
        those = [question for question in to_write if question.template == template]
        prompts = [question.prompt for question in those]
        texts = generate_texts(model, params, tokenizer, prompts, max_tokens=config.max_tokens, template=template)
        for question, text in zip(those, texts, strict=True):
            seen = [segment for segment in question.prompt if isinstance(segment, Image)]
            words = f"{_words(question.prompt)}\n\n**Document:** {question.answer.text}\n\n**Model:** {text}"
            samples[question.name] = Sample(words.strip(), pixels(seen[-1]) if seen else None)
    return samples


def _words(segments: Sequence[Segment]) -> str:
    return " ".join(segment.text if isinstance(segment, Text) else "🖼" for segment in segments)
