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

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.diffusion import schedule
from dreamllm_jax.layers.linear import cast_early, spread
from dreamllm_jax.model import DreamLLM, axes_of, take
from dreamllm_jax.parallel import chunks
from dreamllm_jax.parallel.collectives import copied, on_devices
from dreamllm_jax.parallel.mesh import constrain, shards, split_over
from dreamllm_jax.towers.autoencoders.kl import sample_moments


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
      snr_velocity: their formula for velocity prediction (`schedule.min_snr_weights`): the "original" program's, so
        that published settings give published numbers, or the "paper"'s.
      detach_condition: no denoising gradient reaches the llama and the queries. The original does this wherever its
        condition projector is frozen; here freezing concerns weights only.
      loss_chunk: at most how many tokens of each row have logits at a time; 0 for all.
      image_chunk: at most how many images each device puts through CLIP, the autoencoder and the UNet at a time; 0 for
        all, which on CPU is several times faster.
    """

    lm_weight: float = 1.0
    dm_weight: float = 10.0
    scaling: Literal["none", "l1_norm", "l2_norm"] = "none"
    drop_prob: float = 0.0
    null_condition: Literal["queries", "original"] = "queries"
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    snr_gamma: float | None = None
    snr_velocity: schedule.VelocityWeights = "original"
    detach_condition: bool = False
    loss_chunk: int = 256
    image_chunk: int = 8

    def __post_init__(self):
        for name in ("lm_weight", "dm_weight", "noise_offset", "input_perturbation", "loss_chunk", "image_chunk"):
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
    hidden: Float[Array, "B L E"], head: Float[Array, "E V"], targets: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """-log p(targets) given the hidden states, in float32."""
    logits = jnp.einsum("ble,ev->blv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    # A sum, not a gather: its gradient is an elementwise operation.
    chosen = jnp.arange(head.shape[1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def next_token_loss(
    hidden: Float[Array, "B L E"],
    head: Float[Array, "E V"],
    tokens: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    chunk: int = 0,
) -> Float[Array, ""]:
    """Sum over tokens of weight · -log p(token given the hidden state before it).

    In chunks, no logits of all tokens ever exist, and none of chunks whose tokens have no weight.

    Args:
      weights: of predicting `tokens[:, i]`; those of a row's first token count for nothing.
      chunk: at most how many tokens of each row (of each device's part of it) are computed at a time; 0 for all.
    """

    def total(head, items):
        hidden, targets, weights = items
        nll = next_token_nll(hidden, head, targets)
        return jnp.sum(jnp.where(weights > 0, nll * weights, 0.0))

    parts = shards("tokens", tokens.shape[1])

    def by_part(x):  # [B, L, ...] -> [B · parts, L / parts, ...]: what one device holds of a row stays there
        x = x.reshape(-1, x.shape[1] // parts, *x.shape[2:])
        return constrain(x, ("row_parts", *[None] * (x.ndim - 1)))

    weights = jnp.roll(weights, -1, axis=1).at[:, -1].set(0.0)  # nothing precedes a row's first token
    items = jax.tree.map(by_part, (hidden, jnp.roll(tokens, -1, axis=1), weights))
    number = chunks.count(tokens.shape[1] // parts, chunk)
    over = split_over("row_parts", tokens.shape[0] * parts)
    return chunks.chunked_sum(
        total, head.astype(hidden.dtype), items, items[-1] > 0, number, axes=("embed", "vocab"), over=over
    )


@struct.dataclass
class Prediction:
    """What `denoise` compared, for one image each."""

    latents: Float[Array, "N h w c"]
    noisy_latents: Float[Array, "N h w c"]
    prediction: Float[Array, "N h w c"]
    target: Float[Array, "N h w c"]
    error: Float[Array, " N"]


def conditions(
    model: DreamLLM,
    config: ObjectiveConfig,
    params: dict,
    hidden: Float[Array, "N Q E"],
    drop: Bool[Array, " N"] | None,
) -> Float[Array, "N Q C"]:
    """What the UNet is given for each image: the projected hidden states at its queries, or the null condition's.

    Args:
      hidden: the llama's final hidden states at the image's queries.
      drop: which images get the null condition.
    """
    apply = functools.partial(model.apply, {"params": params})
    if drop is not None:
        null = apply(config.null_condition == "queries", method="null_hidden")
        hidden = jnp.where(drop[:, None, None], spread(null, hidden.shape, hidden.dtype), hidden)
    if config.detach_condition:
        hidden = jax.lax.stop_gradient(hidden)
    return apply(hidden, method="condition")


def denoise(
    model: DreamLLM,
    config: ObjectiveConfig,
    params: dict,
    condition: Float[Array, "N Q C"],
    moments: Float[Array, "N h w 2c"],
    draws: Draws,
) -> Prediction:
    """The denoising error of each image under its condition (DreamLLM, eq. 5), weighted by min-SNR if configured.

    Args:
      moments: the autoencoder's output for the image.
      draws: with the leading axes (B, D) flattened to N.
    """
    apply = functools.partial(model.apply, {"params": params})
    alphas = schedule.alphas_cumprod(model.config.schedule)
    prediction_type = model.config.schedule.prediction_type

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
        weights = schedule.min_snr_weights(
            alphas, draws.timesteps, config.snr_gamma, prediction_type, config.snr_velocity
        )
        error = error * weights
    return Prediction(latents, noisy, prediction, target, error)


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


def hidden_states(model: DreamLLM, params: dict, batch: Batch, image_chunk: int = 0) -> Float[Array, "B L E"]:
    """The llama's final hidden states for packed rows, images and queries spliced in."""
    apply = functools.partial(model.apply, {"params": params})
    features = None
    if batch.see_slots.shape[1]:
        method, images = ("see", batch.see_images) if batch.see_features is None else ("project", batch.see_features)
        features = _features(model, params, method, images, image_chunk)
    x = apply(batch.tokens, features, batch.see_slots, batch.dream_slots, method="embed")
    return apply(x, batch.positions, batch.segment_ids, method="decode")[0]


def _features(model: DreamLLM, params: dict, method: str, images: Array, chunk: int) -> Array:
    """What `method` makes of images [B, S, ...], at most `chunk` of each device's at a time."""
    names, over = ("clip", "visual_projector"), split_over("images", images.shape[0] * images.shape[1])
    towers = cast_early({name: params[name] for name in names}, model.config.dtype)
    towers = jax.tree.map(lambda x, axes: copied(x, axes, over), towers, axes_of(model.config, names))
    types = jax.tree.map(lambda x: x.dtype, towers)

    def on_device(towers, parts):
        # Their gradients are added up over the chunks: in float32.
        wide = jax.tree.map(lambda x: x[0].astype(jnp.float32), towers)

        def features(part):
            given = {"params": jax.tree.map(lambda x, dtype: x.astype(dtype), wide, types)}
            return _regroup(model.apply(given, _flat(part), method=method), len(part))

        return jax.lax.map(features, parts)

    items = _by_device(images)
    parts = chunks.split(items, chunks.count(items.shape[1], chunk))
    features = chunks.join(on_devices(on_device, over, (0, 1), 1)(towers, parts))
    return features.reshape(*images.shape[:2], *features.shape[2:])


def denoising_loss(
    model: DreamLLM, config: ObjectiveConfig, params: dict, hidden: Float[Array, "B L E"], batch: Batch, draws: Draws
) -> Float[Array, ""]:
    """Sum of the filled dream slots' denoising errors, `config.image_chunk` images of each device at a time."""
    queries = take(hidden, batch.dream_slots, model.config.num_queries)
    condition = conditions(model, config, params, _flat(queries), _flat(draws.drop))
    pictures = batch.dream_images if batch.dream_moments is None else batch.dream_moments
    filled = batch.dream_slots >= 0

    def total(towers, items):
        condition, pictures, draws, filled = jax.tree.map(_flat, items)
        moments = pictures
        if batch.dream_moments is None:
            moments = model.apply({"params": towers}, pictures, method="moments")
        error = denoise(model, config, towers, condition, moments, draws).error
        return jnp.sum(jnp.where(filled, error, 0.0))

    names = [name for name in ("vae", "unet") if name in params]
    towers = cast_early({name: params[name] for name in names}, model.config.dtype)
    condition = condition.reshape(*filled.shape, *condition.shape[1:])
    items = jax.tree.map(_by_device, (condition, pictures, draws, filled))
    number = chunks.count(items[-1].shape[1], config.image_chunk)
    over = split_over("images", filled.size)
    return chunks.chunked_sum(total, towers, items, items[-1], number, axes=axes_of(model.config, names), over=over)


def _flat(tree):
    """[a, b, ...] -> [a · b, ...] in every leaf."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _regroup(x: Array, groups: int) -> Array:
    return x.reshape(groups, -1, *x.shape[1:])


def _by_device(x: Array) -> Array:
    """Images [B, S, ...] -> [devices, images of each, ...]."""
    devices = shards("images", x.shape[0] * x.shape[1])
    return constrain(_regroup(_flat(x), devices), ("images", *[None] * (x.ndim - 1)))


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
    hidden = hidden_states(model, params, batch, config.image_chunk)
    lm_loss = dm_loss = jnp.zeros((), jnp.float32)
    if config.lm_weight:
        head = model.apply({"params": params}, method="head_kernel")
        lm_loss = _mean(
            next_token_loss(hidden, head, batch.tokens, batch.loss_weights, config.loss_chunk), totals.tokens
        )
    if config.dm_weight and batch.dream_slots.shape[1]:
        dm_loss = _mean(denoising_loss(model, config, params, hidden, batch, draws), totals.images)
    loss = (config.lm_weight * lm_loss + config.dm_weight * dm_loss) / config.scale
    return loss, {"loss": loss, "lm_loss": lm_loss, "dm_loss": dm_loss}
