"""The public annotation formats of vision-language benchmarks, as questions about images.

Each reader is given the annotations' files and the folder of images, and checks that every image is there.
"""

import base64
import collections
import csv
import dataclasses
import functools
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamllm_jax.common.directories import read_text
from dreamllm_jax.data import images
from dreamllm_jax.data.corpora.records import spellings


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing asked about one image.

    Attributes:
      id: the benchmark's own, which its submission names.
      image: encoded bytes, or the file that holds them.
      text: what is asked; empty for a caption.
      answers: what the annotators said; empty where that is kept secret.
      record: whatever else the benchmark says of it.
    """

    id: Any
    image: bytes | Path
    text: str = ""
    answers: Sequence[str] = ()
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        answers = [] if self.answers is None else self.answers
        if isinstance(answers, str) or not all(isinstance(text, str) for text in (self.text, *answers)):
            raise TypeError(f"of {self.id!r} the question or an answer is no text")

    def read_image(self) -> bytes:
        return self.image if isinstance(self.image, bytes) else self.image.read_bytes()

    def require_image(self) -> None:
        """Raises ImageError, naming the file or the question, if the image cannot be decoded."""
        where = f"the image of {self.id!r}" if isinstance(self.image, bytes) else self.image
        images.decode_named(self.read_image(), where)


def vqa(files: Sequence[Path], images: Path) -> list[Question]:
    """VQAv2 and OK-VQA: a file of `questions`, and one of `annotations`, without which nothing can be scored."""
    read = [_json(file) for file in files]
    listed = [[one[part] for one in read if part in one] for part in ("questions", "annotations")]
    if [len(part) for part in listed] not in ([1, 0], [1, 1]) or sum(map(len, listed)) < len(files):
        found = "none has" if not listed[0] else "several have"
        raise ValueError(
            f"{_names(files)}: {found} `questions`, or one has neither these nor `annotations`; give --annotations="
            "QUESTIONS.json,ANNOTATIONS.json"
        )
    (questions,), annotations = listed[0], [one for part in listed[1] for one in part]
    for part in (questions, annotations):
        if twice := [one for one, times in collections.Counter(o["question_id"] for o in part).items() if times > 1]:
            raise ValueError(f"{_names(files)}: the question_id {twice[0]!r} is there twice")
    answers = {one["question_id"]: _answers(one) for one in annotations}
    _require_known(answers, [one["question_id"] for one in questions], files)
    return [
        Question(
            one["question_id"],
            _coco_image(images, one["image_id"]),
            one["question"],
            answers.get(one["question_id"], ()),
        )
        for one in questions
    ]


def vizwiz(files: Sequence[Path], images: Path) -> list[Question]:
    """VizWiz-VQA: a list of images with a question each."""
    return [
        Question(one["image"], _image(images, one["image"]), one["question"], _answers(one))
        for one in _json(_only(files))
    ]


def textvqa(files: Sequence[Path], images: Path) -> list[Question]:
    """TextVQA: `data`, with pictures of Open Images."""
    return [
        Question(one["question_id"], _image(images, f"{one['image_id']}.jpg"), one["question"], one.get("answers", ()))
        for one in _under(_json(_only(files)), "data", files)
    ]


def docvqa(files: Sequence[Path], images: Path) -> list[Question]:
    """DocVQA and InfographicVQA: `data`, with the accepted answers."""
    read = _under(_json(_only(files)), "data", files)
    names = [Path(one.get("image_local_name", one.get("image", ""))).name for one in read]
    return [
        Question(one["questionId"], _image(images, name), one["question"], one.get("answers", ()))
        for one, name in zip(read, names, strict=True)
    ]


def pope(files: Sequence[Path], images: Path) -> list[Question]:
    """POPE: JSON lines, each with a `label` that says yes or no."""
    file, found = _only(files), []
    for number, line in enumerate(_text(file).split("\n"), 1):  # not at U+2028, which may stand within a text
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
        label = str(one.get("label", "")).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{file}, line {number}: its label is neither yes nor no but {one.get('label')!r}")
        found.append(Question(one["question_id"], _image(images, one["image"]), one["text"], [label]))
    return found


def captions(files: Sequence[Path], images: Path) -> list[Question]:
    """COCO captions: COCO's own file, or Karpathy's `dataset_coco.json`, of which the test split is taken."""
    content = _json(_only(files))
    listed = _under(content, "images", files)
    if listed and "sentences" in listed[0]:
        return [
            Question(
                one.get("cocoid", one["filename"]),
                _image(images, one["filename"]),
                answers=[sentence["raw"] for sentence in one["sentences"]],
            )
            for one in listed
            if one["split"] == "test"
        ]
    said = collections.defaultdict(list)
    for one in _under(content, "annotations", files):
        said[one["image_id"]].append(one["caption"])
    _require_known(said, [one["id"] for one in listed], files)
    return [Question(one["id"], _image(images, one["file_name"]), answers=said[one["id"]]) for one in listed]


def paragraphs(files: Sequence[Path], images: Path) -> list[Question]:
    """Image2Paragraph: the paragraphs (`paragraphs_v1.json`), and the images of a split (`test_split.json`)."""
    read = [_json(file) for file in files]
    told = [one for one in read if one and isinstance(one[0], Mapping)]
    splits = [one for one in read if one and not isinstance(one[0], Mapping)]
    if len(told) != 1 or len(splits) != 1:
        raise ValueError(f"{_names(files)}: give --annotations=paragraphs_v1.json,test_split.json")
    wanted = set(splits[0])
    if missing := wanted - {one["image_id"] for one in told[0]}:
        raise ValueError(
            f"{_names(files)}: {len(missing)} images of the split have no paragraph, {min(missing)} is one"
        )
    return [
        Question(one["image_id"], _image(images, f"{one['image_id']}.jpg"), answers=[one["paragraph"]])
        for one in told[0]
        if one["image_id"] in wanted
    ]


def mmvet(files: Sequence[Path], images: Path) -> list[Question]:
    """MM-Vet: questions by name. The answers are scored by its server."""
    return [
        Question(name, _image(images, one["imagename"]), one["question"]) for name, one in _json(_only(files)).items()
    ]


def mmbench(files: Sequence[Path], images: Path) -> list[Question]:
    """MMBench: a table separated by tabs, with the images in it. The answers are scored by its server."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    file = _only(files)
    try:
        rows = list(csv.DictReader(io.StringIO(_text(file), newline=""), delimiter="\t", strict=True))
    except csv.Error as error:
        raise ValueError(f"{file} is not a table separated by tabs: {error}") from None
    if torn := [number for number, row in enumerate(rows, 1) if None in row or None in row.values()]:
        raise ValueError(f"{file}, row {torn[0]} has not as many cells as the header")
    by_index = {row["index"]: row["image"] for row in rows}
    found = []
    for row in rows:
        image = row["image"]
        if len(image) < 64 and image in by_index:  # questions about one image name the first of them
            image = by_index[image]
        hint = f"Hint:{row['hint']}" if row.get("hint") else ""
        try:
            data = base64.b64decode(image)
        except ValueError as error:
            raise ValueError(f"{file}: the image of index {row['index']} is not in base64: {error}") from None
        found.append(Question(row["index"], data, f"{hint}Question:{row['question']}", record=row))
    return found


