"""What a model says about images: the paper's benchmarks with the original program's prompts."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from etils import epath

from dreamllm_jax.data.document import Image, Segment, Text
from dreamllm_jax.data.images import ImageError
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.evaluation import anls, annotations, pope, scores, vqa_accuracy
from dreamllm_jax.evaluation.annotations import Question
from dreamllm_jax.evaluation.hosts import compute
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.model import DreamLLM

TEMPLATE = "vicuna_v1"
BEAMS, MAX_TOKENS = 5, 1024  # the original's
_ANSWERABLE = "Is the answer can be known?"  # sic

# The model's answers, and what the annotators said -> metrics, as `scores.summary` takes them.
Rating = Callable[[Sequence[str], Sequence[Sequence[str]]], Mapping[str, Any]]


def _short(answer: str) -> str:
    return answer.replace(".", "").replace('"', "").split(",")[0].lower()


def _unless_unanswerable(question: Question, said: str) -> Question | None:
    return None if "no" in said.lower() else question


def _perhaps_with_options(question: Question, said: str) -> Question:
    given = [question.record[letter] for letter in "ABCDE" if question.record.get(letter)]
    options = "Options: " + "".join(f"({number}). {option} " for number, option in enumerate(given))
    return _asking(question, options if said.lower().startswith("no") else "")


def _asking(question: Question, words: str) -> Question:
    return dataclasses.replace(question, text=question.text + words)


def _each(metric: str, rate: Callable[[str, Sequence[str]], float]) -> Rating:
    return lambda answers, known: {metric: [rate(*pair) for pair in zip(answers, known, strict=True)]}


def _pope(answers: Sequence[str], known: Sequence[Sequence[str]]) -> Mapping[str, Any]:
    present = [label == "yes" for (label,) in known]
    right = [pope.says_yes(answer) == there for answer, there in zip(answers, present, strict=True)]
    return {**pope.scores(answers, present), "accuracy": right}


def _cider(answers: Sequence[str], known: Sequence[Sequence[str]]) -> Mapping[str, Any]:
    try:
        from dreamllm_jax.evaluation.cider import cider
    except ModuleNotFoundError as error:
        raise ImportError(f"CIDEr needs {error.name}: pip install 'dreamllm_jax[evaluation]'") from None
    return {"cider": cider(answers, known)}


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      read: its annotations.
      score: of the answers, if they are not scored elsewhere.
      submission: what its server wants: (identity, answer) pairs under these names, all in one mapping, or a table.
      before, after: the original's words before the image and after the question.
      opening: with which it has the answer begin.
      reconsider: where it first asks if the question can be answered: the question after the answer to that, if any.
      clean: what is made of an answer.
      beams: as the original searches; it draws where this is 1, at temperature 0.2, and we take the most probable.
      needs: packages of the extra `evaluation` that score it or write its submission.
    """

    read: Callable[[Sequence[Path], Path], list[Question]]
    score: Rating | None = None
    submission: tuple[str, str] | Literal["mapping", "table"] = ("question_id", "answer")
    before: str = ""
    after: str = ""
    opening: str = ""
    reconsider: Callable[[Question, str], Question | None] | None = None
    clean: Callable[[str], str] = str
    beams: int = BEAMS
    needs: tuple[str, ...] = ()


_ANSWER = "Based on the image, please answer the question."
_ONE_WORD = "Please provide an accurate answer within one word."
_CIDER = ("nltk", "pycocoevalcap")
_VQA = Task(
    annotations.vqa,
    _each("accuracy", vqa_accuracy.accuracy),
    before=_ANSWER,
    after=_ONE_WORD,
    opening="The short answer (one word) is:",
    clean=_short,
)
_CAPTION = Task(
    annotations.captions,
    _cider,
    ("image_id", "caption"),
    before="Based on the image, give the image caption briefly.",
    after="Please summarize object in one sentence within 10 words.",
    opening="The image depicts",
    clean=str.capitalize,
    needs=_CIDER,
)

