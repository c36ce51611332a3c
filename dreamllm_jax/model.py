"""DreamLLM (arXiv 2309.11499): a causal language model that reads images and conditions a diffusion model.

Legend: B rows, L tokens in a row, K see slots, D dream slots, N images, P patches, Q dream queries, E llama width,
V vocabulary, F width of CLIP's features, C condition width, h x w x c latents.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from dreamllm_jax.data.vocabulary import NULL_SLOT, SpecialTokens
from dreamllm_jax.diffusion.schedule import ScheduleConfig
from dreamllm_jax.layers import remat
from dreamllm_jax.layers.linear import spread
from dreamllm_jax.layers.weights import Weight
from dreamllm_jax.parallel.mesh import constrain
from dreamllm_jax.towers.autoencoders.kl import Autoencoder, AutoencoderConfig
from dreamllm_jax.towers.autoencoders.pixel import PixelAutoencoder, PixelAutoencoderConfig
from dreamllm_jax.towers.connectors.projector import DreamQueries, Projector, ProjectorConfig
from dreamllm_jax.towers.image_decoders.unet import UNet, UNetConfig
from dreamllm_jax.towers.language_models.llama import KVCache, Llama, LlamaConfig
from dreamllm_jax.towers.vision_encoders.clip import ClipVision, ClipVisionConfig, normalise_pixels


@dataclasses.dataclass(frozen=True)
class DreamLLMConfig:
    """The towers' shapes and how they are joined.

    Attributes:
      num_queries: dream queries an image is painted from.
      special_tokens: ids; None for the last eight of the vocabulary.
      dtype: what the towers compute in; parameters are stored as the training configuration says.
      remat: what the llama's layers keep for their backward pass: "none" (everything), "dots", "full" (nothing),
        "offload", or names (see `models.remat`).
    """

    llama: LlamaConfig
    clip: ClipVisionConfig
    vae: AutoencoderConfig | PixelAutoencoderConfig
    unet: UNetConfig
    visual_projector: ProjectorConfig = ProjectorConfig()
    condition_projector: ProjectorConfig = ProjectorConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    num_queries: int = 64
    special_tokens: SpecialTokens | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str = "full"

    def __post_init__(self):
        remat.check(self.remat)
        if self.num_queries < 1:
            raise ValueError(f"num_queries must be positive, got {self.num_queries}")
        for name, tokens in (("visual", self.clip.num_patches), ("condition", self.num_queries)):
            if getattr(self, f"{name}_projector").kind == "conv" and math.isqrt(tokens) ** 2 != tokens:
                raise ValueError(f"{name}_projector: a conv projector needs a square number of tokens, got {tokens}")
        if self.unet.in_channels != self.vae.latent_channels:
            raise ValueError(
                f"unet.in_channels is {self.unet.in_channels}, but the autoencoder's latents have "
                f"{self.vae.latent_channels} channels"
            )
        if self.special_tokens is None:
            object.__setattr__(self, "special_tokens", SpecialTokens.last_of(self.llama.vocab_size))

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(h, w, c) of the latents of an image of so many pixels; a square one if no width is given."""
        return height // self.vae.downscale, (width or height) // self.vae.downscale, self.vae.latent_channels


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


