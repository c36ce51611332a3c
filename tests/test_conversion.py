"""PyTorch checkpoints come in and go back out with every bit; what does not fit is refused by name."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: E402
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM  # noqa: E402

from dreamllm_jax import convert  # noqa: E402
from dreamllm_jax.conversion import export_model  # noqa: E402
from dreamllm_jax.data.tokenizer import load_tokenizer  # noqa: E402
from dreamllm_jax.interop.dreamllm import open_dreamllm  # noqa: E402
from dreamllm_jax.training import saved  # noqa: E402
from tests import public_models  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*:FutureWarning")


def run(command: str, **flags) -> None:
    """The command line without a process of its own; `True` is a flag without a value."""
    words = [command]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [f"{flag}={value}"]
    arguments = convert.parser().parse_args(words)
    arguments.main(arguments)


def tensors(checkpoint) -> dict[str, np.ndarray]:
    found = saved.find(str(checkpoint))
    return found.read(found.leaves())


def assert_identical(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for path in want:
        assert got[path].dtype == want[path].dtype, path
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


LAYOUTS = {
    "safetensors": {"llama": {}, "clip": {}, "diffusion": {}},
    "pickles": {"llama": {"pickled": True}, "clip": {"pickled": True}, "diffusion": {"pickled": True}},
    "tied, whole clip, 1.5": {
        "llama": {"tie_word_embeddings": True, "num_key_value_heads": 4},
        "clip": {"whole": True},
        "diffusion": {"version": "1.5"},
    },
}


@pytest.fixture(scope="module", params=[(name, "float32") for name in LAYOUTS] + [("safetensors", "bfloat16")], ids=str)
def imported(request, tmp_path_factory):
    """Three public directories of one layout and type, and the checkpoint made of them."""
    layout, dtype = request.param
    root = tmp_path_factory.mktemp("imported")
    kinds, options = {"dtype": getattr(torch, dtype)}, LAYOUTS[layout]
    public_models.save_llama(root / "llama", **kinds, **options["llama"])
    public_models.save_clip(root / "clip", **kinds, **options["clip"])
    public_models.save_diffusion(root / "diffusion", **kinds, **options["diffusion"])
    towers = {name: root / name for name in ("llama", "clip", "diffusion")}
    run(
        "import",
        **towers,
        to=root / "ours",
        num_queries=3,
        visual_projector="mlp:2",
        visual_layernorm=True,
        condition_projector="mlp:3",
        dtype=",".join(f"{part}:{dtype}" for part in ("visual_projector", "queries", "condition_projector")),
    )
    return SimpleNamespace(root=root, ours=root / "ours", dtype=dtype, **towers)


def test_import_accounts_for_every_tensor(imported):
    theirs = LlamaForCausalLM.from_pretrained(imported.llama, dtype="auto").state_dict()
    found = saved.find(str(imported.ours))
    leaves = tensors(imported.ours)
    assert {str(leaf.dtype) for leaf in leaves.values()} == {imported.dtype}
    embedding = theirs["model.embed_tokens.weight"].float().numpy()
    new = [*load_tokenizer(found.tokenizer).special.__dict__.values()][2:]
    kept = np.setdiff1d(np.arange(len(embedding)), new)
    grown = leaves["llama/embed_tokens/embedding"].astype(np.float32)
    np.testing.assert_array_equal(grown[kept], embedding[kept])
    assert len(grown) == found.config.llama.vocab_size == max(len(embedding), max(new) + 1)
    assert 0.01 < grown[new].std() < 0.03
    query = theirs["model.layers.1.self_attn.q_proj.weight"].float().numpy()
    np.testing.assert_array_equal(leaves["llama/layers/self_attn/q_proj/kernel"][1].astype(np.float32), query.T)


@pytest.mark.slow
def test_out_and_in_again_is_bit_identical(imported, tmp_path):
    run("export", checkpoint=imported.ours, format="all", to=tmp_path / "out", max_shard_size="40KB", no_check=True)
    want = tensors(imported.ours)
    run("import", dreamllm=tmp_path / "out" / "dreamllm", to=tmp_path / "again")
    assert_identical(tensors(tmp_path / "again"), want)
    assert saved.find(str(tmp_path / "again")).config == saved.find(str(imported.ours)).config

    diffusers = tmp_path / "out" / "diffusers"
    run("import", llama=tmp_path / "out" / "hf", clip=diffusers / "clip", diffusion=diffusers, to=tmp_path / "towers")
    towers = {path: array for path, array in want.items() if path.split("/")[0] in ("llama", "clip", "vae", "unet")}
    got = tensors(tmp_path / "towers")
    assert_identical({path: got[path] for path in towers}, towers)
    before, after = (load_tokenizer(saved.find(str(p)).tokenizer) for p in (imported.ours, tmp_path / "towers"))
    assert after.special == before.special and after.new_tokens == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "imported", [("safetensors", "float32"), ("tied, whole clip, 1.5", "float32")], indirect=True, ids=str
)
def test_the_libraries_load_what_is_exported_and_compute_the_same(imported, tmp_path):
    checkpoint = saved.find(str(imported.ours))
    assert export_model(checkpoint, tmp_path / "out", ("dreamllm", "hf", "diffusers"), dtype="float32")
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
    assert scheduler.config.prediction_type == checkpoint.config.schedule.prediction_type
    assert CLIPImageProcessor.from_pretrained(diffusers / "clip").crop_size["height"] == 16
    tokenizer, ours = AutoTokenizer.from_pretrained(hf), load_tokenizer(checkpoint.tokenizer)
    assert tokenizer("a red bird").input_ids == [ours.special.bos, *ours.encode_text("a red bird")]
    assert tokenizer.convert_tokens_to_ids("<dream_start>") == ours.special.dream_start
    card = (hf / "README.md").read_text()
    assert "as imported" in card and "language model" in card and "float32" in card


def test_types_are_converted_where_bits_allow_it(tmp_path):
    """float16 -> float32 -> float16 and bfloat16 -> float32 -> bfloat16 lose nothing; a part's type can be chosen."""
    for dtype in ("float16", "bfloat16"):
        root = tmp_path / dtype
        kind = getattr(torch, dtype)
        towers = {
            "llama": public_models.save_llama(root / "llama", kind),
            "clip": public_models.save_clip(root / "clip", kind),
            "diffusion": public_models.save_diffusion(root / "diffusion", kind),
        }
        run("import", **towers, to=root / "wide", dtype="float32")
        run("import", **towers, to=root / "mixed", dtype="clip:float32")
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
        assert {mixed["clip/pre_layrnorm/scale"].dtype, mixed["vae/quant_conv/kernel"].dtype} == {
            np.dtype(np.float32),
            np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16),
        }


