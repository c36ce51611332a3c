"""Checkpoints of DreamLLM's fork over Qwen2.5 come in: random ones, of torch's classes, stored as its plugins store."""

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.data.tokenizer import load_tokenizer  # noqa: E402
from dreamllm_jax.interop.verify import compare  # noqa: E402
from tests import byte_level, public_models  # noqa: E402
from tests.conversion.helpers import run, tensors  # noqa: E402
from tests.parity import randomised  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # diffusers
]

WIDTH, QUERIES = 32, 3
# Among the special tokens of `tokenization_dreamllm.py`, those that Qwen2.5's tokenizer lacks.
ADDED = ["<image>", "<dream>", "<dream_start>", "<dream_end>"]
NAMES = {
    "dreamllm_qwen2": ("vision_encoder", "stable_diffusion_head"),
    "dreamllm_qwen_sd3": ("clip_vision_embedding", "stable_diffusion3_head"),
}


def of_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def save_clip(directory: Path) -> dict:
    """CLIP and its plugin's file; that plugin's settings."""
    public_models.save_clip(directory / "clip")
    projector = randomised(nn.Linear(16, WIDTH)).state_dict()
    content = {f"clip_vision_model.{name}": x for name, x in of_folder(directory / "clip").items()}
    content |= {f"projector.projector.{name}": x for name, x in projector.items()}
    torch.save(content, directory / "clip_vision_embedding.bin")
    return {
        "_target_": "CLIPVisionEmbedding",
        "clip_vision_model_name_or_path": "/models/clip",
        "projector_type": "linear",
        "projector_depth": 1,
        "select_layer": -2,
    }


def save_intern_vit(directory: Path) -> dict:
    """InternViT as OpenGVLab stores it and its plugin's file; that plugin's settings."""
    public_models.save_internvl(directory / "whole", chat=True)
    tower = {name: x for name, x in of_folder(directory / "whole").items() if name.startswith("vision_model.")}
    settings = json.loads((directory / "whole" / "config.json").read_text())["vision_config"]
    shutil.rmtree(directory / "whole")
    (directory / "vit").mkdir()
    (directory / "vit" / "config.json").write_text(json.dumps(settings))
    width = 4 * settings["hidden_size"]
    norm = randomised(nn.LayerNorm(width)).state_dict()
    projector = randomised(nn.Sequential(nn.Linear(width, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))).state_dict()
    content = tower | {f"post_layernorm.{name}": x for name, x in norm.items()}
    content |= {f"projector.projector.{name}": x for name, x in projector.items()}
    torch.save(content, directory / "intern_vit_embedding.bin")
    return {
        "_target_": "InternViTEmbedding",
        "intern_vit_model_name_or_path": "/models/vit",
        "projector_type": "mlp",
        "projector_depth": 2,
        "select_layer": -1,
    }


SIGHTS = {"clip": save_clip, "intern_vit": save_intern_vit}