TASKS: Mapping[str, Task] = {
    "vqav2": _VQA,
    "okvqa": dataclasses.replace(_VQA, before="", after="Please provide an accurate and brief answer within one word."),
    "vizwiz": dataclasses.replace(
        _VQA,
        read=annotations.vizwiz,
        submission=("image", "answer"),
        opening="The answer is:",
        reconsider=_unless_unanswerable,
    ),
    "textvqa": dataclasses.replace(_VQA, read=annotations.textvqa, opening="The answer is:"),
    "docvqa": Task(annotations.docvqa, _each("anls", anls.similarity), ("questionId", "answer")),
    "pope": Task(
        annotations.pope,
        _pope,
        before="Based on the image, please objectively and accurately indicate whether the object exists.",
        opening="The answer is:",
        beams=1,
    ),
    "coco_caption": _CAPTION,
    "i2paragraph": dataclasses.replace(
        _CAPTION,
        read=annotations.paragraphs,
        before="Based on the image, please describe the image in detail.",
        after="Please describe the image in detail.",
    ),
    "mmvet": Task(
        annotations.mmvet,
        submission="mapping",
        before="This is an exam, please answer according to the image and question.",
        after="Please provide an accurate, detailed and comprehensive answer.",
    ),
    "mmbench": Task(
        annotations.mmbench,
        submission="table",
        before="This is an exam, please answer according to the image, hint and question.",
        after="Please provide an accurate and detailed answer.",
        reconsider=_perhaps_with_options,
        needs=("openpyxl",),
    ),
}


def require_packages(name: str) -> None:
    """Looks for what a task needs beside the core, before anything is loaded.

    Raises:
      ImportError: it is not installed.
    """
    for package in TASKS[name].needs:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{name} needs {package}: pip install 'dreamllm_jax[evaluation]'")


def most_tokens(model: DreamLLM) -> int:
    """How long answers may become: as the original's, but never more than half of what the model reads."""
    return min(MAX_TOKENS, model.config.language_model.max_position_embeddings // 2)


def prompt(task: Task, question: Question, template: str = TEMPLATE) -> list[Segment]:
    """What the model is given; with a template the opening is the beginning of its own turn."""
    said = [Text(task.before), Image(question.read_image()), Text(question.text + task.after)]
    opening = [Text(task.opening, "assistant" if template else "")]
    return [one for one in [*said, *opening] if isinstance(one, Image) or one.text]


def answer(
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    *,
    batch: int,
    beams: int = BEAMS,
    max_tokens: int = MAX_TOKENS,
    template: str = TEMPLATE,
) -> list[str]:
    """The model's answers, searched with `beams` or, with 1, greedily; all hosts must call it.

    Raises:
      ValueError: a question too long for the model, with the image and `max_tokens`.
      ImageError: an image cannot be decoded.
    """

    def ask(task: Task, questions: Sequence[Question]) -> list[str]:
        def some(questions: Sequence[Question]) -> list[str]:
            prompts = [prompt(task, question, template) for question in questions]
            try:
                return generate_texts(
                    model, params, tokenizer, prompts, max_tokens=max_tokens, beams=beams, template=template
                )
            except ImageError:
                for question in questions:
                    question.require_image()
                raise

        return compute(some, questions, batch=batch, length=lambda question: len(question.text))

    asked: Sequence[Question | None] = questions
    if task.reconsider is not None:
        first = ask(Task(task.read), [_asking(question, _ANSWERABLE) for question in questions])
        asked = [task.reconsider(question, said) for question, said in zip(questions, first, strict=True)]
    told = iter(ask(task, [question for question in asked if question is not None]))
    return ["unanswerable" if question is None else task.clean(next(told)) for question in asked]


def score(
    name: str, answers: Sequence[str], questions: Sequence[Question], checkpoint: scores.Checkpoint, settings: Mapping
) -> scores.Score | None:
    """The task's score; None where a server has it, or where annotators' answers are not told."""
    task = TASKS[name]
    if task.score is None or not all(question.answers for question in questions):
        return None
    found = scores.summary(task.score(answers, [question.answers for question in questions]))
    return scores.Score(name, checkpoint, len(questions), *found, settings)


def write_submission(
    name: str, answers: Sequence[str], questions: Sequence[Question], directory: epath.Path
) -> epath.Path:
    """The answers in the form that the benchmark's server takes, as `NAME.json` or `NAME.xlsx`; its path.

    Raises:
      ImportError: openpyxl is not installed, which MMBench needs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pairs, submission = list(zip(questions, answers, strict=True)), TASKS[name].submission
    if submission == "table":
        return _write_table(pairs, directory / f"{name}.xlsx")
    if submission == "mapping":
        content: Any = {question.id: answer for question, answer in pairs}
    else:
        identity, value = submission
        content = [{identity: question.id, value: answer} for question, answer in pairs]
    path = directory / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def _write_table(pairs: Sequence[tuple[Question, str]], path: epath.Path) -> epath.Path:
    try:
        from openpyxl import Workbook
    except ModuleNotFoundError:
        raise ImportError("MMBench's table needs openpyxl: pip install 'dreamllm_jax[evaluation]'") from None
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category")
    book = Workbook()
    book.active.append([*columns, "prediction"])
    for question, answer in pairs:
        book.active.append([*(question.record.get(column, "") for column in columns), answer])
    with path.open("wb") as file:
        book.save(file)
    return path
