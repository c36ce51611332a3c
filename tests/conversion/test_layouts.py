"""What may stand in a model's directory: variants, shards, and things that are no model of ours to read."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import EulerDiscreteScheduler  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.interop import torch_modules  # noqa: E402
from dreamllm_jax.interop.files import find_model, open_model  # noqa: E402
from dreamllm_jax.interop.image_decoder import open_image_decoder  # noqa: E402
from dreamllm_jax.interop.language_model import open_language_model  # noqa: E402
from dreamllm_jax.interop.verify import compare  # noqa: E402
from dreamllm_jax.interop.vision_encoder import open_vision_encoder  # noqa: E402
from dreamllm_jax.towers.language_models.llama import LlamaConfig  # noqa: E402
from tests import public_models  # noqa: E402
from tests.conversion.helpers import run  # noqa: E402
from tests.conversion.helpers import towers as towers_of  # noqa: E402

OPEN = {
    "language_model": open_language_model,
    "vision_encoder": open_vision_encoder,
    "image_decoder": lambda path: open_image_decoder(path)[1]["image_decoder/denoiser"],
}
INSIDE = {"language_model": ".", "vision_encoder": ".", "image_decoder": "unet"}
STEMS = {
    ".safetensors": dict(zip(OPEN, ("model", "model", "diffusion_pytorch_model"), strict=True)),
    ".bin": dict(zip(OPEN, ("pytorch_model", "pytorch_model", "diffusion_pytorch_model"), strict=True)),
}


def values(tensors) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in tensors.items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that a public class wrote, whose files are then taken away."""
    found = {}
    for file in folder.glob("*.safetensors*"):
        found |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    return found


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, path) if path.suffix == ".bin" else save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    return public_models.save_towers(root)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema", "ema"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("tower", OPEN)
def test_every_tower_is_read_from_its_only_variant(towers, tower, suffix, variant, tmp_path, caplog):
    """Whole and in shards, with both names that an index of a variant has had."""
    directory = shutil.copytree(towers[tower], tmp_path / tower)
    folder = directory / INSIDE[tower]
    stem, tensors = STEMS[suffix][tower], stored(folder)
    want = values(OPEN[tower](towers[tower]).tensors)
    names = sorted(tensors)
    shards = {f"{stem}.{variant}-0000{i + 1}-of-00002{suffix}": names[i::2] for i in range(2)}
    index = json.dumps({"weight_map": {name: shard for shard, held in shards.items() for name in held}})
    for way in (
        f"{stem}.{variant}{suffix}",
        f"{stem}{suffix}.index.{variant}.json",
        f"{stem}.{variant}{suffix}.index.json",
    ):
        if way.endswith(".json"):
            (folder / way).write_text(index)
            for shard, held in shards.items():
                write(folder / shard, {name: tensors[name] for name in held})
        else:
            write(folder / way, tensors)
        with caplog.at_level("INFO", "dreamllm_jax"):
            got = values(OPEN[tower](directory).tensors)
        assert f"{way}: its variant {variant!r} is read" in caplog.text
        assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)
        (folder / way).unlink()


def test_the_model_itself_comes_before_its_variants(towers, tmp_path):
    tensors = {"a": torch.ones(1)}
    for name in ("model.fp16.safetensors", "model.non_ema.safetensors"):
        write(tmp_path / name, tensors)
    message = "has the variants fp16, non_ema of the model and none that is the model itself: leave only the one"
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path, "model", "pytorch_model")
    write(tmp_path / "pytorch_model.bin", tensors)
    assert find_model(tmp_path, "model", "pytorch_model") == (tmp_path / "pytorch_model.bin", "")
    write(tmp_path / "model.safetensors", tensors)
    assert find_model(tmp_path, "model", "pytorch_model") == (tmp_path / "model.safetensors", "")


