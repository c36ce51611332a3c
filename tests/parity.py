"""Comparing our networks with their PyTorch references: the same random weights, outputs and every gradient."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.layers.lora import LORA_A, LORA_B, merge

TOLERANCE = 1e-5
# Compilation is nearly all the time that small models take, and half of it goes without the optimiser.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def nchw(x: Any) -> torch.Tensor:
    """Images in our layout, as torch's."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def nhwc(x: torch.Tensor) -> np.ndarray:
    """The inverse of `nchw`."""
    return x.detach().movedim(1, -1).numpy()


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter random values of a size that keeps activations alive, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.float().eval()


def tensors(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Name -> value of every parameter; tied ones appear once."""
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def gradients(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Name -> gradient of every parameter, zero where none arrived."""
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {
        name: np.zeros(parameter.shape, np.float32) if grads[name] is None else grads[name].numpy()
        for name, parameter in module.named_parameters()
    }


def random_weights(shapes: Any, seed: int = 0) -> Any:
    """A parameter tree of these shapes, drawn as `randomised` draws, without compiling an initialiser."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name in ("kernel", "embedding"):
            return noise / np.sqrt(leaf.shape[-2] if name == "kernel" else leaf.shape[-1], dtype=np.float32)
        return 0.3 * noise + (1 if name == "scale" else 0)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def merged(params: Any, scale: float) -> dict:
    """A parameter tree whose kernels do what they and their adapters (`layers.lora`) did together."""
    flat = flatten_dict(params, sep="/")
    for path in [path for path in flat if path.endswith(f"/{LORA_A}")]:
        kernel, b = (path.replace(LORA_A, leaf) for leaf in ("kernel", LORA_B))
        flat[kernel] = merge(flat[kernel], flat.pop(path), flat.pop(b), scale)
    return unflatten_dict(flat, sep="/")


def relative_error(got: np.ndarray, want: np.ndarray, scale: np.ndarray | None = None) -> float:
    """|got - want| / |scale or want|, in L2 norms of whole tensors; infinite where shapes or zeros differ."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return math.inf
    error, size = np.linalg.norm(got - want), np.linalg.norm(want if scale is None else scale)
    return 0.0 if error == 0 else (error / size if size else math.inf)


def assert_same(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], tolerance: float = TOLERANCE) -> float:
    """Asserts the same names and, each within the tolerance, the same tensors; returns the largest error.

    The bias of an attention's keys moves all scores of a query alike; its gradient is zero but for rounding, and judged
    on the scale of the values' bias.
    """
    assert sorted(got) == sorted(want)
    errors = {}
    for name in want:
        values = re.sub(r"(k_proj|to_k)(?=[./]bias$)", lambda keys: {"k_proj": "v_proj", "to_k": "to_v"}[keys[0]], name)
        errors[name] = relative_error(got[name], want[name], scale=want[values])
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"
    return max(errors.values())
