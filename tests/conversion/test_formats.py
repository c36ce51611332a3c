"""PyTorch checkpoints come in and go back out with every bit, and the libraries compute the same with them."""

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.data.tokenizer import load_tokenizer  # noqa: E402
from dreamllm_jax.interop import conversion  # noqa: E402
from dreamllm_jax.interop.dreamllm import open_dreamllm  # noqa: E402
from tests import public_models  # noqa: E402
from tests.conversion.helpers import assert_identical, run, tensors, towers  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # diffusers
]

LAYOUTS = {
    "safetensors": {},
    "pickles": {name: {"pickled": True} for name in ("language_model", "vision_encoder", "image_decoder")},
    "tied and scaled, whole clip, 1.5": {
        "language_model": {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
        "vision_encoder": {"whole": True},
        "image_decoder": {"version": "1.5"},
    },
    "xl": {"image_decoder": {"version": "xl"}},
}


@pytest.fixture(scope="module", params=[(name, "float32") for name in LAYOUTS] + [("safetensors", "bfloat16")], ids=str)
def imported(request, tmp_path_factory):
    """Three public directories of one layout and type, and the checkpoint made of them."""
    layout, dtype = request.param
    root = tmp_path_factory.mktemp("imported")
    run(
        "import",
        **public_models.save_towers(root, getattr(torch, dtype), **LAYOUTS[layout]),
        to=root / "ours",
        num_queries=3,
        visual_projector="mlp:2",
        visual_layernorm=True,
        connector="mlp:3",
        dtype=",".join(f"{part}:{dtype}" for part in ("visual_projector", "dream_queries", "connector")),
    )
    return SimpleNamespace(root=root, ours=root / "ours", dtype=dtype)


def test_import_accounts_for_every_tensor(imported):
    theirs = LlamaForCausalLM.from_pretrained(imported.root / "language_model", dtype="auto").state_dict()
    found = saved.find(str(imported.ours))
    leaves = tensors(imported.ours)
    assert {str(leaf.dtype) for leaf in leaves.values()} == {imported.dtype}
    embedding = theirs["model.embed_tokens.weight"].float().numpy()
    new = [*load_tokenizer(found.tokenizer).special.__dict__.values()][2:]
    kept = np.setdiff1d(np.arange(len(embedding)), new)
    grown = leaves["language_model/embed_tokens/embedding"].astype(np.float32)
    np.testing.assert_array_equal(grown[kept], embedding[kept])
    assert len(grown) == found.config.language_model.vocab_size == max(len(embedding), max(new) + 1)
    assert 0.01 < grown[new].std() < 0.03
    query = theirs["model.layers.1.self_attn.q_proj.weight"].float().numpy()
    np.testing.assert_array_equal(
        leaves["language_model/layers/self_attn/q_proj/kernel"][1].astype(np.float32), query.T
    )


@pytest.mark.slow
def test_out_and_in_again_is_bit_identical(imported, tmp_path):
    run("export", checkpoint=imported.ours, format="all", to=tmp_path / "out", max_shard_size="40KB", no_check=True)
    want = tensors(imported.ours)
    run("import", dreamllm=tmp_path / "out" / "dreamllm", to=tmp_path / "again")
    assert_identical(tensors(tmp_path / "again"), want)
    assert saved.find(str(tmp_path / "again")).config == saved.find(str(imported.ours)).config

    diffusers = tmp_path / "out" / "diffusers"
    towers = {"vision_encoder": diffusers / "clip", "image_decoder": diffusers}
    run("import", language_model=tmp_path / "out" / "hf", **towers, to=tmp_path / "towers")
    roles = ("language_model", "vision_encoder", "image_decoder")
    want = {path: array for path, array in want.items() if path.split("/")[0] in roles}
    got = tensors(tmp_path / "towers")
    assert_identical({path: got[path] for path in want}, want)
    before, after = (load_tokenizer(saved.find(str(p)).tokenizer) for p in (imported.ours, tmp_path / "towers"))
    assert after.special == before.special and after.new_tokens == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "imported",
    [(layout, "float32") for layout in ("safetensors", "tied and scaled, whole clip, 1.5", "xl")],
    indirect=True,
    ids=str,
)
def test_the_libraries_load_what_is_exported_and_compute_the_same(imported, tmp_path, monkeypatch):
    found, check = [], conversion._check
    monkeypatch.setattr(conversion, "_check", lambda *args: found.extend(check(*args)) or found)
    checkpoint = saved.find(str(imported.ours))
    assert conversion.export_model(checkpoint, tmp_path / "out", ("dreamllm", "hf", "diffusers"), dtype="float32")
    float32 = [difference for difference in found if difference.dtype == "float32"]
    assert len(float32) == 5 + 1 + 3 and max(difference.relative for difference in float32) <= 1e-5, found
    hf, diffusers = tmp_path / "out" / "hf", tmp_path / "out" / "diffusers"
    for cls, path, more in (
        (LlamaForCausalLM, hf, {}),
        (CLIPVisionModel, diffusers / "clip", {}),
        (UNet2DConditionModel, diffusers, {"subfolder": "unet"}),
        (AutoencoderKL, diffusers, {"subfolder": "vae"}),
    ):
        _, report = cls.from_pretrained(path, output_loading_info=True, **more)
        assert not any(report.values()), (cls, report)
    scheduler = DDIMScheduler.from_pretrained(diffusers, subfolder="scheduler")
    assert scheduler.config.prediction_type == checkpoint.config.image_decoder.schedule.prediction_type
    assert CLIPImageProcessor.from_pretrained(diffusers / "clip").crop_size["height"] == 16
    tokenizer, ours = AutoTokenizer.from_pretrained(hf), load_tokenizer(checkpoint.tokenizer)
    assert tokenizer("a red bird").input_ids == [ours.special.bos, *ours.encode_text("a red bird")]
    assert tokenizer.convert_tokens_to_ids("<dream_start>") == ours.special.dream_start
    card = (hf / "README.md").read_text()
    assert "as imported" in card and "language model" in card and "float32" in card