@pytest.mark.slow
def test_variants_are_verified_too(original, tmp_path):
    diffusion = shutil.copytree(original / "image_decoder", tmp_path / "diffusion")
    for part in ("unet", "vae"):
        stem = diffusion / part / "diffusion_pytorch_model"
        stem.with_suffix(".safetensors").rename(stem.with_suffix(".fp16.safetensors"))
    found = saved.find(str(original / "ours"))
    differences = compare(found.config, found.part, diffusion, ["float32"])
    assert {d.tower for d in differences} >= {"denoiser", "autoencoder"} and all(d.passed for d in differences)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers
def test_a_scheduler_comes_and_goes_and_is_verified(original, tmp_path):
    """Its file as it came; `verify` sees one that samples otherwise, though every weight is the same."""
    diffusion = shutil.copytree(original / "image_decoder", tmp_path / "diffusion")
    file = diffusion / "scheduler" / "scheduler_config.json"
    noise = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_start": 1e-3, "beta_end": 0.01}
    EulerDiscreteScheduler(**noise, timestep_spacing="trailing", use_karras_sigmas=True).save_pretrained(file.parent)
    came = json.loads(file.read_text())
    run("import", **towers_of(original) | {"image_decoder": diffusion}, to=tmp_path / "ours", num_queries=3)
    run("export", checkpoint=tmp_path / "ours", format="all", to=tmp_path / "out", no_check=True)
    for place in ("diffusers", "dreamllm/diffusion"):
        assert json.loads((tmp_path / "out" / place / "scheduler" / file.name).read_text()) == came
    found = saved.find(str(tmp_path / "ours"))
    for changes, passed in (
        ({}, True),
        ({"timestep_spacing": "leading"}, False),
        ({"use_karras_sigmas": False}, False),
        ({"beta_end": 0.011}, False),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, False),
        ({"clip_sample": False}, False),  # which the original program, reading it as DDPM, heeds
    ):
        file.write_text(json.dumps(came | changes))
        (difference,) = [d for d in compare(found.config, found.part, diffusion, []) if d.tower == "scheduler"]
        assert difference.passed == passed, (changes, difference)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", "sub/a.safetensors", "..\\a", 3, ""])
def test_an_index_leads_nowhere_else(shard, towers, tmp_path):
    directory = shutil.copytree(towers["language_model"], tmp_path / "llama")
    shutil.copy(next(directory.glob("*-00001-*")), tmp_path / "secret.safetensors")
    index = directory / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    weights["weight_map"][next(iter(weights["weight_map"]))] = shard
    index.write_text(json.dumps(weights))
    message = re.escape(f"{index} is refused: it names the shard {shard!r}")
    with pytest.raises(ValueError, match=message):
        open_language_model(directory)
    with pytest.raises(ValueError, match=message):  # nor does it lead torch
        torch_modules.pretrained(LlamaConfig.public, directory)


def test_weights_that_are_no_numbers_are_named(towers, tmp_path):
    for change, message in (
        (lambda x: x.to(torch.int8), r"1 tensors do not fit:\n  norm\.weight is stored as int8, not as floating point"),
        (lambda x: x * torch.nan, r"{file}: model\.norm\.weight has 32 values of 32 that are not finite"),
        (lambda x: x / torch.tensor([0.0, *[1.0] * 31]), r"{file}: model\.norm\.weight has 1 values of 32 that are"),
    ):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        directory = shutil.copytree(towers["language_model"], root / "llama")
        tensors = stored(directory)
        write(directory / "model.safetensors", tensors | {"model.norm.weight": change(tensors["model.norm.weight"])})
        with pytest.raises(ValueError, match=message.format(file=re.escape(str(directory / "model.safetensors")))):
            run("import", **towers | {"language_model": directory}, to=root / "to", num_queries=2)
        assert not (root / "to").exists() and not list(root.glob(".*building"))


