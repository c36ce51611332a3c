"""LLaMA 1 to 3 and Mistral: their public `config.json`, and the shapes that were published.

arXiv 2302.13971, 2307.09288, 2407.21783, 2310.06825; Vicuna is LLaMA's shape, TinyLlama (arXiv 2401.02385) its kind.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from dreamllm_jax.towers.language_models.public_decoder import PublicDecoder, causal_lm


@dataclasses.dataclass(frozen=True)
class LlamaConfig(PublicDecoder):
    """A LLaMA, a Mistral, and their like."""

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    kind: Literal["llama"] = "llama"
    public = causal_lm("LlamaForCausalLM", "llama", "dreamllm", "mistral")
    own = ("attention_bias", "mlp_bias")


_SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_THIRTEEN = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_FIRST = {"kind": "llama", "vocab_size": 32008, "max_position_embeddings": 2048}  # 8 special tokens included
_SECOND = {**_FIRST, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}  # arXiv 2307.09288
LlamaConfig.PUBLISHED = {
    "7b": {**_FIRST, **_SEVEN},  # LLaMA-1, Vicuna v1.1
    "13b": {**_FIRST, **_THIRTEEN},
    "vicuna15-7b": {**_SECOND, **_SEVEN},
    "vicuna15-13b": {**_SECOND, **_THIRTEEN},
    "llama31-8b": {  # arXiv 2407.21783
        **_FIRST,
        **_SEVEN,
        "vocab_size": 128264,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tinyllama": {  # arXiv 2401.02385
        **_FIRST,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    },
    "1b": {  # no published model: for trials on one chip
        **_FIRST,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
    },
}