def test_types_are_converted_where_bits_allow_it(tmp_path):
    """float16 -> float32 -> float16 and bfloat16 -> float32 -> bfloat16 lose nothing; a part's type can be chosen."""
    for dtype in ("float16", "bfloat16"):
        root, kind = tmp_path / dtype, getattr(torch, dtype)
        flags = public_models.save_towers(root, kind)
        run("import", **flags, to=root / "wide", dtype="float32")
        run("import", **flags, to=root / "mixed", dtype="vision_encoder:float32")
        run("export", checkpoint=root / "wide", format="hf", to=root / "hf", dtype=dtype, no_check=True)
        run("export", checkpoint=root / "mixed", format="hf", to=root / "direct", no_check=True)
        wide, direct = (
            LlamaForCausalLM.from_pretrained(root / name, dtype="auto").state_dict() for name in ("hf", "direct")
        )
        for name, tensor in direct.items():
            assert tensor.dtype == wide[name].dtype == kind
            if not name.endswith(("embed_tokens.weight", "lm_head.weight")):  # new rows were drawn in either type
                assert torch.equal(tensor, wide[name]), name
        mixed = tensors(root / "mixed")
        assert (
            mixed["vision_encoder/pre_layrnorm/scale"].dtype == "float32"
            and mixed["image_decoder/autoencoder/quant_conv/kernel"].dtype == dtype
        )


def test_embeddings_of_new_tokens_can_begin_as_the_mean(imported, tmp_path):
    run("import", **towers(imported.root), to=tmp_path / "mean", new_tokens="mean", dtype="float32")
    found = saved.find(str(tmp_path / "mean"))
    rows = tensors(tmp_path / "mean")["language_model/embed_tokens/embedding"]
    new = [*dataclasses.asdict(found.config.special_tokens).values()][2:]
    kept = np.setdiff1d(np.arange(len(rows)), new)
    rounding = 1e-6 if imported.dtype == "float32" else 1e-2
    np.testing.assert_allclose(rows[new], np.tile(rows[kept].mean(axis=0), (8, 1)), atol=rounding)


