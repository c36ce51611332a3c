"""A DreamLLM to begin training with, from a LLaMA, a CLIP and a Stable Diffusion."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import numpy as np

from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.diffusion.schedule import ScheduleConfig
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.llama import grow
from dreamllm_jax.interop.names import to_torch
from dreamllm_jax.interop.source import Part, Source, join
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.projector import Projector, ProjectorConfig
from dreamllm_jax.towers.queries import DreamQueries


def assemble(
    llama: Part,
    clip: Part,
    unet: Part,
    vae: Part,
    schedule: ScheduleConfig,
    *,
    special_tokens: SpecialTokens,
    vocab_size: int,
    new_tokens: Sequence[int],
    init: Literal["normal", "mean"],
    num_queries: int,
    visual_projector: ProjectorConfig,
    condition_projector: ProjectorConfig,
    seed: int,
) -> Source:
    """Joins the towers (see `open_llama`, `open_clip`, `open_diffusion`) with fresh projectors and dream queries.

    Args:
      special_tokens, vocab_size: of the tokenizer.
      new_tokens: ids the language model has never seen.
      init: rows of new tokens: "normal", or the "mean" of the others.
      num_queries, visual_projector, condition_projector: see `DreamLLMConfig`; they begin at random.
      seed: of everything random here.

    Raises:
      ValueError: listing what is missing, unexpected or wrongly shaped in a tower.
    """
    llama = grow(llama, vocab_size, new_tokens, init, seed)
    config = DreamLLMConfig(
        llama=llama.config,
        clip=clip.config,
        vae=vae.config,
        unet=unet.config,
        schedule=schedule,
        visual_projector=visual_projector,
        condition_projector=condition_projector,
        num_queries=num_queries,
        special_tokens=special_tokens,
    )
    towers = {"llama": llama, "clip": clip, "unet": unet, "vae": vae}
    tensors = {name: part.tensors for name, part in towers.items()} | _fresh(config, seed)
    where = {name: part.where for name, part in towers.items()}
    return join(config, tensors, tuple(name for part in towers.values() for name in part.left_out), where)


def _fresh(config: DreamLLMConfig, seed: int) -> dict[str, dict[str, Tensor]]:
    width, condition = config.llama.hidden_size, config.unet.cross_attention_dim
    visual, queries, projector = jax.random.split(jax.random.key(seed), 3)
    params = {
        "visual_projector": Projector(config.visual_projector, width, use_bias=True).init(
            visual, np.zeros((1, 1, config.clip.hidden_size), np.float32)
        ),
        "queries": DreamQueries(config.num_queries, width).init(queries),
        "condition_projector": Projector(config.condition_projector, condition, use_bias=False).init(
            projector, np.zeros((1, 1, width), np.float32)
        ),
    }
    return {
        name: {key: Tensor.of(np.ascontiguousarray(array)) for key, array in to_torch(nn.unbox(tree["params"])).items()}
        for name, tree in params.items()
    }
