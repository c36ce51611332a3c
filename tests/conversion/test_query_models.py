"""OpenUni's and MetaQuery's checkpoints come in, and go out as they came."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.data.prompting import PUBLISHED  # noqa: E402
from dreamllm_jax.data.tokenizer import load_tokenizer  # noqa: E402
from dreamllm_jax.diffusion.flow import FlowConfig  # noqa: E402
from dreamllm_jax.interop import metaquery, openuni, query_modules, verify  # noqa: E402
from dreamllm_jax.interop.conversion import export_model  # noqa: E402
from tests import query_checkpoints  # noqa: E402
from tests.conversion.helpers import assert_identical, run, tensors  # noqa: E402
from tests.query_checkpoints import PLACEMENTS, QUERIES, ROWS  # noqa: E402
from tests.tiny import DECODER_UNILIP, tiny_config  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*:FutureWarning")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """OpenUni's."""
    root = tmp_path_factory.mktemp("openuni")
    query_checkpoints.save_openuni_towers(root)
    return {"vision_language": root / "lmm", "image_decoder": root / "Sana"}


@pytest.fixture(scope="module", params=("llava", "Qwen2.5-VL"))
def directory(request, tmp_path_factory):
    """MetaQuery's, beside its towers."""
    return query_checkpoints.save_metaquery(tmp_path_factory.mktemp("metaquery"), request.param)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def beside(directory):
    """The towers that a checkpoint's config.json names, which lie beside it."""
    settings = json.loads((directory / "config.json").read_text())
    names = {"vision_language": "mllm_id", "image_decoder": "vae_id"}
    return {role: directory.parent / settings[key].split("/")[1] for role, key in names.items()}


def assert_compared(ours, theirs):
    """All but the image decoder, which is compared elsewhere: of that the public classes take every tensor."""
    found = saved.find(str(ours))
    with pytest.MonkeyPatch.context() as patch:
        decoder = ("denoiser", "autoencoder")
        for tower in decoder:
            query_modules.loaders(found.config, theirs)[f"image_decoder/{tower}"]()
        others = {name: tower for name, tower in verify._TOWERS.items() if name not in decoder}
        patch.setattr(verify, "_TOWERS", others)
        differences = verify.compare(found.config, found.part, theirs, dtypes=("float32",))
    assert {d.tower for d in differences} == {"vision encoder", "language model", "multimodal forward"}
    assert all(d.passed and d.relative <= 1e-5 for d in differences), differences


@pytest.mark.slow
def test_openuni_comes_in_computes_what_torch_does_and_goes_out(towers, tmp_path):
    file = query_checkpoints.save_openuni(towers["image_decoder"].parent, "enc_proj", towers=True)
    run("import", openuni=file, **towers, connector_heads=8, to=tmp_path / "ours")
    run("export", checkpoint=tmp_path / "ours", format="openuni", to=tmp_path / "out", no_check=True)
    assert_compared(tmp_path / "ours", tmp_path / "out")
    assert_same(*(torch.load(x)["state_dict"] for x in (tmp_path / "out" / "openuni.pth", file)))
    assert "'num_attention_heads': 8" in (tmp_path / "out" / "README.md").read_text()
    run("import", openuni=tmp_path / "out" / "openuni.pth", **towers, connector_heads=8, to=tmp_path / "again")
    assert_identical(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))
    found = saved.find(str(tmp_path / "ours"))
    words, special = load_tokenizer(found.tokenizer), found.config.special_tokens
    assert words.special == special and words.painting == ("<img>", "</img>") and not words.new_tokens
    ids = [words.fast.token_to_id(token) for token in ("<img>", "<IMG_CONTEXT>", "</img>", "<|endoftext|>")]
    assert [special.dream_start, special.im_patch, special.dream_end, special.pad] == ids
    assert found.config.prompting == PUBLISHED["openuni"] and found.config.vision_encoder.max_tiles == 1
    run("export", checkpoint=tmp_path / "ours", format="all", to=tmp_path / "all", no_check=True)
    assert {folder.name for folder in (tmp_path / "all").iterdir()} == {"openuni", "hf", "diffusers"}


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["proj_enc", "proj_enc_proj"])
def test_projectors_stand_where_they_did_and_towers_come_from_their_directories(towers, placement, tmp_path):
    root = towers["image_decoder"].parent
    file = query_checkpoints.save_openuni(root, placement, towers=False)
    heads = PLACEMENTS[placement][0] // 8
    run("import", openuni=file, **towers, connector_heads=heads, to=tmp_path / "ours")
    found = saved.find(str(tmp_path / "ours"))
    assert openuni.placement_of(found.config.connector) == placement and found.config.connector.head_dim == 8
    (difference,) = verify.compare(found.config, found.part, file, dtypes=("float32",))
    assert difference.tower == "connector" and difference.relative <= 1e-5
    run("export", checkpoint=tmp_path / "ours", format="openuni", to=tmp_path / "out", no_check=True)
    whole = query_checkpoints.save_openuni(root, placement, towers=True)
    assert_same(*(torch.load(x)["state_dict"] for x in (tmp_path / "out" / "openuni.pth", whole)))


