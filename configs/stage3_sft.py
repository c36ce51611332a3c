"""Stage III of DreamLLM, supervised fine-tuning on instructions (arXiv 2309.11499, section 3.3): as stage II, on
conversations and instructed stories.

    python -m dreamllm_jax.plan --config=configs/stage3_sft.py:7b --topology=v5p-16
    python -m dreamllm_jax.train --config=configs/stage3_sft.py:7b --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_STAGE_II --config.data.path=DOCUMENTS

The argument is the llama's size: 7b (default) or 13b.
"""

from ml_collections import ConfigDict

from dreamllm_jax import published


def get_config(arg: str = "") -> ConfigDict:
    config = published.tuning(arg)
    config.steps = 5_000
    config.data = {
        "path": "",
        "corpora": {
            "conversations": {"mode": "joint", "weight": 1.0},
            "interleaved": {"mode": "joint", "weight": 1.0},
            "pairs": {"mode": "creation", "weight": 1.0},
        },
    }
    config.optimizer.learning_rate = 4e-5
    return config
