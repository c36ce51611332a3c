"""What does not fit is refused by name, before anything is written."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from dreamllm_jax import convert  # noqa: E402
from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.interop.conversion import export_model  # noqa: E402
from dreamllm_jax.towers.autoencoders.pixel import PixelAutoencoderConfig  # noqa: E402
from tests.conversion.helpers import run  # noqa: E402


@pytest.fixture
def broken(original, tmp_path):
    """A copy to be broken."""
    return Path(shutil.copytree(original / "original", tmp_path / "checkpoint"))


def assert_refused(message: str, path: Path, error: type[Exception] = ValueError, **flags) -> None:
    to = path.parent / "to"
    with pytest.raises(error) as caught:
        run("import", dreamllm=path, to=to, **flags)
    assert str(caught.value).startswith(message.format(path=path)), str(caught.value)
    assert not to.exists() and not list(to.parent.glob(".*building"))


def edit(path: Path, **changes) -> None:
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | changes))


def test_a_truncated_file_is_named(broken):
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert_refused("{path}/model.safetensors is truncated or not a safetensors file: ", broken)
    (broken / "model.safetensors").write_bytes(whole)
    head = (broken / "stable_diffusion_head.bin").read_bytes()
    (broken / "stable_diffusion_head.bin").write_bytes(head[: len(head) // 2])
    assert_refused("{path}/stable_diffusion_head.bin is truncated or not a PyTorch file: ", broken)


def test_a_tied_head_is_left_out_where_it_is_the_embedding(broken):
    edit(broken / "config.json", tie_word_embeddings=True)
    message = "{path}: config.json says tie_word_embeddings, but lm_head.weight is not the embedding"
    assert_refused(message, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    run("import", dreamllm=broken, to=broken.parent / "to")
    found = saved.find(str(broken.parent / "to"))
    assert found.config.language_model.tie_word_embeddings and not any("lm_head" in path for path in found.leaves())


def test_an_index_that_names_a_missing_shard(broken):
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    weight_map = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = "{path}/model.safetensors.index.json names the shard model-00002-of-00002.safetensors, which is missing"
    assert_refused(message, broken, FileNotFoundError)
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = "{path}/model.safetensors.index.json does not list lm_head.weight, unlike its shards (22 such tensors)"
    assert_refused(message, broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "9 tensors do not fit:\n  unexpected layers.1.input_layernorm.weight (32,)\n"),
        ({"num_hidden_layers": 3}, "9 tensors do not fit:\n  missing layers.2.input_layernorm.weight (32,)\n"),
        ({"vocab_size": 99}, "2 tensors do not fit:\n  embed_tokens.weight has shape (308, 32), expected (99, 32)"),
        ({"num_key_value_heads": 4}, "4 tensors do not fit:\n  layers.0.self_attn.k_proj.weight has shape (16, 32)"),
    ],
    ids=["fewer layers", "more layers", "vocabulary", "key heads"],
)
def test_a_config_of_another_model(broken, changes, message):
    edit(broken / "config.json", **changes)
    assert_refused("{path} and its config.json: language_model: " + message, broken)


def test_heads_and_rotary_base_of_another_model(broken):
    edit(broken / "config.json", num_attention_heads=8)
    assert_refused(
        "{path}: model.layers.0.self_attn.rotary_emb.inv_freq has shape (4,), expected (2,) for num_attention_heads=8",
        broken,
    )
    edit(broken / "config.json", num_attention_heads=4, rope_theta=5e5)
    assert_refused("{path}: model.layers.0.self_attn.rotary_emb.inv_freq does not belong to rope_theta", broken)


def test_unsupported_settings_are_named(broken):
    edit(broken / "config.json", hidden_act="gelu")
    assert_refused("{path}/config.json: hidden_act = 'gelu' is not supported: only 'silu' is", broken)
    edit(broken / "config.json", model_type="llama")
    assert_refused("{path}/config.json has model_type 'llama', expected 'dreamllm'", broken)
    (broken / "config.json").write_text("{")
    assert_refused("{path}/config.json is not valid JSON: ", broken)


class _Evil:
    def __reduce__(self):
        return Path.touch, (Path(__file__).parent / "executed",)


def test_a_pickle_that_would_execute_code_is_refused(broken):
    torch.save({"dream_queries": _Evil()}, broken / "dream_embedding.bin")
    assert_refused("{path}/dream_embedding.bin is refused, for it is a pickle of more than tensors: ", broken)
    assert not (Path(__file__).parent / "executed").exists()


def test_tensors_nobody_expects_are_listed(broken):
    vision = torch.load(broken / "clip_vision_embedding.bin")
    torch.save(vision | {"proj.weight": torch.zeros(2, 3)}, broken / "clip_vision_embedding.bin")
    message = "clip_vision_embedding.bin holds 1 unexpected tensors: proj.weight (2, 3)"
    assert_refused(message, broken)
    del vision["projector.projector.bias"]
    vision["projector.projector.weight"] = torch.zeros(5, 5)
    torch.save(vision, broken / "clip_vision_embedding.bin")
    message = "{path} and its config.json: visual_projector: 2 tensors do not fit:\n  missing projector.bias (32,)\n"
    assert_refused(message, broken)


def test_a_missing_plugin_or_tower_is_named(broken, tmp_path):
    (broken / "dream_embedding.bin").unlink()
    message = "{path} has neither dream_embedding.bin nor dream_queries.pt"
    assert_refused(message, broken, FileNotFoundError)
    shutil.move(broken / "clip", tmp_path / "elsewhere")
    settings = json.loads((broken / "config.json").read_text())
    settings["plugins_init_kwargs"]["clip_vision_embedding"]["clip_vision_model_name_or_path"] = "openai/clip"
    (broken / "config.json").write_text(json.dumps(settings))
    message = (
        "{path}/config.json refers to 'openai/clip' (clip_vision_model_name_or_path), and no config.json is found in"
    )
    assert_refused(message, broken, FileNotFoundError)
    message = "{path} has neither dream_embedding.bin nor dream_queries.pt"
    assert_refused(message, broken, FileNotFoundError, vision_encoder=tmp_path / "elsewhere")


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


def test_a_disk_too_small_is_told_beforehand(original, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(
        OSError, match=r"to needs 0\.06 GiB for the checkpoint, half of it while importing; free are 0\.00"
    ):
        run("import", dreamllm=original / "original", to=tmp_path / "to")
    with pytest.raises(OSError, match=r"to needs 0\.06 GiB for the export, part of it while exporting; free are"):
        run("export", checkpoint=original / "ours", format="hf", to=tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_what_the_original_does_not_know_is_not_exported(original, tmp_path):
    found = saved.find(str(original / "ours"))
    llama = dataclasses.replace(found.config.language_model, mlp_bias=True)
    other = dataclasses.replace(found, config=dataclasses.replace(found.config, language_model=llama))
    with pytest.raises(
        ValueError, match=r"^the original program has no language_model\.mlp_bias: export with --format=hf"
    ):
        export_model(other, tmp_path / "to", ("dreamllm",))
    special = dataclasses.replace(found.config.special_tokens, bos=None)
    other = dataclasses.replace(found, config=dataclasses.replace(found.config, special_tokens=special))
    with pytest.raises(
        ValueError, match=r"^the original program has no documents without <s>, or images without marks"
    ):
        export_model(other, tmp_path / "to", ("dreamllm",))
    copy = shutil.copytree(original / "ours", tmp_path / "copy")
    edit(copy / "tokenizer" / "tokenizer_config.json", image_marks=["<s>", "<unk>", "</s>"])
    with pytest.raises(
        ValueError, match=r"^the original program does not mark images by <s>, <unk>, </s>: export with"
    ):
        export_model(saved.find(str(copy)), tmp_path / "to", ("dreamllm",))
    shutil.rmtree(copy)
    decoder = found.config.image_decoder
    pixels = dataclasses.replace(
        found.config,
        image_decoder=dataclasses.replace(
            decoder,
            autoencoder=PixelAutoencoderConfig(2),
            denoiser=dataclasses.replace(decoder.denoiser, in_channels=12, out_channels=12),
        ),
    )
    message = r"^image_decoder\.autoencoder of kind 'pixel' has no PyTorch format: only --format=hf"
    for kind in ("diffusers", "dreamllm"):
        with pytest.raises(ValueError, match=message):
            export_model(dataclasses.replace(found, config=pixels), tmp_path / "to", (kind,))
    llama = dataclasses.replace(found.config.language_model, qk_norm=True)
    normed = dataclasses.replace(found, config=dataclasses.replace(found.config, language_model=llama))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no qk_norm=True"):
        export_model(normed, tmp_path / "to", ("hf",))
    assert not list(tmp_path.iterdir())


def test_flags_that_do_not_go_together(original, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^give --vision-encoder, --image-decoder as well, or --dreamllm=DIR$"):
        run("import", language_model=original / "language_model", to=tmp_path / "to")
    with pytest.raises(ValueError, match="leave out --language-model"):
        run("import", language_model=original / "language_model", dreamllm=original / "original", to=tmp_path / "to")
    with pytest.raises(ValueError, match="has its own: leave out --num-queries, --visual-layernorm"):
        run("import", dreamllm=original / "original", to=tmp_path / "to", num_queries=8, visual_layernorm=True)
    for command, flags, message in (
        (
            "import",
            {"dtype": "lama:float32"},
            "'lama:float32' is not PART:TYPE; parts are vision_encoder, connector",
        ),
        ("import", {"dtype": "unet:float32"}, "'unet' is called image_decoder/denoiser now"),
        ("import", {"dtype": "queries:float32"}, "'queries' is called dream_queries now"),
        ("import", {"visual_projector": "mlp:1"}, "'mlp:1': an mlp projector has a depth of 2 or more"),
        ("export", {"max_shard_size": "5XB"}, "'5XB' is not a size such as 5GB or 500MB"),
    ):
        with pytest.raises(SystemExit):
            run(command, to=tmp_path / "to", **flags)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="can then be copied to gs://bucket/to"):
        run("export", checkpoint=original / "ours", format="hf", to="gs://bucket/to")
    with pytest.raises(FileNotFoundError, match=r"has no model\.json: it is not the --to of a finished"):
        run("export", checkpoint=tmp_path, format="hf", to=tmp_path / "to")
    with pytest.raises(FileNotFoundError, match="is an imported model: it has no step 3"):
        run("export", checkpoint=f"{original / 'ours'}@3", format="hf", to=tmp_path / "to")


@pytest.mark.parametrize(
    ("command", "former", "now"),
    [
        ("import", "--llama", "--language-model"),
        ("import", "--clip", "--vision-encoder"),
        ("import", "--diffusion", "--image-decoder"),
        ("import", "--condition-projector", "--connector"),
        ("verify", "--clip", "--vision-encoder"),
        ("verify", "--diffusion", "--image-decoder"),
    ],
)
def test_a_former_flag_is_refused_by_its_name_of_today(command, former, now):
    with pytest.raises(SystemExit) as refused:
        convert.parser().parse_args([command, f"{former}=x"])
    assert refused.value.code == f"error: {former} is called {now} now"
