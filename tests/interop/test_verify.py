"""The comparison with PyTorch passes for equal models, and tells which tower of unequal ones differs."""

import copy
import dataclasses
import json
import math
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.interop.verify import ROUNDING_FACTOR, Difference, compare, table
from dreamllm_jax.layers.rope import RopeScaling
from dreamllm_jax.towers.autoencoders.pixel import PixelAutoencoderConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from tests.tiny import MLP, tiny_config, tiny_params

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from tests.torch_reference import TorchDreamLLM  # noqa: E402

CONFIG = tiny_config(visual_projector=MLP, connector=ProjectorConfig(kind="mlp", depth=2))
PARAMS = tiny_params(CONFIG)
TOWERS = ["vision encoder", "denoiser", "autoencoder", "language model", "multimodal forward"]
PLUGINS = {
    "clip_vision_embedding": {
        "clip_vision_model_name_or_path": "clip",
        "projector_type": "mlp",
        "projector_depth": 2,
        "select_layer": CONFIG.vision_encoder.select_layer,
        "use_additional_post_layernorm": True,
    },
    "dream_embedding": {"num_dream_queries": CONFIG.num_queries},
    # Where an export is to be used: its folders are found inside it all the same.
    "stable_diffusion_head": {
        "diffusion_name_or_path": "/elsewhere/diffusion",
        "projector_type": "mlp",
        "projector_depth": 2,
    },
}


def write_dreamllm(model, directory):
    """What the original program's `save_pretrained` and the plugins' `save_model` leave."""
    model.language_model.save_pretrained(directory)
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    settings["rope_theta"] = settings.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(settings | {"model_type": "dreamllm", "plugins_init_kwargs": PLUGINS}))
    model.vision_encoder.config.save_pretrained(directory / "clip")
    model.image_decoder["denoiser"].save_config(directory / "diffusion" / "unet")
    model.image_decoder["autoencoder"].save_config(directory / "diffusion" / "vae")
    clip = {f"clip_vision_model.vision_model.{name}": x for name, x in model.vision_encoder.state_dict().items()}
    projector = {
        name if name.startswith("post_layernorm") else f"projector.{name}": x
        for name, x in model.visual_projector.state_dict().items()
    }
    torch.save(clip | projector, directory / "clip_vision_embedding.bin")
    torch.save({"dream_queries": model.dream_queries["embedding"].data[None]}, directory / "dream_embedding.bin")
    parts = {
        "vae": model.image_decoder["autoencoder"],
        "unet": model.image_decoder["denoiser"],
        "projector": model.connector,
    }
    head = {f"{prefix}.{name}": x for prefix, part in parts.items() for name, x in part.state_dict().items()}
    torch.save(head, directory / "stable_diffusion_head.bin")


def write_diffusers(model, directory):
    decoder = model.image_decoder
    parts = {"unet": decoder["denoiser"], "vae": decoder["autoencoder"], "clip": model.vision_encoder}
    for name, part in parts.items():
        part.save_pretrained(directory / name)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The model in float32 in the three layouts, and in bfloat16 in two of them."""
    model = TorchDreamLLM(CONFIG, PARAMS)
    root = tmp_path_factory.mktemp("torch")
    write_dreamllm(model, root / "dreamllm")
    write_diffusers(model, root / "diffusers")
    model.language_model.save_pretrained(root / "hf")
    model.bfloat16()
    write_dreamllm(model, root / "dreamllm_bfloat16")
    write_diffusers(model, root / "diffusers_bfloat16")
    return root


def part_of(params):
    """What gives a part of these parameters by its path."""
    flat = flatten_dict(params, sep="/")

    def part(name):
        prefix = f"{name}/"
        return unflatten_dict({p.removeprefix(prefix): x for p, x in flat.items() if p.startswith(prefix)}, sep="/")

    return part


def verdicts(differences):
    return {difference.tower: difference.passed for difference in differences}


@pytest.mark.parametrize(
    ("layout", "towers"),
    [
        pytest.param("dreamllm", TOWERS, marks=pytest.mark.slow),
        ("hf", ["language model"]),
        ("diffusers", ["vision encoder", "denoiser", "autoencoder"]),
    ],
)
def test_the_same_model_passes(directories, layout, towers):
    differences = compare(CONFIG, part_of(PARAMS), directories / layout)
    assert [(d.tower, d.dtype) for d in differences] == [(t, d) for t in towers for d in ("float32", "bfloat16")]
    assert all(d.passed for d in differences), table(differences)
    for d in differences:
        assert 0 < d.relative < d.limit and d.largest > 0
        assert d.limit == 1e-5 if d.dtype == "float32" else 2e-3 < d.limit < 0.1


@pytest.mark.parametrize("layout", [pytest.param("dreamllm_bfloat16", marks=pytest.mark.slow), "diffusers_bfloat16"])
def test_what_torch_stores_in_fewer_digits_passes(directories, layout):
    """Ours has all digits, and in any type: the comparison takes away those that torch's files do not have."""
    differences = compare(CONFIG, part_of(PARAMS), directories / layout, dtypes=["float32"])
    assert all(d.passed for d in differences), table(differences)

    def rounded(part):
        return unflatten_dict({k: x.astype(ml_dtypes.bfloat16) for k, x in flatten_dict(part_of(PARAMS)(part)).items()})

    assert compare(CONFIG, rounded, directories / layout, dtypes=["float32"]) == differences
    float32 = directories / layout.removesuffix("_bfloat16")
    assert not any(verdicts(compare(CONFIG, rounded, float32, dtypes=["float32"])).values())


