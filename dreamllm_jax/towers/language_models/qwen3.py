"""Qwen3, the dense models: what their public `config.json` means, and the shapes that were published.

arXiv 2505.09388. Each head's queries and keys are normalised, and a head is 128 wide whatever the model's width; the
embedding has rows of no token, which leave room for special ones.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from dreamllm_jax.towers.language_models.public_decoder import PublicDecoder, causal_lm


@dataclasses.dataclass(frozen=True)
class Qwen3Config(PublicDecoder):
    """A dense Qwen3."""

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    head_dim: int | None = 128
    qk_norm: bool = True
    kind: Literal["qwen3"] = "qwen3"
    public = causal_lm("Qwen3ForCausalLM", "qwen3")
    own = ("attention_bias",)
    unsaid = (False, 28)


_LARGE = {
    "kind": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
_SMALL = {**_LARGE, "tie_word_embeddings": True}
Qwen3Config.PUBLISHED = {
    "qwen3-0.6b": {
        **_SMALL,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-1.7b": {
        **_SMALL,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-4b": {
        **_SMALL,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "qwen3-8b": {
        **_LARGE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "qwen3-14b": {
        **_LARGE,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}