def test_embeddings_of_new_tokens_can_begin_as_the_mean(imported, tmp_path):
    towers = {name: getattr(imported, name) for name in ("llama", "clip", "diffusion")}
    run("import", **towers, to=tmp_path / "mean", new_tokens="mean", dtype="float32")
    found = saved.find(str(tmp_path / "mean"))
    rows = tensors(tmp_path / "mean")["llama/embed_tokens/embedding"]
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
        "llama/layers/mlp/up_proj/kernel": (None, "a", "b"),
        "llama/embed_tokens/embedding": (None, "a"),
        "unet/conv_in/kernel": (None, None, None, "b"),
        "queries/dream_queries": (None, "b"),
    }
    abstract = {
        path: jax.ShapeDtypeStruct(
            source.leaves[path].shape,
            np.float32,
            sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)),
        )
        for path, spec in specs.items()
    }
    placed, want = source.restore(abstract), tensors(imported.ours)
    for path, array in placed.items():
        assert array.sharding == abstract[path].sharding
        np.testing.assert_array_equal(array, want[path].astype(np.float32))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint of the original program, its tokenizer with it."""
    root = tmp_path_factory.mktemp("original")
    towers = {
        "llama": public_models.save_llama(root / "llama"),
        "clip": public_models.save_clip(root / "clip"),
        "diffusion": public_models.save_diffusion(root / "diffusion"),
    }
    run("import", **towers, to=root / "ours", num_queries=3)
    run("export", checkpoint=root / "ours", format="dreamllm", to=root / "original", no_check=True)
    return root


@pytest.fixture
def broken(original, tmp_path):
    """A copy to be broken."""
    return Path(shutil.copytree(original / "original", tmp_path / "checkpoint"))


def refused(message: str, path: Path, to: Path, error: type[Exception] = ValueError, **flags) -> None:
    with pytest.raises(error) as caught:
        run("import", dreamllm=path, to=to, **flags)
    assert str(caught.value).startswith(message.format(path=path)), str(caught.value)
    assert not to.exists() and not list(to.parent.glob(".*building"))


def edit(path: Path, **changes) -> None:
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | changes))


def test_a_truncated_file_is_named(broken, tmp_path):
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("{path}/model.safetensors is truncated or not a safetensors file: ", broken, tmp_path / "to")
    (broken / "model.safetensors").write_bytes(whole)
    head = (broken / "stable_diffusion_head.bin").read_bytes()
    (broken / "stable_diffusion_head.bin").write_bytes(head[: len(head) // 2])
    refused("{path}/stable_diffusion_head.bin is truncated or not a PyTorch file: ", broken, tmp_path / "to")


def test_an_index_that_names_a_missing_shard(broken, tmp_path):
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    weight_map = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = "{path}/model.safetensors.index.json names the shard model-00002-of-00002.safetensors, which is missing"
    refused(message, broken, tmp_path / "to", FileNotFoundError)
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = "{path}/model.safetensors.index.json does not list lm_head.weight, unlike its shards (22 such tensors)"
    refused(message, broken, tmp_path / "to")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 1},
            "llama: 9 tensors do not fit:\n  unexpected layers.1.input_layernorm.weight (32,)\n",
        ),
        ({"num_hidden_layers": 3}, "llama: 9 tensors do not fit:\n  missing layers.2.input_layernorm.weight (32,)\n"),
        (
            {"vocab_size": 99},
            "llama: 2 tensors do not fit:\n  embed_tokens.weight has shape (308, 32), expected (99, 32)",
        ),
        (
            {"num_key_value_heads": 4},
            "llama: 4 tensors do not fit:\n  layers.0.self_attn.k_proj.weight has shape (16, 32)",
        ),
    ],
    ids=["fewer layers", "more layers", "vocabulary", "key heads"],
)
def test_a_config_of_another_model(broken, tmp_path, changes, message):
    edit(broken / "config.json", **changes)
    refused("{path} and its config.json: " + message, broken, tmp_path / "to")


def test_heads_and_rotary_base_of_another_model(broken, tmp_path):
    edit(broken / "config.json", num_attention_heads=8)
    refused(
        "{path}: model.layers.0.self_attn.rotary_emb.inv_freq has shape (4,), expected (2,) for num_attention_heads=8",
        broken,
        tmp_path / "to",
    )
    edit(broken / "config.json", num_attention_heads=4, rope_theta=5e5)
    refused(
        "{path}: model.layers.0.self_attn.rotary_emb.inv_freq does not belong to rope_theta", broken, tmp_path / "to"
    )


def test_unsupported_settings_are_named(broken, tmp_path):
    edit(broken / "config.json", hidden_act="gelu")
    refused("{path}/config.json: hidden_act = 'gelu' is not supported: only 'silu' is", broken, tmp_path / "to")
    edit(broken / "config.json", model_type="llama")
    refused("{path}/config.json has model_type 'llama', expected 'dreamllm'", broken, tmp_path / "to")
    (broken / "config.json").write_text("{")
    refused("{path}/config.json is not valid JSON: ", broken, tmp_path / "to")


class _Evil:
    def __reduce__(self):
        return Path.touch, (Path(__file__).parent / "executed",)


def test_a_pickle_that_would_execute_code_is_refused(broken, tmp_path):
    torch.save({"dream_queries": _Evil()}, broken / "dream_embedding.bin")
    refused("{path}/dream_embedding.bin is refused, for it is a pickle of more than tensors: ", broken, tmp_path / "to")
    assert not (Path(__file__).parent / "executed").exists()


def test_tensors_nobody_expects_are_listed(broken, tmp_path):
    vision = torch.load(broken / "clip_vision_embedding.bin")
    torch.save(vision | {"proj.weight": torch.zeros(2, 3)}, broken / "clip_vision_embedding.bin")
    message = "clip_vision_embedding.bin holds 1 unexpected tensors: proj.weight (2, 3)"
    refused(message, broken, tmp_path / "to")
    del vision["projector.projector.bias"]
    vision["projector.projector.weight"] = torch.zeros(5, 5)
    torch.save(vision, broken / "clip_vision_embedding.bin")
    message = "{path} and its config.json: visual_projector: 2 tensors do not fit:\n  missing projector.bias (32,)\n"
    refused(message, broken, tmp_path / "to")


def test_a_missing_plugin_or_tower_is_named(broken, tmp_path):
    (broken / "dream_embedding.bin").unlink()
    message = "{path} has neither dream_embedding.bin nor dream_queries.pt"
    refused(message, broken, tmp_path / "to", FileNotFoundError)
    shutil.move(broken / "clip", tmp_path / "elsewhere")
    settings = json.loads((broken / "config.json").read_text())
    settings["plugins_init_kwargs"]["clip_vision_embedding"]["clip_vision_model_name_or_path"] = "openai/clip"
    (broken / "config.json").write_text(json.dumps(settings))
    message = (
        "{path}/config.json refers to 'openai/clip' (clip_vision_model_name_or_path), and no config.json is found in"
    )
    refused(message, broken, tmp_path / "to", FileNotFoundError)
    message = "{path} has neither dream_embedding.bin nor dream_queries.pt"
    refused(message, broken, tmp_path / "to", FileNotFoundError, clip=tmp_path / "elsewhere")


@pytest.mark.slow
def test_projectors_that_convolve(original, tmp_path):
    towers = {name: original / name for name in ("llama", "clip", "diffusion")}
    kinds = {"visual_projector": "conv", "condition_projector": "conv"}
    run("import", **towers, **kinds, to=tmp_path / "ours", num_queries=4)
    assert export_model(saved.find(str(tmp_path / "ours")), tmp_path / "out", ("dreamllm",))
    run("import", dreamllm=tmp_path / "out", to=tmp_path / "again")
    assert_identical(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))


def test_older_names_are_read(original, broken, tmp_path):
    """Queries and projectors in files of their own; the towers' weights from the directories of the towers."""
    queries = torch.load(broken / "dream_embedding.bin")["dream_queries"]
    torch.save(torch.nn.Parameter(queries), broken / "dream_queries.pt")
    for plugin, old in (
        ("clip_vision_embedding", "clip_vision_model_projector.pt"),
        ("stable_diffusion_head", "unet_projector.pt"),
    ):
        content = torch.load(broken / f"{plugin}.bin")
        prefix = "projector."
        torch.save({n[len(prefix) :]: t for n, t in content.items() if n.startswith(prefix)}, broken / old)
        (broken / f"{plugin}.bin").unlink()
    (broken / "dream_embedding.bin").unlink()
    run("import", dreamllm=broken, to=tmp_path / "to")
    assert_identical(tensors(tmp_path / "to"), tensors(original / "ours"))


