"""Small random models in the layouts that the public PyTorch classes write."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessorPil,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dreamllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from tests.parity import randomised

TEXTS = ["a red square on a green field", "What is this? It is a bird."] * 10
BASE_VOCABULARY = 300


def tokenizer() -> Tokenizer:
    """300 pieces, and the special tokens after them."""
    return train_tokenizer(TEXTS, BASE_VOCABULARY + 8)


def save_towers(
    directory: Path, dtype: torch.dtype = torch.float32, decoder: str = "stable_diffusion", **options: dict
) -> dict[str, Path]:
    """A LLaMA, a CLIP and an image decoder in folders named by their roles, and where they are, by `convert`'s flags.

    Args:
      decoder: the kind of image decoder, of `DECODERS`.
      options: those of one of the towers, by its name.
    """
    saving = {"language_model": save_language_model, "vision_encoder": save_clip, "image_decoder": DECODERS[decoder]}
    return {name: save(directory / name, dtype, **options.get(name, {})) for name, save in saving.items()}


LLAMA = {
    "vocab_size": BASE_VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


LANGUAGE_MODELS = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}


def save_language_model(
    directory: Path, dtype: torch.dtype = torch.float32, pickled: bool = False, family: str = "llama", **settings
) -> Path:
    """A LLaMA, or of another family, of two layers with a SentencePiece model; in shards, for they are very small.

    Args:
      pickled: `pytorch_model-*.bin` in place of safetensors.
    """
    cls = LANGUAGE_MODELS[family]
    model = randomised(cls(cls.config_class(**LLAMA | settings))).to(dtype)
    model.save_pretrained(directory, max_shard_size="30KB")
    (directory / "tokenizer.model").write_bytes(tokenizer().sentencepiece_model)
    if pickled:
        _pickle(directory, "model", "pytorch_model")
    return directory


def save_clip(directory: Path, dtype: torch.dtype = torch.float32, whole: bool = False, pickled: bool = False) -> Path:
    """A CLIP vision tower of three layers, or a `whole` CLIP."""
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    if whole:
        config = CLIPConfig(vision_config=CLIP, text_config=text.to_dict(), projection_dim=8)
        model = CLIPModel(config)
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    randomised(model).to(dtype).save_pretrained(directory)
    if pickled:
        _pickle(directory, "model", "pytorch_model")
    return directory


def save_llava(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A LLaVA-1.5: the LLaMA, the CLIP and a projector."""
    config = LlavaConfig(
        text_config={"model_type": "llama", **LLAMA},
        vision_config={"model_type": "clip_vision_model", **CLIP},
        image_token_index=BASE_VOCABULARY - 1,
        image_seq_length=4,
    )
    randomised(LlavaForConditionalGeneration(config)).to(dtype).save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(tokenizer().sentencepiece_model)
    return directory


INTERN_VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "attention_bias": True,
}
# Names of transformers' class, and of InternVL's own layout.
INTERNVL_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.layer_norm.": "mlp1.0.",
    "model.multi_modal_projector.linear_1.": "mlp1.1.",
    "model.multi_modal_projector.linear_2.": "mlp1.3.",
    "model.vision_tower.embeddings.patch_embeddings.projection.": "vision_model.embeddings.patch_embedding.",
    "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "model.vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "model.vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.": ".attn.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".lambda_": ".ls",
}


