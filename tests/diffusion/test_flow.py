"""The rectified flow, its scheduler files and its samplers equal diffusers'."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.diffusion import flow
from dreamllm_jax.diffusion.flow import FlowConfig
from dreamllm_jax.diffusion.flow_files import flow_config_from_diffusers, flow_config_to_diffusers
from dreamllm_jax.diffusion.flow_samplers import make_flow_steps
from dreamllm_jax.diffusion.samplers import SamplerConfig, Steps, advance, sample
from dreamllm_jax.diffusion.schedule import schedule_config_from_diffusers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")
Euler = diffusers.FlowMatchEulerDiscreteScheduler
FLOWING = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_the_table_equals_diffusers(shift):
    config, theirs = FlowConfig(shift=shift, sampling_shift=7.0), Euler(shift=shift)
    sigma = flow.sigmas(config)
    np.testing.assert_allclose(sigma, theirs.sigmas, rtol=1e-6)
    np.testing.assert_allclose(flow.timesteps(config, sigma), theirs.timesteps, rtol=1e-6)
    assert sigma[0] == 1 and sigma.dtype == np.float32


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 256, 1000, 4096, 9216])
def test_the_dynamic_shift_equals_diffusers(kind, tokens):
    settings = {"use_dynamic_shifting": True, "base_shift": 0.6, "max_shift": 1.3, "max_image_seq_len": 2048}
    config, theirs = FlowConfig(**settings, time_shift_type=kind), Euler(**settings, time_shift_type=kind)
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens, 256, 2048, 0.6, 1.3)
    theirs.set_timesteps(1000, mu=mu)
    np.testing.assert_allclose(flow.sigmas(config, tokens), theirs.sigmas[:-1], rtol=1e-6)
    np.testing.assert_allclose(flow.sigmas(config), Euler().sigmas, rtol=1e-6)


def test_noise_and_target():
    latents, noise = np.random.default_rng(0).normal(size=(2, 5, 4, 4, 3)).astype(np.float32)
    index, config, theirs = np.array([0, 3, 500, 998, 999]), FlowConfig(shift=3.0), Euler(shift=3.0)
    sigma = flow.sigmas(config)[index]
    want = theirs.scale_noise(torch.tensor(latents), theirs.timesteps[index], torch.tensor(noise))
    noisy, target = flow.add_noise(latents, noise, sigma), flow.target(config, latents, noise)
    np.testing.assert_allclose(noisy, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(noisy - sigma[:, None, None, None] * target, latents, atol=1e-6)


DENSITIES = {
    "uniform": {},
    "logit_normal": {"logit_mean": -0.3, "logit_std": 1.4},
    "mode": {"mode_scale": 1.29},
}


@pytest.mark.parametrize("density", DENSITIES)
def test_densities_equal_diffusers(density):
    config = FlowConfig(density=density, **DENSITIES[density])
    draws = flow.draw_time(config, jax.random.key(0), (4000,))
    if density == "logit_normal":
        assert abs(float(draws.mean())) < 0.06 and abs(float(draws.std()) - 1) < 0.04
        given = {"normal": lambda mean, std, **_: torch.tensor(np.array(mean + std * draws))}
    else:
        assert 0 <= float(draws.min()) < 0.01 and 0.99 < float(draws.max()) < 1
        given = {"rand": lambda **_: torch.tensor(np.array(draws))}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in given.items():
            patch.setattr(torch, name, function)
        u = training_utils.compute_density_for_timestep_sampling(density, 4000, **DENSITIES[density])
    got, want = np.asarray(flow.index_of(config, draws)), (u * 1000).long().numpy()
    assert np.abs(got - want).max() <= 1 and (got == want).mean() > 0.999  # a rounding at an edge
    assert got.dtype == np.int32 and got.min() >= 0 and got.max() <= 999


def test_no_draw_leads_beyond_the_table():
    assert int(flow.index_of(FlowConfig(density="mode"), jnp.float32(0))) == 999
    assert int(flow.index_of(FlowConfig(density="logit_normal"), jnp.float32(40))) == 999
    assert int(flow.index_of(FlowConfig(), jnp.float32(0))) == 0
    assert flow.draw_time(FlowConfig(), jax.random.key(0)).shape == ()


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_equal_diffusers(weighting):
    sigma = flow.sigmas(FlowConfig(shift=3.0))
    want = training_utils.compute_loss_weighting_for_sd3(weighting, torch.tensor(sigma))
    np.testing.assert_allclose(flow.weights(FlowConfig(weighting=weighting), jnp.asarray(sigma)), want, rtol=1e-5)


def test_the_preconditioned_error_is_that_of_clean_latents():
    latents, noise, guess = np.random.default_rng(0).normal(size=(3, 4, 2, 2, 3)).astype(np.float32)
    sigma = np.array([1.0, 0.7, 0.2, 0.01], np.float32)
    wide = sigma[:, None, None, None]
    clean = flow.add_noise(latents, noise, sigma) - wide * guess
    config = FlowConfig(weighting="preconditioned")
    weights = flow.weights(config, sigma)
    errors = np.square(guess - flow.target(config, latents, noise)).mean((1, 2, 3))
    np.testing.assert_allclose(weights * errors, np.square(clean - latents).mean((1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("weighting", ["none", "cosmap"])
def test_a_denoiser_of_clean_latents_has_the_error_of_its_velocity(weighting):
    latents, noise, guess = np.random.default_rng(0).normal(size=(3, 4, 2, 2, 3)).astype(np.float32)
    sigma = np.array([1.0, 0.7, 0.2, 0.05], np.float32)
    velocity, clean = (FlowConfig(weighting=weighting, prediction_type=kind) for kind in ("flow_prediction", "sample"))
    given = flow.add_noise(latents, noise, sigma) - sigma[:, None, None, None] * guess

    def error(config, prediction):
        errors = np.square(prediction - flow.target(config, latents, noise)).mean((1, 2, 3))
        return flow.weights(config, sigma) * errors

    np.testing.assert_allclose(error(clean, given), error(velocity, guess), rtol=1e-3)
    least = flow.weights(clean, np.array([0.05, 0.01], np.float32))
    assert weighting != "none" or least[0] == least[1]


SAMPLERS = {
    "euler": (Euler, {}, "shift"),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, FLOWING, "flow_shift"),
    "unipc": (diffusers.UniPCMultistepScheduler, FLOWING, "flow_shift"),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers
@pytest.mark.parametrize("shift", ["1", "3", "dynamic"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_diffusers(name, shift):
    kind, settings, shifting = SAMPLERS[name]
    rng = np.random.default_rng(0)
    start, mixing = rng.normal(size=(2, 4, 4, 3)).astype(np.float32), rng.normal(size=(3, 3)).astype(np.float32) / 3

    def predict(x, t):  # any function of latents and timestep
        return np.tanh(np.asarray(x) @ mixing + np.float32(0.001) * np.asarray(t, np.float32).reshape(-1, 1, 1, 1))

    for count in (1, 2, 3, 5, 20, 27, 50):
        if shift == "dynamic":
            config, tokens = FlowConfig(use_dynamic_shifting=True, integer_timesteps=name != "euler"), 1024
            mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens)
            scheduler, extra = kind(**settings, use_dynamic_shifting=True), {"mu": mu}
        else:
            config, tokens = FlowConfig(sampling_shift=float(shift), integer_timesteps=name != "euler"), None
            scheduler, extra = kind(**settings, **{shifting: float(shift)}), {}
        scheduler.set_timesteps(count, **extra)
        steps, scale = make_flow_steps(config, SamplerConfig(name, count), tokens)
        np.testing.assert_allclose(steps.timestep, scheduler.timesteps, rtol=1e-6)
        x, before, latents = start, (np.zeros_like(start),) * 2, torch.tensor(start)
        for i, timestep in enumerate(scheduler.timesteps):
            predicted = torch.tensor(predict(latents.numpy(), float(timestep)))
            latents = scheduler.step(predicted, timestep, latents).prev_sample
            x, before = advance(Steps(*(column[i] for column in steps)), predict, x, before, 0.0)
            assert np.linalg.norm(x - latents.numpy()) <= 1e-5 * np.linalg.norm(latents.numpy()), (count, i)
        assert scale == 1.0


def test_the_timesteps_of_sana():
    config = FlowConfig(sampling_shift=3.0, integer_timesteps=True)
    assert make_flow_steps(config, SamplerConfig("dpmpp_2m", 5))[0].timestep.tolist() == [999, 922, 817, 666, 428]
    whole = dataclasses.replace(config, integer_timesteps=False)
    assert make_flow_steps(whole, SamplerConfig("dpmpp_2m", 5))[0].timestep[-1] == pytest.approx(428.27, abs=0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_find_a_straight_flow_exactly(name):
    """Latents that are all the same: the velocity at x is (x - those) / s, and every path is straight."""
    goal = jnp.full((4, 4, 3), 0.7)

    def denoise(x, t):
        return (x - goal) / (t / 1000)[:, None, None, None]

    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    got = sample(denoise, keys, goal.shape, *make_flow_steps(FlowConfig(shift=2.0), SamplerConfig(name, 7)))
    np.testing.assert_allclose(got, jnp.stack([goal, goal]), atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_clean_latents_are_sampled_as_their_velocity(name):
    def clean(x, t):
        return jnp.tanh(3 * x) * (1 + t / 2000)[:, None, None, None]

    def velocity(x, t):
        return (x - clean(x, t)) / (t / 1000)[:, None, None, None]

    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    got, want = (
        sample(denoise, keys, (4, 4, 3), *make_flow_steps(FlowConfig(prediction_type=kind), SamplerConfig(name, 9)))
        for denoise, kind in ((clean, "sample"), (velocity, "flow_prediction"))
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="diffusers has no scheduler for a flow with prediction_type='sample'"):
        flow_config_to_diffusers(FlowConfig(prediction_type="sample"))
    with pytest.raises(ValueError, match=r"diffusers has no scheduler for a flow with input_scale=0\.5"):
        flow_config_to_diffusers(FlowConfig(input_scale=0.5))


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_even_the_greatest_shift_leaves_multistep_solvers_some_signal(name):
    steps, _ = make_flow_steps(FlowConfig(shift=100.0), SamplerConfig(name, 1000))
    assert all(np.isfinite(column).all() for column in steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ddim"}, "not sampled with ddim: there are euler, dpmpp_2m, unipc"),
        ({"name": "ddpm"}, "not sampled with ddpm"),
        ({"name": "euler_ancestral"}, "not sampled with euler_ancestral"),
        ({"timestep_spacing": "leading", "steps_offset": 1}, "leave out timestep_spacing=leading, steps_offset=1"),
        ({"set_alpha_to_one": False}, "leave out set_alpha_to_one=False"),
        ({"use_karras_sigmas": True}, "leave out use_karras_sigmas=True"),
        ({"eta": 0.5}, "eta is for ddim, not for dpmpp_2m"),
    ],
)
def test_samplers_that_a_flow_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        make_flow_steps(FlowConfig(), SamplerConfig(**settings).named("dpmpp_2m"))


def test_a_dynamic_shift_needs_tokens():
    with pytest.raises(ValueError, match="depends on the number of tokens"):
        make_flow_steps(FlowConfig(use_dynamic_shifting=True), SamplerConfig("euler"))


SANA = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.32.0.dev0",
    "algorithm_type": "dpmsolver++",
    "beta_schedule": "linear",
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lambda_min_clipped": -math.inf,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "thresholding": False,
    "use_flow_sigmas": True,
}
FLUX = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5}
FILES = {
    "sana": (SANA, FlowConfig(sampling_shift=3.0, integer_timesteps=True)),
    "sana with a shift": (SANA | {"shift": 3.0}, FlowConfig(shift=3.0, sampling_shift=3.0, integer_timesteps=True)),
    "silent solver": (
        {"_class_name": "UniPCMultistepScheduler", **FLOWING},
        FlowConfig(sampling_shift=1.0, integer_timesteps=True),
    ),
    "stable diffusion 3": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, FlowConfig(shift=3.0)),
    "flux": (FLUX, FlowConfig(shift=3.0, use_dynamic_shifting=True)),
    "nulls": (FLUX | {"base_shift": None, "shift_terminal": None}, FlowConfig(shift=3.0, use_dynamic_shifting=True)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_scheduler_goes_out_as_it_came(name):
    came, want = FILES[name]
    config = flow_config_from_diffusers(came)
    assert dataclasses.replace(config, scheduler="") == want
    assert json.dumps(flow_config_to_diffusers(config)) == json.dumps(came)
    learned = dataclasses.replace(config, density="mode", weighting="cosmap")
    assert flow_config_to_diffusers(learned) == came


def test_what_is_changed_since_goes_out_changed():
    sana, sd3 = flow_config_from_diffusers(SANA), flow_config_from_diffusers(FILES["stable diffusion 3"][0])
    assert flow_config_to_diffusers(dataclasses.replace(sana, shift=2.0)) == SANA | {"shift": 2.0}
    assert flow_config_to_diffusers(dataclasses.replace(sana, sampling_shift=4.0)) == SANA | {"flow_shift": 4.0}
    assert flow_config_to_diffusers(dataclasses.replace(sana, sampling_shift=None)) == SANA | {"flow_shift": 1.0}
    assert flow_config_to_diffusers(dataclasses.replace(sd3, shift=2.0)) == {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 2.0,
    }


@pytest.mark.parametrize(
    "config",
    [
        FlowConfig(),
        FlowConfig(num_train_timesteps=500, shift=2.0),
        FlowConfig(use_dynamic_shifting=True, max_shift=1.3, time_shift_type="linear"),
        FlowConfig(shift=2.0, sampling_shift=3.0, integer_timesteps=True),
        flow_config_from_diffusers(FLUX | {"use_dynamic_shifting": False, "flow_shift": 9.0}),
    ],
)
def test_what_is_written_is_read_as_the_same(config):
    """The last two came with no file, or with one that has no place for these settings."""
    for sampled in (config, dataclasses.replace(config, sampling_shift=5.0, integer_timesteps=True)):
        written = flow_config_to_diffusers(sampled)
        read = flow_config_from_diffusers(json.loads(json.dumps(written)))
        assert dataclasses.replace(read, scheduler="") == dataclasses.replace(sampled, scheduler="")
        theirs = getattr(diffusers, written["_class_name"]).from_config(written).config
        assert sampled.sampling_shift is None or theirs.flow_shift == sampled.sampling_shift


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers
@pytest.mark.parametrize("name", [n for n in vars(diffusers) if n.endswith("Scheduler")])
def test_every_scheduler_of_diffusers_is_read_as_it_is_or_refused(name):
    kind = getattr(diffusers, name)
    for given in ({}, FLOWING):
        try:
            theirs = kind(**given)
            settings = json.loads(theirs.to_json_string())
        except (ImportError, TypeError, ValueError):
            continue  # needs a package, has no defaults, or does not know these
        try:
            config = flow_config_from_diffusers(settings)
        except ValueError as error:
            assert name in str(error) and (given or name != "FlowMatchEulerDiscreteScheduler")
            continue
        np.testing.assert_allclose(flow.sigmas(config), Euler.from_config(settings).sigmas, rtol=1e-6)
        with pytest.raises(ValueError, match=r"another noise process|use_flow_sigmas=True"):
            schedule_config_from_diffusers(settings)
        if name != "FlowMatchEulerDiscreteScheduler":
            theirs.set_timesteps(10)
            sampler = SamplerConfig("unipc" if name.startswith("UniPC") else "dpmpp_2m", 10)
            np.testing.assert_allclose(make_flow_steps(config, sampler)[0].timestep, theirs.timesteps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}, "PNDMScheduler is not of a flow"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "FlowMatchLCMScheduler is not of a flow"),
        ({"shift": 3.0}, "does not say _class_name"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "prediction_type='epsilon' and use_flow_sigmas=False"),
        (SANA | {"use_flow_sigmas": False}, "'flow_prediction' and use_flow_sigmas=False is not of a flow"),
        (SANA | {"prediction_type": "v_prediction"}, "'v_prediction' and use_flow_sigmas=True is not of a flow"),
        *((SANA | {name: True}, f"setting {name}=True is not") for name in ("thresholding", "use_lu_lambdas")),
        *(
            (FLUX | {name: True}, f"setting {name}=True is not supported for a flow")
            for name in ("invert_sigmas", "stochastic_sampling", "use_beta_sigmas", "use_exponential_sigmas")
        ),
        (FLUX | {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        (FLUX | {"shift_terminal": 0.02}, r"shift_terminal=0\.02"),
        (SANA | {"variance_type": "learned_range"}, "variance_type='learned_range'"),
        (SANA | {"flow_shift": "3"}, "sampling_shift must be a positive number, at most 100, got '3'"),
        (FLUX | {"shift": -1.0}, r"shift must be a positive number, at most 100, got -1\.0"),
        (FLUX | {"time_shift_type": "cubic"}, "time_shift_type='cubic'; there are exponential, linear"),
        (FLUX | {"use_dynamic_shifting": "yes"}, "use_dynamic_shifting must be true or false, got 'yes'"),
        (FLUX | {"max_shift": True}, "max_shift must be a number, got True"),
        (FLUX | {"max_image_seq_len": 256}, "base_image_seq_len < max_image_seq_len must hold, got 256 and 256"),
        (FLUX | {"num_train_timesteps": 0}, "num_train_timesteps must be a whole number"),
    ],
)
def test_files_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        flow_config_from_diffusers(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": "beta"}, "density='beta'; there are uniform, logit_normal, mode"),
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon'; there are flow_prediction, sample"),
        ({"weighting": "snr"}, "weighting='snr'; there are none, sigma_sqrt"),
        ({"shift": None}, "shift must be a positive number, at most 100, got None"),
        ({"sampling_shift": 101}, "sampling_shift must be a positive number, at most 100, got 101"),
        ({"logit_std": 0.0}, r"logit_std must be a positive number, got 0\.0"),
        ({"logit_mean": math.nan}, "logit_mean must be a number, got nan"),
        ({"input_scale": 0.0}, r"input_scale must be a positive number, got 0\.0"),
        ({"mode_scale": 1.8}, r"mode_scale must lie in -1 \.\.\. 1\.752, got 1\.8"),
        ({"scheduler": "[1]"}, "scheduler is not the text"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FlowConfig(**settings)


def test_shifts_that_are_none():
    linear = FlowConfig(use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.1, max_shift=9.0)
    with pytest.raises(ValueError, match=r"16 tokens must be positive and at most 100, got -0\.456"):
        flow.sigmas(linear, 16)
    with pytest.raises(ValueError, match="100000000 tokens must be positive"):
        flow.sigmas(FlowConfig(use_dynamic_shifting=True), 10**8)
