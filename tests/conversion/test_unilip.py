"""A checkpoint of UniLIP comes in and goes out, and computes what compositions of public classes do."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config, Qwen2Model  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.data.prompting import PUBLISHED  # noqa: E402
from dreamllm_jax.interop.unilip_modules import autoencoder  # noqa: E402
from dreamllm_jax.towers.autoencoders.dc import DCAutoencoderConfig  # noqa: E402
from dreamllm_jax.towers.autoencoders.unilip import UnilipAutoencoderConfig  # noqa: E402
from dreamllm_jax.towers.connectors.transformer import TransformerConfig  # noqa: E402
from tests import byte_level, public_models  # noqa: E402
from tests.conversion.helpers import assert_identical, run, tensors  # noqa: E402
from tests.parity import randomised  # noqa: E402

FILE, ROWS, QUERIES = "model.safetensors", 320, 5
LANGUAGE = {"model_type": "qwen2", **public_models.LLAMA, "vocab_size": ROWS, "tie_word_embeddings": False}
SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 16,
    "caption_channels": 24,
    "sample_size": 2,
}
DC = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), ()),
    "decoder_qkv_multiscales": ((), ()),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
}


def save_internvl(directory):
    """In InternVL's own layout, with a tokenizer; its tensors by the names that UniLIP's program has for them."""
    config = InternVLConfig(text_config=LANGUAGE, vision_config=public_models.INTERN_VIT, tie_word_embeddings=False)
    stored = dict(randomised(InternVLForConditionalGeneration(config)).state_dict())
    for name in [name for name in stored if ".q_proj." in name and "vision" in name]:
        parts = [stored.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        stored[name.replace("q_proj", "qkv")] = torch.cat(parts)
    for new, old in public_models.INTERNVL_NAMES.items():
        stored = {name.replace(new, old): tensor for name, tensor in stored.items()}
    byte_level.save_tokenizer(directory, "internvl3")
    theirs = {"mlp1.": "multi_modal_projector.", "vision_model.": "vision_tower."}
    for old, new in theirs.items():
        stored = {name.replace(old, new): tensor for name, tensor in stored.items()}
    return stored


def save_sana(directory):
    transformer = randomised(SanaTransformer2DModel(**SANA))
    transformer.save_pretrained(directory / "transformer")
    randomised(AutoencoderDC(**DC)).save_pretrained(directory / "vae")
    solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    DPMSolverMultistepScheduler(**solver).save_pretrained(directory / "scheduler")
    return transformer


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A checkpoint as its program saves it, in bfloat16, beside the directories that it names."""
    root = tmp_path_factory.mktemp("unilip")
    stored, dit = save_internvl(root / "InternVL3-tiny"), save_sana(root / "Sana-tiny")
    layers = {**LANGUAGE, "num_hidden_layers": 1}
    connector = randomised(Qwen2Model(Qwen2Config(**layers)), 1)
    projector, decoder = randomised(torch.nn.Linear(32, 24), 2), DCAutoencoderConfig.from_public(DC)
    latents = randomised(autoencoder(UnilipAutoencoderConfig(feature_width=32, decoder=decoder, downscale=8)), 3)
    stored["model.latent_queries"] = torch.randn(1, QUERIES, 32, generator=torch.Generator().manual_seed(4))
    for prefix, module in (
        ("llm_connector", connector),
        ("projector", projector),
        ("dit", dit),
        ("vae_decoder", latents),
    ):
        stored |= {f"model.{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
    del stored["model.llm_connector.embed_tokens.weight"]
    directory = root / "unilip"
    directory.mkdir()
    save_file(
        {name: x.to(torch.bfloat16).contiguous() for name, x in stored.items()}, directory / FILE, {"format": "pt"}
    )
    vision = {**public_models.INTERN_VIT, "image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"}
    settings = {
        "model_type": "unilip_internvl",
        "text_config": LANGUAGE,
        "vision_config": vision,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        **{"n_query": QUERIES, "connect_layer": 1, "unilip_factor": 10.6},
        **{"mllm_path": "InternVL3-tiny", "dit_path": "Sana-tiny", "vae_path": "Sana-tiny/vae"},
    }
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def ours(theirs):
    run("import", unilip=theirs, to=theirs.parent / "ours")
    return theirs.parent / "ours"


def test_it_comes_in_and_goes_out_as_it_was(theirs, ours, tmp_path):
    found = saved.find(str(ours))
    config, decoder = found.config, found.config.image_decoder
    assert config.prompting == PUBLISHED["unilip"] and config.num_queries == QUERIES
    assert config.connector.num_hidden_layers == 1 and config.connector.sees and config.vision_encoder.max_tiles == 1
    assert (decoder.denoiser.interpolation_scale, decoder.denoiser.narrow_positions) == (1.0, True)
    assert (decoder.flow.density, decoder.flow.sampling_shift) == ("logit_normal", 3.0)
    assert (decoder.default_size, decoder.encodes_features) == (16, "visual_projector")
    words, special = json.loads((ours / "tokenizer" / "added_tokens.json").read_text()), config.special_tokens
    assert (special.dream_start, special.im_start, special.im_end) == (words["<img>"], words["<img>"], words["</img>"])
    assert special.im_patch == words["<IMG_CONTEXT>"] and max(words.values()) < config.language_model.vocab_size == ROWS
    run("export", checkpoint=ours, format="unilip", to=tmp_path / "out", no_check=True)
    got, want = load_file(tmp_path / "out" / FILE), load_file(theirs / FILE)
    assert got.keys() == want.keys()
    assert all(got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]) for name in want)
    run("import", unilip=tmp_path / "out", to=tmp_path / "again")  # which stands alone
    again = saved.find(str(tmp_path / "again"))
    assert again.config == config
    assert_identical(tensors(tmp_path / "again"), tensors(ours))