def test_values_beyond_a_type_are_named(towers, tmp_path):
    directory = shutil.copytree(towers["language_model"], tmp_path / "llama")
    tensors = stored(directory)
    write(directory / "model.safetensors", tensors | {"model.norm.weight": 1e5 * torch.ones(32)})
    flags = towers | {"language_model": directory}
    with pytest.raises(
        ValueError, match=r"^language_model/norm/scale has values that float16 cannot hold: choose a --dtype of"
    ):
        run("import", **flags, to=tmp_path / "to", num_queries=2, dtype="float16")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_quantised_model_is_named(method, towers, tmp_path):
    """By its config.json; by its tensors where that says nothing: ten of them, how many there are, and where."""
    directory = shutil.copytree(towers["language_model"], tmp_path / "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError) as refused:
        open_language_model(directory)
    assert str(refused.value) == (
        f"{directory}/config.json: it has a quantization_config ({method}): quantised weights are not read: give the "
        "model that it was made from, in float16, bfloat16 or float32"
    )
    (directory / "config.json").write_text(json.dumps(config))
    tensors = stored(directory)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors.pop(name)
        module = name.removesuffix("weight")
        tensors |= {f"{module}{part}": torch.ones(4, dtype=torch.int32) for part in ("qweight", "qzeros", "g_idx")}
        tensors[f"{module}scales"] = torch.ones(4)
    write(directory / "model.safetensors", tensors)
    with pytest.raises(ValueError) as refused:
        run("import", **towers | {"language_model": directory}, to=tmp_path / "to", num_queries=2)
    told = str(refused.value).splitlines()
    assert told[0] == f"language_model of {directory}: {5 * 14} tensors do not fit:" and len(told) == 13
    assert told[-2] == "  and 60 more" and told[-1].startswith("  likely cause: the weights are quantised (GPTQ, AWQ")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def described(root: Path, **contents: str) -> Path:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json is missing; the directory is empty"),
        ({"adapter_config.json": '{"base_model_name_or_path": "a/b"}', "adapter_model.bin": ""}, "merge it into a/b"),
        ({"params.json": "{}", "consolidated.00.pth": "", "tokenizer.model": ""}, "Meta's (or Mistral's) own layout"),
        ({"refs/main": "abc", "snapshots/abc/config.json": "{}"}, "the model is in {path}/snapshots/abc"),
        ({"models--a--b/snapshots/abc/config.json": "{}"}, "the model is in {path}/models--a--b/snapshots/abc"),
        ({"v1-5-pruned.ckpt": "PK"}, "with v1-5-pruned.ckpt, but no config.json: weights in single files"),
        ({"model.safetensors": LFS}, "model.safetensors is a git-lfs pointer, not the file itself: `git lfs pull`"),
        ({"config.json": "{}", "model.safetensors": LFS}, "model.safetensors is a git-lfs pointer"),
        ({"config.json": LFS}, "config.json is a git-lfs pointer"),
        ({"config.json": "<!DOCTYPE html>"}, "config.json is a web page: download the file itself"),
        ({"config.json": "{}", "model.safetensors": ""}, "model.safetensors is empty: download it again"),
        ({"vicuna/config.json": "{}"}, "a folder around the model: give {path}/vicuna"),
        ({"checkpoint-9/config.json": "{}"}, "a trainer's directory of checkpoints: give one of them, such as {path}"),
        ({"a.Q4_0.gguf": "GGUF"}, "give the file itself, {path}/a.Q4_0.gguf"),
        ({"model.safetensors.incomplete": "x"}, "an unfinished download"),
        ({"config.json": "{}", "model-00001-of-00002.safetensors": "x"}, "in shards (model-00001-of-00002.safetensors"),
        ({"config.json": "{}", "flax_model.msgpack": "x"}, "for another library (flax_model.msgpack)"),
        ({"config.json": "{}", "quantize_config.json": "{}"}, "a quantised model (quantize_config.json)"),
        ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, "a FluxPipeline directory of diffusers"),
        ({"model.json": "{}"}, "a model or a run of ours: --checkpoint"),
    ],
)
def test_whatever_stands_there_is_told(files, message, tmp_path):
    path = described(tmp_path / "given", **files)
    path.mkdir(exist_ok=True)
    for open_it in (open_language_model, open_vision_encoder):
        with pytest.raises((FileNotFoundError, ValueError)) as refused:
            open_it(path)
        assert message.format(path=path) in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_two_models_in_a_directory_are_none(towers, tmp_path):
    """A whole file beside an index of shards; an adapter beside its model, with which transformers would load it."""
    both = shutil.copytree(towers["language_model"], tmp_path / "both")
    adapted = shutil.copytree(both, tmp_path / "adapted")
    shards = [load_file(file) for file in both.glob("*.safetensors")]
    write(both / "model.safetensors", {name: 2 * tensor for shard in shards for name, tensor in shard.items()})
    with pytest.raises(ValueError, match=r"model\.safetensors.* are two models: take one of them away"):
        open_language_model(both)
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json is of an adapter"):
        open_language_model(adapted)


