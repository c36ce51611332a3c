"""What DreamLLM's authors published, for configurations: the models' shapes, and what the three stages have in common.

Vicuna v1.1 (the LLaMA-1 shapes, arXiv 2302.13971), CLIP ViT-L/14 at 224 pixels (arXiv 2103.00020) read at its last
layer but one, Stable Diffusion 2.1-base (arXiv 2112.10752), as DreamLLM joins them (arXiv 2309.11499, section 4.1);
and other language models and the older Stable Diffusion that can stand in their places.
"""

from typing import Any

from ml_collections import ConfigDict

from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.experiment.recipes import parse

_SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_THIRTEEN = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_FIRST = {"vocab_size": 32008, "max_position_embeddings": 2048}  # 8 special tokens included
_SECOND = {"vocab_size": 32008, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}  # arXiv 2307.09288
_LLM: dict[str, dict[str, Any]] = {
    "7b": {**_FIRST, **_SEVEN},  # LLaMA-1, Vicuna v1.1
    "13b": {**_FIRST, **_THIRTEEN},
    "vicuna15-7b": {**_SECOND, **_SEVEN},
    "vicuna15-13b": {**_SECOND, **_THIRTEEN},
    "llama31-8b": {  # arXiv 2407.21783
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
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
_UNET: dict[str, dict[str, Any]] = {
    "sd21": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sd15": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "use_linear_projection": False,
    },
}

# What is trained, see `ParametersConfig.trainable`: in stage I, in stages II and III, and there with adapters. Adapters
# alone would not do, for the embeddings of new tokens begin at random.
ALIGNMENT = (("(visual_projector|queries|condition_projector)/.*", True), (".*", False))
EVERYTHING_BUT_TOWERS = (("(llama|visual_projector|queries|condition_projector)/.*", True), (".*", False))
ADAPTERS = (("llama/(embed_tokens|lm_head|.*/lora_.)(/.*)?", True), *ALIGNMENT)


# Arguments of the stages' configurations: the shapes of language model and Stable Diffusion, and the dream queries an
# image is painted from; in stages II and III also the rank of adapters (`models.lora`), 0 to train the whole llama.
CHOICES = {"llm": _LLM, "diffusion": _UNET}
ALIGNMENT_ARGUMENTS = {"llm": "7b", "diffusion": "sd21", "queries": 64}
TUNING_ARGUMENTS = ALIGNMENT_ARGUMENTS | {"lora": 0}


def model(argument: str = "") -> dict[str, Any]:
    """Settings of DreamLLM, as `DreamLLMConfig` has them.

    Args:
      argument: of `ALIGNMENT_ARGUMENTS`; "13b" alone will do.

    Raises:
      ConfigError: an argument that cannot be used.
    """
    return _model(parse(argument, CHOICES, **ALIGNMENT_ARGUMENTS))


def _model(given: Any) -> dict[str, Any]:
    return {
        "llama": dict(_LLM[given.llm]),
        "clip": dict(_CLIP_LARGE),
        "vae": {"scaling_factor": 0.18215},
        "unet": dict(_UNET[given.diffusion]),
        "schedule": {"prediction_type": "epsilon"},
        "num_queries": given.queries,
        "dtype": "bfloat16",
    }


def alignment(argument: str = "") -> ConfigDict:
    """The configuration that the variants of stage I have in common: projectors and dream queries are trained.

    Args:
      argument: of `ALIGNMENT_ARGUMENTS`.

    Raises:
      ConfigError: an argument that cannot be used.
    """
    config = _stage(parse(argument, CHOICES, **ALIGNMENT_ARGUMENTS))
    config.parameters.trainable = ALIGNMENT
    config.optimizer.learning_rate = 2e-3
    return config


def tuning(argument: str = "", **defaults: Any) -> ConfigDict:
    """What stages II and III have in common: the llama is trained too, text and pictures weigh 1 and 10.

    Args:
      argument: of `TUNING_ARGUMENTS`.
      defaults: other values than they have there.

    Raises:
      ConfigError: an argument that cannot be used.
    """
    given = parse(argument, CHOICES, **{**TUNING_ARGUMENTS, **defaults})
    config = _stage(given)
    adapt(config, given.lora)
    return config


def adapt(config: ConfigDict, rank: int) -> None:
    """Trains adapters of this rank in place of the llama itself; the llama itself for 0.

    Raises:
      ConfigError: a negative rank.
    """
    if rank < 0:
        raise ConfigError(f"the rank of adapters must not be negative, got {rank}")
    # Without adapters, those of the run before are merged.
    config.model.llama.lora = ConfigDict({"rank": rank, "alpha": 2.0 * rank}) if rank else None
    config.parameters.trainable = ADAPTERS if rank else EVERYTHING_BUT_TOWERS


def _stage(given: Any) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.log_every = 10
    config.model = _model(given)
    config.parameters = {"init_from": "", "dtype": "float32", "frozen_dtype": "bfloat16"}
    config.rows = {"per_step": 64, "length": 2048, "see_slots": 4, "dream_slots": 4, "dream_size": 512}
    config.objective = {"lm_weight": 1.0, "dm_weight": 10.0, "drop_prob": 0.1}
    config.optimizer = {"warmup_ratio": 0.003, "weight_decay": 0.0}
    config.sharding = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}
    config.checkpoint = {"every": 500, "keep": 3}
    return config