@pytest.mark.slow
def test_it_computes_what_public_classes_do(theirs, ours, capsys):
    run("verify", checkpoint=ours, torch=theirs)
    lines = capsys.readouterr().out.splitlines()
    towers = ("vision encoder", "denoiser", "autoencoder", "language model", "multimodal forward")
    assert {line.split("  ")[0] for line in lines[1:]} == set(towers) and "DIFFERS" not in "".join(lines)


def test_what_does_not_fit_is_named(theirs, ours, tmp_path):
    other = shutil.copytree(theirs, tmp_path / "other")
    kept, settings = load_file(theirs / FILE), json.loads((theirs / "config.json").read_text())
    places = {"vision_language": theirs.parent / "InternVL3-tiny", "image_decoder": theirs.parent / "Sana-tiny"}
    less = {name: tensor for name, tensor in kept.items() if name != "model.vae_decoder.down_mlp.3.bias"}
    for stored, changes, flags, message in (
        (
            kept,
            {"model_type": "internvl"},
            places,
            r"config\.json: model_type is 'internvl', expected 'unilip_internvl'",
        ),
        (
            kept,
            {"n_query": 7},
            places,
            r"dream_queries of .*: 1 tensors do not fit:\n  weight has shape \(5, 32\), expected \(7",
        ),
        (less, {}, places, r"image_decoder/autoencoder of .*:\n  missing down_mlp\.3\.bias \(4,\)"),
        (kept | {"model.vae.x": torch.zeros(1)}, {}, places, r"unexpected model\.vae\.x \(1,\)"),
        (kept, {}, {}, r"refers to 'Sana-tiny' \(dit_path\).* name SANA's directory with --image-decoder"),
        (
            kept,
            {},
            places | {"vision_language": None},
            r"\(mllm_path\).* name InternVL's directory with --vision-language",
        ),
        (kept, {}, places | {"num_queries": 3}, r"--unilip has its own: leave out --num-queries"),
    ):
        save_file(stored, other / FILE, {"format": "pt"})
        (other / "config.json").write_text(json.dumps(settings | changes))
        flags = {name: value for name, value in flags.items() if value is not None}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("import", unilip=other, to=tmp_path / "to", **flags)
    with pytest.raises(ValueError, match=r"language model of kind|'qwen2'|no head"):
        run("export", checkpoint=ours, format="dreamllm", to=tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.slow
def test_a_connector_begins_as_the_last_layers(theirs, tmp_path, monkeypatch):
    settings = {"intermediate_size": 48, "head_dim": 8, "num_key_value_heads": 2, "num_hidden_layers": 1}
    alike = TransformerConfig.PUBLISHED["unilip-1b"] | settings | {"prompt_tokens": 9}
    monkeypatch.setitem(TransformerConfig.PUBLISHED, "unilip-1b", alike)
    given = {"vision_language": theirs, "image_decoder": theirs.parent / "Sana-tiny", "connector": "unilip-1b"}
    given |= {"tokenizer": theirs.parent / "InternVL3-tiny", "num_queries": 3}
    run("import", to=tmp_path / "ours", **given)
    found, copied = tensors(tmp_path / "ours"), 0
    for path, array in found.items():
        if path.startswith("connector/layers/"):
            own = found[path.replace("connector/", "language_model/")]
            np.testing.assert_array_equal(array, own[-1:])
            copied += 1
    assert copied == 12
    np.testing.assert_array_equal(found["connector/norm/scale"], found["language_model/norm/scale"])
    monkeypatch.setitem(TransformerConfig.PUBLISHED, "unilip-1b", alike | {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"and there layers\.-1\.\S+ is missing; choose another connector"):
        run("import", to=tmp_path / "to", **given)
    with pytest.raises(ValueError, match="copied=true needs layers as a language model has them"):
        TransformerConfig(layer="siglip", copied=True)
