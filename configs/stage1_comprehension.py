"""Stage I of DreamLLM, seeing alone (arXiv 2309.11499, section 3.3): the visual projector is learnt on captioned
pictures; everything else stays frozen. The image decoder is not run.

    python -m dreamllm_jax.plan --config=configs/stage1_comprehension.py:7b --topology=v5e-8
    python -m dreamllm_jax.train --config=configs/stage1_comprehension.py:7b --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS

Argument (`published.ALIGNMENT_ARGUMENTS`): `llm=13b`; 7b alone will do.

Slice: v5e-8 (9.1 of 15.8 GiB a chip). Planned at normal effort: 5.07 s a step, 733 chip-hours for 29 million pictures;
the compiler's estimate, which a chip will not reach. 13b: 10,177 TFLOP a step to 7b's 5,356, so 1,390 chip-hours at
the same rate; v5e-16 (7.0 GiB, planned at low effort).

Curves, as expected (not run here): `lm_loss` falls steeply within the first few hundred steps, when the projector has
found the words' place, then slowly; `dm_loss` is not computed.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import published


def get_config(arg: str = "") -> ConfigDict:
    config = published.alignment(arg)
    config.steps = 65_000
    config.parameters.trainable = (("visual_projector/.*", True), (".*", False))
    config.data = {"path": "", "corpora": {"pairs": {"mode": "comprehension", "weight": 1.0}}}
    config.rows.see_slots, config.rows.dream_slots = 7, 0  # pairs with short captions fill 2048 tokens
    config.objective.lm_weight, config.objective.dm_weight = 1.0, 0.0
    return config
