"""Whether a scheduler's file samples as our schedule says: both by diffusers' own classes, and our noise levels."""

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.diffusion.schedule import (
    ScheduleConfig,
    alphas_cumprod,
    schedule_config_from_diffusers,
    schedule_config_to_diffusers,
)
from dreamllm_jax.interop.files import read_config, read_json

STEPS = 20
_READ_AS = "DDPMScheduler"  # by the original program, whatever the file says


def compare_sampling(schedule: ScheduleConfig, file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What comes of our schedule and of a `scheduler_config.json`.

    Returns:
      Name -> ours, theirs: the noise levels; and of the scheduler's own class and of the one that the original program
      reads it as, the timesteps and the latents of some steps with a stand-in for a model.

    Raises:
      ValueError: the file is of another noise process, naming the setting.
    """
    read_config(file, schedule_config_from_diffusers)
    ours, theirs = schedule_config_to_diffusers(schedule), read_json(file)
    found = {"noise levels": (alphas_cumprod(schedule), _scheduler(theirs, "").alphas_cumprod.numpy())}
    for kind in dict.fromkeys(("", _READ_AS)):
        one, other = _trajectory(_scheduler(ours, kind)), _trajectory(_scheduler(theirs, kind))
        for name in one.keys() & other.keys():
            found[f"{name} {kind}".strip()] = one[name], other[name]
    return found


def _scheduler(settings: Mapping[str, Any], kind: str):
    import diffusers

    # Its warnings of settings that another class does not know concern nobody: the original ignores them too.
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        return getattr(diffusers, kind or settings.get("_class_name", _READ_AS)).from_config(dict(settings))
    finally:
        diffusers.logging.set_verbosity(verbosity)


def _trajectory(scheduler) -> dict[str, np.ndarray]:
    import torch

    scheduler.set_timesteps(STEPS)
    found = {"timesteps": scheduler.timesteps.double().numpy()}
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4, 4, generator=draws) * float(scheduler.init_noise_sigma)
    drawn = {"generator": draws} if "generator" in inspect.signature(scheduler.step).parameters else {}
    with contextlib.suppress(ImportError):  # a few need packages of their own
        for timestep in scheduler.timesteps:
            predicted = 3 * torch.tanh(scheduler.scale_model_input(x, timestep) + 0.001 * timestep)  # clipped by some
            x = scheduler.step(predicted, timestep, x, **drawn).prev_sample
        found["latents"] = x.double().numpy()
    return found
