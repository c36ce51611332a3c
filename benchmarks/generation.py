"""Times writing and painting beside transformers and diffusers, both with random weights on the same machine.

    python -m benchmarks.generation --size=small     # seconds on a CPU
    python -m benchmarks.generation --size=7b        # a GPU; SD 2.1, pictures of 512 pixels, 50 steps of DDIM

Printed are milliseconds a token for 1 and 16 rows, seconds a picture, and both over their floors: the time to read all
weights once, and the time the U-Net's multiplications take at the speed of a large product of matrices.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.common.configuration import read
from dreamllm_jax.data.batch import Batch, RowShape, empty_batch
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.experiment import published
from dreamllm_jax.generation.images import paint
from dreamllm_jax.generation.text import read_prompts, write
from dreamllm_jax.model import DreamLLM, DreamLLMConfig, abstract_params
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.training.state import init_leaves

PROMPT, NEW = 128, 64
SMALL = {
    "language_model": {
        "kind": "llama",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
    },
    "image_decoder": {
        "kind": "stable_diffusion",
        "denoiser": {
            "sample_size": 32,
            "block_out_channels": (64, 128, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 256,
            "attention_head_dim": (1, 2, 2),
            "use_linear_projection": True,
        },
    },
}


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The fastest of some runs, after one that does not count."""
    run()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def prompts(config: DreamLLMConfig, rows: int) -> Batch:
    tokens = np.random.default_rng(0).integers(3, config.language_model.vocab_size - 8, (rows, PROMPT)).astype(np.int32)
    ones = np.ones((rows, PROMPT), np.int32)
    positions = np.cumsum(ones, axis=1, dtype=np.int32) - 1
    return empty_batch(rows, RowShape(PROMPT)).replace(tokens=tokens, segment_ids=ones, positions=positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "1b", "7b"], default="small")
    parser.add_argument("--steps", type=int, default=0, help="of sampling; 10 for small, else 50")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-torch", action="store_true")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    small = arguments.size == "small"
    model_settings = published.model("1b" if small else arguments.size)
    model_settings |= SMALL if small else {}
    config = read(DreamLLMConfig, model_settings | {"dtype": "float32" if small else "bfloat16"})
    steps = arguments.steps or (10 if small else 50)
    wanted = {
        path: jax.ShapeDtypeStruct(weight.value.shape, jnp.dtype(config.dtype))
        for path, weight in flatten_dict(abstract_params(config), sep="/").items()
    }
    model = DreamLLM(config)
    params = unflatten_dict(init_leaves(config, wanted, jax.random.key(0)), sep="/")

    # Floors: how fast this device reads weights, and how fast it multiplies.
    llama = sum(leaf.nbytes for leaf in jax.tree.leaves(params["language_model"]))
    block = jnp.ones((max(llama // 4, 1 << 26),), jnp.float32)
    total = jax.jit(jnp.sum)
    reading = block.nbytes / seconds(lambda: total(block).block_until_ready(), arguments.repeats)
    side = 2048 if small else 8192
    square = jnp.ones((side, side), jnp.dtype(config.dtype))
    product = jax.jit(jnp.dot)
    multiplying = 2 * side**3 / seconds(lambda: product(square, square).block_until_ready(), arguments.repeats)
    print(
        f"{jax.devices()[0].device_kind}: reads {reading / 1e9:.0f} GB/s, multiplies {multiplying / 1e12:.2f} TFLOP/s"
    )

    reference = None if arguments.without_torch else torch_llama(config)
    for rows in (1, 16):
        batch = prompts(config, rows)

        def ours(batch=batch, new=NEW):
            read = read_prompts(model, params, batch, PROMPT + NEW)
            return jax.block_until_ready(write(model, params, read, new, (config.language_model.vocab_size,)))

        each = (seconds(ours, arguments.repeats) - seconds(lambda: ours(new=1), arguments.repeats)) / (NEW - 1)
        line = f"{rows:2} rows: {1e3 * each:.2f} ms a token ({each * reading / llama:.2f} x the floor)"
        if reference is not None:
            line += f"; transformers {1e3 * torch_seconds(reference, batch, arguments.repeats):.2f} ms"
        print(line)
    del reference

    size = config.image_decoder.default_size
    hidden = jnp.ones((1, config.num_queries, config.language_model.hidden_size), jnp.dtype(config.dtype))
    sampler = SamplerConfig("ddim", steps)
    each = seconds(
        lambda: paint(model, params, hidden, [0], size=size, sampler=sampler).block_until_ready(), arguments.repeats
    )
    latents = jax.ShapeDtypeStruct((2, *config.image_decoder.latent_shape(size, size)), jnp.dtype(config.dtype))
    condition = jax.ShapeDtypeStruct((2, config.num_queries, config.image_decoder.condition_width), latents.dtype)

    @jax.jit
    def denoise(params, latents, condition):
        return model.bind({"params": params}).image_decoder.denoise(latents, jnp.zeros(2), Condition(condition))

    flops = denoise.lower(params, latents, condition).compile().cost_analysis()["flops"]
    floor = steps * flops / multiplying
    line = f"a picture of {size} pixels, {steps} guided steps: {each:.2f} s ({each / floor:.2f} x the U-Net's floor)"
    if not arguments.without_torch:
        line += f"; diffusers {torch_picture(config, steps, arguments.repeats):.2f} s without its decoder"
    print(line)


def torch_llama(config: DreamLLMConfig):
    import torch

    from benchmarks import torch_models

    return torch_models.llama(config.language_model).to(getattr(torch, config.dtype)).eval().requires_grad_(False)


def torch_seconds(model, batch: Batch, repeats: int) -> float:
    """Seconds a token of greedy `generate`."""
    import torch

    from benchmarks.torch_models import DEVICE, wait

    ids = torch.tensor(batch.tokens, device=DEVICE).long()
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def run(new: int) -> None:
        model.generate(ids, min_new_tokens=new, max_new_tokens=new, **settings)
        wait()

    with torch.inference_mode():
        return (seconds(lambda: run(NEW), repeats) - seconds(lambda: run(1), repeats)) / (NEW - 1)


def torch_picture(config: DreamLLMConfig, steps: int, repeats: int) -> float:
    import diffusers
    import torch

    from benchmarks import torch_models

    unet = (
        torch_models.unet(config.image_decoder.denoiser).to(getattr(torch, config.dtype)).eval().requires_grad_(False)
    )
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    height, width, channels = config.image_decoder.latent_shape(*[config.image_decoder.default_size] * 2)
    placed = {"device": unet.device, "dtype": unet.dtype}
    condition = torch.ones(2, config.num_queries, config.image_decoder.denoiser.cross_attention_dim, **placed)

    def run() -> None:
        scheduler.set_timesteps(steps)
        x = torch.randn(1, channels, height, width, **placed)
        for timestep in scheduler.timesteps:
            null, conditioned = unet(torch.cat([x, x]), timestep, condition).sample.chunk(2)
            x = scheduler.step(null + 3.5 * (conditioned - null), timestep, x).prev_sample
        torch_models.wait()

    with torch.inference_mode():
        return seconds(run, repeats)


if __name__ == "__main__":
    main()
