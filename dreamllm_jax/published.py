"""What DreamLLM's authors published, for configurations: the models' shapes, and what the three stages have in common.

Vicuna v1.1 (the LLaMA-1 shapes, arXiv 2302.13971), CLIP ViT-L/14 at 224 pixels (arXiv 2103.00020) read at its last
layer but one, Stable Diffusion 2.1-base (arXiv 2112.10752), as DreamLLM joins them (arXiv 2309.11499, section 4.1).
"""

from typing import Any

from ml_collections import ConfigDict

_LLAMA = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
_UNET_2_1 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


def model(size: str = "7b") -> dict[str, Any]:
    """Settings of DreamLLM, as `DreamLLMConfig` has them, around a llama of `size`.

    "7b" and "13b" are as published, "1b" is for trials on one chip.

    Raises:
      ValueError: an unknown size.
    """
    if size not in _LLAMA:
        raise ValueError(f"unknown size {size!r}: choose from {', '.join(_LLAMA)}")
    return {
        "llama": {"vocab_size": 32008, "max_position_embeddings": 2048, **_LLAMA[size]},  # 8 special tokens included
        "clip": dict(_CLIP_LARGE),
        "vae": {"scaling_factor": 0.18215},
        "unet": dict(_UNET_2_1),
        "num_queries": 64,
        "dtype": "bfloat16",
    }


def stage(size: str = "7b") -> ConfigDict:
    """A training stage's configuration, up to its data and what it decides otherwise.

    Everything but CLIP and Stable Diffusion is trained, text and pictures weigh 1 and 10, as in stages II and III.

    Raises:
      ValueError: an unknown size.
    """
    config = ConfigDict()
    config.seed = 0
    config.log_every = 10
    config.model = model(size)
    config.parameters = {
        "init_from": "",
        "trainable": (
            ("(llama|visual_projector|queries|condition_projector)/.*", True),
            (".*", False),
        ),
        "dtype": "float32",
        "frozen_dtype": "bfloat16",
    }
    config.rows = {"per_step": 64, "length": 2048, "see_slots": 4, "dream_slots": 4, "dream_size": 512}
    config.objective = {"lm_weight": 1.0, "dm_weight": 10.0, "drop_prob": 0.1}
    config.optimizer = {"warmup_ratio": 0.003, "weight_decay": 0.0}
    config.sharding = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}
    config.checkpoint = {"every": 500, "keep": 3}
    return config
