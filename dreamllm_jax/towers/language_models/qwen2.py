"""Qwen2 and Qwen2.5: what their public `config.json` means, and the shapes that were published.

arXiv 2407.10671, 2412.15115. A LLaMA whose queries, keys and values have biases; the embedding has rows of no token,
which leave room for special ones.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from dreamllm_jax.towers.language_models.public_decoder import PublicDecoder, causal_lm


@dataclasses.dataclass(frozen=True)
class Qwen2Config(PublicDecoder):
    """A Qwen2 or Qwen2.5."""

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    attention_bias: bool = True
    attention_out_bias: bool | None = False
    kind: Literal["qwen2"] = "qwen2"
    public = causal_lm("Qwen2ForCausalLM", "qwen2", without=("head_dim",))
    unsaid = (False, 28)


_COMMON = {"kind": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_SMALL = {**_COMMON, "max_position_embeddings": 32768, "tie_word_embeddings": True}
_LARGE = {**_COMMON, "max_position_embeddings": 131072, "vocab_size": 152064}
Qwen2Config.PUBLISHED = {
    "qwen25-0.5b": {
        **_SMALL,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "qwen25-1.5b": {
        **_SMALL,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "max_position_embeddings": 131072,
    },
    "qwen25-3b": {
        **_SMALL,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
    },
    "qwen25-7b": {
        **_LARGE,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen25-14b": {
        **_LARGE,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
}
