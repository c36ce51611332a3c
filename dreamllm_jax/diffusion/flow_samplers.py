"""The samplers of a rectified flow, as tables (`samplers.Steps`).

Legend: S sampling steps.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from dreamllm_jax.diffusion import multistep
from dreamllm_jax.diffusion.flow import FlowConfig, dynamic_shift, shifted
from dreamllm_jax.diffusion.samplers import SamplerConfig, Steps


def make_flow_steps(flow: FlowConfig, config: SamplerConfig, tokens: int | None = None) -> tuple[Steps, float]:
    """The table of a sampler, and the scale of the noise it begins with.

    Args:
      tokens: of the denoiser, by which a dynamic shift goes.

    Raises:
      ValueError: a sampler or a setting that a flow does not have.
    """
    makers = {"euler": _euler, "dpmpp_2m": multistep.dpmpp_2m, "unipc": multistep.unipc}
    if config.name not in makers:
        raise ValueError(f"a flow is not sampled with {config.name}: there are {', '.join(makers)}")
    plain = dataclasses.asdict(SamplerConfig(config.name, config.steps))
    if other := [f"{name}={value}" for name, value in dataclasses.asdict(config).items() if value != plain[name]]:
        raise ValueError(f"a flow has its own timesteps and no fresh noise: leave out {', '.join(other)}")
    sigmas = _levels(flow, config, tokens)
    timesteps = flow.num_train_timesteps * sigmas
    if flow.integer_timesteps:
        timesteps = np.trunc(timesteps)
    # The levels in float32, as diffusers has them: of what remains of the signal at first, that decides.
    levels = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
    columns = makers[config.name](1 - levels, levels)
    now, ones, zeros = levels[:-1], np.ones(config.steps), np.zeros(config.steps)
    clean = (ones, -now) if flow.prediction_type == "flow_prediction" else (zeros, ones)
    steps = timesteps, ones, *clean, *columns, zeros
    return Steps(*(np.asarray(column, np.float32) for column in steps)), 1.0


def _levels(flow: FlowConfig, config: SamplerConfig, tokens: int | None) -> Float[np.ndarray, " S"]:
    """The noise levels at which the model is asked, spaced as diffusers' scheduler of each sampler does."""
    least, steps = 1 / flow.num_train_timesteps, config.steps
    if flow.use_dynamic_shifting:
        if tokens is None:
            raise ValueError("this flow's shift depends on the number of tokens, which is not given")
        shift = dynamic_shift(flow, tokens)
    else:
        shift = flow.shift if flow.sampling_shift is None else flow.sampling_shift
    if config.name == "euler":
        # Its last level is the training table's, and is shifted with the others once more.
        last = least if flow.use_dynamic_shifting else shifted(least, shift)
        return shifted(np.linspace(1, last, steps), shift)
    if config.name == "dpmpp_2m":
        spaced = (1 - np.linspace(1, least, steps + 1))[:0:-1]
    else:
        spaced = np.linspace(1, least, steps + 1)[:-1]
    return np.minimum(shifted(spaced, shift), 1 - 1e-6)  # multistep solvers need some signal


def _euler(signal: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, ...]:
    """Euler's method: x moves along the velocity, which is (x - x0) / deviation."""
    ratio = deviation[1:] / deviation[:-1]
    return ratio, 1 - ratio, 0 * ratio, 0 * ratio
