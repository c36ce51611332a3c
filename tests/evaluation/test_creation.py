"""Pictures for captions: interrupted, resumed, measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from dreamllm_jax import evaluate
from dreamllm_jax.evaluate import make_parser
from dreamllm_jax.evaluation import creation, features, fid
from tests import processes
from tests.evaluation.models import WORDS, save

CAPTIONS = 200
HOSTS = ("one", "two")


class AsGiven(torch.nn.Module):
    """In the place of Inception: what it is given are features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given


def reference_distance(one: np.ndarray, other: np.ndarray) -> float:
    """As torchmetrics has it, which compares itself with torch-fidelity and pytorch-fid."""
    metric = FrechetInceptionDistance(feature=AsGiven(one.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(one), real=False)
    metric.update(torch.from_numpy(other), real=True)
    return float(metric.compute())


def test_fid_is_torchmetrics_and_grows_with_noise():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(400, 24)) @ rng.normal(size=(24, 24))
    true = fid.statistics(mixed)
    assert abs(fid.distance(true, true)) < 1e-3
    found = []
    for scale in (0.1, 0.5, 1.0, 2.0):
        noisy = mixed + scale * rng.normal(size=mixed.shape) + scale
        found.append(fid.distance(fid.statistics(noisy), true))
        assert found[-1] == pytest.approx(reference_distance(noisy, mixed), rel=1e-6)
    assert found == sorted(found) and found[0] > 0
    few = mixed[:10]  # fewer pictures than features: singular
    assert fid.distance(fid.statistics(few), true) == pytest.approx(reference_distance(few, mixed), rel=1e-3)


def test_statistics_of_parts_are_pooled():
    features = np.random.default_rng(0).normal(size=(20, 5)) + 3
    parts = [fid.statistics(features[start:end]) for start, end in ((0, 1), (1, 8), (8, 20))]
    found = fid.pooled(parts)
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-9)
    with pytest.raises(ValueError, match="two images or more, got 1"):
        fid.pooled(parts[:1])


def test_statistics_are_kept(tmp_path):
    made = fid.statistics(np.random.default_rng(0).normal(size=(9, 3)))
    fid.save(made, tmp_path / "some.npz")
    read = fid.load(tmp_path / "some.npz")
    np.testing.assert_array_equal(read.covariance, made.covariance)
    assert (read.count, fid.distance(read, made)) == (9, pytest.approx(0, abs=1e-9))
    (tmp_path / "other.npz").write_bytes(b"other")
    with pytest.raises(ValueError, match="does not hold the arrays mu and sigma"):
        fid.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="of 3 and 2 numbers"):
        fid.distance(made, fid.statistics(np.eye(2)))


def test_captions_of_all_forms(tmp_path):
    said = [{"image_id": image, "caption": f"{image} {word}"} for image in range(20) for word in ("fox", "barn")]
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": said}))
    (tmp_path / "narratives.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    (tmp_path / "lines.txt").write_text("a fox\n\na barn\n")
    coco = creation.read_captions(tmp_path / "coco.json")
    assert coco == creation.read_captions(tmp_path / "narratives.jsonl")
    assert len(coco) == 20 and {caption.split()[1] for caption in coco.values()} == {"fox", "barn"}
    some = creation.read_captions(tmp_path / "coco.json", 7)
    assert len(some) == 7 and some.items() < coco.items() and sorted(some) != sorted(coco)[:7]
    assert creation.read_captions(tmp_path / "lines.txt") == {"000000": "a fox", "000002": "a barn"}
    (tmp_path / "bad.jsonl").write_text('{"caption": "a fox"}\n')
    with pytest.raises(ValueError, match="neither COCO's captions"):
        creation.read_captions(tmp_path / "bad.jsonl")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("creation")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(CAPTIONS)]
    (folder / "captions.txt").write_text("\n".join(lines))
    return [
        "creation",
        f"--checkpoint={save(folder / 'model')}",
        f"--captions={folder / 'captions.txt'}",
        f"--to={folder / 'results'}",
        "--steps=2",
        "--batch=8",
    ]


def test_a_sampler_that_the_model_does_not_have_is_refused_before_a_directory_is_begun(command, tmp_path, monkeypatch):
    def refuse(model, sampler):
        raise ValueError(f"no {sampler.name} of {sampler.steps}")

    monkeypatch.setattr(evaluate, "require_sampler", refuse)
    arguments = evaluate.make_parser().parse_args([*command, f"--pictures={tmp_path / 'to'}", "--sampler=euler"])
    with pytest.raises(ValueError, match=r"^no euler of 2$"):
        arguments.main(arguments)
    assert not (tmp_path / "to").exists()


