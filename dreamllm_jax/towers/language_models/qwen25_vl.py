"""Qwen2.5-VL's language model (arXiv 2502.13923): a Qwen2 whose positions have three axes (M-RoPE).

Of texts it computes what a Qwen2 of the same weights does, and as such it is written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from dreamllm_jax.towers.language_models.public_decoder import causal_lm
from dreamllm_jax.towers.language_models.qwen2 import Qwen2Config

_UNTOLD = ("head_dim", "tie_word_embeddings")  # which a whole model's settings of texts lack


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(Qwen2Config):
    """The language model of a Qwen2.5-VL; defaults as in transformers' `Qwen2_5_VLTextConfig`."""

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    kind: Literal["qwen25_vl"] = "qwen25_vl"
    public = causal_lm("Qwen2ForCausalLM", "qwen2", "qwen2_5_vl", "qwen2_5_vl_text", without=_UNTOLD)
    own = ("mrope_section",)
    unsaid = (False, 80)

    def __post_init__(self):
        super().__post_init__()
        if not self.mrope_section:
            raise ValueError("mrope_section is empty: Qwen2.5-VL's positions have three axes")

    @classmethod
    def from_public(cls, config: Mapping[str, Any]) -> Self:
        """Reads the `config.json` of a whole model, whose settings of texts stand in `text_config` or beside those of
        images, or of the language model alone; errors as of `PublicDecoder.from_public`."""
        text = config.get("text_config") or {}
        tied = any(settings.get("tie_word_embeddings") for settings in (config, text))  # it may stand in either
        config = {**config, **text, "tie_word_embeddings": tied}
        rope = {**(config.pop("rope_scaling", None) or {}), **(config.pop("rope_parameters", None) or {})}
        section = rope.pop("mrope_section", cls.mrope_section)
        if rope.get("rope_type", rope.get("type")) == "mrope":
            rope = {name: value for name, value in rope.items() if name not in ("rope_type", "type")}
        return super().from_public({**config, "mrope_section": tuple(section), "rope_parameters": rope})

    def to_public(self) -> dict[str, Any]:
        """The settings of a Qwen2's `config.json`; errors as of `PublicDecoder.to_public`."""
        names = {field.name for field in dataclasses.fields(self)} - {"kind", "mrope_section"}
        return Qwen2Config(**{name: getattr(self, name) for name in names}).to_public()


_COMMON = {"kind": "qwen25_vl", "max_position_embeddings": 128000, "rms_norm_eps": 1e-6}
Qwen25VLConfig.PUBLISHED = {
    "qwen25-vl-3b": {
        **_COMMON,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen25-vl-7b": {
        **_COMMON,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
