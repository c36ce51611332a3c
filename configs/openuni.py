"""OpenUni (arXiv 2505.23661): queries and a transformer are learnt between a frozen InternVL3 and SANA, on captioned
pictures; then SANA too, on few good ones.

    python -m dreamllm_jax.plan --config=configs/openuni.py:l-512 --topology=v5e-16
    python -m dreamllm_jax.train --config=configs/openuni.py:l-512 --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS
    python -m dreamllm_jax.train --config=configs/openuni.py:l-512,stage=finetune --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_PRETRAIN --config.data.path=DOCUMENTS

Arguments: `size`, b-512 (InternVL3-1B, SANA-0.6B), l-512 (InternVL3-2B, SANA-1.6B) or l-1024 (with SANA-1.5-1.6B);
`stage`, pretrain (SANA frozen, 23 million pictures) or finetune (SANA trained, BLIP3o-60k); `captions`, short or long,
of which the rows' length follows.

As the program has it: 512 and 256 pictures a step, 100,000 and 10,000 steps, AdamW, clipping at 1. Different: packed
rows in place of padded ones.

Slice: v5p-16 (9.5 of 95.7 GiB a chip; 1.59 s a step of pretrain, its 100,000 steps 354 chip-hours, as `plan`
estimates), or v5e-8 (9.7 of 15.8, long captions), v5e-16 (7.7), v4-16 (9.4), planned at low effort.

Curves, as expected (not run here): `dm_loss` falls from about 1.1, where SANA is without a condition, within the first
thousand steps, then slowly; noisy from step to step.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import family, recipes

# size -> InternVL3's, SANA, connector
SIZES = {
    "b-512": ("1b", "sana-0.6b-512", "openuni-b"),
    "l-512": ("2b", "sana-1.6b-512", "openuni-l"),
    "l-1024": ("2b", "sana-1.5-1.6b-1024", "openuni-l"),
}
CHOICES = {"size": tuple(SIZES), "stage": ("pretrain", "finetune"), "captions": tuple(family.LENGTHS)}


def get_config(arg: str = "") -> ConfigDict:
    given = recipes.parse(arg, CHOICES, size="l-512", stage="pretrain", captions="short")
    pretrain = given.stage == "pretrain"
    model = family.internvl(*SIZES[given.size], prompting=family.prompting("openuni"), dream_queries={"init": "width"})
    model["dream_queries"] = {"init": "width"}
    trained = family.ONLY if pretrain else family.DENOISER
    length = family.LENGTHS[given.captions]
    config = family.painting(model, trained, pictures=512 if pretrain else 256, slots=8, length=length)
    config.rows.dream_size = 1024 if given.size == "l-1024" else 512
    config.steps = 100_000 if pretrain else 10_000
    config.optimizer.update(learning_rate=1e-4 if pretrain else 1e-5, warmup_ratio=0.01, weight_decay=0.05)
    return config
