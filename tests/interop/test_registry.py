"""A tower is read by the class of the registry that knows what its file calls itself: nothing else names it."""

import dataclasses
import json
import re
import shutil
import typing
from typing import Literal

import numpy as np
import pytest

pytest.importorskip("torch")

from dreamllm_jax.interop.image_decoder import open_image_decoder, write_image_decoder
from dreamllm_jax.interop.language_model import open_language_model, write_language_model
from dreamllm_jax.interop.names import to_torch
from dreamllm_jax.interop.vision_encoder import open_vision_encoder, write_vision_encoder
from dreamllm_jax.towers import public, registry
from dreamllm_jax.towers.autoencoders.kl import AutoencoderConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion import StableDiffusionConfig
from dreamllm_jax.towers.image_decoders.unet import UNetConfig
from dreamllm_jax.towers.language_models.llama import LlamaConfig
from dreamllm_jax.towers.vision_encoders.clip import ClipVisionConfig
from tests import public_models
from tests.tiny import tiny_config, tiny_params


def other(cls, **changes):
    return dataclasses.replace(cls.public, torch_class="OtherModel", **changes)


@dataclasses.dataclass(frozen=True)
class OtherLanguageModel(LlamaConfig):
    kind: Literal["other"] = "other"
    public = other(LlamaConfig, types=("other",), prefix="decoder.")


@dataclasses.dataclass(frozen=True)
class OtherVisionEncoder(ClipVisionConfig):
    kind: Literal["other"] = "other"
    public = other(ClipVisionConfig, types=("other_vision", "other"), prefix="vision.")


@dataclasses.dataclass(frozen=True)
class OtherDenoiser(UNetConfig):
    kind: Literal["other"] = "other"
    public = other(UNetConfig, folder="transformer")


@dataclasses.dataclass(frozen=True)
class OtherDecoder(StableDiffusionConfig):
    kind: Literal["other"] = "other"
    public_parts = {"denoiser": (OtherDenoiser,), "autoencoder": (AutoencoderConfig,)}  # noqa: RUF012


@pytest.fixture
def others(monkeypatch):
    """A second tower of each role: a line each."""
    monkeypatch.setattr(registry, "LANGUAGE_MODELS", (*registry.LANGUAGE_MODELS, OtherLanguageModel))
    monkeypatch.setattr(registry, "VISION_ENCODERS", (*registry.VISION_ENCODERS, OtherVisionEncoder))
    monkeypatch.setattr(registry, "IMAGE_DECODERS", (*registry.IMAGE_DECODERS, OtherDecoder))


def test_whatever_stands_in_the_registry_says_what_is_asked_of_it():
    asked = [(tower, public.PublicTower) for tower in registry.LANGUAGE_MODELS]
    asked += [(tower, public.PublicVisionEncoder) for tower in registry.VISION_ENCODERS]
    for decoder in registry.IMAGE_DECODERS:
        asked.append((decoder, public.PublicImageDecoder))
        asked += [(part, public.PublicTower) for classes in decoder.public_parts.values() for part in classes]
        assert all(hasattr(part, "run_public") for classes in decoder.public_parts.values() for part in classes)
    for tower, protocol in asked:
        members = {name for name in dir(protocol) if not name.startswith("_")} | {*typing.get_type_hints(protocol)}
        assert members <= {*dir(tower)}, (tower, members - {*dir(tower)})


def same(config, cls):
    """The same settings in another class."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "kind"}
    return cls(**fields)


def assert_same_tensors(part, params):
    want = to_torch(params)
    assert part.tensors.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(part.tensors[name].read(), array)


def test_other_towers_are_written_and_read_by_their_own_classes(others, tmp_path):
    config, params = tiny_config(), tiny_params(tiny_config())
    decoder = same(config.image_decoder, OtherDecoder)
    config = dataclasses.replace(
        config,
        language_model=same(config.language_model, OtherLanguageModel),
        vision_encoder=same(config.vision_encoder, OtherVisionEncoder),
        image_decoder=dataclasses.replace(decoder, denoiser=same(decoder.denoiser, OtherDenoiser)),
    )
    parts = {part: params[part] for part in ("language_model", "vision_encoder")}
    parts |= {f"image_decoder/{name}": tree for name, tree in params["image_decoder"].items()}
    tensors = {part: {n: np.ascontiguousarray(x) for n, x in to_torch(tree).items()} for part, tree in parts.items()}
    write_language_model(tmp_path / "language", config, tensors, 10**9)
    write_vision_encoder(tmp_path / "vision", config, tensors, 10**9)
    write_image_decoder(tmp_path / "decoder", config, tensors, 10**9)
    written = json.loads((tmp_path / "language" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("other", ["OtherModel"])

    language, vision = open_language_model(tmp_path / "language"), open_vision_encoder(tmp_path / "vision")
    assert (language.config, vision.config) == (config.language_model, config.vision_encoder)
    assert_same_tensors(language, params["language_model"])
    assert_same_tensors(vision, params["vision_encoder"])
    read, found = open_image_decoder(tmp_path / "decoder")
    assert isinstance(read, OtherDecoder) and read.denoiser == config.image_decoder.denoiser
    assert (tmp_path / "decoder" / "transformer").is_dir() and not (tmp_path / "decoder" / "unet").exists()
    for part, tower in found.items():
        assert_same_tensors(tower, parts[part])


def test_the_first_of_a_role_reads_what_does_not_say_what_it_is(others, tmp_path):
    towers = public_models.save_towers(tmp_path)
    for file, key, opening, cls in (
        (towers["language_model"] / "config.json", "model_type", open_language_model, LlamaConfig),
        (towers["vision_encoder"] / "config.json", "model_type", open_vision_encoder, ClipVisionConfig),
    ):
        settings = json.loads(file.read_text())
        assert type(opening(file.parent).config) is cls
        del settings[key]
        file.write_text(json.dumps(settings))
        assert type(opening(file.parent).config) is cls
    assert type(open_image_decoder(towers["image_decoder"])[0]) is StableDiffusionConfig


def test_what_no_class_reads_is_named_with_what_is_read(others, tmp_path):
    towers = public_models.save_towers(tmp_path)
    for file, key, opening, known in (
        ("language_model/config.json", "model_type", open_language_model, "'llama', 'dreamllm', 'mistral', 'qwen2',"),
        (
            "vision_encoder/config.json",
            "model_type",
            open_vision_encoder,
            "'clip_vision_model', 'clip', 'siglip_vision_model', 'siglip', ",
        ),
        ("image_decoder/vae/config.json", "_class_name", open_image_decoder, "'AutoencoderKL',"),
    ):
        root = tmp_path / file.split("/")[0]
        settings = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(settings | {key: "unheard_of"}))
        message = f"{tmp_path / file}: {key} 'unheard_of' is not supported: expected one of ({known}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            opening(root)
        shutil.rmtree(root)
    assert towers
