"""The noise schedule and the sampler equal diffusers' schedulers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.diffusion import schedule
from dreamllm_jax.diffusion.ddpm_samplers import make_steps
from dreamllm_jax.diffusion.samplers import SamplerConfig, Steps, advance, guided, sample
from dreamllm_jax.diffusion.schedule import (
    ScheduleConfig,
    alphas_cumprod,
    schedule_config_from_diffusers,
    schedule_config_to_diffusers,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_equal_diffusers(beta_schedule):
    want = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule).alphas_cumprod
    np.testing.assert_allclose(alphas_cumprod(ScheduleConfig(beta_schedule=beta_schedule)), want, rtol=2e-5)


def test_noise_and_velocity_equal_diffusers():
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 5, 4, 4, 3)).astype(np.float32)
    timesteps = np.array([0, 3, 500, 998, 999])
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    given = [torch.tensor(x) for x in (latents, noise, timesteps)]
    alphas = alphas_cumprod(ScheduleConfig())
    for ours, theirs in ((schedule.add_noise, scheduler.add_noise), (schedule.velocity, scheduler.get_velocity)):
        np.testing.assert_allclose(ours(alphas, latents, noise, timesteps), theirs(*given), rtol=1e-5, atol=1e-6)


def test_min_snr_weights():
    alphas, timesteps = alphas_cumprod(ScheduleConfig()), np.array([0, 400, 999])
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    epsilon = schedule.min_snr_weights(alphas, timesteps, 5.0, "epsilon")
    np.testing.assert_allclose(epsilon, np.minimum(snr, 5) / snr, rtol=1e-6)
    velocity = schedule.min_snr_weights(alphas, timesteps, 5.0, "v_prediction")
    np.testing.assert_allclose(velocity, np.minimum(snr + 1, 5) / (snr + 1), rtol=1e-6)
    paper = schedule.min_snr_weights(alphas, timesteps, 5.0, "v_prediction", "paper")
    np.testing.assert_allclose(paper, np.minimum(snr, 5) / (snr + 1), rtol=1e-6)
    # It weighs the error of the noise as for epsilon: that is sqrt(a) times the velocity's, and 1 / a = 1 + 1 / s.
    np.testing.assert_allclose(paper * (1 + 1 / snr), epsilon, rtol=1e-5)


SAMPLERS = {
    "ddpm": (diffusers.DDPMScheduler, {}, {"clip_sample": False}),
    "ddim": (diffusers.DDIMScheduler, {}, {"clip_sample": False}),
    "ddim with noise": (diffusers.DDIMScheduler, {"eta": 0.7}, {"clip_sample": False}),
    "ddim as published": (
        diffusers.DDIMScheduler,
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}, {}),
    "dpmpp_2m karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True},
    ),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, {}),
    "unipc karras": (diffusers.UniPCMultistepScheduler, {"use_karras_sigmas": True}, {"use_karras_sigmas": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}, {}),
    "euler karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}, {"use_karras_sigmas": True}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, {}),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_diffusers(name, prediction_type, spacing, monkeypatch):
    kind, ours, theirs = SAMPLERS[name]
    rng = np.random.default_rng(0)
    start, mixing = rng.normal(size=(2, 4, 4, 3)).astype(np.float32), rng.normal(size=(3, 3)).astype(np.float32) / 3
    draws = rng.normal(size=(50, *start.shape)).astype(np.float32)

    def predict(x, t):  # any function of latents and timestep
        return np.tanh(np.asarray(x) @ mixing + np.float32(0.001) * np.asarray(t, np.float32).reshape(-1, 1, 1, 1))

    module = __import__(kind.__module__, fromlist=["randn_tensor"])
    given = iter(())
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor(next(given)), raising=False)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for count in (5, 20, 50):
        scheduler = kind(**betas, prediction_type=prediction_type, timestep_spacing=spacing, **theirs)
        scheduler.set_timesteps(count)
        config = SamplerConfig(name.split()[0], count, spacing, **ours)
        steps, scale = make_steps(ScheduleConfig(prediction_type=prediction_type), config)
        np.testing.assert_allclose(steps.timestep, scheduler.timesteps, rtol=1e-5, atol=1e-4)
        assert scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-5)
        given = iter(draws)
        x, before, latents = scale * start, (np.zeros_like(start),) * 2, torch.tensor(scale * start)
        for i, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(latents, timestep)
            predicted = torch.tensor(predict(scaled.numpy(), float(timestep)))
            extra = {"eta": config.eta} if "ddim" in name else {}
            latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
            x, before = advance(Steps(*(column[i] for column in steps)), predict, x, before, draws[i])
            assert np.linalg.norm(x - latents.numpy()) <= 1e-5 * np.linalg.norm(latents.numpy()), (count, i)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m"])
def test_sampling_runs_the_table_and_images_are_independent(name):

    def denoise(x, t):
        return jnp.tanh(x + 0.001 * t[:, None, None, None])

    keys = jax.vmap(jax.random.key)(jnp.asarray([3, 4]))
    steps, scale = make_steps(ScheduleConfig(), SamplerConfig(name, 4))
    both = sample(denoise, keys, (4, 4, 3), steps, scale)
    noise = [jax.random.normal(jax.random.fold_in(jax.random.key(4), i), (1, 4, 4, 3)) for i in range(5)]
    x, before = scale * noise[0], (0.0, 0.0)
    for i in range(4):
        x, before = advance(Steps(*(column[i] for column in steps)), denoise, x, before, noise[i + 1])
    np.testing.assert_allclose(both[1:], x, rtol=1e-5, atol=1e-6)
    assert np.abs(both[0] - both[1]).max() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "heun"}, "name='heun'; there are ddpm, ddim"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even'; there are leading"),
        ({"steps": 0}, "steps must be positive"),
        ({"eta": 0.5, "name": "euler"}, "eta is for ddim"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is for dpmpp_2m, unipc and euler, not for ddim"),
        ({"steps": 1001}, r"1 \.\.\. 1000, got 1001"),
        ({"steps": 1000, "name": "dpmpp_2m"}, r"1 \.\.\. 999, got 1000"),
        ({"steps": 1000, "timestep_spacing": "leading", "steps_offset": 1}, "steps_offset=1 leads beyond the 1000"),
    ],
)
def test_samplers_that_there_are_not(settings, message):
    with pytest.raises(ValueError, match=message):
        make_steps(ScheduleConfig(), SamplerConfig(**settings).named("ddim"))


def test_guidance():
    def denoise(latents, timesteps, condition):
        return latents * condition

    x, condition, null = jnp.ones((2, 1)), jnp.array([[3.0], [5.0]]), jnp.array([[1.0], [1.0]])
    got = guided(denoise, (null, condition), (2.0,))(x, jnp.zeros(2, int))
    np.testing.assert_allclose(got, [[5.0], [9.0]])
    got = guided(denoise, (null, jnp.array([[2.0], [1.5]]), condition), (4.0, 2.0))(x, jnp.zeros(2, int))
    np.testing.assert_allclose(got, [[1 + 4 * 1 + 2 * 1], [1 + 4 * 0.5 + 2 * 3.5]])


def test_guidance_can_be_rescaled():
    rng = np.random.default_rng(0)
    null, conditioned = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    both, scales = (null, conditioned), (3.0,)
    got = guided(lambda x, t, c: jnp.concatenate(both), both, scales, 0.7)(null, jnp.zeros(3))
    result = torch.tensor(null + 3.0 * (conditioned - null))
    ratio = torch.tensor(conditioned).std([1, 2, 3], keepdim=True) / result.std([1, 2, 3], keepdim=True)
    np.testing.assert_allclose(got, 0.7 * result * ratio + 0.3 * result, rtol=1e-5, atol=1e-6)


def test_guidance_can_be_confined_to_an_interval():
    x, condition, null = jnp.ones((3, 1)), jnp.array([[3.0], [5.0], [7.0]]), jnp.ones((3, 1))
    denoise = guided(lambda latents, _, given: latents * given, (null, condition), (2.0,), interval=(300, 500))
    np.testing.assert_allclose(denoise(x, jnp.array([299.0, 300.0, 500.5])), [[3.0], [9.0], [7.0]])


def test_scheduler_files_are_read_strictly():
    stable_diffusion = {"_class_name": "PNDMScheduler", "prediction_type": "v_prediction", "steps_offset": 1}
    assert schedule_config_from_diffusers(stable_diffusion).prediction_type == "v_prediction"
    for setting, message in (
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"prediction_type": "sample"}, "prediction_type 'sample'"),
        ({"beta_schedule": "exp"}, "beta_schedule 'exp'"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule_config_from_diffusers(setting)


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing", "use_karras_sigmas": True}),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "thresholding": True}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": False, "steps_offset": 3}),
    "ddpm": (diffusers.DDPMScheduler, {"variance_type": "fixed_large", "clip_sample": True}),
    "lcm": (diffusers.LCMScheduler, {"original_inference_steps": 40}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 3}),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_out_as_it_came(name, prediction_type):
    kind, settings = SCHEDULERS[name]
    came = json.loads(kind(**NOISE, **settings, prediction_type=prediction_type).to_json_string())
    config = schedule_config_from_diffusers(came)
    assert config.prediction_type == prediction_type and config.beta_end == 0.012
    assert schedule_config_to_diffusers(config) == came
    changed = dataclasses.replace(config, beta_end=0.02)
    assert schedule_config_to_diffusers(changed) == came | {"beta_end": 0.02}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers
@pytest.mark.parametrize("name", [n for n in vars(diffusers) if n.endswith("Scheduler")])
def test_every_scheduler_of_diffusers_is_read_as_it_is_or_refused(name):
    """With its own defaults, and with a file that says nothing but its class: diffusers' noise levels either way."""
    try:
        theirs = getattr(diffusers, name)()
        settings = json.loads(theirs.to_json_string())
    except (ImportError, TypeError, ValueError):
        pytest.skip("needs a package, or has no defaults")
    same_process = hasattr(theirs, "alphas_cumprod") and hasattr(theirs, "betas")
    for given in (settings, {"_class_name": name}):
        try:
            config = schedule_config_from_diffusers(given)
        except ValueError as error:
            assert name in str(error) or "variance_type" in str(error) or "prediction_type" in str(error)
        else:
            assert same_process and config.prediction_type == theirs.config.prediction_type
            np.testing.assert_allclose(alphas_cumprod(config), theirs.alphas_cumprod, rtol=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler is of another noise"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler is of another noise process"),
        ({"_class_name": "CogVideoXDDIMScheduler", **NOISE}, "CogVideoXDDIMScheduler is of another noise process"),
        ({"num_train_timesteps": 1000}, "neither _class_name nor beta_start, beta_end, beta_schedule"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1] * 1000}, "trained_betas"),
        ({"_class_name": "DDIMScheduler", "beta_end": 1.5}, "beta_start <= beta_end < 1 must hold, got 0.0001 and 1.5"),
        ({"_class_name": "DDIMScheduler", "beta_start": 0}, "beta_start <= beta_end < 1 must hold, got 0 and 0.02"),
        ({"_class_name": "DDIMScheduler", "beta_start": "0.1"}, "beta_start <= beta_end < 1 must hold, got '0.1'"),
        (
            {"_class_name": "DDIMScheduler", "beta_end": float("nan")},
            "beta_start <= beta_end < 1 must hold, got 0.0001 and nan",
        ),
        ({"_class_name": "DDIMScheduler", "beta_end": 0.9}, "some signal at the last"),
        ({"_class_name": "DDIMScheduler", "beta_start": 1e-9}, "some noise at the first"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 0}, "num_train_timesteps must be a whole number"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 10.5}, "num_train_timesteps must be a whole number"),
    ],
)
def test_another_noise_process_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        schedule_config_from_diffusers(settings)
