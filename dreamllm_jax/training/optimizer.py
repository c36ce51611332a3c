"""AdamW with warm-up and cosine decay, as DreamLLM trains (arXiv 2309.11499, appendix)."""

import dataclasses
from typing import Literal

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings.

    Attributes:
      learning_rate: its peak, reached after the warm-up.
      warmup_ratio: share of the run's steps over which the learning rate rises linearly from 0.
      end_value: learning rate at the last step, as a share of the peak.
      clip_norm: gradients of a larger global norm are scaled down to it; 0 for no clipping.
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
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    nu_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.learning_rate <= 0 or self.eps <= 0:
            raise ValueError(f"learning_rate and eps must be positive, got {self.learning_rate} and {self.eps}")
        for name in ("warmup_ratio", "end_value", "b1", "b2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.weight_decay < 0 or self.clip_norm < 0:
            raise ValueError(
                f"weight_decay and clip_norm must not be negative, got {self.weight_decay} and {self.clip_norm}"
            )


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
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
