"""What the recipes of DreamLLM's family share: towers as they were published together, and how they are joined.

OpenUni (arXiv 2505.23661), MetaQuery (arXiv 2504.06256), UniLIP (arXiv 2507.23278).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dreamllm_jax.data.prompting import PUBLISHED as PROMPTINGS
from dreamllm_jax.experiment import published

INTERNVL = {"1b": "qwen25-0.5b", "2b": "qwen25-1.5b"}  # InternVL3's language models, by its own sizes
MLP1 = {"kind": "mlp", "depth": 2, "pre_layernorm": True}  # InternVL's visual projector
ONLY = "(dream_queries|connector)/.*"  # what is trained beside frozen towers
# Tokens of a row of eight pictures with 256 queries each, by the length of their captions: some 20 tokens, or 60 to 120
# (`python -m dreamllm_jax.data rows`).
LENGTHS = {"short": 2304, "long": 2688}
DENOISER = "(dream_queries|connector|image_decoder/denoiser)/.*"


def towers(llm: str, vision: str, decoder: str, connector: str, **more: Any) -> dict[str, Any]:
    """Settings of a model, as `DreamLLMConfig` has them, of published towers by name.

    Args:
      more: other settings of it.
    """
    found = published.towers(llm=llm, vision=vision, decoder=decoder, connector=connector)
    return {**found, "num_queries": 256, "dtype": "bfloat16", **more}


def prompting(name: str, **changes: Any) -> dict[str, Any]:
    """How a published program asks for pictures, as settings."""
    return dataclasses.asdict(PROMPTINGS[name]) | changes


def internvl(size: str, decoder: str, connector: str, **more: Any) -> dict[str, Any]:
    """`towers` over InternVL3 (arXiv 2504.10479) of this size, with 256 tokens a picture."""
    return towers(INTERNVL[size], "internvit-300m-448", decoder, connector, visual_projector=MLP1, **more)


def painting(model: Mapping[str, Any], trained: str, pictures: int, slots: int, length: int) -> ConfigDict:
    """A configuration that learns to paint alone, from captions: whatever the language model writes is not learned.

    Args:
      trained: regular expression of the parameters that are trained.
      pictures: of a step.
      slots: pictures of a row, for which it has `length` tokens.
    """
    config = published.run(model)
    config.parameters.trainable = ((trained, True), (".*", False))
    config.rows = {"per_step": pictures // slots, "length": length, "see_slots": 0, "dream_slots": slots}
    config.rows.dream_size = 512
    config.objective = {"kind": "joint", "lm_weight": 0.0, "dm_weight": 1.0}
    config.optimizer = {"b1": 0.9, "b2": 0.95}
    config.data = {"path": "", "corpora": {"pairs": {"mode": "creation", "drop_text": 0.1}}}
    config.checkpoint = {"every": 1000, "keep": 3}
    return config
