"""Stage I of DreamLLM, painting alone (arXiv 2309.11499, section 3.3): dream queries and connector are learnt on
captioned pictures; everything else stays frozen, the visual projector included.

    python -m dreamllm_jax.plan --config=configs/stage1_creation.py:7b --topology=v5e-8
    python -m dreamllm_jax.train --config=configs/stage1_creation.py:7b --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS

Argument (`published.ALIGNMENT_ARGUMENTS`): `llm=13b,decoder=sd15,queries=128`; 7b alone will do.

Slice: v5e-8 (12.6 of 15.8 GiB a chip, planned at low effort). 8,692 TFLOP a step: 8.2 s at the rate that is planned for
`stage1_comprehension`, so some 440 chip-hours for 31 million pictures. An estimate, like that. 13b: 13,498
TFLOP a step, some 680 chip-hours; v5e-16 (10.8 GiB, planned at low effort).

Curves, as expected (not run here): `lm_loss` is not computed. `dm_loss` depends on the timesteps that are drawn and is
noisy; look at means over hundreds of steps, which fall by a few per cent, and at pictures.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import published


def get_config(arg: str = "") -> ConfigDict:
    config = published.alignment(arg)
    config.steps = 24_000
    config.parameters.trainable = (("(dream_queries|connector)/.*", True), (".*", False))
    config.data = {"path": "", "corpora": {"pairs": {"mode": "creation", "weight": 1.0}}}
    config.rows.see_slots, config.rows.dream_slots = 0, 20  # pairs with short captions fill 2048 tokens
    config.objective.lm_weight, config.objective.dm_weight = 0.0, 1.0
    return config
