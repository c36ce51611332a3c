"""Times one joint training step of this project on the devices there are, with random weights and pictures.

python -m benchmarks.joint_step --size=1b --rows=4
"""

import time

import jax

from benchmarks.shapes import experiment, parser, random_batch, report
from dreamllm_jax.parallel.feeding import rows_sharding, to_mesh
from dreamllm_jax.parallel.mesh import make_mesh, use
from dreamllm_jax.training.optimizer import make_optimizer
from dreamllm_jax.training.state import abstract_state, init_leaves, state_from_leaves
from dreamllm_jax.training.step import train_step_of


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    settings = experiment(arguments)
    mesh = make_mesh(settings.sharding)
    sharding = rows_sharding(mesh, settings.sharding, arguments.rows)
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    abstract = abstract_state(settings.model, settings.parameters, settings.optimizer, mesh, settings.sharding)
    leaves = init_leaves(settings.model, {**abstract.trainable, **abstract.frozen}, jax.random.key(0))
    state = state_from_leaves(abstract, leaves, optimizer)
    batch = to_mesh(random_batch(settings), sharding, arguments.rows)
    step = train_step_of(settings, state)
    with use(mesh, settings.sharding):
        began = time.monotonic()
        compiled = step.lower(state, batch, jax.random.key(1)).compile()
        compile_seconds = time.monotonic() - began
        for _ in range(2):
            state, metrics = compiled(state, batch, jax.random.key(1))
        jax.block_until_ready(metrics)
        began = time.monotonic()
        for _ in range(arguments.steps):
            state, metrics = compiled(state, batch, jax.random.key(1))
        jax.block_until_ready((state, metrics))
    seconds = (time.monotonic() - began) / arguments.steps
    device = jax.devices()[0]
    measured = {
        "program": "dreamllm_jax",
        "jax": jax.__version__,
        "loss": float(metrics["loss"]),
        "peak_gib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "compile_seconds": compile_seconds,
    }
    report(arguments, settings, device.device_kind, jax.device_count(), seconds, **measured)


if __name__ == "__main__":
    main()
