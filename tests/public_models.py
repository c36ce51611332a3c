"""Small random models in the layouts that the public PyTorch classes write."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dreamllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from tests.parity import randomised

TEXTS = ["a red square on a green field", "What is this? It is a bird."] * 10
BASE_VOCABULARY = 300


def tokenizer() -> Tokenizer:
    """300 pieces, and the special tokens after them."""
    return train_tokenizer(TEXTS, BASE_VOCABULARY + 8)


def save_towers(directory: Path, dtype: torch.dtype = torch.float32, **options: dict) -> dict[str, Path]:
    """A LLaMA, a CLIP and a Stable Diffusion in folders named by their roles, and where they are, by `convert`'s flags.

    Args:
      options: those of one of the towers, by its name.
    """
    saving = {"language_model": save_llama, "vision_encoder": save_clip, "image_decoder": save_diffusion}
    return {name: save(directory / name, dtype, **options.get(name, {})) for name, save in saving.items()}


def save_llama(directory: Path, dtype: torch.dtype = torch.float32, pickled: bool = False, **settings) -> Path:
    """A LLaMA of two layers with its SentencePiece model; in shards, for they are very small.

    Args:
      pickled: `pytorch_model-*.bin` in place of safetensors.
    """
    config = LlamaConfig(
        **{
            "vocab_size": BASE_VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        | settings
    )
    model = randomised(LlamaForCausalLM(config)).to(dtype)
    model.save_pretrained(directory, max_shard_size="30KB")
    (directory / "tokenizer.model").write_bytes(tokenizer().sentencepiece_model)
    if pickled:
        _pickle(directory, "model", "pytorch_model")
    return directory


def save_clip(directory: Path, dtype: torch.dtype = torch.float32, whole: bool = False, pickled: bool = False) -> Path:
    """A CLIP vision tower of three layers, or a `whole` CLIP."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    if whole:
        config = CLIPConfig(vision_config=vision, text_config=text.to_dict(), projection_dim=8)
        model = CLIPModel(config)
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**vision))
    randomised(model).to(dtype).save_pretrained(directory)
    if pickled:
        _pickle(directory, "model", "pytorch_model")
    return directory


def save_diffusion(
    directory: Path, dtype: torch.dtype = torch.float32, version: str = "2.1", pickled: bool = False
) -> Path:
    """A Stable Diffusion of two levels, shaped as version "1.5", "2.1" (which predicts velocity) or "xl"."""
    new = version == "2.1"
    xl = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "upcast_attention": None,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 34,
    }
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 24,
            "attention_head_dim": 4 if version == "1.5" else [2, 4],
            "norm_num_groups": 4,
            "use_linear_projection": new,
        }
        | (xl if version == "xl" else {})
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    for name, model in (("unet", unet), ("vae", vae)):
        randomised(model).to(dtype).save_pretrained(directory / name)
        if pickled:
            _pickle(directory / name, "diffusion_pytorch_model", "diffusion_pytorch_model")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = {
        "1.5": PNDMScheduler(**betas),
        "2.1": DDIMScheduler(prediction_type="v_prediction", **betas),
        "xl": EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **betas),
    }[version]
    scheduler.save_pretrained(directory / "scheduler")
    return directory


def _pickle(directory: Path, stem: str, new_stem: str) -> None:
    """Rewrites safetensors, whole or in shards, as the pickles that older versions of the libraries wrote."""
    from safetensors.torch import load_file

    for file in directory.glob(f"{stem}*.safetensors"):
        torch.save(load_file(file), directory / (file.stem.replace(stem, new_stem) + ".bin"))
        file.unlink()
    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace(".safetensors", ".bin").replace(f'"{stem}-', f'"{new_stem}-')
        (directory / f"{new_stem}.bin.index.json").write_text(json.dumps(json.loads(text)))
        index.unlink()
