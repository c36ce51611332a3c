"""What a model says about images: the paper's benchmarks with the original program's prompts."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamllm_jax.data.document import Image, Segment, Text
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.evaluation import anls, benchmarks, pope, scores, vqa_accuracy
from dreamllm_jax.evaluation.benchmarks import Question
from dreamllm_jax.evaluation.hosts import compute
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.models.dreamllm import DreamLLM

TEMPLATE = "vicuna_v1"
BEAMS, MAX_TOKENS = 5, 1024  # the original's
_ANSWERABLE = "Is the answer can be known?"  # sic

Found = tuple[dict[str, float], dict[str, float]]  # metrics, standard errors


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      read: its annotations.
      score: of the answers, if they are not scored elsewhere.
      submission: what its server wants; (identity, answer) pairs under these names, or None for a table of MMBench.
      before, after: the original's words before the image and after the question.
      opening: with which it has the answer begin.
      asks_first: whether it first asks if the question can be answered, and what is done if not.
      clean: what is made of an answer.
      beams: as the original searches; it draws where this is 1, at temperature 0.2, and we take the most probable.
      needs: packages of the extra `evaluation` that score it or write its submission.
    """

    read: Callable[[Sequence[Path], Path], list[Question]]
    score: Callable[[Sequence[str], Sequence[Question]], Found] | None = None
    submission: tuple[str, str] | None = ("question_id", "answer")
    before: str = ""
    after: str = ""
    opening: str = ""
    asks_first: bool = False
    clean: Callable[[str], str] = str
    beams: int = BEAMS
    needs: tuple[str, ...] = ()


def _short(answer: str) -> str:
    return answer.replace(".", "").replace('"', "").split(",")[0].lower()


def _vqa_score(answers: Sequence[str], questions: Sequence[Question]) -> Found:
    pairs = zip(answers, questions, strict=True)
    return _of_means("accuracy", [vqa_accuracy.accuracy(answer, question.answers) for answer, question in pairs])


def _anls_score(answers: Sequence[str], questions: Sequence[Question]) -> Found:
    pairs = zip(answers, questions, strict=True)
    return _of_means("anls", [anls.similarity(answer, question.answers) for answer, question in pairs])


def _pope_score(answers: Sequence[str], questions: Sequence[Question]) -> Found:
    present = [question.answers[0] == "yes" for question in questions]
    right = [pope.says_yes(answer) == there for answer, there in zip(answers, present, strict=True)]
    return pope.scores(answers, present), {"accuracy": scores.mean(right)[1]}


def _cider_score(answers: Sequence[str], questions: Sequence[Question]) -> Found:
    from dreamllm_jax.evaluation.cider import cider

    return _of_means("cider", cider(answers, [question.answers for question in questions]))


def _of_means(name: str, values: Sequence[float]) -> Found:
    value, error = scores.mean(values)
    return {name: value}, {name: error}


_ANSWER = "Based on the image, please answer the question."
_ONE_WORD = "Please provide an accurate answer within one word."
_CIDER = ("nltk", "pycocoevalcap")
_VQA = Task(
    benchmarks.vqa, _vqa_score, before=_ANSWER, after=_ONE_WORD, opening="The short answer (one word) is:", clean=_short
)

