"""Stage III of DreamLLM, supervised fine-tuning on instructions (arXiv 2309.11499, section 3.3): as stage II, on
conversations and instructed stories.

    python -m dreamllm_jax.plan --config=configs/stage3_sft.py:7b --topology=v5p-16
    python -m dreamllm_jax.train --config=configs/stage3_sft.py:7b --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_STAGE_II --config.data.path=DOCUMENTS

Argument (`published.TUNING_ARGUMENTS`): `llm=vicuna15-13b,lora=64`; 7b alone will do.

Slice: v5p-16; its step is stage II's, so 33 chip-hours for 5,000 steps by the same estimate. 13b: some 60, on
v5p-32, with stage II's memory.

Curves, as expected (not run here): the next-token loss is mostly that of the assistant's turns and begins lower than
stage II's ended; it should fall for the whole run. `dm_loss` hardly moves.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import published


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
