"""What a connector and an image decoder can ask for: the prompt's hidden states, and the vision encoder's features."""

import dataclasses
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.data.batch import Slots
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.generation.images import paint
from dreamllm_jax.generation.text import read_image, read_prompts, read_queries
from dreamllm_jax.layers.blocks import Dense
from dreamllm_jax.model import DreamLLM, painted_from
from dreamllm_jax.objectives.images import hidden_states
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.towers.autoencoders.kl import AutoencoderConfig
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion import StableDiffusion, StableDiffusionConfig
from dreamllm_jax.training.step import loss_and_gradients
from tests.tiny import DECODER, make_batch, random_document, random_rows, tiny_config, tiny_params


@dataclasses.dataclass(frozen=True)
class PromptedConfig(ProjectorConfig):
    """Linear maps of the hidden states at the queries and of the prompt's, one after the other (as UniLIP has them)."""

    prompt_tokens: ClassVar[int] = 5
    sees: ClassVar[bool] = True

    def condition_tokens(self, tokens):
        return tokens + self.prompt_tokens

    def make_connector(self, features, pooled, dtype, remat, **names):
        return PromptedConnector(features, **names)


class PromptedConnector(nn.Module):
    features: int

    @nn.compact
    def __call__(self, hidden):
        queries = Dense(self.features, name="queries")(hidden.queries)
        prompt = Dense(self.features, name="prompt")(hidden.prompt) * hidden.mask[..., None]
        return Condition(jnp.concatenate([queries, prompt], axis=1))


@dataclasses.dataclass(frozen=True)
class FeatureDecoderConfig(StableDiffusionConfig):
    """Latents are the vision encoder's features, as UniLIP's are."""

    encodes_features: ClassVar[str] = "vision_encoder"

    def make(self, dtype):
        return FeatureDecoder(self, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class ProjectedDecoderConfig(FeatureDecoderConfig):
    """Latents are the first channels of what the language model is given."""

    encodes_features: ClassVar[str] = "visual_projector"


class FeatureDecoder(StableDiffusion):
    def encode(self, images, draws, stored=False, features=None):
        side = math.isqrt(features.shape[1])
        return features.reshape(len(features), side, side, -1)[..., :16].astype(jnp.float32)


def decoder(cls=FeatureDecoderConfig):
    """Of 2 x 2 latents of 16 channels, as the tiny vision encoder's features are."""
    unet = dataclasses.replace(DECODER.denoiser, in_channels=16, out_channels=16, sample_size=2)
    levels = 4
    autoencoder = AutoencoderConfig(
        latent_channels=16,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return cls(unet, autoencoder)


CONFIG = tiny_config(image_decoder=decoder(), connector=PromptedConfig())
MODEL = DreamLLM(CONFIG)
PARAMS = tiny_params(CONFIG)


@pytest.mark.parametrize("cls", [FeatureDecoderConfig, ProjectedDecoderConfig])
def test_a_step_learns_from_both(cls):
    model = DreamLLM(dataclasses.replace(CONFIG, image_decoder=decoder(cls)))
    objective = JointConfig(lm_weight=0.0, drop_prob=0.4, image_chunk=2).make(model)
    batch, leaves = make_batch(CONFIG, random_rows(CONFIG)), flatten_dict(PARAMS, sep="/")
    step = jax.jit(lambda leaves, batch, draws: loss_and_gradients(objective, leaves, {}, batch, draws))
    draws = objective.draws(jax.random.key(1), batch)
    _, gradients = step(leaves, batch, draws)
    for name in ("queries", "prompt"):
        assert np.abs(gradients[f"connector/{name}/kernel"]).max() > 0
    # The targets move with the towers, but no gradient goes back through them: images that are seen alone give it one.
    unseen = batch.replace(see=tuple(Slots(np.full_like(s.at, -1), s.images) for s in batch.see))
    alone, gradients = step(leaves, unseen, draws)
    for tower in ("vision_encoder", "visual_projector"):
        moved = {path: x * 1.1 if path.startswith(f"{tower}/") else x for path, x in leaves.items()}
        depends = tower in ("vision_encoder", cls.encodes_features)
        assert (step(moved, unseen, draws)[0]["dm_loss"] != alone["dm_loss"]) == depends
        assert all(not g.any() for path, g in gradients.items() if path.startswith(f"{tower}/"))


def test_in_place_of_hidden_states_stands_what_was_given_of_images():
    batch, blind = make_batch(CONFIG, random_rows(CONFIG)), dataclasses.replace(CONFIG, connector=ProjectorConfig())
    (slots,), hidden = batch.see, hidden_states(MODEL, PARAMS, batch)
    row, slot = np.argwhere(slots.filled)[0]
    at = slice(start := int(slots.at[row, slot]), start + CONFIG.vision_encoder.num_patches)
    given = MODEL.bind({"params": PARAMS}).see(slots.images[row, slot][None])[0]
    np.testing.assert_allclose(hidden[row, at], given, rtol=1e-4, atol=1e-5)
    objectives = (JointConfig(dm_weight=0.0).make(DreamLLM(config)) for config in (CONFIG, blind))
    seeing, other = (objective.loss(PARAMS, batch, ())[0] for objective in objectives)
    np.testing.assert_allclose(seeing, other, rtol=1e-6)  # no token that is learned depends on it


def test_generation_gives_what_training_gives():
    rng = np.random.default_rng(4)
    for parts in ("td", "tttd", "tsd", "std"):
        whole = make_batch(CONFIG, [[random_document(rng, CONFIG, parts)]])
        hidden, slot = hidden_states(MODEL, PARAMS, whole), int(whole.dream[0].at[0, 0])
        want = painted_from(CONFIG, hidden, whole.segment_ids, whole.dream[0].at[:, :1])
        for announced in (False, True):
            names = ("tokens", "segment_ids", "positions", "loss_weights")
            cut = {name: getattr(whole, name)[:, : slot - 1 + announced] for name in names}
            reading = read_prompts(MODEL, PARAMS, whole.replace(**cut, dream=()), 64)
            got, _ = read_queries(MODEL, PARAMS, reading, announced)
            np.testing.assert_array_equal(got.mask, want.mask[:, 0])
            np.testing.assert_allclose(got.queries, want.queries[:, 0], rtol=1e-4, atol=1e-5)
            there = np.asarray(got.mask)[..., None]
            np.testing.assert_allclose(got.prompt * there, want.prompt[:, 0] * there, rtol=1e-4, atol=1e-5)
    images = paint(MODEL, PARAMS, got, np.array([1]), size=16, sampler=SamplerConfig(steps=2), guidance=2.0)
    assert images.shape == (1, 16, 16, 3) and np.asarray(images).std() > 0


def test_an_image_that_is_read_later_is_given_alike():
    whole = make_batch(CONFIG, [[random_document(np.random.default_rng(5), CONFIG, "tsd")]])
    names, before = ("tokens", "segment_ids", "positions", "loss_weights"), int(whole.see[0].at[0, 0]) - 1
    cut = {name: getattr(whole, name)[:, :before] for name in names}
    reading = read_prompts(MODEL, PARAMS, whole.replace(**cut, see=(), dream=()), 64)
    got, _ = read_queries(MODEL, PARAMS, read_image(MODEL, PARAMS, reading, whole.see[0].images[:, 0]))
    hidden = hidden_states(MODEL, PARAMS, whole)
    want = painted_from(CONFIG, hidden, whole.segment_ids, whole.dream[0].at[:, :1])
    np.testing.assert_allclose(got.prompt, want.prompt[:, 0], rtol=1e-4, atol=1e-5)