def save_fork(directory: Path, package: str = "dreamllm_qwen2", sight: str = "clip", bias: bool = True) -> Path:
    """What its trainer leaves, of Qwen2.5 and Stable Diffusion 3.5, with the towers' directories inside."""
    tokenizer = byte_level.save_tokenizer(directory, "qwen2_5_vl", bos_token="<|im_start|>")
    tokenizer.add_tokens(ADDED, special_tokens=True)
    tokenizer.save_pretrained(directory)
    config = Qwen2Config(
        vocab_size=352,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    randomised(Qwen2ForCausalLM(config)).save_pretrained(directory)
    decoder = public_models.save_sd3(directory / "diffusion")
    torch.save({"dream_queries": torch.randn(1, QUERIES, WIDTH)}, directory / "dream_embedding.bin")
    parts = {
        "vae": of_folder(decoder / "vae"),
        "transformer": of_folder(decoder / "transformer"),
        "projector.projector": randomised(nn.Linear(WIDTH, 24, bias), 1).state_dict(),
        "pooled_projector.projector": randomised(nn.Linear(WIDTH, 12, bias), 2).state_dict(),
    }
    head = {f"{part}.{name}": x for part, found in parts.items() for name, x in found.items()}
    torch.save(head, directory / "stable_diffusion3_head.bin")

    vision_name, head_name = NAMES[package]
    linear = {"projector_type": "linear", "projector_depth": 1}
    places = {
        vision_name: SIGHTS[sight](directory),
        "dream_embedding": {"_target_": "DreamEmbedding", "num_dream_queries": QUERIES},
        head_name: {"_target_": "StableDiffusion3Head", "diffusion_name_or_path": "/models/diffusion", **linear},
    }
    module = f"omni.models.{package}.modeling_plugins"
    plugins = {name: {**given, "_target_": f"{module}.{given['_target_']}"} for name, given in places.items()}
    ids = tokenizer.get_vocab()
    more = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", *ADDED)
    edit(
        directory,
        architectures=["DreamLLMForCausalMLM"],
        model_type="dreamllm",
        attention_bias=False,  # its class has them whatever this says
        plugins_init_kwargs=plugins,
        special_tokens2ids_dict={
            **{token: ids[token] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")},
            "additional_special_tokens": {token: ids[token] for token in more},
        },
    )
    return directory


def edit(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("package", "sight", "bias"),
    [
        pytest.param("dreamllm_qwen2", "intern_vit", True, marks=pytest.mark.slow),
        ("dreamllm_qwen_sd3", "clip", False),
    ],
)
def test_a_checkpoint_comes_in(tmp_path, package, sight, bias):
    """Whatever its plugins are called, its tokens, the head's biases; torch computes the same."""
    theirs = save_fork(tmp_path / "theirs", package, sight, bias)
    run("import", dreamllm=theirs, to=tmp_path / "ours")
    found = saved.find(str(tmp_path / "ours"))
    config, tokenizer = found.config, load_tokenizer(found.tokenizer)
    assert (config.language_model.kind, config.image_decoder.kind) == ("qwen2", "stable_diffusion_3")
    assert (config.vision_encoder.kind, config.visual_projector.pre_layernorm) == (sight, sight == "intern_vit")
    connector = config.connector
    assert config.num_queries == QUERIES and [bool(connector.bias), connector.pooled_bias] == [bias, bias]
    special, names = config.special_tokens, tokenizer.fast.id_to_token
    assert special == tokenizer.special
    assert [
        names(index) for index in (special.bos, special.eos, special.im_start, special.im_patch, special.im_end)
    ] == [*("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")]
    stored = torch.load(theirs / "stable_diffusion3_head.bin")
    got = tensors(tmp_path / "ours")
    for name in ("projector", "pooled_projector"):
        kernel = stored[f"{name}.projector.weight"].numpy()
        assert (got[f"connector/{name}/kernel"] == kernel.T).all()
        assert (f"connector/{name}/bias" in got) == bias
    if bias:
        differences = compare(config, found.part, theirs, ("float32",))
        assert {difference.tower for difference in differences} >= {"language model", "multimodal forward", "denoiser"}
        assert all(difference.passed for difference in differences), differences
        with pytest.raises(ValueError, match=r"^the original program has no language_model of kind 'qwen2'"):
            run("export", checkpoint=tmp_path / "ours", format="dreamllm", to=tmp_path / "out")


def test_what_is_not_read_is_named(tmp_path):
    theirs = save_fork(tmp_path / "theirs")
    settings = json.loads((theirs / "config.json").read_text())
    plugins = settings["plugins_init_kwargs"]
    other = {"_target_": "SAMEmbedding", "sam_model_name_or_path": "/models/sam"}

    def refused(message: str, error: type[Exception] = ValueError, **changes) -> None:
        edit(theirs, **changes)
        with pytest.raises(error, match=message):
            run("import", dreamllm=theirs, to=tmp_path / "ours")
        edit(theirs, **settings)
        assert not (tmp_path / "ours").exists()

    unknown = r"refers to None \(clip_vision_model_name_or_path\), and no config.json is found in any directory"
    refused(unknown, FileNotFoundError, plugins_init_kwargs=plugins | {"vision_encoder": other})
    ids = settings["special_tokens2ids_dict"]
    fewer = {token: index for token, index in ids.items() if token != "<|im_end|>"}
    refused(r"special_tokens2ids_dict has no <\|im_end\|>$", special_tokens2ids_dict=fewer)
    shutil.rmtree(theirs / "diffusion")
    missing = (
        r"no unet/config.json and no transformer/config.json is found in .*name the directory with --image-decoder"
    )
    refused(missing, FileNotFoundError)
