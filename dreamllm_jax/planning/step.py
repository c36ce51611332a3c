"""The training step, assembled from shapes alone and compiled for chips that need not be there."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreamllm_jax.data.batch import Batch, empty_batch
from dreamllm_jax.experiment.experiment import Experiment, require_mesh_fits
from dreamllm_jax.parallel.chips import Topology
from dreamllm_jax.parallel.feeding import rows_sharding
from dreamllm_jax.parallel.mesh import make_mesh, use
from dreamllm_jax.planning.program import Program, read_program
from dreamllm_jax.training.parameters import Parameters, count_parameters
from dreamllm_jax.training.state import TrainState, abstract_state
from dreamllm_jax.training.step import IN_FLIGHT, train_step_of

# "low" compiles several times faster: FLOPs and collectives are the same, memory reads up to a fifth too low, and the
# estimated cycles mean nothing.
Effort = Literal["low", "normal"]
_OPTIONS = {"low": {"optimization_level": 9}, "normal": None}  # XLA's EFFORT_O0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      limit: what a program may use.
      peak: what training needs at most at a time; `temporaries` is what is neither weights nor optimizer state nor
        the next batch: activations, gradients, the batch of the step.
      next_batch: the batch of the step to come, which is there already (`training.step.IN_FLIGHT`).
    """

    limit: int
    peak: int
    weights: int
    optimizer: int
    next_batch: int

    @property
    def temporaries(self) -> int:
        return self.peak - self.weights - self.optimizer - self.next_batch

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What compiling a step has told; `program` is None if the memory does not suffice."""

    experiment: Experiment
    topology: Topology
    effort: Effort
    mesh: dict[str, int]
    parameters: tuple[Parameters, ...]
    memory: Memory
    program: Program | None
    compile_seconds: float


def lower_step(experiment: Experiment, devices: Sequence[jax.Device]) -> tuple[Mesh, TrainState, jax.stages.Lowered]:
    """Traces the training step for `devices`; also gives the mesh and the state's shapes.

    Raises:
      ValueError: a mesh that does not fit the devices, or rows that it does not divide.
    """
    rows, model = experiment.rows, experiment.model
    mesh = make_mesh(experiment.sharding, devices)
    require_mesh_fits(experiment, mesh.shape)
    batch = _abstract_batch(experiment, rows_sharding(mesh, experiment.sharding, rows.per_step))
    state = abstract_state(model, experiment.parameters, experiment.optimizer, mesh, experiment.sharding)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    with use(mesh, experiment.sharding):
        return mesh, state, train_step_of(experiment, state).lower(state, batch, key)


def next_batch_bytes(experiment: Experiment, mesh: Mesh) -> int:
    """Bytes of one chip that hold what comes next, while a step is computed with its own batch."""
    sharding = rows_sharding(mesh, experiment.sharding, experiment.rows.per_step)
    return (IN_FLIGHT - 1) * _bytes_per_chip(_abstract_batch(experiment, sharding))


def _abstract_batch(experiment: Experiment, sharding: NamedSharding) -> Batch:
    def of(row: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((experiment.rows.per_step, *row.shape[1:]), row.dtype, sharding=sharding)

    return jax.tree.map(of, empty_batch(1, experiment.row_shape))


def compile_step(experiment: Experiment, topology: Topology, effort: Effort = "normal") -> CompiledStep:
    """Compiles the training step for a topology.

    Raises:
      ImportError: there is no TPU compiler.
      ValueError: a mesh that does not fit the chips, rows that it does not divide.
    """
    mesh, state, lowered = lower_step(experiment, topology.devices())
    weights, optimizer = _bytes_per_chip((state.trainable, state.frozen)), _bytes_per_chip(state.opt_state)
    next_batch = next_batch_bytes(experiment, mesh)
    limit, program = topology.chip.hbm_bytes, None
    began = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=_OPTIONS[effort])
    except jax.errors.JaxRuntimeError as error:
        peak, limit = exhausted(str(error))
        peak = max(peak + next_batch, limit + 1)  # what fits by the figures alone may still be too scattered
    else:
        peak = compiled.memory_analysis().peak_memory_in_bytes + next_batch
        program = read_program(compiled.as_text(), mesh.shape)
    seconds = time.monotonic() - began
    memory = Memory(limit, max(peak, weights + optimizer + next_batch), weights, optimizer, next_batch)
    return CompiledStep(
        experiment,
        topology,
        effort,
        dict(mesh.shape),
        count_parameters(state.trainable, state.frozen),
        memory,
        program,
        seconds,
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_EXHAUSTED = (
    r"total memory required .* \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
)


def exhausted(message: str) -> tuple[int, int]:
    """Bytes (needed, there are) of one chip, from what the compiler says when its memory does not suffice.

    Raises:
      RuntimeError: it is another message.
    """
    found = next((match for pattern in _EXHAUSTED if (match := re.search(pattern, message))), None)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        raise RuntimeError(message)
    needed, needed_unit, limit, limit_unit = found.groups()
    return int(float(needed) * _UNITS[needed_unit]), int(float(limit) * _UNITS[limit_unit])


def _bytes_per_chip(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