@pytest.mark.slow
def test_metaquery_comes_in_computes_what_torch_does_and_goes_out(directory, tmp_path):
    run("import", metaquery=directory, to=tmp_path / "ours")
    run("export", checkpoint=tmp_path / "ours", format="metaquery", to=tmp_path / "out", no_check=True)
    assert_compared(tmp_path / "ours", tmp_path / "out")
    got, want = (load_file(x / "model.safetensors") for x in (tmp_path / "out", directory))
    assert_same(got, want)
    found, given = saved.find(str(tmp_path / "ours")), tensors(tmp_path / "ours")
    embedding = next(x for name, x in want.items() if name.endswith("embed_tokens.weight")).numpy()
    np.testing.assert_array_equal(given["language_model/embed_tokens/embedding"], embedding[: ROWS + 2])
    np.testing.assert_array_equal(given["dream_queries/embedding"], embedding[ROWS + 2 :])
    qwen = found.config.language_model.kind == "qwen25_vl"
    if qwen:  # whose output matrix is the language model's own
        whole = load_file(directory.parent / "Qwen2.5-VL" / "model.safetensors")["lm_head.weight"].numpy()
        np.testing.assert_array_equal(given["language_model/lm_head/kernel"][:, :ROWS], whole.T)
    words, special, prompting = load_tokenizer(found.tokenizer), found.config.special_tokens, found.config.prompting
    assert words.special == special and words.vocab_size == ROWS + 2 == found.config.language_model.vocab_size
    assert [words.fast.token_to_id(mark) for mark in metaquery.MARKS] == [ROWS, ROWS + 1]
    assert (special.dream_start, special.dream_end) == (ROWS, ROWS + 1)
    size = words.fast.token_to_id("<pad_token_0>")
    assert words.fast.id_to_token(ROWS - 1) == f"<pad_token_{ROWS - 1 - size}>"
    assert words.fast.id_to_token(size - 1) in ("<think>", "</think>")
    assert (prompting.template, prompting.system, prompting.max_tokens) == (
        "qwen2" if qwen else "llava_onevision",
        "Describe it.",
        17,
    )
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["num_metaqueries"] == QUERIES and settings["loss_type"] == ("diff" if qwen else "flow")
    # The tokenizer that lies there now is read, with the queries' tokens that its program would add.
    theirs = words.fast
    theirs.add_special_tokens([f"<img{i}>" for i in range(QUERIES)])
    theirs.save(str(tmp_path / "out" / "tokenizer.json"))
    run("import", metaquery=tmp_path / "out", **beside(directory), to=tmp_path / "again")
    assert_identical(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))
    again = saved.find(str(tmp_path / "again"))
    assert again.config == found.config and load_tokenizer(again.tokenizer).vocab_size == ROWS + 2


