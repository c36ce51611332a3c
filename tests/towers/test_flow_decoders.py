"""Image decoders that learn a flow, in the joined model: their error, what is stored, meshes, adapters, painting."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.data.batch import Slots
from dreamllm_jax.diffusion import flow
from dreamllm_jax.diffusion.flow import FlowConfig
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.experiment.settings import OptimizerConfig, ParametersConfig
from dreamllm_jax.generation.images import paint
from dreamllm_jax.model import DreamLLM, painted_from
from dreamllm_jax.objectives.images import flat, hidden_states
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.parallel.feeding import rows_sharding, to_mesh
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, use
from dreamllm_jax.towers.autoencoders.dc import DCAutoencoderConfig
from dreamllm_jax.towers.autoencoders.kl import AutoencoderConfig
from dreamllm_jax.towers.image_decoders.mmdit import MMDiTConfig, MMDiTLora
from dreamllm_jax.towers.image_decoders.sana import SanaConfig
from dreamllm_jax.towers.image_decoders.sana_transformer import SanaLora, SanaTransformerConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion_3 import StableDiffusion3Config
from dreamllm_jax.training.state import abstract_state
from dreamllm_jax.training.step import loss_and_gradients
from tests.parity import assert_same
from tests.tiny import DREAM_SIZE, make_batch, random_rows, tiny_config, tiny_params

SANA = SanaConfig(
    denoiser=SanaTransformerConfig(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=DREAM_SIZE // 2,
        qk_norm="rms_norm_across_heads",
        lora=SanaLora(rank=2, alpha=4.0),
    ),
    autoencoder=DCAutoencoderConfig(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        decoder_norm_types=("rms_norm",) * 2,
        decoder_act_fns=("silu",) * 2,
    ),
)
# Of the condition, which attends to nothing in SD3's last layer.
LAST_QUERIES = "2_to_3/attn/(add_q_proj|norm_added_q)/"
SD3 = StableDiffusion3Config(
    denoiser=MMDiTConfig(
        sample_size=DREAM_SIZE // 2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        lora=MMDiTLora(2, 4.0, ("to_q", "add_k_proj", "proj")),
    ),
    autoencoder=AutoencoderConfig(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    flow=FlowConfig(shift=3.0, density="logit_normal", weighting="preconditioned", input_scale=0.5),
)


ONE = ShardingConfig(fsdp=1)


def abstract_of(config, rules, mesh=None, sharding=ONE):
    mesh = mesh or make_mesh(sharding, jax.devices()[:1])
    settings = OptimizerConfig(learning_rate=1e-3)
    return abstract_state(config, ParametersConfig(trainable=tuple(rules)), settings, mesh, sharding)


class Case:
    """A joined model with a decoder; `run` gives metrics and gradients of one batch, of all that the rules leave."""

    def __init__(self, decoder):
        self.config = tiny_config(image_decoder=decoder)
        self.model, self.params = DreamLLM(self.config), tiny_params(self.config)
        self.leaves = flatten_dict(self.params, sep="/")
        self.objective = JointConfig(drop_prob=0.3, image_chunk=2).make(self.model)
        self.batch = make_batch(self.config, random_rows(self.config))
        self.draws = self.objective.draws(jax.random.key(1), self.batch)
        step = lambda leaves, batch, draws: loss_and_gradients(self.objective, leaves, {}, batch, draws)  # noqa: E731
        self.step = jax.jit(step)

    def run(self, batch=None, draws=None):
        return jax.device_get(self.step(self.leaves, batch or self.batch, draws or self.draws))


@pytest.fixture(scope="module", params=[SANA, SD3], ids=lambda decoder: decoder.kind)
def case(request):
    return Case(request.param)


def test_the_error_is_that_of_the_velocity(case):
    """As written out by hand, from the draws."""
    (draws,), (slots,), decoder = case.draws, case.batch.dream, case.config.image_decoder
    joined = case.model.bind({"params": case.params})
    given = painted_from(
        case.config, hidden_states(case.model, case.params, case.batch), case.batch.segment_ids, slots.at
    )
    condition = case.objective.conditions(case.params, flat(given), joined.null_hidden(), flat(draws.drop))
    assert (condition.pooled is None) == (decoder.pooled_width == 0)
    assert (draws.decoder.posterior_noise is None) == decoder.autoencoder.deterministic
    latents = joined.image_decoder.encode(flat(slots.images), flat(draws.decoder))
    noise, levels = flat(draws.decoder.noise), jnp.asarray(flow.sigmas(decoder.flow))[flat(draws.decoder.index)]
    sigma = levels[:, None, None, None]
    noisy = decoder.flow.input_scale * ((1 - sigma) * latents + sigma * noise)
    predicted = joined.image_decoder.denoiser(noisy, 1000 * levels, condition)
    errors = jnp.mean((predicted - (noise - latents)) ** 2, axis=(1, 2, 3))
    errors *= levels**2 if decoder.flow.weighting == "preconditioned" else 1
    want = jnp.sum(errors * flat(slots.filled)) / slots.filled.sum()
    np.testing.assert_allclose(case.run()[0]["dm_loss"], want, rtol=1e-5)


def test_every_weight_of_the_denoiser_learns_but_for_tables(case):
    state = abstract_of(case.config, [(".*", True)])
    tables = {path for path in state.frozen if path.startswith("image_decoder/denoiser")}
    assert tables == {"image_decoder/denoiser/pos_embed/pos_embed"} & case.leaves.keys()
    idle = tables | {path for path in case.leaves if re.search(LAST_QUERIES, path)}
    for path, gradient in case.run()[1].items():
        if path.startswith(("image_decoder/denoiser", "connector")):
            assert np.isfinite(gradient).all() and gradient.any() == (path not in idle), path


@pytest.mark.slow
def test_adapters_alone_are_trained(case):
    state = abstract_of(case.config, [(".*/denoiser/.*/lora_[ab]", True), (".*", False)])
    # Of two attentions and the feed-forward; of three kinds of layers' attentions and feed-forwards.
    assert len(state.trainable) == 2 * {"sana": 10, "stable_diffusion_3": 4 + 3 + 5}[case.config.image_decoder.kind]
    split = [{path: case.leaves[path] for path in part} for part in (state.trainable, state.frozen)]
    step = jax.jit(lambda *parts: loss_and_gradients(case.objective, *parts, case.batch, case.draws))
    metrics, gradients = jax.device_get(step(*split))
    want_metrics, want = case.run()
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
    assert_same(gradients, {path: want[path] for path in gradients}, tolerance=2e-5)


def test_what_is_stored_equals_images(case):
    (slots,), decoder = case.batch.dream, case.model.bind({"params": case.params}).image_decoder
    stored = np.asarray(decoder.stored(flat(slots.images)))
    assert stored.shape[1:] == case.config.image_decoder.stored_shape(DREAM_SIZE, DREAM_SIZE)
    stored = stored.reshape(*slots.at.shape, *stored.shape[1:])
    batch = case.batch.replace(dream=(Slots(slots.at, stored, stored=True),))
    loss = jax.jit(lambda leaves, batch, draws: loss_and_gradients(case.objective, {}, leaves, batch, draws)[0])
    np.testing.assert_allclose(loss(case.leaves, batch, case.draws)["loss"], case.run()[0]["loss"], rtol=1e-6)


def test_held_out_losses_are_by_ranges_of_time(case):
    decoder, (draws,) = case.config.image_decoder.plain, case.draws
    assert (decoder.flow.density, decoder.flow.weighting) == ("uniform", "none")
    for part in range(4):
        first, end = decoder.time_range(part, 4)
        index = np.asarray(decoder.within(draws.decoder, part, 4).index)
        times = 1000 - index  # of an unshifted table: timesteps
        assert (times > first).all() and (times <= end).all()


@pytest.mark.slow
def test_a_mesh_equals_one_device(case):
    sharding = ShardingConfig(data=2, fsdp=2, tensor=2)
    mesh = make_mesh(sharding)
    state = abstract_of(case.config, [(".*", True)], mesh, sharding)
    leaves = {
        path: jax.device_put(case.leaves[path], leaf.sharding)
        for path, leaf in (state.trainable | state.frozen).items()
    }
    with use(mesh, sharding):
        batch = to_mesh(case.batch, rows_sharding(mesh, sharding, 8), 8)
        metrics, gradients = jax.device_get(case.step(leaves, batch, case.draws))
    want_metrics, want = case.run()
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=2e-6)
    assert_same(gradients, want, tolerance=2e-5)


@pytest.mark.slow
def test_painting(case):
    """Pictures that are not square, alone as in company; with the decoder's own sampler and with others."""
    hidden = np.random.default_rng(0).normal(size=(2, case.config.num_queries, 32)).astype(np.float32)
    size = (DREAM_SIZE, 2 * DREAM_SIZE)

    def painted(hidden, seeds, sampler):
        return np.asarray(
            paint(case.model, case.params, hidden, np.array(seeds), size=size, sampler=sampler, guidance=2.0)
        ).astype(int)

    own = case.config.image_decoder.default_sampler
    both = painted(hidden, [3, 4], SamplerConfig(steps=3))
    assert both.shape == (2, *size, 3) and np.abs(both[0] - both[1]).max() > 10
    assert np.abs(painted(hidden[1:], [4], SamplerConfig(steps=3)) - both[1:]).max() <= 1
    np.testing.assert_array_equal(painted(hidden, [3, 4], SamplerConfig(own, 3)), both)
    others = [name for name in ("euler", "dpmpp_2m", "unipc") if name != own]
    assert all(np.abs(painted(hidden, [3, 4], SamplerConfig(name, 3)) - both).max() > 1 for name in others)
    with pytest.raises(ValueError, match="a flow is not sampled with ddim: there are euler, dpmpp_2m, unipc"):
        painted(hidden, [3, 4], SamplerConfig("ddim", 3))
