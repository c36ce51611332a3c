"""diffusers' `scheduler_config.json` of a rectified flow, read and written.

Two families have it. `FlowMatchEulerDiscreteScheduler` has one shift. The multistep solvers have `flow_shift`, which is
of sampling alone: programs that train read their files, too, as `FlowMatchEulerDiscreteScheduler`, for which the shift
is 1 where the file has no `shift`. So SANA is trained without a shift and sampled with one.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dreamllm_jax.diffusion.flow import FlowConfig

_EULER = "FlowMatchEulerDiscreteScheduler"
_SOLVERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
_FIELDS = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)
# Settings that would make it another process or other noise levels.
_OFF = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "thresholding",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
)
_VARIANCES = ("learned", "learned_range")
# For models that did not come with a scheduler.
_PUBLISHED = {"_class_name": _EULER} | {name: getattr(FlowConfig(), name) for name in _FIELDS}
_PUBLISHED_SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "flow_shift": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


def flow_config_from_diffusers(config: Mapping[str, Any]) -> FlowConfig:
    """Reads a diffusers `scheduler_config.json`.

    Raises:
      ValueError: for a scheduler of another process, saying which it is, or a setting that is not supported, naming it.
    """
    kind = config.get("_class_name")
    if kind not in (_EULER, *_SOLVERS):
        what = (
            f"{kind} is not of a flow" if kind else "it does not say _class_name: whether it is of a flow is not known"
        )
        raise ValueError(f"{what}; this image decoder needs {_EULER} or a solver with use_flow_sigmas")
    if kind in _SOLVERS:
        predicted, flowing = config.get("prediction_type", "epsilon"), config.get("use_flow_sigmas", False)
        if predicted != "flow_prediction" or flowing is not True:
            raise ValueError(
                f"{kind} with prediction_type={predicted!r} and use_flow_sigmas={flowing!r} is not of a flow, which "
                "has 'flow_prediction' and True"
            )
    for name in _OFF:
        if config.get(name):
            raise ValueError(f"scheduler setting {name}={config[name]!r} is not supported for a flow (only off)")
    if (variance := config.get("variance_type")) in _VARIANCES:
        raise ValueError(f"scheduler setting variance_type={variance!r} is not supported for a flow (only None)")
    given = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    if kind in _SOLVERS:
        given["integer_timesteps"] = True
        given["sampling_shift"] = config.get("flow_shift", 1.0)
    return FlowConfig(**given, scheduler=json.dumps(dict(config)))


def flow_config_to_diffusers(config: FlowConfig) -> dict[str, Any]:
    """A diffusers `scheduler_config.json`: the one that the model came with, but for what is otherwise since.

    A file of `FlowMatchEulerDiscreteScheduler` has no place for another shift of sampling, nor for timesteps without
    fractions: it becomes a solver's. Density and weighting have a place in neither; they are not of the process.

    Raises:
      ValueError: the denoiser gives clean latents, or sees scaled ones, which no scheduler of a flow expects.
    """
    for name in ("prediction_type", "input_scale"):
        if (value := getattr(config, name)) != getattr(FlowConfig, name):
            raise ValueError(f"diffusers has no scheduler for a flow with {name}={value!r}")
    kept = json.loads(config.scheduler) if config.scheduler else _PUBLISHED
    if kept.get("_class_name") == _EULER and (config.sampling_shift is not None or config.integer_timesteps):
        kept = _PUBLISHED_SOLVER
    names = _FIELDS if kept.get("_class_name") == _EULER else (*_FIELDS, "flow_shift")
    came, now = _settings(flow_config_from_diffusers(kept)), _settings(config)
    return kept | {name: now[name] for name in names if now[name] != came[name]}


def _settings(config: FlowConfig) -> dict[str, Any]:
    shift = config.shift if config.sampling_shift is None else config.sampling_shift
    return dataclasses.asdict(config) | {"flow_shift": shift}