def refused(message, error=ValueError, **flags):
    with pytest.raises(error, match=message):
        run("import", **flags)


def changed(file, to, **changes):
    """A file of tensors with some of them changed, or without those that are None."""
    state = torch.load(file)["state_dict"] | changes
    torch.save({"state_dict": {name: x for name, x in state.items() if x is not None}}, to)
    return to


def test_what_openuni_lacks_is_named(towers, tmp_path):
    root, to = towers["image_decoder"].parent, tmp_path / "to"
    file = query_checkpoints.save_openuni(root, "enc_proj", towers=True)
    given = {**towers, "connector_heads": 8, "to": to}
    other = tmp_path / "other.pth"
    for changes, message in (
        ({"meta_queries": None}, r"other\.pth has no meta_queries: it is no checkpoint of OpenUni$"),
        ({"connector.layers.0.mlp.fc1.weight": None}, r"has no connector\.layers\.0\.mlp\.fc1\.weight: it is not all"),
        (
            {"connector.layers.1.mlp.fc2.bias": None},
            r"connector of .*other\.pth: 1 tensors.*\n  missing layers\.1\.mlp\.fc2",
        ),
        ({"more": torch.zeros(3)}, r"other\.pth: 1 tensors do not fit:\n  unexpected more \(3,\)$"),
        ({"lmm.more": torch.zeros(3)}, r"other\.pth: 1 tensors do not fit:\n  unexpected lmm\.more \(3,\)$"),
        ({"vae.more": torch.zeros(3)}, r"autoencoder of .*other\.pth: 1 tensors do not fit:\n  unexpected more"),
        ({"lmm.mlp1.1.bias": None}, r"visual_projector of .*other\.pth: 1 tensors.*\n  missing projector\.0\.bias"),
        (
            {"meta_queries": torch.zeros(3, 8)},
            r"meta_queries are 8 wide, the language model of .*lmm 64: it was trained",
        ),
    ):
        refused(message, openuni=changed(file, other, **changes), **given)
    other.write_bytes(file.read_bytes()[:-1000])
    refused(r"other\.pth is truncated or not a PyTorch file", openuni=other, **given)
    refused(r"openuni.* is a directory: OpenUni's checkpoint is one file", openuni=root, **given)
    refused(
        r"the connector is 64 wide, which is no multiple of 7 heads$", openuni=file, **given | {"connector_heads": 7}
    )
    narrow = query_checkpoints.save_openuni(root, "proj_enc", towers=False)
    refused("24 wide, .* 64 channels a head: say how many it has by --conn", openuni=narrow, **towers, to=to)
    other_model = given | {"vision_language": root / "Sana" / "vae"}
    refused(r"vae is of model_type None: the checkpoint is of one of internvl_chat$", openuni=file, **other_model)
    refused("^give --vision-language as well", openuni=file, image_decoder=towers["image_decoder"], to=to)
    refused("^--connector-heads is of --openuni", vision_language=root / "lmm", connector_heads=8, to=to)
    refused("^--openuni has its own: leave out --num-queries", openuni=file, **given, num_queries=3)
    refused("^--openuni has its own: leave out --metaquery", openuni=file, metaquery=root, **given)
    assert not to.exists()


