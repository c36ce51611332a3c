"""What both sides of a benchmark agree on: the experiment and a synthetic batch."""

import argparse
import json

import numpy as np

from dreamllm_jax.data.batch import Batch, Slots, empty_batch
from dreamllm_jax.experiment import published
from dreamllm_jax.experiment.experiment import Experiment, read_experiment
from dreamllm_jax.experiment.flops import model_flops
from dreamllm_jax.parallel.chips import CHIPS


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of both programs."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--size", default="1b", help="of the language model: 1b, 7b or 13b, or tiny to try it out")
    flags.add_argument("--rows", type=int, default=4, help="rows of 2048 tokens a step")
    flags.add_argument("--see", type=int, default=2, help="images a row sees")
    flags.add_argument("--dream", type=int, default=2, help="images a row paints")
    flags.add_argument("--remat", default="full", help="what layers keep for their backward pass (ours only)")
    flags.add_argument("--image_chunk", type=int, default=8, help="images in the towers at a time (ours only)")
    flags.add_argument("--steps", type=int, default=10, help="timed steps, after two that are not")
    return flags


# Dense bfloat16 FLOP/s of NVIDIA's data sheets (SXM modules).
_GPUS = {"NVIDIA H100": 989.4e12, "NVIDIA H200": 989.4e12, "NVIDIA A100": 312e12}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by the name that JAX or PyTorch gives it; None if it is not known."""
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip.peak_flops
    return next((peak for name, peak in _GPUS.items() if device_kind.startswith(name)), None)


def report(
    arguments: argparse.Namespace, experiment: Experiment, kind: str, devices: int, step_seconds: float, **measured
) -> None:
    """Prints a line of JSON.

    Args:
      kind: of the devices, of which there are so many.
      measured: what else was.
    """
    flops, peak = model_flops(experiment), peak_flops(kind)
    told = {
        **vars(arguments),
        **measured,
        "device": f"{devices} x {kind}",
        "step_seconds": step_seconds,
        "tokens_per_second": arguments.rows * experiment.rows.length / step_seconds,
        "images_per_second": arguments.rows * (arguments.see + arguments.dream) / step_seconds,
        "model_tflops_per_second": flops / step_seconds / 1e12,
        "mfu": flops / step_seconds / (devices * peak) if peak else None,
    }
    print(json.dumps(told))


_TINY_LLAMA = {
    "kind": "llama",
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TINY_UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
}
_TINY_VAE = {
    "kind": "kl",
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def experiment(arguments: argparse.Namespace) -> Experiment:
    """Stage II: language model, projectors and dream queries are trained, the image towers frozen in bfloat16."""
    tiny = arguments.size == "tiny"
    model = published.model("1b" if tiny else arguments.size)
    if tiny:
        model["language_model"] = _TINY_LLAMA
        model["image_decoder"] |= {"denoiser": _TINY_UNET, "autoencoder": _TINY_VAE}
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
        model["vision_encoder"] |= small
    return read_experiment(
        {
            "model": model | {"remat": arguments.remat},
            "data": {"path": ""},
            "steps": 1000,
            "rows": {
                "per_step": arguments.rows,
                "length": 2048,
                "see_slots": arguments.see,
                "dream_slots": arguments.dream,
                "dream_size": 64 if tiny else 512,
            },
            "parameters": {
                "trainable": (("(language_model|visual_projector|dream_queries|connector)/.*", True), (".*", False)),
            },
            "objective": {"kind": "joint", "lm_weight": 1.0, "dm_weight": 10.0, "image_chunk": arguments.image_chunk},
            "optimizer": {"learning_rate": 1e-5, "warmup_ratio": 0.0},
        }
    )


def random_batch(experiment: Experiment, seed: int = 0) -> Batch:
    """One document fills each row: pictures to see, then pictures to paint, then text; every slot is filled."""
    rng, rows, model = np.random.default_rng(seed), experiment.rows, experiment.model
    shape = rows.per_step, rows.length
    see = 2 + np.arange(rows.see_slots) * (model.vision_encoder.num_patches + 2)
    painted_from = 2 + rows.see_slots * (model.vision_encoder.num_patches + 2)
    dream = painted_from + np.arange(rows.dream_slots) * (model.num_queries + 2)
    weights = np.ones(shape, np.float32)
    weights[:, : painted_from + rows.dream_slots * (model.num_queries + 2)] = 0
    batch = empty_batch(rows.per_step, experiment.row_shape)

    def filled(groups: tuple[Slots, ...], at: np.ndarray) -> tuple[Slots, ...]:
        images = (rng.integers(0, 256, slots.images.shape).astype(np.uint8) for slots in groups)
        return tuple(
            slots.replace(at=np.broadcast_to(at, slots.at.shape).astype(np.int32), images=pixels)
            for slots, pixels in zip(groups, images, strict=True)
        )

    return batch.replace(
        tokens=rng.integers(3, model.language_model.vocab_size - 8, shape).astype(np.int32),
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(rows.length, dtype=np.int32), shape).copy(),
        loss_weights=weights,
        see=filled(batch.see, see),
        dream=filled(batch.dream, dream),
    )
