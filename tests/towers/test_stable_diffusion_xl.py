"""Stable Diffusion XL: told from its older relatives, and what its denoiser is told of pictures."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.common.configuration import read
from dreamllm_jax.data.batch import Slots
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.generation.images import paint
from dreamllm_jax.model import DreamLLM, abstract_params
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion import StableDiffusionConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLConfig
from tests.tiny import DECODER, DECODER_XL, make_batch, random_rows, tiny_config, tiny_params


def test_a_denoiser_of_the_other_kind_is_refused():
    with pytest.raises(ValueError, match=r"^stable_diffusion has .* got 'text_time': its kind is stable_diffusion_xl$"):
        StableDiffusionConfig(DECODER_XL.denoiser, DECODER.autoencoder)
    with pytest.raises(ValueError, match=r"^stable_diffusion_xl has .* got None: its kind is stable_diffusion$"):
        StableDiffusionXLConfig(DECODER.denoiser, DECODER.autoencoder)


@pytest.mark.parametrize(
    ("version", "cls"),
    [("1.5", StableDiffusionConfig), ("2.1", StableDiffusionConfig), ("xl", StableDiffusionXLConfig)],
)
def test_a_directory_is_of_one_of_them(version, cls, tmp_path):
    pytest.importorskip("torch")
    from dreamllm_jax.interop.image_decoder import read_decoder_config
    from tests import public_models

    place = public_models.save_diffusion(tmp_path, version=version)
    config = read_decoder_config(place)
    assert type(config) is cls and config.pooled_width == (10 if version == "xl" else 0)
    assert read(type(config), dataclasses.asdict(config)) == config
    unet = place / "unet" / "config.json"
    settings = json.loads(unet.read_text())
    unet.write_text(json.dumps(settings | {"addition_embed_type": "image"}))
    with pytest.raises(ValueError, match=r"addition_embed_type='image': only 'text_time' is implemented$") as refused:
        read_decoder_config(place)
    assert str(unet) in str(refused.value) and "\n" not in str(refused.value)


def test_published_shapes_are_the_published_ones():
    config = tiny_config(image_decoder=read(StableDiffusionXLConfig, StableDiffusionXLConfig.PUBLISHED["sdxl"]))
    decoder = config.image_decoder
    assert (decoder.condition_width, decoder.pooled_width, decoder.default_size) == (2048, 1280, 1024)
    parts = nn.unbox(abstract_params(config))["image_decoder"]
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in parts.items()}
    assert count == {"denoiser": 2_567_463_684, "autoencoder": 83_653_863}


def test_the_autoencoder_computes_in_float32():
    for upcast, dtype in ((True, jnp.float32), (False, jnp.bfloat16)):
        decoder = dataclasses.replace(DECODER_XL, upcast=upcast).make(jnp.bfloat16).bind({})
        assert (decoder.autoencoder.dtype, decoder.denoiser.dtype) == (dtype, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class RecordingConfig(StableDiffusionXLConfig):
    """Predicts the sizes that it was told and the mean of its pooled vector, and keeps them."""

    def make(self, dtype):
        return Recording(self, dtype=dtype)


TOLD = []


class Recording(StableDiffusionXL):
    def denoise(self, latents, timesteps, condition):
        jax.debug.callback(
            lambda *arrays: TOLD.append(tuple(map(np.asarray, arrays))), condition.extra["time_ids"], condition.pooled
        )
        return jnp.zeros_like(latents) + jnp.mean(condition.extra["time_ids"], axis=-1)[:, None, None, None]


RECORDING = tiny_config(
    image_decoder=RecordingConfig(**{f.name: getattr(DECODER_XL, f.name) for f in dataclasses.fields(DECODER_XL)})
)


def test_what_is_painted_is_whole():
    """Without a prompt too, and whatever the size."""
    model, params = DreamLLM(RECORDING), tiny_params(RECORDING)
    hidden = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    for size, guidance in (((16, 24), 3.0), ((8, 8), 1.0)):
        TOLD.clear()
        paint(model, params, hidden, np.array([1, 2]), size=size, guidance=guidance, sampler=SamplerConfig(steps=2))
        jax.effects_barrier()
        assert len(TOLD) == 2
        for sizes, pooled in TOLD:
            assert sizes.shape == (4 if guidance > 1 else 2, 6)
            assert (sizes == [*size, 0, 0, *size]).all()
            assert len(np.unique(np.round(pooled[:, 0], 4))) == (3 if guidance > 1 else 2)


def test_training_tells_each_picture_its_own_sizes():
    """Under the null condition too; and held-out documents likewise."""
    batch = make_batch(RECORDING, random_rows(RECORDING))
    objective = JointConfig(lm_weight=0.0, drop_prob=0.5, image_chunk=0).make(DreamLLM(RECORDING))
    params, (slots,) = tiny_params(RECORDING), batch.dream
    draws = objective.draws(jax.random.key(1), batch)
    assert 0 < draws[0].drop[slots.filled].sum() < slots.filled.sum()
    TOLD.clear()
    jax.block_until_ready(jax.jit(objective.loss)(params, batch, draws))
    held_out = JointConfig(lm_weight=0.0, image_chunk=0).held_out(RECORDING, 1)
    jax.block_until_ready(jax.jit(held_out.sums)(params, batch, jax.random.key(2)))
    jax.effects_barrier()
    given = {tuple(row) for row in slots.sizes[slots.filled]}
    assert len(given) == slots.filled.sum() > 4 and len(TOLD) == 2
    for sizes, _ in TOLD:
        assert {tuple(row) for row in sizes} - {(0.0,) * 6} == given
        np.testing.assert_array_equal(sizes.reshape(*slots.at.shape, 6), slots.sizes)


def test_other_decoders_have_no_further_arrays():
    config = tiny_config()
    batch = make_batch(config, random_rows(config))
    assert batch.dream[0].sizes is None and len(jax.tree.leaves(batch.dream)) == 2
    assert len(jax.tree.leaves(Slots(batch.dream[0].at, None))) == 1
