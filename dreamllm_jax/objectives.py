"""The training objective: next-token cross-entropy and score distillation, as pure functions.

Every random number is an argument (`Draws`), so that a loss is a function of parameters, batch and draws alone.

Legend: B rows, L tokens in a row, K see slots, D dream slots, N images, Q dream queries, E llama width, V vocabulary,
h x w x c latents.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dreamllm_jax.batch import Batch
from dreamllm_jax.diffusion import schedule
from dreamllm_jax.models.dreamllm import DreamLLM, take
from dreamllm_jax.models.vae import sample_moments


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised: `(lm_weight · cross_entropy + dm_weight · denoising_error) / scale`.

    Attributes:
      lm_weight, dm_weight: the two losses' weights; a part of weight 0 is not computed.
      scaling: scale is 1 ("none"), the weights' sum ("l1_norm") or the root of their squares' sum ("l2_norm").
      drop_prob: share of images whose condition is replaced by the null condition (classifier-free guidance).
      null_condition: run the document without a prompt with the dream queries ("queries"), or with plain `<im_patch>`
        embeddings in their place, as the original's training code does ("original").
      noise_offset: strength of the noise added to whole channels, 0 for none.
      input_perturbation: strength of the noise added to the UNet's input but not to its target (Ning et al. 2023).
      snr_gamma: gamma of the min-SNR weights (Hang et al. 2023), None for plain means.
      detach_condition: no denoising gradient reaches the llama and the queries. The original does this wherever its
        condition projector is frozen; here freezing concerns weights only.
      loss_chunk: tokens of each row whose logits exist at a time; 0 for all. It must divide the row's length.
    """

    lm_weight: float = 1.0
    dm_weight: float = 10.0
    scaling: Literal["none", "l1_norm", "l2_norm"] = "none"
    drop_prob: float = 0.0
    null_condition: Literal["queries", "original"] = "queries"
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    snr_gamma: float | None = None
    detach_condition: bool = False
    loss_chunk: int = 0

    def __post_init__(self):
        for name in ("lm_weight", "dm_weight", "noise_offset", "input_perturbation", "loss_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0.0 <= self.drop_prob <= 1.0:
            raise ValueError(f"drop_prob must lie in [0, 1], got {self.drop_prob}")
        if self.lm_weight == self.dm_weight == 0:
            raise ValueError("lm_weight and dm_weight are both 0: there is nothing to learn")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be positive, got {self.snr_gamma}")

    @property
    def scale(self) -> float:
        if self.scaling == "none":
            return 1.0
        return (
            self.lm_weight + self.dm_weight if self.scaling == "l1_norm" else math.hypot(self.lm_weight, self.dm_weight)
        )


@struct.dataclass
class Draws:
    """All randomness of one loss, for every dream slot. Options that are off have None."""

    posterior_noise: Float[Array, "B D h w c"]
    noise: Float[Array, "B D h w c"]
    timesteps: Int[Array, "B D"]
    drop: Bool[Array, "B D"] | None = None
    offset_noise: Float[Array, "B D 1 1 c"] | None = None
    perturbation: Float[Array, "B D h w c"] | None = None


def draw(
    key: jax.Array,
    rows: int,
    slots: int,
    latent_shape: tuple[int, int, int],
    num_timesteps: int,
    config: ObjectiveConfig,
) -> Draws:
    """Samples `Draws`, each number a function of (key, row, slot) alone.

    Args:
      key: typed key of the step.
      rows, slots: B and D of the global batch.
      latent_shape: (h, w, c).
      num_timesteps: timesteps are drawn uniformly from 0 to this, exclusive.
    """
    channels = latent_shape[-1]

    def one(row, slot):
        k = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, row), slot), 6)
        return Draws(
            posterior_noise=jax.random.normal(k[0], latent_shape),
            noise=jax.random.normal(k[1], latent_shape),
            timesteps=jax.random.randint(k[2], (), 0, num_timesteps),
            drop=jax.random.uniform(k[3]) < config.drop_prob if config.drop_prob else None,
            offset_noise=jax.random.normal(k[4], (1, 1, channels)) if config.noise_offset else None,
            perturbation=jax.random.normal(k[5], latent_shape) if config.input_perturbation else None,
        )

    return jax.vmap(lambda row: jax.vmap(lambda slot: one(row, slot))(jnp.arange(slots)))(jnp.arange(rows))


