"""A DreamLLM for one accelerator: adapters on a language model of a billion parameters (TinyLlama's shape), visual
projector, connector and dream queries are learnt, on pairs and interleaved documents at once. The vision encoder (CLIP)
and the image decoder (Stable Diffusion) stay frozen.

    python -m dreamllm_jax.plan --config=configs/small.py --topology=v5e-1
    python -m dreamllm_jax.train --config=configs/small.py --workdir=runs/small \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS

For one chip of v5e (7.6 of 15.8 GiB, planned at low effort), or one GPU with 16 GB or more. Pictures are painted at 256
pixels. 33 TFLOP a step: a third of a second at half of a v5e's peak, an hour for 10,000 steps; an estimate by hand. The
argument may say otherwise: `configs/small.py:llm=1b,decoder=sd15,queries=16,lora=64`; lora=0 trains the language model
itself, which needs more memory than a v5e has.

Curves, as expected (not run here): the next-token loss falls first, once the visual projector shows the language model
something; `dm_loss`, noisy from step to step, falls slowly throughout from where the frozen image decoder is without a
condition.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import published


def get_config(arg: str = "") -> ConfigDict:
    config = published.tuning(arg, llm="tinyllama", lora=16)
    config.steps = 10_000
    config.data = {
        "path": "",
        "corpora": {
            "pairs": {"mode": "joint", "weight": 2.0},
            "interleaved": {"mode": "joint", "weight": 1.0},
        },
    }
    config.rows = {"per_step": 4, "length": 1024, "see_slots": 2, "dream_slots": 2, "dream_size": 256}
    config.objective.image_chunk = 4
    config.optimizer.learning_rate = 2e-4
    return config
