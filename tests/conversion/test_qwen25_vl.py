"""A Qwen2.5-VL comes in whole, of either generation of files, and computes what transformers does."""

import json
import re
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.interop.language_model import open_language_model  # noqa: E402
from dreamllm_jax.interop.verify import compare  # noqa: E402
from dreamllm_jax.interop.vision_encoder import open_vision_encoder  # noqa: E402
from dreamllm_jax.interop.vision_language import open_visual_projector  # noqa: E402
from dreamllm_jax.towers.connectors.projector import IdentityConfig  # noqa: E402
from tests import public_models  # noqa: E402
from tests.conversion.helpers import run  # noqa: E402

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return public_models.save_qwen25_vl(tmp_path_factory.mktemp("qwen25_vl"))


def test_its_parts_are_read_from_files_of_either_generation(whole, tmp_path):
    """The names that its classes have had since transformers 4.52, and a config.json as it was published."""
    other = shutil.copytree(whole, tmp_path / "other")
    names = {"^visual": "model.visual", "^model": "model.language_model"}
    found = load_file(other / FILE)
    (other / FILE).unlink()
    beginning = re.compile("|".join(names))
    save_file({beginning.sub(lambda m: names[f"^{m[0]}"], name): x for name, x in found.items()}, other / FILE)
    settings = json.loads((other / "config.json").read_text())
    text, vision = settings.pop("text_config"), settings["vision_config"]
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    settings |= text | {"model_type": "qwen2_5_vl", "rope_scaling": scaling, "rope_theta": rope["rope_theta"]}
    vision |= {"model_type": "qwen2_5_vl", "in_chans": vision.pop("in_channels")}
    del vision["rope_parameters"]
    (other / "config.json").write_text(json.dumps(settings))
    for opening in (open_language_model, open_vision_encoder, open_visual_projector):
        got, want = opening(other), opening(whole)
        assert got.config == want.config and got.tensors.keys() == want.tensors.keys()
        for name, tensor in want.tensors.items():
            np.testing.assert_array_equal(got.tensors[name].read(), tensor.read(), err_msg=name)
    assert got.config == IdentityConfig() and not got.tensors
    language, vision = (opening(other).config for opening in (open_language_model, open_vision_encoder))
    assert (language.kind, language.mrope_section, language.rope_theta) == ("qwen25_vl", (1, 2, 1), 10000.0)
    assert (vision.kind, vision.min_pixels, vision.max_pixels, vision.image_size) == ("qwen25_vl", 64, 1024, 32)
    with pytest.raises(ValueError, match="of kind 'qwen25_vl' has no select_layer to choose"):
        open_vision_encoder(other, -2)


@pytest.mark.slow
def test_it_computes_what_transformers_does_and_is_exported_by_its_parts(whole, tmp_path):
    decoder = public_models.save_diffusion(tmp_path / "decoder")
    run("import", vision_language=whole, image_decoder=decoder, to=tmp_path / "ours")
    found = saved.find(str(tmp_path / "ours"))
    differences = compare(found.config, found.part, whole)
    assert {d.tower for d in differences} == {"vision encoder", "language model", "multimodal forward"}
    assert all(d.passed for d in differences), differences
    assert max(d.relative for d in differences if d.dtype == "float32") <= 1e-5
    for form in ("hf", "diffusers"):  # as a Qwen2, and the tower in a folder of its own; both are compared
        run("export", checkpoint=tmp_path / "ours", format=form, to=tmp_path / form)
    again = open_vision_encoder(tmp_path / "diffusers" / "visual")
    assert again.config == found.config.vision_encoder