class DreamLLM(nn.Module):
    """All parameters of the model, under `llama, clip, visual_projector, queries, condition_projector, vae, unet`."""

    config: DreamLLMConfig

    def setup(self):
        config = self.config
        dtype = jnp.dtype(config.dtype)
        towers_remat = "none" if config.remat == "none" else "full"
        self.llama = Llama(config.llama, dtype=dtype, remat=config.remat)
        self.clip = ClipVision(config.clip, dtype=dtype, remat=towers_remat)
        self.visual_projector = Projector(config.visual_projector, config.llama.hidden_size, use_bias=True, dtype=dtype)
        self.queries = DreamQueries(config.num_queries, config.llama.hidden_size)
        self.condition_projector = Projector(
            config.condition_projector, config.unet.cross_attention_dim, use_bias=False, dtype=dtype
        )
        pixel = isinstance(config.vae, PixelAutoencoderConfig)
        self.vae = (PixelAutoencoder if pixel else Autoencoder)(config.vae, dtype=dtype)
        self.unet = UNet(config.unet, dtype=dtype)

    def see(self, images: UInt8[Array, "N H W 3"] | Float[Array, "N H W 3"]) -> Float[Array, "N P E"]:
        """What the llama is given for an image: CLIP features through the visual projector."""
        return self.visual_projector(self.features(images))

    def features(self, images: UInt8[Array, "N H W 3"] | Float[Array, "N H W 3"]) -> Float[Array, "N P F"]:
        """CLIP's features of the images' patches."""
        if images.dtype == jnp.uint8:
            images = normalise_pixels(images, self.config.clip.image_mean, self.config.clip.image_std)
        return self.clip(constrain(images, ("images", None, None, None)))

    def project(self, features: Float[Array, "N P F"]) -> Float[Array, "N P E"]:
        """CLIP features, perhaps stored ones -> what the llama is given."""
        features = features.astype(jnp.dtype(self.config.dtype))
        return self.visual_projector(constrain(features, ("images", None, None)))

    def embed(
        self,
        tokens: Int[Array, "B L"],
        see_features: Float[Array, "B K P E"] | None = None,
        see_slots: Int[Array, "B K"] | None = None,
        dream_slots: Int[Array, "B D"] | None = None,
    ) -> Float[Array, "B L E"]:
        """Token embeddings with image features and dream queries spliced in at their slots."""
        x = self.llama.embed(tokens)
        if see_features is not None:
            x = splice(x, see_features, see_slots)
        if dream_slots is not None and dream_slots.shape[1]:
            queries = self.queries()
            x = splice(x, spread(queries, (*dream_slots.shape, *queries.shape), x.dtype), dream_slots)
        return constrain(x, ("rows", "tokens", "act_embed"))

    def decode(
        self,
        embeddings: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T E"], KVCache | None]:
        """The llama's hidden states after its final norm."""
        return self.llama(embeddings, positions, segment_ids, cache)

    def logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        return self.llama.logits(hidden)

    def head_kernel(self) -> Float[Array, "E V"]:
        return self.llama.head_kernel()

    def null_hidden(self, with_queries: bool = True) -> Float[Array, "Q E"]:
        """Hidden states at the queries of the document without a prompt, for classifier-free guidance.

        Args:
          with_queries: feed the dream queries; without them their positions keep the embedding of `<im_patch>`, as in
            the original's training code.
        """
        tokens = jnp.asarray([self.config.special_tokens.null_document(self.config.num_queries)], jnp.int32)
        slots = jnp.full((1, 1), NULL_SLOT) if with_queries else None
        x = self.embed(tokens, dream_slots=slots)
        positions = jnp.arange(tokens.shape[1])[None]
        hidden, _ = self.decode(x, positions, jnp.ones_like(tokens))
        return hidden[0, NULL_SLOT : NULL_SLOT + self.config.num_queries]

    def condition(self, hidden: Float[Array, "N Q E"]) -> Float[Array, "N Q C"]:
        """Hidden states at the queries -> what the UNet attends to."""
        return self.condition_projector(constrain(hidden, ("images", None, None)))

    def moments(self, images: UInt8[Array, "N H W 3"] | Float[Array, "N H W 3"]) -> Float[Array, "N h w 2c"]:
        """Mean and log-variance of the images' latents, before scaling."""
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 127.5 - 1.0
        return self.vae.encode(constrain(images, ("images", None, None, None)))

    def denoise(
        self, latents: Float[Array, "N h w c"], timesteps: Int[Array, " N"], condition: Float[Array, "N Q C"]
    ) -> Float[Array, "N h w c"]:
        """The UNet's prediction (noise or velocity) for scaled noisy latents."""
        latents = constrain(latents, ("images", None, None, None))
        return self.unet(latents, timesteps, condition).astype(jnp.float32)

    def paint(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N H W 3"]:
        """Scaled latents -> pixels in [-1, 1]."""
        return self.vae.decode(latents / self.config.vae.scaling_factor)

    def __call__(self) -> None:
        """Touches every parameter once, on the smallest inputs: for `init`."""
        config = self.config
        size = config.clip.image_size
        features = self.see(jnp.zeros((1, size, size, 3), jnp.uint8))[None]
        length = max(config.clip.num_patches, config.num_queries)
        tokens, slots = jnp.zeros((1, length), jnp.int32), jnp.zeros((1, 1), jnp.int32)
        x = self.embed(tokens, features, slots, slots)
        hidden, _ = self.decode(x, jnp.arange(length)[None], jnp.ones_like(tokens))
        self.logits(hidden)
        side = 2 ** (len(config.unet.block_out_channels) - 1)
        moments = self.moments(jnp.zeros((1, side * config.vae.downscale, side * config.vae.downscale, 3), jnp.uint8))
        latents = moments[..., : config.vae.latent_channels]
        self.denoise(latents, jnp.zeros(1, jnp.int32), self.condition(hidden[:, : config.num_queries]))
        self.paint(latents)


@functools.cache
def abstract_params(config: DreamLLMConfig) -> dict:
    """The parameter tree's shapes (`models.weights.Weight`), nothing computed."""
    return dict(jax.eval_shape(DreamLLM(config).init, jax.random.key(0))["params"])


def axes_of(config: DreamLLMConfig, names: Sequence[str]) -> dict:
    """The logical axes of the parameters of towers, in the same tree."""
    boxed = {"is_leaf": lambda x: isinstance(x, Weight)}
    return jax.tree.map(lambda weight: weight.names, {name: abstract_params(config)[name] for name in names}, **boxed)