def save_internvl(directory: Path, dtype: torch.dtype = torch.float32, chat: bool = False, **text) -> Path:
    """An InternVL3: a Qwen2.5, an InternViT and a projector; as transformers saves it, or in InternVL's own layout."""
    language = {"model_type": "qwen2", **LLAMA, "tie_word_embeddings": False, **text}
    config = InternVLConfig(
        text_config=language, vision_config=INTERN_VIT, image_token_id=BASE_VOCABULARY - 1, tie_word_embeddings=False
    )
    model = randomised(InternVLForConditionalGeneration(config)).to(dtype)
    model.save_pretrained(directory)
    if chat:
        tensors = dict(model.state_dict())
        for name in [name for name in tensors if ".q_proj." in name and "vision" in name]:
            parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            tensors[name.replace("q_proj", "qkv")] = torch.cat(parts)
        for new, old in INTERNVL_NAMES.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        vision = {("qkv_bias" if name == "attention_bias" else name): value for name, value in INTERN_VIT.items()}
        settings = {
            "model_type": "internvl_chat",
            "llm_config": language,
            "vision_config": {"model_type": "intern_vit_6b", "norm_type": "layer_norm", **vision},
            **{"downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "force_image_size": 16},
            **{"dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 6, "min_dynamic_patch": 1},
        }
        (directory / "config.json").write_text(json.dumps(settings))
    (directory / "tokenizer.model").write_bytes(tokenizer().sentencepiece_model)
    return directory


def save_onevision(directory: Path, dtype: torch.dtype = torch.float32, **text) -> Path:
    """A LLaVA-OneVision of one tile: a Qwen2 with tied embeddings, a SigLIP, a projector and its `image_newline`."""
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **LLAMA, "tie_word_embeddings": True, **text},
        vision_config={"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False},
        image_grid_pinpoints=[[16, 16]],
        image_token_index=BASE_VOCABULARY - 1,
        tie_word_embeddings=True,
    )
    randomised(LlavaOnevisionForConditionalGeneration(config)).to(dtype).save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(tokenizer().sentencepiece_model)
    return directory


def qwen25_vl_config(**text) -> Qwen2_5_VLConfig:
    """Of a Qwen2.5-VL of two layers and three, one of which sees more than a window."""
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": text.get("hidden_size", 32),
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    rope = {"type": "mrope", "mrope_section": [1, 2, 1], "rope_theta": 10000.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    return Qwen2_5_VLConfig(
        text_config={**LLAMA, **ends, "rope_parameters": rope, **text},
        vision_config=vision,
        image_token_id=BASE_VOCABULARY - 1,
        video_token_id=BASE_VOCABULARY - 2,
        vision_start_token_id=BASE_VOCABULARY - 3,
        vision_end_token_id=BASE_VOCABULARY - 4,
    )


def save_qwen25_vl(directory: Path, dtype: torch.dtype = torch.float32, **text) -> Path:
    """A Qwen2.5-VL, and its image processor; `text` are settings of its language model."""
    model = randomised(Qwen2_5_VLForConditionalGeneration(qwen25_vl_config(**text))).to(dtype)
    model.save_pretrained(directory)
    Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=1024, patch_size=4).save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(tokenizer().sentencepiece_model)
    return directory


def save_siglip(directory: Path, dtype: torch.dtype = torch.float32, whole: bool = False) -> Path:
    """A SigLIP vision tower with its head and its image processor, or a `whole` SigLIP."""
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = SiglipModel(SiglipConfig(vision_config=CLIP, text_config={**text, "vocab_size": 99}))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**CLIP))
    randomised(model).to(dtype).save_pretrained(directory)
    size = {"height": CLIP["image_size"], "width": CLIP["image_size"]}
    SiglipImageProcessorPil(size=size, resample=2).save_pretrained(directory)
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
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = {
        "1.5": PNDMScheduler(**betas),
        "2.1": DDIMScheduler(prediction_type="v_prediction", **betas),
        "xl": EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **betas),
    }[version]
    return _save_decoder(directory, {"unet": unet, "vae": vae}, scheduler, dtype, pickled)


def save_sana(directory: Path, dtype: torch.dtype = torch.float32, version: str = "1.5", pickled: bool = False) -> Path:
    """A SANA of three layers, shaped as version "1.0" or "1.5" (the latter normalises queries and keys), over an
    autoencoder of two stages, with the scheduler that it was published with."""
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=8,
        qk_norm="rms_norm_across_heads" if version == "1.5" else None,
    )
    blocks = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in (
            ("block_types", ("ResBlock", "EfficientViTBlock")),
            ("block_out_channels", (8, 16)),
            ("layers_per_block", (1, 1)),
            ("qkv_multiscales", ((), (5,))),
        )
    }
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types=("rms_norm",) * 2,
        decoder_act_fns=("silu",) * 2,
        scaling_factor=0.41407,
        **blocks,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = DPMSolverMultistepScheduler(**flow)
    return _save_decoder(directory, {"transformer": transformer, "vae": vae}, scheduler, dtype, pickled)


def save_sd3(directory: Path, dtype: torch.dtype = torch.float32, version: str = "3.5", pickled: bool = False) -> Path:
    """A Stable Diffusion 3 of four layers, shaped as version "3" or "3.5" (whose first have a second attention)."""
    new = version == "3.5"
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1) if new else (),
        qk_norm="rms_norm" if new else None,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _save_decoder(directory, {"transformer": transformer, "vae": vae}, scheduler, dtype, pickled)


DECODERS = {"stable_diffusion": save_diffusion, "sana": save_sana, "stable_diffusion_3": save_sd3}


def _save_decoder(
    directory: Path, parts: dict[str, torch.nn.Module], scheduler, dtype: torch.dtype, pickled: bool
) -> Path:
    """Random weights, a folder for each part, and the scheduler's."""
    for name, model in parts.items():
        randomised(model).to(dtype).save_pretrained(directory / name)
        if pickled:
            _pickle(directory / name, "diffusion_pytorch_model", "diffusion_pytorch_model")
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
