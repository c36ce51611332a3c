"""What DreamLLM's authors published, for configurations: the towers that they joined, and what the three stages have in
common.

Vicuna v1.1 (the LLaMA-1 shapes, arXiv 2302.13971), CLIP ViT-L/14 at 224 pixels (arXiv 2103.00020) read at its last
layer but one, Stable Diffusion 2.1-base (arXiv 2112.10752), as DreamLLM joins them (arXiv 2309.11499, section 4.1).
Towers' shapes stand in their files (`PUBLISHED`).
"""

import copy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.experiment.recipes import parse
from dreamllm_jax.towers import registry

# What is trained, see `ParametersConfig.trainable`: in stage I, in stages II and III, and there with adapters. Adapters
# alone would not do, for the embeddings of new tokens begin at random.
ALIGNMENT = (("(visual_projector|dream_queries|connector)/.*", True), (".*", False))
EVERYTHING_BUT_TOWERS = (("(language_model|visual_projector|dream_queries|connector)/.*", True), (".*", False))
ADAPTERS = (("language_model/(embed_tokens|lm_head|.*/lora_.)(/.*)?", True), *ALIGNMENT)

# Arguments of the stages' configurations: the shapes of the towers, and the dream queries an image is painted from; in
# stages II and III also the rank of adapters (`layers.lora`), 0 to train the whole language model.
ROLES = {"llm": "language_model", "vision": "vision_encoder", "decoder": "image_decoder", "connector": "connector"}
CHOICES = {
    "llm": registry.published(registry.LANGUAGE_MODELS),
    "vision": registry.published(registry.VISION_ENCODERS),
    "decoder": registry.published(registry.IMAGE_DECODERS),
    "connector": registry.published(registry.CONNECTORS),
}
ALIGNMENT_ARGUMENTS = {"llm": "7b", "vision": "clip-l-224", "decoder": "sd21", "connector": "linear", "queries": 64}
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
    found = towers(**{argument: getattr(given, argument) for argument in ROLES})
    if given.llm != given.vision:  # what sees is not of the same model: a projector between the two begins anew
        found.pop("visual_projector", None)
    return {**found, "num_queries": given.queries, "dtype": "bfloat16"}


def towers(**names: str) -> dict[str, Any]:
    """Settings of published towers by the names of `CHOICES`, and of the visual projector that the vision encoder was
    published with, if it has one of its own.

    Args:
      names: of all of `ROLES`.
    """
    found = {role: copy.deepcopy(CHOICES[argument][names[argument]]) for argument, role in ROLES.items()}
    if projector := registry.projector_of(found["vision_encoder"]["kind"]):
        found["visual_projector"] = projector
    return found


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
    """What stages II and III have in common: the language model is trained too, text and pictures weigh 1 and 10.

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
    """Trains adapters of this rank in place of the language model itself; that for 0.

    Raises:
      ConfigError: a negative rank.
    """
    if rank < 0:
        raise ConfigError(f"the rank of adapters must not be negative, got {rank}")
    # Without adapters, those of the run before are merged.
    config.model.language_model.lora = ConfigDict({"rank": rank, "alpha": 2.0 * rank}) if rank else None
    config.parameters.trainable = ADAPTERS if rank else EVERYTHING_BUT_TOWERS


def _stage(given: Any) -> ConfigDict:
    config = run(_model(given))
    config.rows = {"per_step": 64, "length": 2048, "see_slots": 4, "dream_slots": 4, "dream_size": 512}
    config.objective = {"kind": "joint", "lm_weight": 1.0, "dm_weight": 10.0, "drop_prob": 0.1}
    config.optimizer = {"warmup_ratio": 0.003, "weight_decay": 0.0}
    config.checkpoint = {"every": 500, "keep": 3}
    return config


def run(model: Mapping[str, Any]) -> ConfigDict:
    """What all recipes begin with: a model, bfloat16 where it is frozen, weights split over all chips."""
    config = ConfigDict()
    config.seed = 0
    config.log_every = 10
    config.model = dict(model)
    config.parameters = {"init_from": "", "dtype": "float32", "frozen_dtype": "bfloat16"}
    config.sharding = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}
    return config
