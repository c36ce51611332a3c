"""MetaQuery (arXiv 2504.06256): queries beside the vocabulary of a frozen language model that sees, a deep transformer
behind it, and SANA trained with both; then on edits or instructions.

    python -m dreamllm_jax.plan --config=configs/metaquery.py --topology=v5p-16
    python -m dreamllm_jax.train --config=configs/metaquery.py --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS
    python -m dreamllm_jax.train --config=configs/metaquery.py:stage=edit --workdir=gs://… \
        --config.parameters.init_from=RUN_BEFORE --config.data.path=DOCUMENTS

Arguments: `llm`, qwen25-vl-3b, qwen25-vl-7b, or llava-ov-0.5b (LLaVA-OneVision); `decoder`, sana-1.6b-512 or sd15
(frozen, with 77 queries); `stage`, pretrain (captions), edit or instruct (pictures are seen); `captions`, short or
long, of which the rows' length follows.

As the program has it: rates, warm-up of 5,000 steps (2,000 for instructions), a floor of a tenth, decay 0.1, clipping
at 0.5, 10 epochs of 10.9 million pictures (CC12M; for edits 5 of 1.2 million, OmniEdit; 10 of 2.4 million
instructions). Pictures of a step: 4,096 as in the paper; for edits and instructions, of which it says so many a device,
512 and 1,024. Different: queries are a table of their own and not rows of the vocabulary, so that the language model
stays whole; packed rows in place of padded ones; LLaVA-OneVision sees one tile a picture.

Slice: v5p-16 (71.9 of 95.7 GiB a chip, pretrain with 3b; 30.6 s a step, 1,809 chip-hours, as `plan` estimates).

Curves, as expected (not run here): as of `openuni.py`, and lower in the end, for SANA is trained too.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import family, recipes

# llm -> language model, vision encoder, template, learning rate
TOWERS = {
    "qwen25-vl-3b": ("qwen25-vl-3b", "qwen25-vl-3b", "qwen2", 1e-4),
    "qwen25-vl-7b": ("qwen25-vl-7b", "qwen25-vl-7b", "qwen2", 5e-5),
    "llava-ov-0.5b": ("qwen25-0.5b", "siglip-so400m-384", "llava_onevision", 1e-4),
}
# stage -> pictures of a step, steps, warm-up
STAGES = {"pretrain": (4_096, 26_600, 5_000), "edit": (512, 11_700, 5_000), "instruct": (1_024, 23_400, 2_000)}
CHOICES = {
    "llm": tuple(TOWERS),
    "decoder": ("sana-1.6b-512", "sd15"),
    "stage": tuple(STAGES),
    "captions": tuple(family.LENGTHS),
}


def get_config(arg: str = "") -> ConfigDict:
    defaults = {"llm": "qwen25-vl-3b", "decoder": "sana-1.6b-512", "stage": "pretrain", "captions": "long"}
    given = recipes.parse(arg, CHOICES, **defaults)
    llm, vision, template, rate = TOWERS[given.llm]
    pictures, steps, warmup = STAGES[given.stage]
    sana = given.decoder != "sd15"
    model = family.towers(llm, vision, given.decoder, "metaquery", num_queries=256 if sana else 77)
    model["prompting"] = family.prompting("metaquery", template=template)
    if given.llm == "llava-ov-0.5b":
        model["vision_encoder"]["packed"] = True
        model["visual_projector"] = {"kind": "newline"}
    if not sana:
        model["connector"]["output_scale"] = 1.0
    trained = family.DENOISER if sana else family.ONLY
    config = family.painting(model, trained, pictures, 8, family.LENGTHS[given.captions] + 256)
    if given.stage != "pretrain":
        config.rows.update(see_slots=8, length=4_736)
        names = ("drop_images",) if given.stage == "edit" else ("drop_text", "drop_images", "drop_both")
        drops = dict.fromkeys(names, 0.1)
        config.data.corpora = {"edits": {"mode": "creation", **drops}}
    config.steps = steps
    config.optimizer.update(learning_rate=rate, warmup_ratio=warmup / steps, end_value=0.1)
    config.optimizer.update(weight_decay=0.1, clip_norm=0.5)
    return config
