"""DreamLLM (arXiv 2309.11499): a causal language model that reads images and conditions an image decoder.

Its towers are arguments: a language model, a vision encoder, an image decoder, and what joins them.

Legend: B rows, L tokens in a row, S slots of a group, N images, P patches, Q dream queries, E language model's width,
V vocabulary, F width of the vision encoder's features.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from dreamllm_jax.data.prompting import Prompting
from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.layers import remat
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.weights import Weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.condition import Condition, Hidden
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.queries import DreamQueries, QueriesConfig
from dreamllm_jax.towers.registry import (
    ConnectorConfig,
    ImageDecoderConfig,
    LanguageModelConfig,
    VisionEncoderConfig,
    VisualProjectorConfig,
)

TEACHER = "teacher"  # of the parameters, beside the model's own


@dataclasses.dataclass(frozen=True)
class DreamLLMConfig:
    """The towers' shapes and how they are joined.

    Attributes:
      num_queries: dream queries an image is painted from; `dream_queries` says how they begin.
      special_tokens: ids; None for the last eight of the vocabulary.
      prompting: how it is asked to paint, of `data.prompting`; None for captions that stand alone.
      teacher: a second vision encoder and visual projector, which stay as these were when a run began and are never
        trained: what `objectives.reconstruction` can keep them near to.
      dtype: what the towers compute in; parameters are stored as the training configuration says.
      remat: what the language model's layers keep for their backward pass: "none" (everything), "dots", "full"
        (nothing), "offload", or names (see `layers.remat`).
    """

    language_model: LanguageModelConfig
    vision_encoder: VisionEncoderConfig
    image_decoder: ImageDecoderConfig
    visual_projector: VisualProjectorConfig = ProjectorConfig()
    connector: ConnectorConfig = ProjectorConfig()
    num_queries: int = 64
    dream_queries: QueriesConfig = QueriesConfig()
    special_tokens: SpecialTokens | None = None
    prompting: Prompting | None = None
    teacher: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str = "full"

    def __post_init__(self):
        remat.check(self.remat)
        if self.num_queries < 1:
            raise ValueError(f"num_queries must be positive, got {self.num_queries}")
        for name, tokens in (("visual_projector", self.vision_encoder.num_patches), ("connector", self.num_queries)):
            try:
                getattr(self, name).require_tokens(tokens)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        seen, decoder = self.vision_encoder, self.image_decoder
        if decoder.encodes_features:
            width = seen.width if decoder.encodes_features == "vision_encoder" else self.language_model.width
            decoder.require_features(seen.image_size, seen.num_patches, width)
        if self.special_tokens is None:
            object.__setattr__(self, "special_tokens", SpecialTokens.last_of(self.language_model.vocab_size))

    @property
    def queries_shape(self) -> tuple[int, int]:
        """Of one image's dream queries."""
        return self.num_queries, self.language_model.width


def splice(
    embeddings: Float[Array, "B L E"], features: Float[Array, "B S T E"], slots: Int[Array, "B S"]
) -> Float[Array, "B L E"]:
    """Puts each slot's T feature vectors at positions `slot ... slot + T - 1` of its row; slots of -1 put nothing."""
    length, tokens = embeddings.shape[1], features.shape[2]
    index = slots[..., None] + jnp.arange(tokens)
    index = jnp.where(slots[..., None] >= 0, index, length)
    rows = jnp.arange(embeddings.shape[0])[:, None, None]
    return embeddings.at[rows, index].set(features.astype(embeddings.dtype), mode="drop")


def take(hidden: Float[Array, "B L E"], slots: Int[Array, "B S"], tokens: int) -> Float[Array, "B S T E"]:
    """The hidden states at positions `slot ... slot + tokens - 1`; arbitrary ones for slots of -1."""
    index = jnp.maximum(slots, 0)[..., None] + jnp.arange(tokens)
    rows = jnp.arange(hidden.shape[0])[:, None, None]
    return hidden.at[rows, index].get(mode="clip")


