"""What the TPU compiler makes of an image decoder's denoiser or encoder, on one chip.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.image_decoders --decoder=sana-1.6b-512 --size=512 \\
    --images=32 --chip=v5e [--part=encoder] [--gradient=condition] [--remat=full]

Needs no TPU. Prints a line of JSON: `ratio` is the estimated time over that of the model's FLOPs at the chip's peak.
The estimate is the compiler's cycles and, for every Pallas kernel, the larger of its FLOPs at half of the peak and of
its arguments' and results' bytes at 70 % of the memory's bandwidth. A denoiser is run forward, and backward to the
condition and, unless told otherwise, to all weights; an encoder forward.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dreamllm_jax.common.configuration import read
from dreamllm_jax.layers.flops import Tally
from dreamllm_jax.parallel.chips import find_topology
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, use
from dreamllm_jax.planning.hlo import executions, parse
from dreamllm_jax.planning.program import read_program
from dreamllm_jax.towers import registry
from dreamllm_jax.towers.condition import Condition

HBM_BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9}  # bytes/s, of the chips' data sheets
DECODERS = registry.published(registry.IMAGE_DECODERS)
SIZES = 6  # that Stable Diffusion XL is told


def config_of(name: str) -> Any:
    """The published configuration of an image decoder."""
    kinds = {settings["kind"]: cls for cls in registry.IMAGE_DECODERS for settings in cls.PUBLISHED.values()}
    return read(kinds[DECODERS[name]["kind"]], DECODERS[name], "decoder")


def denoiser(config: Any, arguments: argparse.Namespace, shape: Callable) -> tuple[Callable, tuple, Tally]:
    """A gradient of the denoiser, what it is given, and its FLOPs."""
    tower, images = config.denoiser, arguments.images
    latents = config.latent_shape(arguments.size, arguments.size)
    model = tower.make(jnp.bfloat16, arguments.remat)
    wide = shape(images, tower.pooled_width, dtype=jnp.bfloat16) if tower.pooled_width else None
    condition = Condition(shape(images, arguments.tokens, tower.condition_width, dtype=jnp.bfloat16), pooled=wide)
    if config.wants_sizes:
        condition = condition.with_sizes(shape(images, SIZES))
    given = shape(images, *latents), shape(images)
    params = parameters(model, shape, *given, condition)
    trained = arguments.gradient == "weights"

    def loss(condition, params, latents, timesteps):
        return jnp.square(model.apply({"params": params}, latents, timesteps, condition)).sum()

    tally = Tally(lambda _: trained)
    tower.flops(tally, images, latents[:2], arguments.tokens, True, arguments.remat)
    return jax.grad(loss, (0, 1) if trained else 0), (condition, params, *given), tally


def encoder(config: Any, arguments: argparse.Namespace, shape: Callable) -> tuple[Callable, tuple, Tally]:
    """The same of the way from pixels to what is stored of them."""
    tower, size = config.autoencoder, arguments.size
    model, pixels = tower.make(jnp.bfloat16), shape(arguments.images, size, size, 3)
    tally = Tally(lambda _: False)
    tower.encoder_flops(tally, arguments.images, size, size)
    params = parameters(model, shape, pixels)
    return lambda params, x: model.apply({"params": params}, x, method="encode"), (params, pixels), tally


def parameters(model: nn.Module, shape: Callable, *inputs: Any) -> Any:
    """The shapes of a module's parameters, in bfloat16."""
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    return jax.tree.map(lambda x: shape(*x.shape, dtype=jnp.bfloat16), params)


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
    parser.add_argument("--decoder", default="sana-1.6b-512", choices=list(DECODERS))
    parser.add_argument("--part", default="denoiser", choices=("denoiser", "encoder"))
    parser.add_argument("--size", type=int, default=512, help="pixels on a side")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of the condition")
    parser.add_argument("--gradient", default="weights", choices=("weights", "condition"))
    parser.add_argument("--remat", default="none", choices=("none", "full"))
    parser.add_argument("--text", help="file for the compiled program")
    arguments = parser.parse_args()

    topology = find_topology(f"{arguments.chip}:{'1x1' if arguments.chip == 'v5e' else '1x1x1'}")
    devices, chip = topology.devices()[:1], topology.chip

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(devices[0]))

    sharding, build = ShardingConfig(), {"denoiser": denoiser, "encoder": encoder}[arguments.part]
    run, inputs, tally = build(config_of(arguments.decoder), arguments, shape)
    with use(make_mesh(sharding, devices), sharding):
        lowered = jax.jit(run).lower(*inputs)
    began = time.monotonic()
    compiled = lowered.compile()
    seconds, text = time.monotonic() - began, compiled.as_text()
    if arguments.text:
        with open(arguments.text, "w") as file:
            file.write(text)

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
