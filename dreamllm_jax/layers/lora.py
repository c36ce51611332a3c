"""Low-rank adapters of a tower's products (LoRA, arXiv 2106.09685): W x becomes W x + alpha / rank · B A x.

Beside the `kernel` of each adapted product stand `lora_a` f[N, I, R] and `lora_b` f[N, R, O] of its N layers,
parameters like all others, which the list `parameters.trainable` chooses. B begins at zero: a model begins as it was.

Legend: N layers, I width in, O width out, R rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_A, LORA_B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which products have adapters.

    Attributes:
      rank: R.
      alpha: what they add is scaled by alpha / rank.
      targets: the adapted products of every layer.
      products: those that there are; of another tower, its subclass says which.
    """

    products: ClassVar[tuple[str, ...]] = PRODUCTS
    rank: int
    alpha: float
    targets: tuple[str, ...] = PRODUCTS

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank and alpha must be positive, got {self.rank} and {self.alpha}")
        if not self.targets or set(self.targets) - set(self.products):
            raise ValueError(
                f"targets must be some of {', '.join(self.products)}, got {', '.join(self.targets) or 'none'}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def chosen(lora: LoraConfig | None, product: str) -> LoraConfig | None:
    """The adapters, if there are any and this product is to have one."""
    return lora if lora is not None and product in lora.targets else None


def adapt(x: jax.Array, a: jax.Array, b: jax.Array, scale: float, axes: int = 1) -> jax.Array:
    """What an adapter adds to a product.

    Args:
      x: f[..., *inputs], the `axes` last of which are multiplied.
      a: f[*inputs, R].
      b: f[R, *outputs].

    Returns:
      f[..., *outputs] in the type of `x`.
    """
    return jnp.tensordot(jnp.tensordot(x, a, axes=axes), b, axes=1) * jnp.asarray(scale, x.dtype)


def is_adapter(path: str) -> bool:
    """Whether a parameter's path is of an adapter."""
    return path.rsplit("/", 1)[-1] in (LORA_A, LORA_B)


def adapters_of(path: str) -> tuple[str, ...]:
    """Paths of the adapter, there or not, of the kernel at `path`; none for another parameter."""
    module, _, leaf = path.rpartition("/")
    return (f"{module}/{LORA_A}", f"{module}/{LORA_B}") if leaf == "kernel" else ()


def adapters_in(config: Any, path: str = "") -> dict[str, LoraConfig]:
    """The adapters of the towers that a configuration is made of: path of a tower -> its adapters."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, LoraConfig):
            found[path] = value
        elif dataclasses.is_dataclass(value):
            found |= adapters_in(value, f"{path}/{field.name}" if path else field.name)
    return found


def without_adapters(config: Any, towers: Mapping[str, Any], path: str = "") -> Any:
    """The configuration whose towers at these paths have no adapters."""
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, LoraConfig):
            changed |= {field.name: None} if path in towers else {}
        elif dataclasses.is_dataclass(value):
            changed[field.name] = without_adapters(value, towers, f"{path}/{field.name}" if path else field.name)
    return dataclasses.replace(config, **changed)


def tower_of(path: str, towers: Mapping[str, LoraConfig]) -> str | None:
    """Of these towers the one that the parameter at `path` is of."""
    return next((tower for tower in towers if path.startswith(f"{tower}/")), None)


def merge(kernel, a, b, scale: float):
    """The kernel that does what `kernel` and its adapter do: W + alpha / rank · A B, in float32, then rounded.

    Args:
      kernel: f[N, I, O], or f[N, 1, 1, I, O] of a 1x1 convolution, of NumPy or JAX like the others.
      a: f[N, I, R].
      b: f[N, R, O].

    Returns:
      The shape and type of `kernel`.
    """
    product = a.astype(np.float32) @ b.astype(np.float32)
    return (kernel.astype(np.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def initial_a(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """First values of A f[..., I, R]: normal, such that its outputs have the size of its inputs."""
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-2] ** -0.5, dtype)
