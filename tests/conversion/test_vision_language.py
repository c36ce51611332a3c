"""Whole vision-language models come in, part by part."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.interop.language_model import open_language_model  # noqa: E402
from dreamllm_jax.interop.torch_modules import public_class  # noqa: E402
from dreamllm_jax.interop.verify import compare  # noqa: E402
from dreamllm_jax.interop.vision_encoder import open_vision_encoder  # noqa: E402
from dreamllm_jax.interop.vision_language import layout_of, open_visual_projector  # noqa: E402
from dreamllm_jax.towers.connectors.newline import NewlineConfig  # noqa: E402
from tests import public_models  # noqa: E402
from tests.conversion.helpers import assert_identical, run, tensors  # noqa: E402

FILE = "model.safetensors"
SAVING = {"llava": public_models.save_llava, "llava_onevision": public_models.save_onevision}
# Names of the files, as transformers wrote them up to 4.51 and as its classes name them since.
GENERATIONS = {
    "before": ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
    "since": (
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
    ),
}


@pytest.fixture(scope="module", params=SAVING)
def whole(request, tmp_path_factory):
    """A model, and ours made of it."""
    root = tmp_path_factory.mktemp(request.param)
    decoder = public_models.save_diffusion(root / "decoder")
    run("import", vision_language=SAVING[request.param](root / "whole"), image_decoder=decoder, to=root / "ours")
    return root


def renamed(directory, changes):
    tensors = {}
    for name, tensor in load_file(directory / FILE).items():
        for pattern, instead in changes:
            name = re.sub(pattern, instead, name)
        tensors[name] = tensor
    (directory / FILE).unlink()
    save_file(tensors, directory / FILE, {"format": "pt"})


@pytest.mark.slow
def test_every_part_computes_what_the_public_class_does(whole):
    found = saved.find(str(whole / "ours"))
    differences = compare(found.config, found.part, whole / "whole")
    assert {d.tower for d in differences} == {"vision encoder", "language model", "multimodal forward"}
    assert all(d.passed for d in differences), differences
    assert max(d.relative for d in differences if d.dtype == "float32") <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["llava_onevision"], indirect=True)
def test_its_towers_go_out_and_are_loaded(whole, tmp_path):
    """Without what is nothing of ours, such as the head of a SigLIP; export compares them by itself."""
    config = saved.find(str(whole / "ours")).config
    for kind in ("hf", "diffusers"):
        run("export", checkpoint=whole / "ours", format=kind, to=tmp_path / kind)
    forms = {"hf": config.language_model.public, f"diffusers/{config.vision_encoder.public.folder}": None}
    for folder, form in forms.items():
        cls = public_class(form or config.vision_encoder.public)
        _, report = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values()), (cls, report)
    again = open_vision_encoder(tmp_path / "diffusers" / config.vision_encoder.public.folder)
    want = open_vision_encoder(whole / "whole")
    assert again.tensors.keys() == want.tensors.keys() and not again.left_out


def test_features_are_packed_for_their_projector_alone(whole):
    """Of LLaVA-OneVision, whose tower is read without the norm after its last layer."""
    config = saved.find(str(whole / "ours")).config
    alone = open_vision_encoder(whole / "whole").config
    if whole.name.startswith("llava_onevision"):
        assert (config.vision_encoder.select_layer, config.vision_encoder.packed, alone.packed) == (-1, True, False)
        assert config.visual_projector == NewlineConfig() and config.language_model.tie_word_embeddings
        assert (config.vision_encoder.num_patches, alone.num_patches) == (4 + 2 * 3, 4)
        with pytest.raises(ValueError, match=r"visual_projector: a visual projector of kind 'newline' needs features"):
            dataclasses.replace(config, vision_encoder=alone)
    else:
        assert config.vision_encoder == alone and alone.select_layer == -2


@pytest.mark.parametrize("names", GENERATIONS.values(), ids=GENERATIONS)
def test_all_names_that_such_models_had_are_read(whole, names, tmp_path):
    other = shutil.copytree(whole / "whole", tmp_path / "other")
    renamed(other, names)
    for opening in (open_language_model, open_vision_encoder, open_visual_projector):
        got, want = opening(other), opening(whole / "whole")
        assert got.config == want.config and got.tensors.keys() == want.tensors.keys()
        for name, tensor in want.tensors.items():
            np.testing.assert_array_equal(got.tensors[name].read(), tensor.read(), err_msg=name)
        assert {*got.left_out}.isdisjoint(got.tensors) and got.left_out


def test_its_towers_may_be_taken_one_by_one(whole, tmp_path, caplog):
    given = dict.fromkeys(("language_model", "vision_encoder"), whole / "whole")
    with caplog.at_level("INFO", "dreamllm_jax"):
        run("import", **given, image_decoder=whole / "decoder", to=tmp_path / "to")
    assert re.search(r"[45] tensors of \[('image_newline', )?'multi_modal_projector'\]", caplog.text)
    got, want = tensors(tmp_path / "to"), tensors(whole / "ours")
    roles = ("language_model/layers/", "vision_encoder/")
    for role in roles:
        assert_identical(*({k: x for k, x in found.items() if k.startswith(role)} for found in (got, want)))


def test_what_does_not_fit_is_named(whole, tmp_path):
    other = shutil.copytree(whole / "whole", tmp_path / "other")
    for changes, message in (
        (
            ((r"linear_2\.bias", "linear_3.bias"),),
            r"1 tensors do not fit:\n  unexpected multi_modal_projector\.linear_3",
        ),
        (((r"linear_3\.bias", "linear_2.extra"),), r"visual_projector of .*: 2 tensors do not fit:\n  missing proj"),
    ):
        renamed(other, changes)
        with pytest.raises(ValueError, match=message):
            run("import", vision_language=other, image_decoder=whole / "decoder", to=tmp_path / "to")
    settings = json.loads((other / "config.json").read_text())
    for changes, message in (
        ({"text_config": None}, "config.json: it has no text_config: .* is read as transformers stores it"),
        ({"vision_feature_layer": [1, 2]}, r"config.json: vision_feature_layer = \[1, 2\] is not supported"),
        ({"vision_feature_select_strategy": "mean"}, "vision_feature_select_strategy = 'mean' is not supported"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu' is not supported: only 'gelu' is"),
    ):
        (other / "config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(ValueError, match=message):
            run("import", vision_language=other, image_decoder=whole / "decoder", to=tmp_path / "to")
    assert layout_of({"model_type": "llama"}) is None
    with pytest.raises(ValueError, match="has its own: leave out --vision-encoder, --select-layer"):
        more = {"vision_encoder": other, "select_layer": 1}
        run("import", vision_language=other, **more, image_decoder=whole / "decoder", to=tmp_path / "to")
    towers = public_models.save_language_model(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"config\.json: model_type 'llama' is of no vision-language model"):
        run("import", vision_language=towers, image_decoder=whole / "decoder", to=tmp_path / "to")
    assert not (tmp_path / "to").exists()
