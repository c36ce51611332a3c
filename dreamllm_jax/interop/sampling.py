"""Whether a scheduler's file samples as our decoder says: both by diffusers' own classes, and our noise levels."""

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.interop.files import read_config, read_json
from dreamllm_jax.towers.registry import ImageDecoderConfig

STEPS = 20
TOKENS = 1024  # of the denoiser, where a shift grows with them


def compare_sampling(decoder: ImageDecoderConfig, file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What comes of our schedule and of a `scheduler_config.json`.

    Returns:
      Name -> ours, theirs: the noise levels; and of the scheduler's own class and of the one that programs which train
      read it as, the timesteps and the latents of some steps with a stand-in for a model.

    Raises:
      ValueError: the file is of another noise process, naming the setting.
    """
    parts, trainer = {part: getattr(decoder, part) for part in decoder.public_parts}, decoder.public_trainer
    read_config(file, lambda settings: decoder.from_public(parts, settings))
    ours, theirs = decoder.to_public_scheduler(), read_json(file)
    own = theirs.get("_class_name", trainer)
    levels = decoder.public_noise_levels(_scheduler(theirs, own), _scheduler(theirs, trainer))
    found = {"noise levels": (decoder.noise_levels, levels)}
    for kind in ("", trainer):
        one = _trajectory(_scheduler(ours, kind or ours.get("_class_name", trainer)))
        other = _trajectory(_scheduler(theirs, kind or own))
        for name in one.keys() & other.keys():
            found[f"{name} {kind}".strip()] = one[name], other[name]
    return found


def _scheduler(settings: Mapping[str, Any], kind: str):
    import diffusers

    # Its warnings of settings that another class does not know concern nobody: the original ignores them too.
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        return getattr(diffusers, kind).from_config(dict(settings))
    finally:
        diffusers.logging.set_verbosity(verbosity)


def _trajectory(scheduler) -> dict[str, np.ndarray]:
    import torch

    try:
        scheduler.set_timesteps(STEPS, **_shift(scheduler))
    except AssertionError:  # most solvers have no shift that is "linear", and nobody samples with such a file of theirs
        return {}
    found = {"timesteps": scheduler.timesteps.double().numpy()}
    draws = torch.Generator().manual_seed(0)
    # What these are is said by schedulers that scale their latents alone.
    start, scaled = getattr(scheduler, "init_noise_sigma", 1.0), getattr(scheduler, "scale_model_input", lambda x, _: x)
    x = torch.randn(1, 4, 4, 4, generator=draws) * float(start)
    drawn = {"generator": draws} if "generator" in inspect.signature(scheduler.step).parameters else {}
    with contextlib.suppress(ImportError):  # a few need packages of their own
        for timestep in scheduler.timesteps:
            predicted = 3 * torch.tanh(scaled(x, timestep) + 0.001 * timestep)  # clipped by some
            x = scheduler.step(predicted, timestep, x, **drawn).prev_sample
        found["latents"] = x.double().numpy()
    return found


def _shift(scheduler) -> dict[str, float]:
    """What a scheduler whose shift grows with the picture is told, as the pipelines of diffusers do."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting") or "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
        return {}
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return {"mu": low + (high - low) * (TOKENS - least) / (most - least)}
