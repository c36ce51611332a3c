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


def save_fork(directory: Path, package: str = "dreamllm_qwen2", bias: bool = True) -> Path:
    """What its trainer leaves, of Qwen2.5, CLIP and Stable Diffusion 3.5, with the towers' directories inside."""
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
    public_models.save_clip(directory / "clip")
    public_models.save_sd3(directory / "diffusion")

    clip, decoder = of_folder(directory / "clip"), directory / "diffusion"
    projector = randomised(nn.Linear(16, WIDTH)).state_dict()
    torch.save(
        {f"clip_vision_model.{name}": x for name, x in clip.items()}
        | {f"projector.projector.{name}": x for name, x in projector.items()},
        directory / "clip_vision_embedding.bin",
    )
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
    places = {
        vision_name: ("CLIPVisionEmbedding", {"clip_vision_model_name_or_path": "/models/clip", "select_layer": -2}),
        "dream_embedding": ("DreamEmbedding", {"num_dream_queries": QUERIES}),
        head_name: ("StableDiffusion3Head", {"diffusion_name_or_path": "/models/diffusion"}),
    }
    linear = {"projector_type": "linear", "projector_depth": 1, "pretrained_model_name_or_path": None}
    plugins = {
        name: {"_target_": f"omni.models.{package}.modeling_plugins.{target}", **linear, **settings}
        for name, (target, settings) in places.items()
    }
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
    ("package", "bias"), [pytest.param("dreamllm_qwen2", True, marks=pytest.mark.slow), ("dreamllm_qwen_sd3", False)]
)
def test_a_checkpoint_comes_in(tmp_path, package, bias):
    """Whatever its plugins are called, its tokens, the head's biases; torch computes the same."""
    theirs = save_fork(tmp_path / "theirs", package, bias)
    run("import", dreamllm=theirs, to=tmp_path / "ours")
    found = saved.find(str(tmp_path / "ours"))
    config, tokenizer = found.config, load_tokenizer(found.tokenizer)
    assert (config.language_model.kind, config.image_decoder.kind) == ("qwen2", "stable_diffusion_3")
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
    vision = {"_target_": "InternViTEmbedding", "intern_vit_model_name_or_path": "/models/vit"}

    def refused(message: str, error: type[Exception] = ValueError, **changes) -> None:
        edit(theirs, **changes)
        with pytest.raises(error, match=message):
            run("import", dreamllm=theirs, to=tmp_path / "ours")
        edit(theirs, **settings)
        assert not (tmp_path / "ours").exists()

    refused("InternViTEmbedding is not supported", plugins_init_kwargs=plugins | {"vision_encoder": vision})
    ids = settings["special_tokens2ids_dict"]
    fewer = {token: index for token, index in ids.items() if token != "<|im_end|>"}
    refused(r"special_tokens2ids_dict has no <\|im_end\|>$", special_tokens2ids_dict=fewer)
    shutil.rmtree(theirs / "diffusion")
    missing = (
        r"no unet/config.json and no transformer/config.json is found in .*name the directory with --image-decoder"
    )
    refused(missing, FileNotFoundError)
