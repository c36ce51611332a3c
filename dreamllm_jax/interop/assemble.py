"""A DreamLLM to begin training with, from a language model, a vision encoder and an image decoder."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.language_model import EMBEDDING, grow
from dreamllm_jax.interop.names import to_torch
from dreamllm_jax.interop.source import Part, Source, join
from dreamllm_jax.model import DreamLLMConfig, nothing_read
from dreamllm_jax.towers.queries import DreamQueries, QueriesConfig, from_vocabulary
from dreamllm_jax.towers.registry import ConnectorConfig, ImageDecoderConfig, VisualProjectorConfig


def assemble(
    language_model: Part,
    vision_encoder: Part,
    image_decoder: tuple[ImageDecoderConfig, Mapping[str, Part]],
    *,
    special_tokens: SpecialTokens,
    vocab_size: int,
    new_tokens: Sequence[int],
    init: Literal["normal", "mean"],
    num_queries: int,
    dream_queries: QueriesConfig,
    visual_projector: VisualProjectorConfig | Part,
    connector: ConnectorConfig,
    seed: int,
) -> Source:
    """Joins the towers, as they are opened, with a fresh connector and dream queries, and with a visual projector
    that is opened too or fresh.

    Args:
      special_tokens, vocab_size: of the tokenizer.
      new_tokens: ids the language model has never seen.
      init: rows of new tokens: "normal", or the "mean" of the others.
      num_queries, dream_queries, visual_projector, connector: see `DreamLLMConfig`; they begin at random, but for what
        of a connector is `copied`.
      seed: of everything random here.

    Raises:
      ValueError: listing what is missing, unexpected or wrongly shaped in a tower.
    """
    vocabulary = language_model.tensors.get(EMBEDDING)
    language_model = grow(language_model, vocab_size, new_tokens, init, seed)
    decoder, decoder_parts = image_decoder
    config = DreamLLMConfig(
        language_model=language_model.config,
        vision_encoder=vision_encoder.config,
        image_decoder=decoder,
        visual_projector=visual_projector.config if isinstance(visual_projector, Part) else visual_projector,
        connector=connector,
        num_queries=num_queries,
        dream_queries=dream_queries,
        special_tokens=special_tokens,
    )
    parts = {"language_model": language_model, "vision_encoder": vision_encoder, **decoder_parts}
    if isinstance(visual_projector, Part):
        parts["visual_projector"] = visual_projector
    fresh = _fresh(config, vocabulary, seed)
    if getattr(connector, "copied", False):
        fresh["connector"] |= _copied(fresh["connector"], language_model)
    tensors = fresh | {name: part.tensors for name, part in parts.items()}
    return join(config, tensors, left_out(parts.values()), {name: part.where for name, part in parts.items()})


def left_out(parts: Iterable[Part]) -> tuple[str, ...]:
    """What none of the parts takes that lie in the same directory."""
    places: dict[Path | None, list[tuple[str, ...]]] = {}
    for part in parts:
        places.setdefault(part.where, []).append(part.left_out)
    return tuple(sorted(name for found in places.values() for name in set.intersection(*map(set, found))))


def _queries(config: DreamLLMConfig, vocabulary: Tensor | None, key: jax.Array) -> dict:
    module = DreamQueries(*config.queries_shape, config.dream_queries.deviation_of(config.language_model.width))
    if config.dream_queries.init != "vocabulary" or vocabulary is None:  # what is missing is told later
        return module.init(key)
    rows = from_vocabulary(jnp.asarray(vocabulary.read(), jnp.float32), config.num_queries, key)
    boxed = nn.unbox(module.init(key))
    return jax.tree.map(lambda _: rows, boxed)


def _fresh(config: DreamLLMConfig, vocabulary: Tensor | None, seed: int) -> dict[str, dict[str, Tensor]]:
    width, seen, decoder = config.language_model.width, config.vision_encoder, config.image_decoder
    visual, queries, connector = jax.random.split(jax.random.key(seed), 3)
    params = {
        "visual_projector": config.visual_projector.make(width, jnp.float32).init(
            visual, np.zeros((1, seen.num_patches, seen.width), np.float32)
        ),
        "dream_queries": {} if config.dream_queries.redrawn else _queries(config, vocabulary, queries),
        "connector": config.connector.make_connector(
            decoder.condition_width, decoder.pooled_width, jnp.float32, "none"
        ).init(connector, nothing_read(config, 1)),
    }
    return {
        name: {key: Tensor.of(np.ascontiguousarray(array)) for key, array in to_torch(nn.unbox(tree["params"])).items()}
        for name, tree in params.items()
        if "params" in tree  # a projector may have none
    }


def _copied(connector: Mapping[str, Tensor], language_model: Part) -> dict[str, Tensor]:
    """The connector's layers, and the norm after them, as the last of the language model's.

    Raises:
      ValueError: these are others, or fewer.
    """
    layers = 1 + max(int(name.split(".")[1]) for name in connector if name.startswith("layers."))
    first, found = language_model.config.num_hidden_layers - layers, {}
    for name, ours in connector.items():
        if not name.startswith(("layers.", "norm.")):
            continue
        theirs = re.sub(r"^layers\.(\d+)", lambda match: f"layers.{first + int(match[1])}", name)
        tensor = language_model.tensors.get(theirs)
        if tensor is None or tensor.shape != ours.shape:
            there = "is missing" if tensor is None else f"is {tensor.shape}"
            raise ValueError(
                f"connector: its layers cannot be copies of the language model's: {name} is {ours.shape} here, and "
                f"there {theirs} {there}; choose another connector"
            )
        found[name] = tensor
    return found
