"""AdamW with warm-up and cosine decay, as DreamLLM trains (arXiv 2309.11499, appendix); Muon for chosen matrices."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from dreamllm_jax.experiment.settings import OptimizerConfig
from dreamllm_jax.layers.weights import LAYERS, place_in_pattern


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `end_value` (transformers' `get_cosine_schedule_with_warmup`)."""
    warmup = round(config.warmup_ratio * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.learning_rate * config.end_value,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (decoupled weight decay, Loshchilov and Hutter 2019), or Muon where the
    configuration says so; all in float32."""
    schedule = learning_rate_schedule(config, steps)
    moved = optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    if config.muon:
        ways = {"adamw": moved, "muon": _muon(schedule, config.weight_decay)}
        moved = optax.partition(ways, lambda params: _ways(config, {path: leaf.shape for path, leaf in params.items()}))
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(moved)
    if config.learning_rates or config.layer_decays:
        parts.append(scale_by_group(config))
    if config.ema_decay:
        parts.append(average_params(config.ema_decay))
    return optax.chain(*parts) if len(parts) > 1 else moved


MOMENTUM = 0.95
SAME_SIZE = 0.2  # the root mean square of AdamW's updates, in learning rates (Liu et al., arXiv 2502.16982)


def _muon(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Momentum whose singular values are all brought near one (Jordan et al. 2024), and then to the size that AdamW's
    updates have, so that both follow one learning rate."""

    def axes(updates: Mapping[str, Any]) -> dict[str, Any]:
        masked = optax.MaskedNode
        return {path: x if isinstance(x, masked) else MuonDimensionNumbers(-2, -1) for path, x in updates.items()}

    return optax.chain(
        scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=axes),
        optax.stateless(lambda updates, _: jax.tree.map(lambda x: SAME_SIZE * max(x.shape[-2:]) ** 0.5 * x, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _ways(config: OptimizerConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Which of "muon" and "adamw" moves each parameter.

    Raises:
      ValueError: naming an expression that matches no trained parameter, or one that is no matrix.
    """
    found = {}
    for pattern in config.muon:
        matched = [path for path in shapes if re.fullmatch(pattern, path)]
        if not matched:
            raise ValueError(f"optimizer.muon: {pattern!r} decides about no trained parameter")
        for path in matched:
            shape = shapes[path]
            if not path.endswith("/kernel") or len(shape) < 2 or math.prod(shape[1:-2]) != 1:
                raise ValueError(
                    f"optimizer.muon: {path} of shape {shape} is no matrix, nor a stack of them: let the expression "
                    "end in /kernel, and leave out convolutions that are wider than a pixel"
                )
        found |= dict.fromkeys(matched, "muon")
    return {path: found.get(path, "adamw") for path in shapes}


def learning_rate_factors(config: OptimizerConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the learning rate of each trained parameter is multiplied by, one number or f32[N, 1, ...] for N layers.

    Args:
      shapes: of the trained parameters, by path.

    Raises:
      ValueError: naming an expression that matches no trained parameter, or no stack of layers.
    """
    used = set()

    def factor(setting: str, path: str) -> float | None:
        for pattern, value in getattr(config, setting):
            if re.fullmatch(pattern, path):
                used.add((setting, pattern))
                return value
        return None

    factors: dict[str, Any] = {}
    for path, shape in shapes.items():
        factors[path] = factor("learning_rates", path) or 1.0
        if decay := factor("layer_decays", path):
            if LAYERS not in path.split("/"):
                raise ValueError(f"optimizer.layer_decays: {path} is matched, but is not of a stack of layers")
            kind, kinds = place_in_pattern(path)
            above = np.arange(shape[0], dtype=np.float32)[::-1] * kinds + (kinds - 1 - kind)
            above = above.reshape(-1, *[1] * (len(shape) - 1))
            factors[path] *= np.float32(decay) ** above
    for setting in ("learning_rates", "layer_decays"):
        for pattern, _ in getattr(config, setting):
            if (setting, pattern) not in used:
                raise ValueError(f"optimizer.{setting}: {pattern!r} decides about no trained parameter")
    return factors


def scale_by_group(config: OptimizerConfig) -> optax.GradientTransformation:
    """Multiplies the updates of flat parameters by their `learning_rate_factors`, after AdamW: weight decay as well."""

    def shapes(tree):
        return {path: leaf.shape for path, leaf in tree.items()}

    def init(params):
        learning_rate_factors(config, shapes(params))
        return optax.EmptyState()

    def update(updates, state, params=None):
        factors = learning_rate_factors(config, shapes(updates))
        return {path: update * factors[path] for path, update in updates.items()}, state

    return optax.GradientTransformation(init, update)


class AverageState(NamedTuple):
    """The averaged parameters."""

    ema: Any


def average_params(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters that the updates lead to; the last of a chain."""

    def update(updates, state, params):
        new = optax.apply_updates(params, updates)
        return updates, AverageState(optax.incremental_update(new, state.ema, 1 - decay))

    return optax.GradientTransformation(AverageState, update)


def split_average(state: Any) -> tuple[Any, Any]:
    """An optimizer's state without the averaged parameters, and these; None where none are kept."""
    if isinstance(state, tuple) and state and isinstance(state[-1], AverageState):
        return state[:-1], state[-1].ema
    return state, None


def join_average(state: Any, average: Any) -> Any:
    """The inverse of `split_average`."""
    return state if average is None else (*state, AverageState(average))