@pytest.mark.parametrize(
    ("path", "differing"),
    [
        ("language_model/layers/mlp/down_proj/kernel", {"language model", "multimodal forward"}),
        ("vision_encoder/encoder/layers/mlp/fc2/kernel", {"vision encoder", "multimodal forward"}),
        ("visual_projector/post_layernorm/scale", {"multimodal forward"}),
        ("dream_queries/embedding", {"multimodal forward"}),
        ("connector/projector_2/kernel", {"multimodal forward"}),
        ("image_decoder/denoiser/mid_block/attentions_0/transformer_blocks_0/attn2/to_v/kernel", {"denoiser"}),
        ("image_decoder/autoencoder/decoder/conv_in/kernel", {"autoencoder"}),
    ],
)
def test_one_weight_that_differs_is_found(directories, path, differing):
    flat = flatten_dict(copy.deepcopy(PARAMS), sep="/")
    weight = flat[path].reshape(-1)  # in a stack of layers the largest of the first, which is always run
    largest = np.abs(weight[: weight.size // len(flat[path])] if "layers" in path else weight).argmax()
    weight[largest] *= 1.01
    params = unflatten_dict(flat, sep="/")
    differences = compare(CONFIG, part_of(params), directories / "dreamllm", dtypes=["float32"])
    assert verdicts(differences) == {tower: tower not in differing for tower in TOWERS}, table(differences)
    assert table(differences).count("DIFFERS") == len(differing)


def test_a_model_that_amplifies_rounding_is_judged_by_torchs_own(directories, monkeypatch):
    """With a limit that float32 cannot keep, ours, its products exact, is nearer to float64 than torch's; wrong weights
    are not as near."""
    monkeypatch.setattr("dreamllm_jax.interop.verify.FLOAT32_LIMIT", 1e-9)
    (right,) = compare(CONFIG, part_of(PARAMS), directories / "hf", dtypes=["float32"])
    assert right.passed and 1e-9 < right.relative < right.limit / ROUNDING_FACTOR < 1e-5, right
    wrong = copy.deepcopy(PARAMS)
    wrong["language_model"]["norm"]["scale"] *= 1.00001
    (differing,) = compare(CONFIG, part_of(wrong), directories / "hf", dtypes=["float32"])
    assert not differing.passed and differing.limit == right.limit


def test_rotary_scaling_of_old_configurations_is_read(directories, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(directories / "dreamllm" / name, tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    llama = dataclasses.replace(CONFIG.language_model, rope_theta=5e4, rope_scaling=RopeScaling("linear", 2.0))
    scaled = dataclasses.replace(CONFIG, language_model=llama)
    assert verdicts(compare(scaled, part_of(PARAMS), tmp_path, ["float32"])) == {"language model": True}
    assert verdicts(compare(CONFIG, part_of(PARAMS), tmp_path, ["float32"])) == {"language model": False}


def test_configurations_of_the_towers_are_found(directories, tmp_path):
    """Inside the checkpoint (the other tests), else at the path that config.json names."""
    directory = shutil.copytree(directories / "dreamllm", tmp_path / "dreamllm")
    (directory / "clip").rename(tmp_path / "elsewhere")
    assert error(CONFIG, directory) == (
        f"{directory}, vision encoder: {directory}/config.json refers to 'clip' (clip_vision_model_name_or_path), "
        "and no config.json is found in "
        f"{directory}/clip, {directory}/clip, clip, {tmp_path}/clip: name the directory with --vision-encoder"
    )
    found = compare(CONFIG, part_of(PARAMS), directory, ["float32"], {"vision_encoder": tmp_path / "elsewhere"})
    assert verdicts(found) == dict.fromkeys(TOWERS, True)
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"clip"', json.dumps(str(tmp_path / "elsewhere"))))
    (directory / "dream_embedding.bin").unlink()  # without which the towers cannot be joined
    differences = compare(CONFIG, part_of(PARAMS), directory, ["float32"])
    assert verdicts(differences) == dict.fromkeys(TOWERS[:-1], True)


def error(config, directory, kind=ValueError):
    with pytest.raises(kind) as refused:
        compare(config, part_of(PARAMS), directory, ["float32"])
    return str(refused.value)


def test_what_is_no_model_is_named(directories, tmp_path, monkeypatch):
    for name in (tmp_path, tmp_path / "missing"):
        assert error(CONFIG, name) == (
            f"{name} is no model in PyTorch's formats: it has neither a config.json of model_type 'llama' or "
            "'dreamllm' nor unet/config.json and vae/config.json"
        )
    (tmp_path / "config.json").write_text("{")
    assert error(CONFIG, tmp_path).startswith(f"{tmp_path}/config.json is not valid JSON: Expecting")
    monkeypatch.setitem(sys.modules, "torch", None)
    want = "verifying needs PyTorch: pip install 'dreamllm_jax[torch]'"
    assert error(CONFIG, directories / "hf", ImportError) == want


def test_tensors_that_do_not_fit_are_named(directories, tmp_path):
    shutil.copytree(directories / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # stands in old files, and is computed
    safetensors.save_file(tensors, path, {"format": "pt"})
    assert error(CONFIG, tmp_path / "hf") == f"{tmp_path}/hf, language model: hf: missing model.norm.weight"

    shutil.copytree(directories / "diffusers", tmp_path / "diffusers")
    path = tmp_path / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.load_file(path)
    del tensors["conv_in.weight"]
    tensors |= {"conv_in.bias": torch.ones(3), "conv_in.scale": torch.ones(3)}
    safetensors.save_file(tensors, path, {"format": "pt"})
    assert error(CONFIG, tmp_path / "diffusers") == (
        f"{tmp_path}/diffusers, denoiser: unet: missing conv_in.weight, unexpected conv_in.scale, "
        "conv_in.bias is (3,), expected (8,)"
    )
    path.write_bytes(b"cut")
    assert error(CONFIG, tmp_path / "diffusers").startswith(f"{tmp_path}/diffusers, denoiser: ")

    shutil.copytree(directories / "dreamllm", tmp_path / "dreamllm")
    path = tmp_path / "dreamllm" / "clip_vision_embedding.bin"
    tensors = torch.load(path)
    del tensors["clip_vision_model.vision_model.post_layernorm.bias"]
    tensors["projector.projector.4.weight"] = tensors.pop("projector.projector.2.weight")
    torch.save(tensors, path)
    assert error(CONFIG, tmp_path / "dreamllm") == (
        f"{tmp_path}/dreamllm, vision encoder: clip_vision_embedding.bin: "
        "missing clip_vision_model.post_layernorm.bias, missing projector.projector.2.weight, "
        "unexpected projector.projector.4.weight"
    )


def test_another_shape_is_named(directories):
    def changed(part, **settings):
        return dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **settings)})

    hf, diffusers = directories / "hf", directories / "diffusers"
    assert error(changed("language_model", num_hidden_layers=3), hf) == (
        f"{hf}, language model: language_model.num_hidden_layers is 3 here, but 2 there"
    )
    decoder = CONFIG.image_decoder
    narrow = dataclasses.replace(decoder.denoiser, block_out_channels=(8, 32))
    assert error(changed("image_decoder", denoiser=narrow), diffusers) == (
        f"{diffusers}, denoiser: image_decoder.denoiser.block_out_channels is (8, 32) here, but (8, 16) there"
    )
    three = dataclasses.replace(decoder.denoiser, in_channels=3)
    pixels = changed("image_decoder", autoencoder=PixelAutoencoderConfig(), denoiser=three)
    assert error(pixels, diffusers) == (
        f"{diffusers}, denoiser: image_decoder.denoiser.in_channels is 3 here, but 4 there"
    )
    clip = {**PARAMS, "vision_encoder": {**PARAMS["vision_encoder"], "more": np.zeros(5)}}
    with pytest.raises(
        ValueError, match=r"vision encoder: vision_encoder has [\d,]+ parameters here, but [\d,]+ there$"
    ):
        compare(CONFIG, part_of(clip), diffusers, ["float32"])


def test_the_table_is_aligned():
    differences = [
        Difference("language model", "float32", 2.34e-6, 5.6e-7, 1e-5),
        Difference("autoencoder", "bfloat16", math.nan, math.inf, 2.5e-2),
    ]
    assert table(differences).splitlines() == [
        "tower           type      largest difference  relative difference  limit    verdict",
        "language model  float32   2.3e-06             5.6e-07              1.0e-05  ok",
        "autoencoder     bfloat16  nan                 inf                  2.5e-02  DIFFERS",
    ]
