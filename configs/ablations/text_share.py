"""Share of documents of text alone, from a corpus `text`, in the mixture: what keeps the language model's abilities."""

import dataclasses

from ml_collections import ConfigDict

from dreamllm_jax import recipes

SWEEP = recipes.grid(share=(0.0, 0.1, 0.25, 0.5))


@dataclasses.dataclass(frozen=True)
class Arguments(recipes.Ablation):
    """What may follow the file's name."""

    share: float = 0.1


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, Arguments, arg)
    recipes.set_share(config, "text", given.share)
    return config
