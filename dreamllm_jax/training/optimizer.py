"""AdamW with warm-up and cosine decay, as DreamLLM trains (arXiv 2309.11499, appendix)."""

import dataclasses
from typing import Any, Literal, NamedTuple

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings.

    Attributes:
      learning_rate: its peak, reached after the warm-up.
      warmup_ratio: share of the run's steps over which the learning rate rises linearly from 0.
      end_value: learning rate at the last step, as a share of the peak.
      clip_norm: gradients of a larger global norm are scaled down to it; 0 for no clipping.
      skip_norm: a step whose gradient has a larger global norm is left out; 0 for none.
      ema_decay: keep an average of the trained parameters that decays so a step, such as 0.9999; 0 for none.
      mu_dtype, nu_dtype: storage types of the first and second moments; bfloat16 is rounded to at random (`rounding`).
    """

    learning_rate: float = 2e-5
    warmup_ratio: float = 0.003
    end_value: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    skip_norm: float = 0.0
    ema_decay: float = 0.0
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    nu_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.learning_rate <= 0 or self.eps <= 0:
            raise ValueError(f"learning_rate and eps must be positive, got {self.learning_rate} and {self.eps}")
        for name in ("warmup_ratio", "end_value", "b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("weight_decay", "clip_norm", "skip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


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
    """Clipping by global norm, then AdamW (decoupled weight decay, Loshchilov and Hutter 2019); all in float32."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(adamw)
    if config.ema_decay:
        parts.append(average_params(config.ema_decay))
    return optax.chain(*parts) if len(parts) > 1 else adamw


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
