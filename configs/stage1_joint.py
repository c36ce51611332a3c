"""Stage I of DreamLLM, alignment (arXiv 2309.11499, section 3.3): visual projector, connector and dream queries are
learnt on captioned pictures, seen and painted in one run; language model, vision encoder and image decoder stay frozen.

    python -m dreamllm_jax.plan --config=configs/stage1_joint.py:7b --topology=v5e-8
    python -m dreamllm_jax.train --config=configs/stage1_joint.py:7b --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS

The original learns to see and to paint in separate runs (`stage1_comprehension`, `stage1_creation`). The parameters
that those learn are disjoint and the images are spread over all chips, so one run does both.

Argument (`published.ALIGNMENT_ARGUMENTS`): `llm=13b,decoder=sd15,queries=128`; 7b alone will do.

Slice: v5e-8 (12.5 of 15.8 GiB a chip, planned at low effort). 6,207 TFLOP a step: 5.9 s at the rate that is planned for
`stage1_comprehension`, so some 520 chip-hours for 13 million pictures painted and as many seen. An estimate, like that.
13b: 11,030 TFLOP a step, some 920 chip-hours; v5e-16 (10.2 GiB, planned at low effort).

Curves, as expected (not run here): the next-token loss falls within the first few hundred steps, when the projector has
found the words' place, and slowly after that; `dm_loss` is noisy from step to step, and falls by a few per cent over
thousands of them.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import published


def get_config(arg: str = "") -> ConfigDict:
    config = published.alignment(arg)
    config.steps = 40_000
    config.data = {"path": "", "corpora": {"pairs": {"mode": "joint", "weight": 1.0}}}
    config.rows.see_slots = config.rows.dream_slots = 5  # pairs with short captions fill 2048 tokens
    config.objective.dm_weight = 1.0
    return config
