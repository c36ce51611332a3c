"""The noise schedule and the sampler equal diffusers' schedulers."""

import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.diffusion import schedule
from dreamllm_jax.diffusion.samplers import ddim, guided, trailing_timesteps
from dreamllm_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod, schedule_config_from_diffusers

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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_ddim_equals_diffusers(prediction_type, steps):
    rng = np.random.default_rng(0)
    noise, mixing = rng.normal(size=(2, 4, 4, 3)).astype(np.float32), rng.normal(size=(3, 3)).astype(np.float32) / 3

    def predict(x, t):  # any function of latents and timestep
        return np.tanh(x @ mixing + 0.001 * t)

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(steps)
    latents = torch.tensor(noise)
    for timestep in scheduler.timesteps:
        predicted = torch.tensor(predict(latents.numpy(), float(timestep)).astype(np.float32))
        latents = scheduler.step(predicted, timestep, latents, eta=0.0).prev_sample

    def denoise(x, t):
        return jnp.tanh(x @ mixing + 0.001 * t[:, None, None, None])

    got = ddim(denoise, jnp.asarray(noise), ScheduleConfig(prediction_type=prediction_type), steps)
    np.testing.assert_array_equal(trailing_timesteps(1000, steps), scheduler.timesteps)
    assert np.linalg.norm(got - latents.numpy()) <= 1e-5 * np.linalg.norm(latents.numpy())


def test_guidance():
    def denoise(latents, timesteps, condition):
        return latents * condition

    x, condition, null = jnp.ones((2, 1)), jnp.array([[3.0], [5.0]]), jnp.array([[1.0], [1.0]])
    got = guided(denoise, condition, null, 2.0)(x, jnp.zeros(2, int))
    np.testing.assert_allclose(got, [[5.0], [9.0]])


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
    with pytest.raises(ValueError, match=r"1 \.\.\. 1000, got 0"):
        trailing_timesteps(1000, 0)