def next_token_nll(
    hidden: Float[Array, "B L E"], head: Float[Array, "E V"], tokens: Int[Array, "B L"], chunk: int = 0
) -> Float[Array, "B L"]:
    """-log p(tokens[:, i]) given the hidden state at i - 1, in float32; 0 at i = 0.

    Args:
      chunk: how many positions' logits exist at a time (forward and backward); 0 for all.

    Raises:
      ValueError: if `chunk` does not divide L.
    """
    rows, length, _ = hidden.shape
    targets = jnp.roll(tokens, -1, axis=1)

    def nll(hidden, targets):
        logits = jnp.einsum("ble,ev->blv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    if chunk and length % chunk:
        raise ValueError(f"objective.loss_chunk={chunk} does not divide the row length {length}")
    if chunk in (0, length):
        losses = nll(hidden, targets)
    else:

        def split(x):  # [B, L, ...] -> [chunks, B, chunk, ...]
            return jnp.moveaxis(x.reshape(rows, length // chunk, chunk, *x.shape[2:]), 1, 0)

        losses = jax.lax.map(lambda xs: jax.checkpoint(nll)(*xs), (split(hidden), split(targets)))
        losses = jnp.moveaxis(losses, 0, 1).reshape(rows, length)
    return jnp.roll(losses, 1, axis=1).at[:, 0].set(0.0)


@struct.dataclass
class Prediction:
    """What `denoise` compared, for one image each."""

    condition: Float[Array, "N Q C"]
    latents: Float[Array, "N h w c"]
    noisy_latents: Float[Array, "N h w c"]
    prediction: Float[Array, "N h w c"]
    target: Float[Array, "N h w c"]
    error: Float[Array, "N"]


def denoise(
    model: DreamLLM,
    config: ObjectiveConfig,
    params: dict,
    hidden: Float[Array, "N Q E"],
    moments: Float[Array, "N h w 2c"],
    draws: Draws,
) -> Prediction:
    """The denoising error of each image under its condition (DreamLLM, eq. 5), weighted by min-SNR if configured.

    Args:
      hidden: the llama's final hidden states at the image's queries.
      moments: the autoencoder's output for the image.
      draws: with the leading axes (B, D) flattened to N.
    """
    apply = functools.partial(model.apply, {"params": params})
    alphas = schedule.alphas_cumprod(model.config.schedule)
    prediction_type = model.config.schedule.prediction_type

    if draws.drop is not None:
        null = apply(config.null_condition == "queries", method="null_hidden")
        hidden = jnp.where(draws.drop[:, None, None], null.astype(hidden.dtype), hidden)
    if config.detach_condition:
        hidden = jax.lax.stop_gradient(hidden)
    condition = apply(hidden, method="condition")

    latents = sample_moments(moments, draws.posterior_noise) * model.config.vae.scaling_factor
    noise = draws.noise
    if draws.offset_noise is not None:
        noise = noise + config.noise_offset * draws.offset_noise
    given = noise
    if draws.perturbation is not None:
        given = noise + config.input_perturbation * draws.perturbation
    noisy = schedule.add_noise(alphas, latents, given, draws.timesteps)
    if prediction_type == "epsilon":
        target = noise
    else:
        target = schedule.velocity(alphas, latents, noise, draws.timesteps)

    prediction = apply(noisy, draws.timesteps, condition, method="denoise")
    error = jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3))
    if config.snr_gamma is not None:
        error = error * schedule.min_snr_weights(alphas, draws.timesteps, config.snr_gamma, prediction_type)
    return Prediction(condition, latents, noisy, prediction, target, error)


@struct.dataclass
class Totals:
    """The two losses' denominators over the global batch: weights of learned tokens, and filled dream slots."""

    tokens: Float[Array, ""]
    images: Float[Array, ""]

    @classmethod
    def of(cls, batch: Batch) -> "Totals":
        return cls(jnp.sum(batch.loss_weights), jnp.sum(batch.dream_slots >= 0).astype(jnp.float32))


def _mean(total: Array, count: Array) -> Array:
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def hidden_states(model: DreamLLM, params: dict, batch: Batch) -> Float[Array, "B L E"]:
    """The llama's final hidden states for packed rows, images and queries spliced in."""
    apply = functools.partial(model.apply, {"params": params})
    rows, see, dream = batch.tokens.shape[0], batch.see_slots.shape[1], batch.dream_slots.shape[1]
    features = None
    if see:
        features = apply(batch.see_images.reshape(-1, *batch.see_images.shape[2:]), method="see")
        features = features.reshape(rows, see, *features.shape[1:])
    x = apply(batch.tokens, features, batch.see_slots, batch.dream_slots if dream else None, method="embed")
    return apply(x, batch.positions, batch.segment_ids, method="decode")[0]


def joint_loss(
    model: DreamLLM,
    config: ObjectiveConfig,
    params: dict,
    batch: Batch,
    draws: Draws | None,
    totals: Totals | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """DreamLLM's joint objective (arXiv 2309.11499, eq. 6).

    Args:
      params: the whole parameter tree.
      draws: for the batch's dream slots; None if it has none.
      totals: of the global batch, where `batch` is a part of it: the parts' losses then add up to the batch's.

    Returns:
      The loss, and the unweighted `lm_loss` (mean negative log-likelihood in nats a token) and `dm_loss` (mean squared
      error an image). Empty slots, padding and tokens of weight 0 contribute exactly nothing to loss and gradients.
    """
    totals = Totals.of(batch) if totals is None else totals
    hidden = hidden_states(model, params, batch)
    lm_loss = dm_loss = jnp.zeros((), jnp.float32)

    if config.lm_weight:
        head = model.apply({"params": params}, method="head_kernel")
        nll = next_token_nll(hidden, head, batch.tokens, config.loss_chunk)
        lm_loss = _mean(jnp.sum(jnp.where(batch.loss_weights > 0, nll * batch.loss_weights, 0.0)), totals.tokens)

    if config.dm_weight and batch.dream_slots.shape[1]:
        flat = functools.partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
        moments = flat(batch.dream_moments)
        if moments is None:
            moments = model.apply({"params": params}, flat(batch.dream_images), method="moments")
        queries = flat(take(hidden, batch.dream_slots, model.config.num_queries))
        error = denoise(model, config, params, queries, moments, flat(draws)).error
        dm_loss = _mean(jnp.sum(jnp.where(flat(batch.dream_slots) >= 0, error, 0.0)), totals.images)

    loss = (config.lm_weight * lm_loss + config.dm_weight * dm_loss) / config.scale
    return loss, {"loss": loss, "lm_loss": lm_loss, "dm_loss": dm_loss}
