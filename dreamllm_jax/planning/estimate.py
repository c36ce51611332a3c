"""What a compiled step means to the one who pays for it: does it fit, how long does it take, what comes of it.

    compute   the compiler's estimated cycles / clock + FLOPs of Pallas kernels / half of the peak; the kernels' FLOPs
              are those that they declare or, where that is more, those of attention by `flops`
    ici       bytes that a chip sends inside its slice / bandwidth of all its links
    dcn       bytes that it sends to other slices / its share of the network
    step      the largest of the three: collectives are taken to hide behind compute, or compute behind them

So a step will hardly be faster, and where its collectives do not overlap it will be slower, up to the sum of the three.
"""

import dataclasses
from typing import Any

from dreamllm_jax.experiment.flops import step_flops
from dreamllm_jax.layers.flops import Flops
from dreamllm_jax.parallel.feeding import row_shards
from dreamllm_jax.planning.step import CompiledStep
from dreamllm_jax.training.parameters import parameter_lines

KERNEL_UTILISATION = 0.5  # share of the peak that Pallas kernels are taken to reach


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step, and what follows from them."""

    compute_seconds: float
    ici_seconds: float
    dcn_seconds: float
    step_seconds: float
    mfu: float
    tokens_per_second: float
    images_per_second: float
    days: float
    chip_hours: float


def estimate(step: CompiledStep) -> Estimate | None:
    """The step's time and yield; None where the compiler gave no cycles (low effort) or no program (it does not fit).

    Tokens and images are slots, filled or not; MFU is defined in `flops`.
    """
    if step.program is None or step.effort == "low":
        return None
    experiment, program, chip = step.experiment, step.program, step.topology.chip
    rows, shape = experiment.rows, experiment.row_shape
    flops = sum(step_flops(experiment).values(), Flops())
    kernel_flops = max(program.kernel_flops, flops.kernels / step.topology.chips)
    compute = program.cycles / chip.clock + kernel_flops / (KERNEL_UTILISATION * chip.peak_flops)
    ici = sum(one.bytes for one in program.collectives if not one.between_slices) / chip.ici_bandwidth
    dcn = sum(one.bytes for one in program.collectives if one.between_slices) / chip.dcn_bandwidth
    seconds = max(compute, ici, dcn)
    hours = experiment.steps * seconds / 3600
    return Estimate(
        compute_seconds=compute,
        ici_seconds=ici,
        dcn_seconds=dcn,
        step_seconds=seconds,
        mfu=flops.model / (seconds * step.topology.chips * chip.peak_flops),
        tokens_per_second=rows.per_step * rows.length / seconds,
        images_per_second=rows.per_step * (shape.see_slots + shape.dream_slots) / seconds,
        days=hours / 24,
        chip_hours=hours * step.topology.chips,
    )


def as_json(step: CompiledStep) -> dict[str, Any]:
    """Everything as plain values: memory in bytes a chip, FLOPs a step of all chips, collectives in bytes a chip sends.

    `flops` is what is executed by the configuration's arithmetic, `kernel_flops` the part of it in attention kernels,
    `model_flops` what MFU is defined on, and `compiled_flops` what was counted in the program outside of kernels.
    """
    flops, memory, program, chips = step_flops(step.experiment), step.memory, step.program, step.topology.chips
    estimated = estimate(step)
    names = [field.name for field in dataclasses.fields(Estimate)]
    return {
        "fits": memory.fits,
        "topology": step.topology.name,
        "chips": chips,
        "mesh": step.mesh,
        "rows_per_chip": step.experiment.rows.per_step / chips,
        "remat": step.experiment.model.remat,
        "parameters": [dataclasses.asdict(one) for one in step.parameters],
        "hbm": {
            "limit": memory.limit,
            "peak": memory.peak,
            "weights": memory.weights,
            "optimizer": memory.optimizer,
            "next_batch": memory.next_batch,
            "temporaries": memory.temporaries,
        },
        "flops": {
            "total": sum(part.executed for part in flops.values()),
            **{name: part.executed for name, part in flops.items()},
        },
        "kernel_flops": sum(part.kernels for part in flops.values()),
        "model_flops": sum(part.model for part in flops.values()),
        "compiled_flops": chips * program.mxu_flops if program else None,
        "estimated": dataclasses.asdict(estimated) if estimated else dict.fromkeys(names),
        "collectives": [dataclasses.asdict(one) for one in (program.collectives if program else ())],
        "compile_seconds": step.compile_seconds,
        "effort": step.effort,
    }


def describe(step: CompiledStep) -> str:
    """The same for people."""
    topology, experiment, program = step.topology, step.experiment, step.program
    rows, shape = experiment.rows, experiment.row_shape
    mesh = " x ".join(f"{axis} {size}" for axis, size in step.mesh.items() if size > 1) or "one chip"
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    lines = [
        f"{topology.name}: {topology.chips} chips of {topology.chip.kind} ({slices}{topology.shape}), mesh {mesh}",
        f"{rows.per_step} rows of {rows.length} tokens a step ({rows.per_step / topology.chips:g} a chip), each with "
        f"room for {shape.see_slots} images to see and {shape.dream_slots} to paint; remat {experiment.model.remat}",
        "",
        "parameters",
        *parameter_lines(step.parameters),
        *_memory_lines(step),
        *_flops_lines(step),
    ]
    if program is not None:
        lines += _program_lines(step)
    return "\n".join(lines)


def _memory_lines(step: CompiledStep) -> list[str]:
    memory = step.memory
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "next batch": memory.next_batch,
        "temporaries": memory.temporaries,
        "in all": memory.peak,
        "limit": memory.limit,
    }
    verdict = "fits" if memory.fits else "does not fit"
    about = " (low effort: up to a fifth too low)" if step.effort == "low" else ""
    return ["", f"memory of a chip: {verdict}{about}"] + [
        f"  {name:20} {size / 2**30:11.2f} GiB" for name, size in parts.items()
    ]


def _flops_lines(step: CompiledStep) -> list[str]:
    flops = step_flops(step.experiment)
    total = sum(flops.values(), Flops())
    lines = ["", "TFLOP a step           executed       model"]
    for name, part in [*flops.items(), ("in all", total)]:
        if part.executed:
            lines.append(f"  {name:20} {_figure(part.executed / 1e12)}   {_figure(part.model / 1e12)}")
    if total.kernels:
        lines.append(f"  {'outside of kernels':20} {_figure(total.products / 1e12)}")
    if step.program is not None:
        compiled = step.topology.chips * step.program.mxu_flops
        lines.append(f"  {'compiled program':20} {_figure(compiled / 1e12)}   counted there, outside of kernels")
        if step.program.unknown_loops:
            lines.append(f"  loops of unknown length, counted once: {len(step.program.unknown_loops)}")
    return lines


def _figure(value: float) -> str:
    return f"{value:>9,.1f}" if value >= 1 else f"{value:>9.2g}"


def _program_lines(step: CompiledStep) -> list[str]:
    program = step.program
    lines = ["", "collectives                 axis           count     a chip sends"]
    for one in sorted(program.collectives, key=lambda one: -one.bytes):
        where = "  between slices" if one.between_slices else ""
        lines.append(f"  {one.kind:25} {one.axis:12} {one.count:>7,.0f} {one.bytes / 1e9:>13,.3f} GB{where}")
    estimated = estimate(step)
    lines += ["", f"compiled in {step.compile_seconds:.0f} s at {step.effort} effort"]
    if estimated is None:
        return [*lines, "time not estimated: the compiler's cycles mean nothing at low effort"]
    times = f"compute {estimated.compute_seconds:.3f}, interconnect {estimated.ici_seconds:.3f}"
    if step.topology.slices > 1:
        times += f", network between slices {estimated.dcn_seconds:.3f}"
    return [
        *lines,
        f"estimated step         {estimated.step_seconds:.3f} s ({times}; the largest counts)",
        f"model FLOPs utilised   {estimated.mfu:.1%} of {step.topology.chip.peak_flops / 1e12:,.0f} TFLOP/s a chip",
        f"throughput             {estimated.tokens_per_second:,.0f} tokens/s, "
        f"{estimated.images_per_second:,.1f} images/s (slots, filled or not)",
        f"{f'{step.experiment.steps:,} steps':22} {estimated.days:.2f} days, {estimated.chip_hours:,.0f} chip-hours",
    ]


def remedy(step: CompiledStep) -> str:
    """Why a step does not fit, and what to change, in one line."""
    memory, experiment, topology = step.memory, step.experiment, step.topology
    changes = []
    shards = row_shards(experiment.sharding, step.mesh)
    if memory.weights + memory.optimizer < memory.limit:
        if experiment.model.remat != "full":
            changes.append("set model.remat=full")
        if experiment.rows.per_step > shards:
            changes.append(f"lower rows.per_step={experiment.rows.per_step}")
            if experiment.rows.per_step // experiment.rows.microbatches > shards:
                changes.append(f"raise rows.microbatches={experiment.rows.microbatches}")
        elif step.mesh["sequence"] * step.mesh["tensor"] < topology.chips:
            changes.append("raise sharding.tensor or sharding.sequence")
    if step.mesh["data"] > topology.slices:
        changes.append(f"give sharding.data={step.mesh['data']} to sharding.fsdp")
    changes.append("take a larger topology or a chip with more memory")
    return (
        f"the step needs {memory.peak / 2**30:.1f} GiB a chip ({memory.weights / 2**30:.1f} weights, "
        f"{memory.optimizer / 2**30:.1f} optimizer, {memory.next_batch / 2**30:.1f} next batch, "
        f"{memory.temporaries / 2**30:.1f} temporaries), "
        f"a {topology.chip.kind} has {memory.limit / 2**30:.1f}: {'; '.join(changes)}"
    )
