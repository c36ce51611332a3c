"""Stage II of DreamLLM, I-GPT pretraining on interleaved documents (arXiv 2309.11499, section 3.3): the language model
is trained with visual projector, connector and dream queries; vision encoder and image decoder stay frozen.

    python -m dreamllm_jax.plan --config=configs/stage2_igpt.py:7b --topology=v5p-16
    python -m dreamllm_jax.train --config=configs/stage2_igpt.py:7b --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_STAGE_I --config.data.path=DOCUMENTS

Argument (`published.TUNING_ARGUMENTS`): `llm=llama31-8b,decoder=sd15,lora=64`; 7b alone will do.

Slice: v5p-16, 8 rows a chip; estimated with `model.remat=attention+gate` at 3.0 s a step and 52 of 96 GiB
(docs/performance.md), which is 100 chip-hours for 15,000 steps. An estimate of the compiler's. 13b:
14,217 TFLOP a step to 7b's 7,756, so some 180 chip-hours at the same rate; v5p-32 (18 GiB, planned at
low effort).

Curves, as expected (not run here): both losses go on where stage I ended. The next-token loss jumps at first, for
interleaved text is new, and falls within some hundred steps; `<dream_start>` is learnt on the way. A gradient norm that
keeps growing means that the learning rate is too high for the model at hand.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import published


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