@pytest.mark.parametrize("directory", ["llava"], indirect=True)
def test_what_metaquery_lacks_is_named(directory, tmp_path):
    to, settings, state = tmp_path / "to", directory / "config.json", load_file(directory / "model.safetensors")
    before, other = settings.read_text(), tmp_path / "other" / "model.safetensors"
    other.parent.mkdir()
    embedding = "model.mllm_backbone.language_model.model.embed_tokens.weight"
    for changes, message in (
        (
            {embedding: state[embedding][1:]},
            r"the embedding has 324 rows, which are not the 320 of .*llava, 2 marks and 3",
        ),
        ({embedding: None}, r"has no embedding of its language model"),
        (
            {"model.connector.0.layers.0.mlp.gate_proj.weight": None},
            r"has no model\.connector\.0\.layers\.0\.mlp\.gate",
        ),
        ({"model.connector.4.weight": None}, r"connector of .*other: 1 tensors.*\n  missing projector\.3\.weight"),
        ({"model.connector.2.weight": torch.zeros(2)}, r"other: 1 tensors.*\n  unexpected model\.connector\.2\.weight"),
        ({"model.transformer.proj_out.bias": None}, r"denoiser of .*other: 1 tensors .*\n  missing proj_out\.bias"),
    ):
        kept = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        save_file({name: x.contiguous() for name, x in kept.items()}, other, {"format": "pt"})
        (other.parent / "config.json").write_text(before)
        refused(message, metaquery=other.parent, **beside(directory), to=to)
    (other.parent / "config.json").write_text(before)
    missing = (
        r"config\.json refers to 'somewhere/llava' \(mllm_id\), and no config\.json is found in .*--vision-language$"
    )
    refused(missing, FileNotFoundError, metaquery=other.parent, to=to)
    for changes, message in (
        ({"model_type": "llava"}, "config.json has model_type 'llava', not 'metaquery'"),
        ({"vae_id": "elsewhere"}, r"several directories \(.*vae_id elsewhere.*\): put their folders into one"),
        ({"num_metaqueries": 4}, "which are not the 320 of .*, 2 marks and 4 queries"),
    ):
        settings.write_text(json.dumps(json.loads(before) | changes))
        refused(message, metaquery=directory, to=to)
    settings.write_text(before)
    assert not to.exists()


def test_what_the_programs_do_not_know_is_not_written(tmp_path):
    ours = SimpleNamespace(config=tiny_config(), tokenizer=tmp_path / "none")
    for kind, names, message in (
        ("openuni", {}, "OpenUni's program has no vision encoder of kind 'clip': export with --format=hf or diffusers"),
        (
            "metaquery",
            {},
            "MetaQuery's program has no vision encoder of kind 'clip' with such a visual projector: export",
        ),
        (
            "hf",
            {"image_decoder": "Sana"},
            "--vision-language and --image-decoder are of --format=metaquery: leave them",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            export_model(ours, tmp_path / "out", (kind,), names=names)
    scaled = dataclasses.replace(DECODER_UNILIP, flow=FlowConfig(input_scale=0.5))
    other = SimpleNamespace(config=dataclasses.replace(ours.config, image_decoder=scaled), tokenizer=ours.tokenizer)
    for kind in ("openuni", "metaquery", "unilip", "dreamllm"):
        with pytest.raises(ValueError, match=r"no scheduler for a flow with input_scale=0\.5"):
            export_model(other, tmp_path / "out", (kind,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("directory", ["llava"], indirect=True)
def test_metaquery_is_told_its_towers_by_name(directory):
    source, _ = metaquery.open_metaquery(directory)
    published = metaquery.names_of(source.config, {})
    assert published["image_decoder"].startswith("Efficient-Large-Model/Sana_")
    assert metaquery.names_of(source.config, {"vision_language": "mine"}) == published | {"vision_language": "mine"}
    for role, name, word in (
        ("image_decoder", "mine", "'Sana' must stand"),
        ("vision_language", "Qwen", "must not stand"),
    ):
        with pytest.raises(ValueError, match=f"--{role.replace('_', '-')}={name}: .*{word}"):
            metaquery.names_of(source.config, {role: name})
    other = dataclasses.replace(source.config, connector=dataclasses.replace(source.config.connector, qk_norm=False))
    with pytest.raises(ValueError, match=r"^MetaQuery's program has no connector\.qk_norm: export"):
        metaquery.require(other)
