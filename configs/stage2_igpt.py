"""Stage II of DreamLLM, I-GPT pretraining on interleaved documents (arXiv 2309.11499, section 3.3): the llama is
trained with projectors and queries; CLIP and Stable Diffusion stay frozen.

    python -m dreamllm_jax.plan --config=configs/stage2_igpt.py:7b --topology=v5p-16
    python -m dreamllm_jax.train --config=configs/stage2_igpt.py:7b --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_STAGE_I --config.data.path=DOCUMENTS

The argument is the llama's size: 7b (default) or 13b.
"""

from ml_collections import ConfigDict

from dreamllm_jax import published


def get_config(arg: str = "") -> ConfigDict:
    config = published.tuning(arg)
    config.steps = 15_000
    config.data = {
        "path": "",
        "corpora": {
            "interleaved": {"mode": "joint", "weight": 1.0},
            "pairs": {"mode": "joint", "weight": 1.0},
        },
    }
    config.optimizer.learning_rate = 2e-5
    return config
