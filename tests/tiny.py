"""A DreamLLM small enough to compile in seconds, random documents for it, and the batches they make.

Legend: B rows, L tokens in a row.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.data.batch import Batch, RowShape, SlotGroup, empty_batch
from dreamllm_jax.model import DreamLLMConfig, abstract_params
from dreamllm_jax.towers.autoencoders.dc import DCAutoencoderConfig
from dreamllm_jax.towers.autoencoders.kl import AutoencoderConfig
from dreamllm_jax.towers.autoencoders.unilip import UnilipAutoencoderConfig
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.image_decoders.sana import SanaConfig
from dreamllm_jax.towers.image_decoders.sana_transformer import SanaTransformerConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion import StableDiffusionConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion_xl import StableDiffusionXLConfig
from dreamllm_jax.towers.image_decoders.unet import UNetConfig
from dreamllm_jax.towers.language_models.decoder import Decoder
from dreamllm_jax.towers.language_models.llama import LlamaConfig
from dreamllm_jax.towers.vision_encoders.clip import ClipVisionConfig
from tests.parity import random_weights

SEE_SIZE, DREAM_SIZE = 16, 16
LENGTH, SEE_SLOTS, DREAM_SLOTS = 32, 2, 2


def logits_of(decoder: Decoder, tokens):
    """Logits of one plain document a row, i32[B, L] -> f32[B, L, V]; as the `method` of `init`, all its parameters."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder(decoder.embed(tokens), positions, jnp.ones_like(tokens))
    return decoder.logits(hidden)


DECODER = StableDiffusionConfig(
    autoencoder=AutoencoderConfig(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ),
    denoiser=UNetConfig(
        sample_size=DREAM_SIZE // 2,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
    ),
)

DECODER_XL = StableDiffusionXLConfig(
    autoencoder=DECODER.autoencoder,
    denoiser=dataclasses.replace(
        DECODER.denoiser,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
    ),
)


# Of 2 x 2 latents, as the vision encoder below has features.
DECODER_UNILIP = SanaConfig(
    SanaTransformerConfig(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=2,
    ),
    UnilipAutoencoderConfig(
        feature_width=32,
        blocks=1,
        decoder=DCAutoencoderConfig(
            latent_channels=4,
            attention_head_dim=8,
            **{
                f"{half}_{name}": value
                for half in ("encoder", "decoder")
                for name, value in (
                    ("block_types", ("ResBlock",) * 4),
                    ("block_out_channels", (8,) * 4),
                    ("layers_per_block", (1,) * 4),
                    ("qkv_multiscales", ((),) * 4),
                )
            },
            decoder_norm_types=("rms_norm",) * 4,
            decoder_act_fns=("silu",) * 4,
        ),
        downscale=8,
    ),
)


def tiny_config(**changes) -> DreamLLMConfig:
    """The configuration with some of its fields changed."""
    config = DreamLLMConfig(
        language_model=LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        ),
        vision_encoder=ClipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SEE_SIZE,
            patch_size=8,
        ),
        image_decoder=DECODER,
        num_queries=3,
        remat="none",
    )
    return dataclasses.replace(config, **changes)


MLP = ProjectorConfig(kind="mlp", depth=2, post_layernorm=True)


def tiny_params(config: DreamLLMConfig, seed: int = 0) -> dict:
    return random_weights(nn.unbox(abstract_params(config)), seed)


@dataclasses.dataclass(frozen=True)
class TinyDocument:
    """Tokens with weights; slots count from the document's start and have an image each."""

    tokens: np.ndarray
    weights: np.ndarray
    see: tuple[tuple[int, np.ndarray], ...] = ()
    dream: tuple[tuple[int, np.ndarray], ...] = ()


def random_document(rng: np.random.Generator, config: DreamLLMConfig, parts: str) -> TinyDocument:
    """A document of `parts`: t text, s an image to see, d an image to dream."""
    ids = config.special_tokens
    tokens, weights, see, dream = [ids.bos], [0.0], [], []

    def pixels(size: int) -> np.ndarray:
        return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)

    for part in parts:
        if part == "t":
            text = rng.integers(3, ids.pad, rng.integers(2, 5))
            tokens += [*text]
            weights += [*rng.choice([0.5, 1.0], len(text))]
        elif part == "s":
            tokens += [ids.im_start, *[ids.im_patch] * config.vision_encoder.num_patches, ids.im_end]
            weights += [0.0] * (config.vision_encoder.num_patches + 2)
            see.append((len(tokens) - config.vision_encoder.num_patches - 1, pixels(SEE_SIZE)))
        else:
            tokens += [ids.dream_start, *[ids.im_patch] * config.num_queries, ids.dream_end]
            weights += [1.0] + [0.0] * (config.num_queries + 1)
            dream.append((len(tokens) - config.num_queries - 1, pixels(DREAM_SIZE)))
    tokens, weights = [*tokens, ids.eos], [*weights, 1.0]
    return TinyDocument(np.array(tokens, np.int32), np.array(weights, np.float32), tuple(see), tuple(dream))


ROWS = (("tsd", "t"), ("dst",), ("t", "ts"), ("dtd",), ("sds",), ("ts", "d"), ("t",), ("d", "s", "t"))


def random_rows(config: DreamLLMConfig, seed: int = 0) -> list[list[TinyDocument]]:
    """Eight rows of one to three documents, some slots and tokens left empty."""
    rng = np.random.default_rng(seed)
    return [[random_document(rng, config, parts) for parts in row] for row in ROWS]


def row_shape(
    config: DreamLLMConfig, length: int = LENGTH, see_slots: int = SEE_SLOTS, dream_slots: int = DREAM_SLOTS
) -> RowShape:
    see = SlotGroup(see_slots, config.vision_encoder.num_patches, SEE_SIZE, SEE_SIZE) if see_slots else None
    sizes = config.image_decoder.wants_sizes
    dream = SlotGroup(dream_slots, config.num_queries, DREAM_SIZE, DREAM_SIZE, sizes=sizes) if dream_slots else None
    return RowShape(length, (see,) if see else (), (dream,) if dream else ())


def told_sizes(image: np.ndarray) -> np.ndarray:
    """Sizes that differ from one random image to another, f32[6]."""
    return image[0, :2].reshape(6).astype(np.float32)


def make_batch(
    config: DreamLLMConfig, rows: list[list[TinyDocument]], length: int = LENGTH, shape: RowShape | None = None
) -> Batch:
    """Packs the documents of each row one after the other."""
    shape = shape or row_shape(config, length)
    batch = empty_batch(len(rows), shape, config.special_tokens.pad)
    for b, row in enumerate(rows):
        start = k = d = 0
        for segment, document in enumerate(row, 1):
            where = slice(start, start + len(document.tokens))
            batch.tokens[b, where], batch.segment_ids[b, where] = document.tokens, segment
            batch.positions[b, where] = np.arange(len(document.tokens))
            batch.loss_weights[b, where] = document.weights
            for slot, image in document.see:
                batch.see[0].at[b, k], batch.see[0].images[b, k], k = start + slot, image, k + 1
            for slot, image in document.dream:
                batch.dream[0].at[b, d], batch.dream[0].images[b, d] = start + slot, image
                if batch.dream[0].sizes is not None:
                    batch.dream[0].sizes[b, d] = told_sizes(image)
                d += 1
            start += len(document.tokens)
    return batch
