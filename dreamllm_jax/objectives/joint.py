"""DreamLLM's joint objective (arXiv 2309.11499, eq. 6): next-token cross-entropy and the image decoder's error.

Every random number is an argument (`Draws`), so that a loss is a function of parameters, batch and draws alone.

Legend: B rows, S slots of a group, N images, Q dream queries, E language model's width.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from dreamllm_jax.data.batch import Batch, Slots
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.model import DreamLLM, DreamLLMConfig, painted_from
from dreamllm_jax.objectives.images import flat, hidden_states, painting_error
from dreamllm_jax.objectives.next_token import next_token_loss
from dreamllm_jax.towers.condition import Condition, Hidden


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """What is minimised: `(lm_weight · cross_entropy + dm_weight · painting_error) / scale`.

    How the painting error is made, is the image decoder's business (`model.image_decoder.training`).

    Attributes:
      lm_weight, dm_weight: the two losses' weights; a part of weight 0 is not computed.
      scaling: scale is 1 ("none"), the weights' sum ("l1_norm") or the root of their squares' sum ("l2_norm").
      drop_prob: share of images whose condition is replaced by the null condition (classifier-free guidance).
      null_condition: run the document without a prompt with the dream queries ("queries"), or with plain `<im_patch>`
        embeddings in their place, as the original's training code does ("original").
      detach_condition: no gradient of the painting error reaches the language model and the queries. The original does
        this wherever its condition projector is frozen; here freezing concerns weights only.
      loss_chunk: at most how many tokens of each row have logits at a time; 0 for all.
      image_chunk: at most how many images each device puts through the image towers at a time; 0 for all, which on CPU
        is several times faster.
    """

    lm_weight: float = 1.0
    dm_weight: float = 10.0
    scaling: Literal["none", "l1_norm", "l2_norm"] = "none"
    drop_prob: float = 0.0
    null_condition: Literal["queries", "original"] = "queries"
    detach_condition: bool = False
    loss_chunk: int = 256
    image_chunk: int = 8
    kind: Literal["joint"] = "joint"

    METRICS: ClassVar[tuple[str, ...]] = ("loss", "lm_loss", "dm_loss")
    BEST: ClassVar[tuple[str, ...]] = METRICS

    def __post_init__(self):
        for name in ("lm_weight", "dm_weight", "loss_chunk", "image_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0.0 <= self.drop_prob <= 1.0:
            raise ValueError(f"drop_prob must lie in [0, 1], got {self.drop_prob}")
        if self.lm_weight == self.dm_weight == 0:
            raise ValueError("lm_weight and dm_weight are both 0: there is nothing to learn")

    @property
    def scale(self) -> float:
        if self.scaling == "none":
            return 1.0
        return (
            self.lm_weight + self.dm_weight if self.scaling == "l1_norm" else math.hypot(self.lm_weight, self.dm_weight)
        )

    def require(self, model: DreamLLMConfig, trained: Callable[[str], bool], paints: bool) -> None:
        """Raises ValueError if rows that have, or have no, room for images to paint leave nothing to learn, or there is
        a teacher, from whom nothing is."""
        if self.lm_weight == 0 and not paints:
            raise ValueError("objective.lm_weight=0 and rows.dream_slots=0: there is nothing to learn")
        if self.drop_prob and model.dream_queries.redrawn:
            raise ValueError(
                f"objective.drop_prob={self.drop_prob:g}: dream queries that are drawn anew have no null condition: "
                "set it to 0, and data.corpora.NAME.drop_text"
            )
        if model.teacher:
            raise ValueError("model.teacher is of objective.kind=reconstruction: leave it out")

    def make(self, model: DreamLLM) -> "Joint":
        """The objective for a model."""
        return Joint(self, model)

    def held_out(self, config: DreamLLMConfig, parts: int) -> "HeldOutJoint":
        """The losses of held-out documents; that of painting in so many equal ranges of time."""
        decoder = config.image_decoder.plain
        model = DreamLLM(dataclasses.replace(config, image_decoder=decoder))
        return HeldOutJoint(Joint(dataclasses.replace(self, drop_prob=0.0, scaling="none"), model), parts)


@struct.dataclass
class Draws:
    """All randomness of a loss for a group of slots.

    Attributes:
      decoder: the image decoder's draws, [B, S, ...].
      drop: bool[B, S]: which images get the null condition; None for none.
      queries: f32[B, S, Q, E]: the dream queries, where they are drawn anew; None for the learned ones.
    """

    decoder: Any
    drop: Bool[Array, "B S"] | None = None
    queries: Float[Array, "B S Q E"] | None = None


@struct.dataclass
class Totals:
    """The two losses' denominators over the global batch: weights of learned tokens, and filled dream slots."""

    tokens: Float[Array, ""]
    images: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Joint:
    """The joint objective of a model; see `objectives.interface.Objective`."""

    config: JointConfig
    model: DreamLLM

    def totals(self, batch: Batch) -> Totals:
        """The losses' denominators."""
        images = sum((jnp.sum(slots.filled) for slots in batch.dream), start=jnp.zeros((), jnp.int32))
        return Totals(jnp.sum(jnp.maximum(batch.loss_weights, 0.0)), images.astype(jnp.float32))

    def draws(self, key: jax.Array, batch: Batch) -> tuple[Draws, ...]:
        """The draws of a batch by group, each number a function of (key, row, slot) alone.

        Args:
          key: typed key of the step.
        """
        found, first = [], 0
        for slots in batch.dream:
            rows, count = slots.at.shape
            found.append(self._draws_of(key, rows, range(first, first + count), slots))
            first += count
        return tuple(found)

    def _draws_of(self, key: jax.Array, rows: int, numbers: range, slots: Slots) -> Draws:
        config, model = self.config, self.model.config
        decoder, queries = model.image_decoder, model.dream_queries
        shape = decoder.latent_shape_of(slots.images.shape[2:], slots.stored)

        def one(row, slot):
            keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, row), slot), 6)
            drop = jax.random.uniform(keys[3]) < config.drop_prob if config.drop_prob else None
            drawn = queries.draw(keys[3], model.queries_shape) if queries.redrawn else None
            return Draws(decoder.draws(keys, shape), drop, drawn)

        every = jnp.arange(numbers.start, numbers.stop)
        return jax.vmap(lambda row: jax.vmap(lambda slot: one(row, slot))(every))(jnp.arange(rows))

    def loss(
        self, params: dict, batch: Batch, draws: tuple[Draws, ...], totals: Totals | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The joint loss.

        Args:
          params: the whole parameter tree.
          draws: as from `draws`.
          totals: of the global batch, where `batch` is a part of it: the parts' losses then add up to the batch's.

        Returns:
          The loss, and the unweighted `lm_loss` (mean negative log-likelihood in nats a token) and `dm_loss` (mean
          training error an image). Empty slots, padding and tokens of weight 0 contribute exactly nothing to loss and
          gradients.
        """
        config = self.config
        totals = self.totals(batch) if totals is None else totals
        hidden = self.hidden(params, batch, draws)
        lm_loss = dm_loss = jnp.zeros((), jnp.float32)
        if config.lm_weight:
            lm_loss = _mean(self.next_token_sum(params, hidden, batch), totals.tokens)
        if config.dm_weight and batch.dream:
            dm_loss = _mean(self.painting_sum(params, hidden, batch, draws), totals.images)
        loss = (config.lm_weight * lm_loss + config.dm_weight * dm_loss) / config.scale
        return loss, {"loss": loss, "lm_loss": lm_loss, "dm_loss": dm_loss}

    def hidden(self, params: dict, batch: Batch, draws: tuple[Draws, ...]) -> Float[Array, "B L E"]:
        """The language model's final hidden states for packed rows."""
        drawn = [one.queries for one in draws]
        return hidden_states(self.model, params, batch, self.config.image_chunk, drawn)

    def next_token_sum(self, params: dict, hidden: Float[Array, "B L E"], batch: Batch) -> Float[Array, ""]:
        """Sum of the weighted negative log-likelihoods of the batch's tokens."""
        head = self.model.bind({"params": params}).language_model.head_kernel()
        return next_token_loss(hidden, head, batch.tokens, batch.loss_weights, self.config.loss_chunk)

    def painting_sum(
        self, params: dict, hidden: Float[Array, "B L E"], batch: Batch, draws: tuple[Draws, ...]
    ) -> Float[Array, ""]:
        """Sum of the training errors of the batch's painted images."""
        total, null = jnp.zeros((), jnp.float32), None
        if any(drawn.drop is not None for drawn in draws):  # read once, for all groups
            null = self.model.bind({"params": params}).null_hidden(self.config.null_condition == "queries")
        for slots, drawn in zip(batch.dream, draws, strict=True):
            given = painted_from(self.model.config, hidden, batch.segment_ids, slots.at)
            condition = self.conditions(params, flat(given), null, flat(drawn.drop))
            total += painting_error(self.model, params, condition, slots, drawn.decoder, self.config.image_chunk)
        return total

    def conditions(
        self,
        params: dict,
        hidden: Float[Array, "N Q E"] | Hidden,
        null: Float[Array, "Q E"] | Hidden | None,
        drop: Bool[Array, " N"] | None,
    ) -> Condition:
        """What the image decoder is given for each image, from the hidden states at its queries; or the null condition.

        Args:
          null: the hidden states at the queries of the document without a prompt.
          drop: which images are painted from those.
        """
        if drop is not None:

            def chosen(null: Array, x: Array) -> Array:
                return jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), spread(null, x.shape, x.dtype), x)

            hidden = jax.tree.map(chosen, null, hidden)
        if self.config.detach_condition:
            hidden = jax.lax.stop_gradient(hidden)
        return self.model.bind({"params": params}).condition(hidden)