def test_a_mesh_is_given_its_shards(imported, tmp_path):
    """Read straight into 8 devices, a checkpoint of the original is what it is when read whole."""
    run("export", checkpoint=imported.ours, format="dreamllm", to=tmp_path / "out", no_check=True)
    source = open_dreamllm(tmp_path / "out")
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {
        "language_model/layers/mlp/up_proj/kernel": (None, "a", "b"),
        "language_model/embed_tokens/embedding": (None, "a"),
        "image_decoder/denoiser/conv_in/kernel": (None, None, None, "b"),
        "dream_queries/embedding": (None, "b"),
    }
    placing = {path: jax.NamedSharding(mesh, jax.P(*spec)) for path, spec in specs.items()}
    abstract = {
        path: jax.ShapeDtypeStruct(source.leaves[path].shape, np.float32, sharding=sharding)
        for path, sharding in placing.items()
    }
    placed, want = source.restore(abstract), tensors(imported.ours)
    for path, array in placed.items():
        assert array.sharding == abstract[path].sharding
        np.testing.assert_array_equal(array, want[path].astype(np.float32))


@pytest.mark.slow
def test_verify_on_the_command_line(original, tmp_path, capsys):
    run("export", checkpoint=original / "ours", format="hf", to=tmp_path / "hf", no_check=True)
    run("verify", checkpoint=original / "ours", torch=tmp_path / "hf")
    assert capsys.readouterr().out.count(" ok\n") == 2
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"] *= 1.001
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="do not compute the same"):
        run("verify", checkpoint=original / "ours", torch=tmp_path / "hf")
    assert " DIFFERS\n" in capsys.readouterr().out


def test_half_precision_variants_and_the_place_of_use(original, tmp_path):
    """Only `fp16` files of Stable Diffusion; and an export whose towers are named where it is going to be."""
    diffusion = shutil.copytree(original / "image_decoder", tmp_path / "diffusion")
    for part in ("unet", "vae"):
        stem = diffusion / part / "diffusion_pytorch_model"
        stem.with_suffix(".safetensors").rename(stem.with_suffix(".fp16.safetensors"))
    run("import", **towers(original) | {"image_decoder": diffusion}, to=tmp_path / "ours", num_queries=3)
    assert_identical(tensors(tmp_path / "ours"), tensors(original / "ours"))
    flags = {"format": "dreamllm", "location": "/mnt/models/mine", "no_check": True}
    run("export", checkpoint=tmp_path / "ours", to=tmp_path / "out", **flags)
    plugins = json.loads((tmp_path / "out" / "config.json").read_text())["plugins_init_kwargs"]
    assert plugins["clip_vision_embedding"]["clip_vision_model_name_or_path"] == "/mnt/models/mine/clip"
    assert plugins["stable_diffusion_head"]["diffusion_name_or_path"] == "/mnt/models/mine/diffusion"
    assert open_dreamllm(tmp_path / "out").config == saved.find(str(tmp_path / "ours")).config  # found inside as well


@pytest.mark.slow
def test_projectors_that_convolve(original, tmp_path):
    kinds = {"visual_projector": "conv", "connector": "conv"}
    run("import", **towers(original), **kinds, to=tmp_path / "ours", num_queries=4)
    assert conversion.export_model(saved.find(str(tmp_path / "ours")), tmp_path / "out", ("dreamllm",))
    run("import", dreamllm=tmp_path / "out", to=tmp_path / "again")
    assert_identical(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))


