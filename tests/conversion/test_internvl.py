"""An InternVL comes in as transformers saves it, and in the layout of the program that trained it."""

import dataclasses
import json
import shutil

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.interop.language_model import open_language_model  # noqa: E402
from dreamllm_jax.interop.verify import compare  # noqa: E402
from dreamllm_jax.interop.vision_encoder import open_vision_encoder  # noqa: E402
from dreamllm_jax.interop.vision_language import open_visual_projector  # noqa: E402
from tests import public_models  # noqa: E402
from tests.conversion.helpers import assert_identical, run  # noqa: E402

FILE = "model.safetensors"


OPENING = (open_language_model, open_vision_encoder, open_visual_projector)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same model in either layout."""
    root = tmp_path_factory.mktemp("internvl")
    return {layout: public_models.save_internvl(root / layout, chat=layout == "chat") for layout in ("hf", "chat")}


@pytest.mark.parametrize("opening", OPENING)
def test_either_layout_is_the_same_model(both, opening):
    hf, chat = opening(both["hf"]), opening(both["chat"])
    if opening is open_vision_encoder:
        assert (hf.config.max_tiles, chat.config.max_tiles) == (12, 6)
        assert dataclasses.replace(hf.config, max_tiles=6) == chat.config
    else:
        assert hf.config == chat.config
    read = ({name: tensor.read() for name, tensor in part.tensors.items()} for part in (hf, chat))
    assert_identical(*read)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hf", "chat"])
def test_every_part_computes_what_the_public_class_does(both, layout, tmp_path):
    decoder = public_models.save_diffusion(tmp_path / "decoder")
    run("import", vision_language=both[layout], image_decoder=decoder, to=tmp_path / "ours")
    found = saved.find(str(tmp_path / "ours"))
    differences = compare(found.config, found.part, both[layout])
    assert {d.tower for d in differences} == {"vision encoder", "language model", "multimodal forward"}
    assert all(d.passed for d in differences), differences
    assert max(d.relative for d in differences if d.dtype == "float32") <= 1e-5
    if layout == "hf":
        return
    # It goes out as transformers has it, with the program's way of seeing.
    run("export", checkpoint=tmp_path / "ours", format="diffusers", to=tmp_path / "out")
    got, want = open_vision_encoder(tmp_path / "out" / "intern_vit"), open_vision_encoder(both["hf"])
    assert got.config == found.config.vision_encoder and got.config.max_tiles == 6
    assert_identical(*({name: tensor.read() for name, tensor in part.tensors.items()} for part in (got, want)))
    other = shutil.copytree(both["chat"], tmp_path / "other")
    less = load_file(other / FILE)
    del less["vision_model.encoder.layers.1.ls2"]
    save_file(less, other / FILE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors do not fit:\n  missing encoder\.layer\.1\.lambda_2 \(16,\)"):
        run("import", vision_language=other, image_decoder=decoder, to=tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_what_does_not_fit_is_named(both, tmp_path):
    other = shutil.copytree(both["chat"], tmp_path / "chat")
    kept, settings = load_file(other / FILE), json.loads((other / "config.json").read_text())
    qkv = "vision_model.encoder.layers.1.attn.qkv.bias"
    for opening, changes, more, message in (
        (OPENING[2], {}, {"mlp1.2.bias": torch.zeros(1)}, r"1 tensors do not fit:\n  unexpected mlp1\.2\.bias \(1,\)"),
        (OPENING[1], {}, {qkv: torch.zeros(47)}, r"qkv\.bias is of shape \(47,\), which has no 3 equal parts"),
        (OPENING[1], {"ps_version": "v1"}, {}, r"config\.json: ps_version = 'v1' is not supported: only 'v2' is"),
        (OPENING[0], {"llm_config": {"model_type": "internlm2"}}, {}, r"config\.json: model_type 'internlm2' is not"),
    ):
        save_file(kept | more, other / FILE, {"format": "pt"})
        (other / "config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(ValueError, match=message):
            opening(other)