def test_pictures_are_painted_as_the_command_says(command, tmp_path, monkeypatch):
    asked = {}

    def paint(*given, **settings):
        asked.update(settings)
        return np.zeros((len(settings["seeds"]), 4, 4, 3), np.uint8)

    monkeypatch.setattr(creation, "generate_images", paint)
    words = [*command, f"--pictures={tmp_path / 'to'}", f"--to={tmp_path}", "--limit=2", "--guidance_interval"]
    wrong = evaluate.make_parser().parse_args([*words, "0.9", "0.1"])
    with pytest.raises(ValueError, match=r"^guidance_interval must be two ascending numbers from 0 to 1, got 0\.9"):
        wrong.main(wrong)
    assert not (tmp_path / "to").exists()
    arguments = evaluate.make_parser().parse_args([*words, "0.2", "0.8"])
    arguments.main(arguments)
    assert (asked["guidance"], asked["guidance_interval"], asked["sampler"].steps) == (2.0, (0.2, 0.8), 2)
    assert json.loads((tmp_path / "to" / "settings.json").read_text())["guidance_interval"] == [0.2, 0.8]
    with pytest.raises(ValueError, match=r"settings\.json has another guidance_interval"):
        other = evaluate.make_parser().parse_args([*words, "0.2", "0.9"])
        other.main(other)


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_pictures(command, tmp_path):
    words = [*command, f"--pictures={tmp_path / 'killed'}"]
    folder, whole = tmp_path / "killed" / "0", tmp_path / "whole" / "0"
    first = processes.kill_at(words, folder, 50)
    second = processes.kill_at(words, folder, 120)
    assert 50 <= first < second < CAPTIONS
    (folder / f".{second:06}.png.5760").write_bytes(b"as a kill inside of a write leaves it")
    assert processes.finish(words) == 0
    assert processes.finish([*command, f"--pictures={tmp_path / 'whole'}"]) == 0
    pictures = {path.name: path.read_bytes() for path in folder.glob("*")}
    assert sorted(pictures) == [f"{number:06}.png" for number in range(CAPTIONS)]
    assert pictures == {path.name: path.read_bytes() for path in whole.glob("*")}
    assert len(set(pictures.values())) > CAPTIONS * 0.9


@pytest.mark.slow
def test_two_hosts_paint_what_one_does(command, tmp_path):
    inception = means(tmp_path)
    reference = tmp_path / "true.npz"
    fid.save(fid.statistics(np.random.default_rng(0).normal(size=(9, 6))), reference)
    words = [*command, "--limit=24", f"--clip={tiny_clip(tmp_path / 'clip')}", inception, f"--reference={reference}"]
    runs = {name: [*words, f"--pictures={tmp_path / name}", f"--to={tmp_path}", f"--task={name}"] for name in HOSTS}
    assert processes.finish(runs["one"]) == 0
    assert processes.finish_together(runs["two"], 2) == [0, 0]
    want, found = (json.loads((tmp_path / f"{name}-0.json").read_text())["metrics"] for name in HOSTS)
    assert set(want) == {"fid", "clip_score"} and found == pytest.approx(want, rel=1e-6)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n / "0").glob("*")} for n in HOSTS)
    assert len(one) == 24 and one == two


class Means(torch.nn.Module):
    """Stands for Inception: a few statistics of the pixels."""

    def forward(self, images, return_features: bool = False):
        x = images.to(torch.float32) / 255.0
        return torch.cat([x.mean(dim=(2, 3)), x.std(dim=2).mean(dim=2)], dim=1)


def means(folder) -> str:
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Means()).save(folder / "means.pt")
    return f"--inception={folder / 'means.pt'}"


def tiny_clip(folder) -> str:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {word: index for index, word in enumerate(["<s>", "</s>", *sorted(set(WORDS))])}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        model.text_projection.weight *= -1  # cosines below 0 would count as 0
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>").save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_the_best_of_several_is_reported_apart(command, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "true").mkdir()
    for number in range(12):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "true" / f"{number}.png")
    inception, reference = means(tmp_path), tmp_path / "true.npz"

    def run(*words: str) -> None:
        arguments = make_parser().parse_args(words)
        arguments.main(arguments)

    run("reference", f"--images={tmp_path / 'true'}", inception, f"--to={reference}", "--size=16")
    clip = tiny_clip(tmp_path / "clip")
    pictures = tmp_path / "pictures"
    words = [*command, inception, f"--reference={reference}", f"--clip={clip}", "--limit=12", "--each=3"]
    run(*words, f"--pictures={pictures}", f"--to={tmp_path}", "--task=ms_coco")
    score = json.loads((tmp_path / "ms_coco-0.json").read_text())
    assert set(score["metrics"]) == {"fid", "fid_best_of_3", "clip_score", "clip_score_best_of_3"}
    assert [score["settings"][name] for name in ("reference", "inception", "clip")] == ["true.npz", "means.pt", "clip"]
    assert score["count"] == 12 and score["metrics"]["clip_score_best_of_3"] > score["metrics"]["clip_score"]

    captions = json.loads((pictures / "captions.json").read_text())
    files = [pictures / "0" / f"{image}.png" for image in captions]
    stored = np.stack([np.asarray(Image.open(file)) for file in files])
    seen = features.inception(tmp_path / "means.pt")(stored)
    want = fid.distance(fid.statistics(seen), fid.load(reference))
    assert score["metrics"]["fid"] == pytest.approx(want, rel=1e-6)

    with pytest.raises(ValueError, match=r"settings\.json has another guidance"):
        run(*words, f"--pictures={pictures}", "--guidance=3")