def require_answers(questions: Sequence[Question], files: Sequence[Path]) -> None:
    """Makes sure that the annotators answered all of the questions or, where that is kept secret, none.

    Raises:
      ValueError: they answered some.
    """
    without = [question.id for question in questions if not question.answers]
    if 0 < len(without) < len(questions):
        raise ValueError(
            f"{_names(files)}: {len(without)} of {len(questions)} questions have no answer there, {without[0]!r} is "
            "one; give the same split's annotations, or the questions alone, which are then answered without a score"
        )


def _require_known(answers: Mapping[Any, Any], asked: Sequence[Any], files: Sequence[Path]) -> None:
    """Raises ValueError if there are answers, and none is to what is asked: they would be left aside unseen."""
    if answers and answers.keys().isdisjoint(asked):
        raise ValueError(
            f"{_names(files)}: the annotations are of {next(iter(answers))!r} and others, the questions of {asked[:1]} "
            "and others: give the same split's"
        )


def _answers(record: Mapping[str, Any]) -> list[str]:
    return [answer["answer"] for answer in record.get("answers", ())]


def _only(files: Sequence[Path]) -> Path:
    if len(files) != 1:
        raise ValueError(f"this task has one file of annotations, got {_names(files)}")
    return files[0]


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files)) or "none"


def _text(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"the annotations {file} are missing")
    return read_text(file)


def _json(file: Path) -> Any:
    text = _text(file)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def _under(content: Any, key: str, files: Sequence[Path]) -> Any:
    if not isinstance(content, Mapping) or key not in content:
        raise ValueError(f"{_names(files)} has no `{key}`: is it the file of another benchmark?")
    return content[key]


def _image(folder: Path, name: str) -> Path:
    found = next((path for spelling in spellings(name) if (path := folder / spelling).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"the image {folder / name} is missing")
    return found


def _coco_image(folder: Path, number: int) -> Path:
    """COCO's file of that image, whatever its year and split: `COCO_val2014_000000000042.jpg`, `000000000042.jpg`."""
    found = _coco_numbers(folder).get(number)
    if found is None:
        raise FileNotFoundError(f"{folder} has no image {number:012}.jpg of COCO")
    return found


@functools.cache
def _coco_numbers(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of images {folder} is missing")
    return {int(match[1]): path for path in folder.iterdir() if (match := re.search(r"(\d{12})\.\w+$", path.name))}