TASKS: Mapping[str, Task] = {
    "vqav2": _VQA,
    "okvqa": dataclasses.replace(_VQA, before="", after="Please provide an accurate and brief answer within one word."),
    "vizwiz": dataclasses.replace(
        _VQA, read=benchmarks.vizwiz, submission=("image", "answer"), opening="The answer is:", asks_first=True
    ),
    "textvqa": dataclasses.replace(_VQA, read=benchmarks.textvqa, opening="The answer is:"),
    "docvqa": Task(benchmarks.docvqa, _anls_score, submission=("questionId", "answer")),
    "pope": Task(
        benchmarks.pope,
        _pope_score,
        before="Based on the image, please objectively and accurately indicate whether the object exists.",
        opening="The answer is:",
        beams=1,
    ),
    "coco_caption": Task(
        benchmarks.captions,
        _cider_score,
        submission=("image_id", "caption"),
        before="Based on the image, give the image caption briefly.",
        after="Please summarize object in one sentence within 10 words.",
        opening="The image depicts",
        clean=str.capitalize,
        needs=_CIDER,
    ),
    "i2paragraph": Task(
        benchmarks.paragraphs,
        _cider_score,
        submission=("image_id", "caption"),
        before="Based on the image, please describe the image in detail.",
        after="Please describe the image in detail.",
        opening="The image depicts",
        clean=str.capitalize,
        needs=_CIDER,
    ),
    "mmvet": Task(
        benchmarks.mmvet,
        before="This is an exam, please answer according to the image and question.",
        after="Please provide an accurate, detailed and comprehensive answer.",
    ),
    "mmbench": Task(
        benchmarks.mmbench,
        submission=None,
        before="This is an exam, please answer according to the image, hint and question.",
        after="Please provide an accurate and detailed answer.",
        asks_first=True,
        needs=("openpyxl",),
    ),
}


def require_packages(name: str) -> None:
    """
    Raises:
      ImportError: a package that the task needs is not installed.
    """
    for package in TASKS[name].needs:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{name} needs {package}: pip install 'dreamllm_jax[evaluation]'")


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
            return generate_texts(
                model, params, tokenizer, prompts, max_tokens=max_tokens, beams=beams, template=template
            )

        return compute(some, questions, batch=batch, length=lambda question: len(question.text))

    def asking(question: Question, words: str) -> Question:
        return dataclasses.replace(question, text=question.text + words)

    unanswerable: set[int] = set()
    if task.asks_first:
        first = ask(Task(task.read), [asking(question, _ANSWERABLE) for question in questions])
        if task.read is benchmarks.mmbench:
            unsure = [said.lower().startswith("no") for said in first]
            questions = [
                asking(question, _options(question)) if lost else question
                for question, lost in zip(questions, unsure, strict=True)
            ]
        else:
            unanswerable = {index for index, said in enumerate(first) if "no" in said.lower()}
    rest = [question for index, question in enumerate(questions) if index not in unanswerable]
    told = iter(ask(task, rest) if rest else [])
    return ["unanswerable" if index in unanswerable else task.clean(next(told)) for index in range(len(questions))]


def _options(question: Question) -> str:
    given = [question.record[letter] for letter in "ABCDE" if question.record.get(letter)]
    return "Options: " + "".join(f"({number}). {option} " for number, option in enumerate(given))


def score(
    name: str, answers: Sequence[str], questions: Sequence[Question], checkpoint: scores.Checkpoint, settings: Mapping
) -> scores.Score | None:
    """The task's score; None where a server has it, or where annotators' answers are not told."""
    task = TASKS[name]
    if task.score is None or not all(question.answers for question in questions):
        return None
    return scores.Score(name, checkpoint, len(questions), *task.score(answers, questions), settings)


def write_submission(name: str, answers: Sequence[str], questions: Sequence[Question], directory: Any) -> Any:
    """The answers in the form that the benchmark's server takes, as `NAME.json` or `NAME.xlsx`; its path."""
    directory.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(questions, answers, strict=True))
    if name == "mmbench":
        return _write_table(pairs, directory / f"{name}.xlsx")
    if name == "mmvet":
        content: Any = {question.id: answer for question, answer in pairs}
    else:
        identity, value = TASKS[name].submission
        content = [{identity: question.id, value: answer} for question, answer in pairs]
    path = directory / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def _write_table(pairs: Sequence[tuple[Question, str]], path: Any) -> Any:
    from openpyxl import Workbook

    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category")
    book = Workbook()
    book.active.append([*columns, "prediction"])
    for question, said in pairs:
        book.active.append([*(question.record.get(column, "") for column in columns), said])
    with path.open("wb") as file:
        book.save(file)
    return path
