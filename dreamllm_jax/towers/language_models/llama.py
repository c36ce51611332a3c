"""LLaMA 1 to 3 and Mistral: their public `config.json`, and the shapes that were published.

arXiv 2302.13971, 2307.09288, 2407.21783, 2310.06825; Vicuna is LLaMA's shape, TinyLlama (arXiv 2401.02385) its kind.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from dreamllm_jax.layers.rope import RopeScaling
from dreamllm_jax.towers.language_models.decoder import DecoderConfig
from dreamllm_jax.towers.public import PublicForm, reader

# Settings of a config.json that would change the function computed here: name -> the one value that is supported.
_SUPPORTED = {"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False}
# The decoder's settings that these families do not have, and those that are not read by their names.
_NOT_ITS_OWN = {"hidden_act", "pattern", "qk_norm", "norm_unit_offset", "embedding_scale"}
_OURS = {*_NOT_ITS_OWN, "kind", "attention_out_bias", "rope_scaling", "rope_theta", "lora"}


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """A LLaMA, a Mistral, and their like."""

    PUBLISHED: ClassVar[dict[str, dict[str, Any]]]  # name -> settings

    kind: Literal["llama"] = "llama"
    public = PublicForm(
        library="transformers",
        torch_class="LlamaForCausalLM",
        types=("llama", "dreamllm", "mistral"),
        prefix="model.",
        outside=("lm_head.",),
        beside=r".*\brotary_emb\.inv_freq$",  # computed
        settings=(
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
        ),
    )

    @classmethod
    def from_public(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a `config.json`, of transformers 5 (`rope_parameters`) or before (`rope_theta`, `rope_scaling`).

        Raises:
          ValueError: naming a setting that is not supported.
        """
        reader((cls,), config)
        for name, value in _SUPPORTED.items():
            if config.get(name, value) not in (value, None):
                raise ValueError(f"{name} = {config[name]!r} is not supported: only {value!r} is")
        window = config.get("sliding_window")
        if window is not None and window < config.get("max_position_embeddings", cls.max_position_embeddings):
            raise ValueError(f"sliding_window = {window} is not supported, as it is less than max_position_embeddings")
        before, now = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
        if before and now and before.get("rope_type", before.get("type")) != now.get("rope_type"):
            raise ValueError(f"rope_scaling {before} and rope_parameters {now} are of different types: leave one out")
        rope = {**before, **now}
        if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (1.0, None):
            raise ValueError("partial_rotary_factor is not supported: the whole head is rotated")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        scaling = None
        if rope_type != "default":
            names = [field.name for field in dataclasses.fields(RopeScaling)[1:]]
            scaling = RopeScaling(rope_type, **{"factor": None, **{name: rope[name] for name in names if name in rope}})
        names = {field.name for field in dataclasses.fields(cls)} - _OURS
        values = {name: config[name] for name in names if config.get(name) is not None}
        theta = rope.get("rope_theta", config.get("rope_theta"))
        return cls(rope_theta=cls.rope_theta if theta is None else theta, rope_scaling=scaling, **values)

    def to_public(self) -> dict[str, Any]:
        """The settings of a `config.json`, understood by transformers 4 and 5 alike.

        Raises:
          ValueError: naming a setting that `LlamaForCausalLM` does not know.
        """
        for field in dataclasses.fields(self):
            if field.name in _NOT_ITS_OWN and getattr(self, field.name) != field.default:
                raise ValueError(f"LlamaForCausalLM has no {field.name}={getattr(self, field.name)!r}")
        if self.attention_out_bias not in (None, self.attention_bias):
            raise ValueError("LlamaForCausalLM has biases at all projections of its attention or at none")
        left_out = _OURS - {"rope_theta"}
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}
        scaling = None
        if self.rope_scaling is not None:
            scaling = {n: value for n, value in dataclasses.asdict(self.rope_scaling).items() if value is not None}
            scaling["type"] = self.rope_scaling.rope_type
        return settings | {"rope_scaling": scaling, "hidden_act": "silu"}


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