def test_a_diffusion_that_is_none_is_told(towers, tmp_path):
    for path, message in (
        (tmp_path / "no/such", "there is no "),
        (Path("runwayml/stable-diffusion-v1-5"), "is it a name on the Hugging Face Hub? `hf download"),
        (towers["image_decoder"] / "unet", "diffusers' UNet2DConditionModel alone: give the folder above"),
        (described(tmp_path / "single", **{"sd.safetensors": "x"}), "StableDiffusionPipeline.from_single_file(FILE)"),
        (tmp_path / "single" / "sd.safetensors", "a single file of weights: give a directory with config.json"),
        (towers["language_model"], "a model of type 'llama' in Hugging Face's layout"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            open_image_decoder(path)
    with pytest.raises(
        FileNotFoundError, match=r"a StableDiffusionPipeline directory of diffusers: --image-decoder takes"
    ):
        index = {"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}
        open_language_model(described(tmp_path / "pipeline", **index))
    with pytest.raises(FileNotFoundError, match=r"has no model\.json: .*; it looks like a model of type 'llama'"):
        saved.find(str(towers["language_model"]))
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "run" / "model.json").touch()
    with pytest.raises(FileNotFoundError, match=rf"a step of a run: give {tmp_path}/run@7"):
        saved.find(str(tmp_path / "run" / "checkpoints" / "7"))


@pytest.mark.slow
def test_rows_of_added_tokens_stay(towers, tmp_path, capsys):
    """As of models tuned to ChatML; rows that no token has, and tokens that have no row, are told."""
    directory = shutil.copytree(towers["language_model"], tmp_path / "llama")
    tensors, count = stored(directory), public_models.BASE_VOCABULARY
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((3, 32), 7.0)])
    write(directory / "model.safetensors", tensors)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": count + 3}))
    added = {"<|im_start|>": count, "<|im_end|>": count + 1}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    flags = towers | {"language_model": directory}
    run("import", **flags, to=tmp_path / "ours", num_queries=2)
    told = capsys.readouterr().err
    assert (
        f"warning: 1 rows of the language model are of no token of its tokenizer, and begin anew: [PAD] {count + 2}"
        in told
    )
    found = saved.find(str(tmp_path / "ours"))
    rows = found.read(["language_model/embed_tokens/embedding"])["language_model/embed_tokens/embedding"]
    assert (rows[count : count + 2] == 7).all() and len(rows) == found.config.language_model.vocab_size == count + 10
    assert found.config.special_tokens.eos == count + 1 and found.config.special_tokens.pad == count + 2
    run("export", checkpoint=tmp_path / "ours", format="dreamllm", to=tmp_path / "out", no_check=True)
    ids = json.loads((tmp_path / "out" / "added_tokens.json").read_text())
    assert (
        ids.items() >= added.items()
        and json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == count + 1
    )
    run("import", dreamllm=tmp_path / "out", to=tmp_path / "again")
    assert saved.find(str(tmp_path / "again")).config == found.config
    more = {f"<{i}>": count + i for i in range(2, 15)}
    (directory / "added_tokens.json").write_text(json.dumps(added | more))
    run("import", **flags, to=tmp_path / "more", num_queries=2)
    told = capsys.readouterr().err
    assert (
        f"12 tokens of the tokenizer have no rows in the language model, where they begin at random: <3> {count + 3}, "
        in told
    )