def test_the_original_s_head_for_stable_diffusion_xl(tmp_path):
    """Its file, its class, the biases that some of its pooled projectors have; the other head's file is not read."""
    run("import", **public_models.save_towers(tmp_path, image_decoder={"version": "xl"}), to=tmp_path / "ours")
    run("export", checkpoint=tmp_path / "ours", format="dreamllm", to=tmp_path / "out", no_check=True)
    file = tmp_path / "out" / "stable_diffusion_xl_head.bin"
    plugin = json.loads((tmp_path / "out" / "config.json").read_text())["plugins_init_kwargs"]["stable_diffusion_head"]
    assert plugin["_target_"] == "omni.models.dreamllm_sdxl.modeling_plugins.StableDiffusionXLHead"
    assert plugin["global_condition_hidden_size"] == 10 and plugin["projector_type"] == "linear"
    head = torch.load(file)
    own = {name: tuple(x.shape) for name, x in head.items() if not name.startswith(("vae.", "unet."))}
    bias = "global_projector.projector.bias"
    shapes = {"projector.projector.weight": (24, 32), "global_projector.projector.weight": (10, 32), bias: (10,)}
    assert own == shapes
    unbiased = {name: tensor for name, tensor in head.items() if name != bias}
    torch.save(unbiased, file)
    run("import", dreamllm=tmp_path / "out", to=tmp_path / "unbiased")
    assert not saved.find(str(tmp_path / "unbiased")).config.connector.pooled_bias
    assert conversion.export_model(saved.find(str(tmp_path / "unbiased")), tmp_path / "again", ("dreamllm",))
    again = torch.load(tmp_path / "again" / file.name)
    assert again.keys() == unbiased.keys() and all(torch.equal(again[name], unbiased[name]) for name in unbiased)
    file.rename(file.with_name("stable_diffusion_head.bin"))
    with pytest.raises(FileNotFoundError, match=r"has neither stable_diffusion_xl_head\.bin nor unet_projector\.pt$"):
        run("import", dreamllm=tmp_path / "out", to=tmp_path / "wrong")


def test_older_names_are_read(original, tmp_path):
    """Queries and projectors in files of their own; the towers' weights from the directories of the towers."""
    older = shutil.copytree(original / "original", tmp_path / "checkpoint")
    queries = torch.load(older / "dream_embedding.bin")["dream_queries"]
    torch.save(torch.nn.Parameter(queries), older / "dream_queries.pt")
    for plugin, old in (
        ("clip_vision_embedding", "clip_vision_model_projector.pt"),
        ("stable_diffusion_head", "unet_projector.pt"),
    ):
        content = torch.load(older / f"{plugin}.bin")
        prefix = "projector."
        torch.save({n[len(prefix) :]: t for n, t in content.items() if n.startswith(prefix)}, older / old)
        (older / f"{plugin}.bin").unlink()
    (older / "dream_embedding.bin").unlink()
    run("import", dreamllm=older, to=tmp_path / "to")
    assert_identical(tensors(tmp_path / "to"), tensors(original / "ours"))


@pytest.mark.slow
def test_safetensors_need_no_torch(original, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import runpy; runpy.run_module('dreamllm_jax.convert', run_name='__main__')"
    )

    def without_torch(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    flags = [f"--{name.replace('_', '-')}={path}" for name, path in towers(original).items()]
    done = without_torch("import", *flags, "--num-queries=3", f"--to={tmp_path / 'to'}")
    assert done.returncode == 0, done.stderr
    assert_identical(tensors(tmp_path / "to"), tensors(original / "ours"))
    theirs = original / "original"
    for flags, purpose in (
        (["import", f"--dreamllm={theirs}"], f"reading {theirs / 'clip_vision_embedding.bin'}"),
        (["export", f"--checkpoint={original / 'ours'}", "--format=dreamllm"], "--format=dreamllm"),
    ):
        done = without_torch(*flags, f"--to={tmp_path / 'other'}")
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last == f"error: {purpose} needs PyTorch: pip install 'dreamllm_jax[torch]'"
