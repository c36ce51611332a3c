"""Benchmarks in their public formats, from the annotations to scores and submissions."""

import base64
import json
import sys

import numpy as np
import pytest
from openpyxl import load_workbook
from PIL import Image as PillowImage

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Image, Text
from dreamllm_jax.evaluate import make_parser
from dreamllm_jax.evaluation import annotations, comprehension, vqa_accuracy
from dreamllm_jax.evaluation.scores import Checkpoint
from dreamllm_jax.runs.load import load_model
from tests.evaluation.models import WORDS, save

QUESTIONS = ["what is red?", "how many birds?", "is it snow?"]
PEOPLE = [["fox"] * 9 + ["barn"], ["10"] * 10, ["yes"] * 6 + ["no"] * 4]


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return images.to_png(PillowImage.fromarray(pixels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures under the names that the benchmarks give them, and their annotations."""
    folder = tmp_path_factory.mktemp("benchmarks")

    def write(name: str, content) -> None:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    numbers = range(3)
    for i in numbers:
        for name in (f"COCO_val2014_{i + 40:012}.jpg", f"{i}.png", f"{i}.jpg", f"v1_{i}.png"):
            (folder / name).write_bytes(picture(i))
    people = [[{"answer": answer} for answer in some] for some in PEOPLE]
    asked = [{"question_id": 7 + i, "image_id": i + 40, "question": QUESTIONS[i]} for i in numbers]
    write("questions.json", {"data_subtype": "val2014", "questions": asked})
    write("answers.json", {"annotations": [{"question_id": 7 + i, "answers": people[i]} for i in numbers]})
    write("vizwiz.json", [{"image": f"{i}.png", "question": QUESTIONS[i], "answers": people[i]} for i in numbers])
    text = [{"question_id": i, "image_id": str(i), "question": QUESTIONS[i], "answers": PEOPLE[i]} for i in numbers]
    write("textvqa.json", {"data": text})
    documents = [{"questionId": i, "image": f"documents/{i}.png", "question": QUESTIONS[i]} for i in numbers]
    write("docvqa.json", {"data": [{**one, "answers": PEOPLE[i][:1]} for i, one in enumerate(documents)]})
    lines = [
        {"question_id": i, "image": f"{i}.png", "text": QUESTIONS[i], "label": "yes" if i else "no"} for i in numbers
    ]
    write("pope.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    listed = [{"id": i, "file_name": f"{i}.png"} for i in numbers]
    said = [{"image_id": i, "caption": f"a {WORDS[i + 1]} {word}"} for i in numbers for word in ("fox", "bird")]
    write("captions.json", {"images": listed, "annotations": said})
    karpathy = [
        {"cocoid": i, "filename": f"{i}.png", "split": "test" if i else "train", "sentences": [{"raw": QUESTIONS[i]}]}
        for i in numbers
    ]
    write("karpathy.json", {"images": karpathy})
    write("paragraphs.json", [{"image_id": i, "paragraph": f"a {WORDS[i]}. a fox."} for i in [*numbers, 9]])
    write("split.json", [*numbers])
    write("mmvet.json", {f"v1_{i}": {"imagename": f"v1_{i}.png", "question": QUESTIONS[i]} for i in numbers})
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image")
    table = [columns]
    for i in numbers:
        image = base64.b64encode(picture(i)).decode() if i < 2 else "0"  # the third is about the first one's image
        table.append(
            (str(i), QUESTIONS[i], "" if i else '"look\n\nthere"', "fox", "barn", "", "", "A", "x", "y", image)
        )
    write("mmbench.tsv", "".join("\t".join(row) + "\n" for row in table))
    return folder


ANNOTATIONS = {
    "vqav2": ["questions.json", "answers.json"],
    "okvqa": ["questions.json", "answers.json"],
    "vizwiz": ["vizwiz.json"],
    "textvqa": ["textvqa.json"],
    "docvqa": ["docvqa.json"],
    "pope": ["pope.jsonl"],
    "coco_caption": ["captions.json"],
    "i2paragraph": ["paragraphs.json", "split.json"],
    "mmvet": ["mmvet.json"],
    "mmbench": ["mmbench.tsv"],
}


def read(folder, name: str) -> list[annotations.Question]:
    return comprehension.TASKS[name].read([folder / file for file in ANNOTATIONS[name]], folder)


@pytest.mark.parametrize("name", comprehension.TASKS)
def test_annotations_become_questions(folder, name):
    questions = read(folder, name)
    assert len(questions) == 3
    assert [question.read_image() for question in questions] == [
        picture(i if name != "mmbench" else i % 2) for i in range(3)
    ]
    if name in ("vqav2", "okvqa", "vizwiz", "textvqa"):
        assert [list(question.answers) for question in questions] == PEOPLE
    if name not in ("coco_caption", "i2paragraph"):
        assert all(question.text.endswith(text) for question, text in zip(questions, QUESTIONS, strict=True))


def test_a_hint_of_several_lines_is_whole(folder):
    assert read(folder, "mmbench")[0].text == f"Hint:look\n\nthereQuestion:{QUESTIONS[0]}"


@pytest.mark.parametrize("name", ["vizwiz", "i2paragraph", "mmvet", "pope"])
def test_another_benchmarks_annotations_are_told_as_such(folder, name):
    files = ",".join(str(folder / file) for file in ["split.json", "answers.json"][: len(ANNOTATIONS[name])])
    words = ["--checkpoint=none", f"--task={name}", f"--annotations={files}", f"--images={folder}"]
    arguments = make_parser().parse_args(["comprehension", *words])
    with pytest.raises(ValueError, match=rf"split\.json.* are not the annotations of {name}: \w+Error"):
        arguments.main(arguments)


def test_karpathys_test_split(folder):
    assert [one.id for one in annotations.captions([folder / "karpathy.json"], folder)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("vqav2", ["answers.json"], "none has `questions`"),
        ("textvqa", ["questions.json"], "has no `data`"),
        ("vizwiz", ["nothing.json"], "nothing.json are missing"),
        ("i2paragraph", ["paragraphs.json"], "give --annotations=paragraphs_v1.json,test_split.json"),
        ("pope", ["pope.jsonl", "pope.jsonl"], "one file of annotations"),
    ],
)
def test_wrong_annotations_are_named(folder, name, files, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        comprehension.TASKS[name].read([folder / file for file in files], folder)


LINE = {"question_id": 1, "image": "1.png", "text": "Is it?", "label": "Yes"}


def test_lines_of_pope_may_hold_any_character(folder, tmp_path):
    lines = [{**LINE, "text": "Is it\u2028so?"}, {**LINE, "label": "no"}]
    (tmp_path / "p.json").write_text("\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    questions = annotations.pope([tmp_path / "p.json"], folder)
    assert [one.text for one in questions] == ["Is it\u2028so?", "Is it?"]
    assert [one.answers for one in questions] == [["yes"], ["no"]]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("pope", json.dumps(LINE) + "\n" + json.dumps({**LINE, "label": None}), "line 2: its label is neither yes nor"),
        (
            "pope",
            json.dumps({name: LINE[name] for name in LINE if name != "label"}),
            "line 1: its label is neither yes",
        ),
        ("pope", json.dumps(LINE) + "\n{", "line 2 is not JSON"),
        ("pope", json.dumps(LINE, ensure_ascii=False).replace("it", "\u00e9").encode("latin-1"), "is not UTF-8"),
        ("vizwiz", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
        ("vizwiz", '[{"image": "1.png"}]', "not the annotations of vizwiz: KeyError, a record has no 'question'"),
        ("mmbench", 'index\tquestion\timage\n1\t"What\tAAAA\n2\tWhy\tAAAA\n', "not a table separated by tabs"),
        ("mmbench", "index\tquestion\timage\n1\tWhat\n", "row 1 has not as many cells as the header"),
        ("mmbench", "index\tquestion\timage\n1\tWhat\tA\n", "the image of index 1 is not in base64"),
    ],
)
def test_damaged_annotations_are_named_before_a_model_is_asked(task, content, message, folder, tmp_path):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["--checkpoint=none", f"--task={task}", f"--annotations={tmp_path / 'a.json'}", f"--images={folder}"]
    arguments = make_parser().parse_args(["comprehension", *words])
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        arguments.main(arguments)


@pytest.mark.parametrize("task", ["vqav2", "vizwiz", "textvqa", "i2paragraph"])
def test_annotations_of_some_questions_are_refused(task, folder, tmp_path):
    files = [folder / name for name in ANNOTATIONS[task]]
    if task == "i2paragraph":
        (tmp_path / "a.json").write_text("[0, 1, 2, 77]")
    else:
        content = json.loads(files[-1].read_text())
        (content if isinstance(content, list) else next(iter(content.values())))[-1]["answers"] = []
        (tmp_path / "a.json").write_text(json.dumps(content))
    files = ",".join(map(str, [*files[:-1], tmp_path / "a.json"]))
    words = ["--checkpoint=none", f"--task={task}", f"--annotations={files}", f"--images={folder}"]
    arguments = make_parser().parse_args(["comprehension", *words])
    message = (
        "1 images of the split have no paragraph, 77" if task == "i2paragraph" else "1 of 3 questions have no answer"
    )
    with pytest.raises(ValueError, match=message):
        arguments.main(arguments)


def test_a_missing_image_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no image 000000000040\.jpg"):
        comprehension.TASKS["vqav2"].read([folder / file for file in ANNOTATIONS["vqav2"]], tmp_path)


def test_prompts_are_the_originals(folder):
    task = comprehension.TASKS["textvqa"]
    assert comprehension.prompt(task, read(folder, "textvqa")[0]) == [
        Text("Based on the image, please answer the question."),
        Image(picture(0)),
        Text("what is red?Please provide an accurate answer within one word."),
        Text("The answer is:", "assistant"),
    ]


def test_perfect_answers_have_the_best_scores(folder):
    given = Checkpoint("x", 1, False)

    def best(name, answers):
        return comprehension.score(name, answers, read(folder, name), given, {}).metrics

    right = [max(some, key=some.count) for some in PEOPLE]
    want = np.mean([vqa_accuracy.accuracy(*pair) for pair in zip(right, PEOPLE, strict=True)])
    assert best("vqav2", right)["accuracy"] == best("textvqa", right)["accuracy"] == want == 1.0
    assert best("docvqa", right)["anls"] == 1.0
    assert best("pope", ["No.", "Yes.", "Yes."])["f1"] == 1.0
    perfect, worse = ["a red fox", "a fox fox", "a sat bird"], ["a red fox", "a red fox", "a sat bird"]
    assert best("coco_caption", perfect)["cider"] > best("coco_caption", worse)["cider"] > 0
    assert comprehension.score("mmvet", right, read(folder, "mmvet"), given, {}) is None


@pytest.mark.parametrize(("name", "package"), [("mmbench", "openpyxl"), ("i2paragraph", "pycocoevalcap")])
def test_a_missing_package_is_told_before_anything_else(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    words = ["--checkpoint=none", f"--task={name}", "--annotations=none.json"]
    arguments = make_parser().parse_args(["comprehension", *words])
    with pytest.raises(ImportError, match=rf"{name} needs {package}: pip install 'dreamllm_jax\[evaluation\]'"):
        arguments.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqav2", "coco_caption", "mmvet", "mmbench"])
def test_a_benchmark_from_the_command_line(folder, tmp_path_factory, tmp_path, name):
    model = tmp_path_factory.getbasetemp() / "model"
    if not model.exists():
        save(model, 1024)
    files = ",".join(str(folder / file) for file in ANNOTATIONS[name])
    words = [f"--checkpoint={model}", f"--task={name}", f"--annotations={files}", f"--images={folder}"]
    limits = ["--max_tokens=8"] if name != "mmvet" else []  # without, there is room for what the model reads
    result = "mine" if name == "coco_caption" else name
    limits += [f"--to={tmp_path}", "--batch=4", "--beams=2", f"--name={result}"]
    arguments = make_parser().parse_args(["comprehension", *words, *limits])
    arguments.main(arguments)

    questions = read(folder, name)
    if name == "mmbench":
        rows = [*load_workbook(tmp_path / "mmbench-0" / "mmbench.xlsx").active.values]
        assert (rows[0][0], rows[0][-1]) == ("index", "prediction")
        assert [row[:2] for row in rows[1:]] == [(str(i), text) for i, text in enumerate(QUESTIONS)]
        return
    told = json.loads((tmp_path / f"{result}-0" / f"{name}.json").read_text())
    if name == "mmvet":
        assert [*told] == [question.id for question in questions]
        return
    assert [next(iter(one.values())) for one in told] == [question.id for question in questions]
    answers = [[*one.values()][1] for one in told]
    score = json.loads((tmp_path / f"{result}-0.json").read_text())
    assert (score["task"], score["count"], score["checkpoint"]["step"]) == (result, 3, 0)
    assert score["settings"]["annotations"] == ANNOTATIONS[name]
    assert score["metrics"] == comprehension.score(name, answers, questions, Checkpoint("x", 0, False), {}).metrics
    if name == "vqav2":
        alone, params, tokenizer = load_model(model)
        settings = {"batch": 1, "beams": 2, "max_tokens": 8}
        task = comprehension.TASKS[name]
        assert comprehension.answer(alone, params, tokenizer, task, questions, **settings) == answers


def asked(number: int, **more) -> dict:
    return {"question_id": number, "image_id": 40, "question": "What?", **more}


def said(number: int, answer: object = "a") -> dict:
    return {"question_id": number, "answers": [{"answer": answer}]}


@pytest.mark.parametrize(
    ("questions", "answers"),
    [
        ([asked(1)], {"annotations": [said(2)]}),  # of another split: all would be answered and none scored
        ([asked("1")], {"annotations": [said(1)]}),
        ([asked(1), asked(1)], {"annotations": [said(1)]}),
        ([asked(1)], {"annotations": [said(1), said(1, "b")]}),
        ([asked(1)], {"questions": [asked(2)], "annotations": [said(1)]}),
        ([asked(1)], {"something": []}),
        ([asked(1)], {"annotations": [said(1, 5)]}),
        ([asked(1, question=None)], {"annotations": [said(1)]}),
    ],
)
def test_annotations_that_do_not_fit_are_told_before_a_model_is_asked(questions, answers, folder, tmp_path):
    files = [tmp_path / name for name in ("q.json", "a.json")]
    for file, content in zip(files, ({"questions": questions}, answers), strict=True):
        file.write_text(json.dumps(content))
    with pytest.raises((ValueError, TypeError)):
        annotations.vqa(files, folder)


@pytest.mark.parametrize("answers", ["yes", [1994]])
def test_answers_are_a_list_of_texts(answers, folder, tmp_path):
    one = {"question_id": 1, "questionId": 1, "image_id": "0", "image": "0.png", "question": "What?"}
    (tmp_path / "t.json").write_text(json.dumps({"data": [{**one, "answers": answers}]}))
    with pytest.raises(TypeError, match="an answer is no text"):
        annotations.textvqa([tmp_path / "t.json"], folder)


def test_a_picture_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be used"):
        annotations.Question(1, tmp_path / "a.jpg").require_image()