def nothing_read(config: DreamLLMConfig, images: int) -> Float[Array, "N Q E"] | Hidden:
    """Zeros in place of what `painted_from` gives, from which a connector's parameters take their shapes."""
    width, tokens = config.language_model.width, config.connector.prompt_tokens
    queries = jnp.zeros((images, config.num_queries, width))
    return Hidden(queries, jnp.zeros((images, tokens, width)), jnp.ones((images, tokens), bool)) if tokens else queries


def painted_from(
    config: DreamLLMConfig, hidden: Float[Array, "B L E"], segment_ids: Int[Array, "B L"], slots: Int[Array, "B S"]
) -> Float[Array, "B S Q E"] | Hidden:
    """What the connector is given of the hidden states, for the images at these slots; arbitrary for slots of -1."""
    queries, tokens = take(hidden, slots, config.num_queries), config.connector.prompt_tokens
    if not tokens:
        return queries
    index, rows = (slots - tokens)[..., None] + jnp.arange(tokens), jnp.arange(len(hidden))[:, None, None]
    there, segment_ids = jnp.maximum(index, 0), jnp.asarray(segment_ids)
    mask = (index >= 0) & (segment_ids[rows, there] == segment_ids[rows, jnp.maximum(slots, 0)[..., None]])
    return Hidden(queries, hidden.at[rows, there].get(mode="clip"), mask)


