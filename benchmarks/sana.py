"""What the TPU compiler makes of SANA's denoiser: forward, and backward to the condition and all weights, on one chip.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.sana --chip=v5e --size=16 --images=32 [--remat=full]

Needs no TPU. Prints a line of JSON: `ratio` is the estimated time over that of the model's FLOPs at the chip's peak.
The estimate is the compiler's cycles and, for every Pallas kernel, the larger of its FLOPs at half of the peak and of its
arguments' and results' bytes at 70 % of the memory's bandwidth.
"""

import argparse
import dataclasses
import json
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.parallel.chips import find_topology
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, use
from dreamllm_jax.planning.hlo import executions, parse
from dreamllm_jax.planning.program import read_program
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.image_decoders.sana_transformer import PUBLISHED, SanaTransformerConfig

HBM_BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9}  # bytes/s, of the chips' data sheets


def kernel_seconds(text: str, peak: float, bandwidth: float) -> float:
    """Of all Pallas kernels."""
    module, seconds = parse(text), 0.0
    for part in executions(module)[0]:
        computation = module.computations[part.computation]
        for one in computation.values():
            if one.opcode == "custom-call" and '"tpu_custom_call"' in one.attributes:
                declared = one.attributes.partition('"cost_estimate":')[2].partition('"flops":"')[2].partition('"')[0]
                moved = one.bytes + sum(computation[name].bytes for name in one.operands)
                seconds += part.count * max(float(declared or 0) / (0.5 * peak), moved / (0.7 * bandwidth))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="v5e", choices=list(HBM_BANDWIDTH))
    parser.add_argument("--shape", default="sana-1.6b-512", choices=list(PUBLISHED))
    parser.add_argument("--size", type=int, default=16, help="latents on a side")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=300, help="of the condition")
    parser.add_argument("--layers", type=int, help="instead of the published number")
    parser.add_argument("--remat", default="none", choices=("none", "full"))
    parser.add_argument("--text", help="file for the compiled program")
    arguments = parser.parse_args()

    topology = find_topology(f"{arguments.chip}:{'1x1' if arguments.chip == 'v5e' else '1x1x1'}")
    config = SanaTransformerConfig(**PUBLISHED[arguments.shape])
    config = dataclasses.replace(config, num_layers=arguments.layers or config.num_layers)
    model, images, size = config.make(jnp.bfloat16, arguments.remat), arguments.images, (arguments.size,) * 2
    devices = topology.devices()[:1]

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(devices[0]))

    inputs = (
        shape(images, *size, config.in_channels),
        shape(images),
        Condition(shape(images, arguments.tokens, config.caption_channels, dtype=jnp.bfloat16)),
    )
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    params = jax.tree.map(lambda x: shape(*x.shape, dtype=jnp.bfloat16), params)

    def loss(params, condition, latents, timesteps):
        return jnp.square(model.apply({"params": params}, latents, timesteps, condition)).sum()

    sharding = ShardingConfig()
    with use(make_mesh(sharding, devices), sharding):
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(params, inputs[2], *inputs[:2])
    began = time.monotonic()
    compiled = lowered.compile()
    seconds, text = time.monotonic() - began, compiled.as_text()
    if arguments.text:
        with open(arguments.text, "w") as file:
            file.write(text)

    tally, chip = Tally(lambda _: True), topology.chip
    config.flops(tally, images, size, arguments.tokens, True, arguments.remat)
    program = read_program(text, {"data": 1})
    ideal = tally.total.model / chip.peak_flops
    kernels = kernel_seconds(text, chip.peak_flops, HBM_BANDWIDTH[chip.kind])
    estimate = program.cycles / chip.clock + kernels
    told = {
        "ratio": round(estimate / ideal, 3),
        "milliseconds": round(1e3 * estimate, 2),
        "kernel_milliseconds": round(1e3 * kernels, 2),
        "model_tflops": round(tally.total.model / 1e12, 2),
        "compiled_tflops": round(program.mxu_flops / 1e12, 2),
        "hbm_gb": round(program.hbm_bytes / 1e9, 1),
        "peak_gib": round(compiled.memory_analysis().peak_memory_in_bytes / 2**30, 2),
        "compile_seconds": round(seconds, 1),
    }
    print(json.dumps(vars(arguments) | told))


if __name__ == "__main__":
    main()