def test_targets_that_exist_are_kept(original, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "mine").write_text("mine")
    message = f"{tmp_path / 'to'} exists already; choose another name or remove it"
    for command, flags in (
        ("import", {"dreamllm": original / "original"}),
        ("export", {"checkpoint": original / "ours", "format": "hf"}),
    ):
        with pytest.raises(FileExistsError) as caught:
            run(command, to=tmp_path / "to", **flags)
        assert str(caught.value) == message
    assert [file.name for file in (tmp_path / "to").iterdir()] == ["mine"]


@pytest.mark.slow
def test_safetensors_need_no_torch(original, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import runpy; runpy.run_module('dreamllm_jax.convert', run_name='__main__')"
    )

    def without_torch(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    towers = [f"--{name}={original / name}" for name in ("llama", "clip", "diffusion")]
    done = without_torch("import", *towers, "--num-queries=3", f"--to={tmp_path / 'to'}")
    assert done.returncode == 0, done.stderr
    assert_identical(tensors(tmp_path / "to"), tensors(original / "ours"))
    for flags, purpose in (
        (
            ["import", f"--dreamllm={original / 'original'}"],
            f"reading {original / 'original' / 'clip_vision_embedding.bin'}",
        ),
        (["export", f"--checkpoint={original / 'ours'}", "--format=dreamllm"], "--format=dreamllm"),
    ):
        done = without_torch(*flags, f"--to={tmp_path / 'other'}")
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last == f"error: {purpose} needs PyTorch: pip install 'dreamllm_jax[torch]'"


def test_a_disk_too_small_is_told_beforehand(original, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(
        OSError, match=r"to needs 0\.06 GiB for the checkpoint, half of it while importing; free are 0\.00"
    ):
        run("import", dreamllm=original / "original", to=tmp_path / "to")
    with pytest.raises(OSError, match=r"to needs 0\.06 GiB for the export, part of it while exporting; free are"):
        run("export", checkpoint=original / "ours", format="hf", to=tmp_path / "to")
    assert not list(tmp_path.iterdir())


_IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run([*_IN_NAMESPACE, "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="a file system cannot be mounted here",
)
def test_a_disk_that_fills_up_loses_nothing(original, tmp_path):
    """On a real small file system, told to have room: the first write that fails ends it with one line."""
    program = (
        "import shutil, types; shutil.disk_usage = lambda _: types.SimpleNamespace(free=1 << 40)\n"
        "import runpy; runpy.run_module('dreamllm_jax.convert', run_name='__main__')"
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    into = f"import --dreamllm={original / 'original'}"
    out = f"export --checkpoint={original / 'ours'}"
    for flags, size in (
        (into, "100k"),  # while the tensors are gathered
        (into, "700k"),  # while the checkpoint is written
        (f"{out} --format=hf", "100k"),
        (f"{out} --format=hf", "230k"),  # while safetensors are written
        (f"{out} --format=dreamllm", "900k"),  # while pickles are written
    ):
        script = (
            f"mount -t tmpfs -o size={size} tmpfs {disk} && "
            f'{sys.executable} -c "$PROGRAM" {flags} --to={disk / "to"}; status=$?; ls -A {disk}; exit $status'
        )
        done = subprocess.run(
            [*_IN_NAMESPACE, "sh", "-c", script],
            env=os.environ | {"PROGRAM": program},
            capture_output=True,
            text=True,
            check=False,
        )
        # Orbax's threads may still be writing to what is then an abandoned temporary directory, and say so.
        assert done.returncode == 1 and done.stdout in ("", ".to.building\n"), (done.stdout, done.stderr)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        assert errors[0].startswith(f"error: the disk of {disk / 'to'} is full; nothing was kept there: ")


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_looks_whole(original, tmp_path):
    command = [sys.executable, "-m", "dreamllm_jax.convert", "export", f"--checkpoint={original / 'ours'}"]
    command += ["--format=dreamllm", f"--to={tmp_path / 'to'}", "--no-check"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / ".to.building").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "to").exists()
    assert (tmp_path / ".to.building").exists()
    run("export", checkpoint=original / "ours", format="dreamllm", to=tmp_path / "to", no_check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    assert not (tmp_path / "to" / ".scratch").exists()


def test_flags_that_do_not_go_together(original, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^give --clip, --diffusion as well, or --dreamllm=DIR$"):
        run("import", llama=original / "llama", to=tmp_path / "to")
    with pytest.raises(ValueError, match="leave out --llama"):
        run("import", llama=original / "llama", dreamllm=original / "original", to=tmp_path / "to")
    with pytest.raises(SystemExit):
        run("import", llama=original / "llama", to=tmp_path / "to", dtype="lama:float32")
    assert "'lama:float32' is not PART:TYPE; parts are llama, queries" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("import", llama=original / "llama", to=tmp_path / "to", visual_projector="mlp:1")
    assert "'mlp:1': an mlp projector has a depth of 2 or more" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"has no model\.json: it is not the --to of a finished"):
        run("export", checkpoint=tmp_path, format="hf", to=tmp_path / "to")
    with pytest.raises(FileNotFoundError, match="is an imported model: it has no step 3"):
        run("export", checkpoint=f"{original / 'ours'}@3", format="hf", to=tmp_path / "to")
