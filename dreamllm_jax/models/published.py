"""Shapes of the published models, for configurations: nested settings as `DreamLLMConfig` has them.

Vicuna v1.1 (the LLaMA-1 shapes, arXiv 2302.13971), CLIP ViT-L/14 at 224 pixels (arXiv 2103.00020) read at its last
layer but one, Stable Diffusion 2.1-base (arXiv 2112.10752), as DreamLLM joins them (arXiv 2309.11499, section 4.1).
"""

from typing import Any

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


def dreamllm(size: str = "7b") -> dict[str, Any]:
    """Settings of DreamLLM around a llama of `size`: "7b" and "13b" as published, "1b" for trials on one chip.

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