def _mean(total: Array, count: Array) -> Array:
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class HeldOutJoint:
    """The two losses as they are measured: nothing is dropped, perturbed or reweighted.

    Attributes:
      parts: equal ranges of time, each of which has its own painting error.
    """

    objective: Joint
    parts: int

    def sums(self, params: dict, batch: Batch, key: jax.Array) -> dict[str, Array]:
        """Sums over a batch, and what to divide them by.

        `lm` is the sum of weighted negative log-likelihoods, `tokens` that of the weights; `dm` has the sums of the
        images' errors by range of time, `images` is their number.
        """
        objective, decoder = self.objective, self.objective.model.config.image_decoder
        totals = objective.totals(batch)
        draws = objective.draws(key, batch)
        hidden = objective.hidden(params, batch, draws)
        lm = objective.next_token_sum(params, hidden, batch)
        found = {"lm": lm, "tokens": totals.tokens, "images": totals.images}
        if not batch.dream:
            return found

        def within(part: int) -> tuple[Draws, ...]:
            return tuple(one.replace(decoder=decoder.within(one.decoder, part, self.parts)) for one in draws)

        return found | {
            "dm": jnp.stack([objective.painting_sum(params, hidden, batch, within(i)) for i in range(self.parts)])
        }

    def means(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The losses by name, of the sums of all batches: `dm_loss_FIRST_LAST` by range of timesteps too."""
        means = {"lm_loss": float(sums["lm"] / sums["tokens"])} if sums["tokens"] else {}
        if not sums["images"]:
            return means
        of_parts = [float(total / sums["images"]) for total in sums["dm"]]
        decoder = self.objective.model.config.image_decoder
        ranges = (decoder.time_range(part, self.parts) for part in range(self.parts))
        named = {f"dm_loss_{a}_{b - 1}": value for (a, b), value in zip(ranges, of_parts, strict=True)}
        return means | {"dm_loss": sum(of_parts) / self.parts} | named