class DreamLLM(nn.Module):
    """All parameters of the model, by role: `language_model`, `vision_encoder`, `visual_projector`, `dream_queries`,
    `connector`, `image_decoder`.

    `model.bind({"params": params})` has the methods below and the towers' own, such as `.image_decoder.decode`; of
    `params` it needs those that a method uses.
    """

    config: DreamLLMConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.language_model.width
        self.language_model = config.language_model.make(dtype, config.remat)
        of_images = "none" if config.remat == "none" else "full"
        self.vision_encoder = config.vision_encoder.make(dtype, of_images)
        self.visual_projector = config.visual_projector.make(width, dtype)
        if not config.dream_queries.redrawn:
            self.dream_queries = DreamQueries(*config.queries_shape, config.dream_queries.deviation_of(width))
        decoder = config.image_decoder
        self.connector = config.connector.make_connector(
            decoder.condition_width, decoder.pooled_width, dtype, of_images
        )
        self.image_decoder = decoder.make(dtype)

    def see(self, images: UInt8[Array, "N ..."] | Float[Array, "N ..."], stored: bool = False) -> Float[Array, "N P E"]:
        """What the language model is given for images: the vision encoder's features through the visual projector.

        Args:
          images: pixels as the encoder's `preprocess` makes them, or the features that are `stored` of them.
        """
        if stored:
            features = constrain(images.astype(jnp.dtype(self.config.dtype)), ("images", None, None))
        else:
            features = self.vision_encoder(images)
        return self.visual_projector(features)

    def embed(
        self,
        tokens: Int[Array, "B L"],
        seen: Sequence[tuple[Float[Array, "B S P E"], Int[Array, "B S"]]] = (),
        dream_slots: Sequence[Int[Array, "B S"]] = (),
        drawn: Sequence[Float[Array, "B S Q E"]] = (),
    ) -> Float[Array, "B L E"]:
        """Token embeddings with what is seen and the dream queries spliced in at their slots, group by group.

        Args:
          drawn: the images' queries, where they are drawn anew (`QueriesConfig.redrawn`).
        """
        x = self.language_model.embed(tokens)
        for features, slots in seen:
            x = splice(x, features, slots)
        for index, slots in enumerate(dream_slots):
            if self.config.dream_queries.redrawn:
                queries = drawn[index]
            else:
                table = self.dream_queries()
                queries = spread(table, (*slots.shape, *table.shape), x.dtype)
            x = splice(x, queries, slots)
        return constrain(x, ("rows", "tokens", "act_embed"))

    def decode(
        self,
        embeddings: Float[Array, "B T E"],
        positions: Int[Array, "B T"] | Int[Array, "B T 3"],
        segment_ids: Int[Array, "B T"],
        cache: Any = None,
        seen: Sequence[tuple[Float[Array, "B S P E"], Int[Array, "B S"]]] = (),
    ) -> tuple[Float[Array, "B T E"], Any]:
        """The language model's hidden states after its final norm, and its cache.

        Args:
          seen: as of `embed`; a connector that `sees` is given it in the place of the hidden states there, which no
            token that is learned depends on.
        """
        hidden, cache = self.language_model(embeddings, positions, segment_ids, cache)
        for features, slots in seen if self.config.connector.sees else ():
            hidden = splice(hidden, features, slots)
        return constrain(hidden, ("rows", "tokens", "act_embed")), cache

    def null_hidden(self, with_queries: bool = True) -> Float[Array, "Q E"] | Hidden:
        """Hidden states at the queries of the document without a prompt, for classifier-free guidance.

        Args:
          with_queries: feed the dream queries; without them their positions keep the embedding of `<im_patch>`, as in
            the original's training code.

        Raises:
          ValueError: the queries are drawn anew, so that each image has a document without a prompt of its own.
        """
        if self.config.dream_queries.redrawn:
            raise ValueError("dream queries that are drawn anew have no null condition: read the prompt without words")
        special = self.config.special_tokens
        tokens = jnp.asarray([special.null_document(self.config.num_queries)], jnp.int32)
        slots = jnp.full((1, 1), special.null_slot)
        x = self.embed(tokens, dream_slots=[slots] if with_queries else ())
        positions = jnp.arange(tokens.shape[1])[None]
        hidden, _ = self.decode(x, positions, jnp.ones_like(tokens))
        given = painted_from(self.config, hidden, jnp.ones_like(tokens), slots)
        return jax.tree.map(lambda x: x[0, 0], given)

    def condition(self, hidden: Float[Array, "N Q E"] | Hidden) -> Condition:
        """Hidden states at the queries -> what the image decoder paints from."""
        return self.connector(jax.tree.map(lambda x: constrain(x, ("images", *[None] * (x.ndim - 1))), hidden))

    def __call__(self) -> None:
        """Touches every parameter once, on the smallest inputs: for `init`."""
        config = self.config
        encoder, size = config.vision_encoder, config.vision_encoder.image_size
        features = self.see(jnp.zeros((1, *encoder.pixels_shape(size, size)), jnp.uint8))[None]
        length = max(encoder.num_patches, config.num_queries)
        tokens, slots = jnp.zeros((1, length), jnp.int32), jnp.zeros((1, 1), jnp.int32)
        x = self.embed(tokens, [(features, slots)], [slots], [jnp.zeros((1, 1, *config.queries_shape))])
        hidden, _ = self.decode(x, jnp.arange(length)[None], jnp.ones_like(tokens))
        self.language_model.logits(hidden)
        given = painted_from(config, hidden, jnp.ones_like(tokens), slots)
        self.image_decoder(self.condition(jax.tree.map(lambda x: x[:, 0], given)))


@functools.cache
def abstract_params(config: DreamLLMConfig) -> dict:
    """The parameter tree's shapes (`layers.weights.Weight`), nothing computed."""
    params = dict(jax.eval_shape(DreamLLM(config).init, jax.random.key(0))["params"])
    if config.teacher:
        taught = {name: params[name] for name in ("vision_encoder", "visual_projector") if name in params}
        params[TEACHER] = jax.tree.map(lambda x: x.replace(fixed=True), taught, is_leaf=lambda x: isinstance(x, Weight))
    return params


def axes_of(weights: Any) -> Any:
    """The logical axes of parameters, in the same tree, from `abstract_params` or a part of it."""
    return jax.tree.map(lambda weight: weight.names, weights, is_leaf=lambda x: isinstance(x, Weight))
