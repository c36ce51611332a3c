"""UniLIP (arXiv 2507.23278): one picture's features are read and painted. An autoencoder is made of InternVL3's vision
encoder; then queries and a transformer, begun as the language model's last layers, are learnt between it and SANA.

    python -m dreamllm_jax.plan --config=configs/unilip.py --topology=v5e-16
    python -m dreamllm_jax.train --config=configs/unilip.py:stage=decoder --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS
    python -m dreamllm_jax.train --config=configs/unilip.py:stage=encoder --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_DECODER --config.data.path=DOCUMENTS
    python -m dreamllm_jax.train --config=configs/unilip.py:stage=1 --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_ENCODER --config.data.path=DOCUMENTS

Arguments: `size`, 1b (InternVL3-1B, SANA-0.6B) or 2b (InternVL3-2B, SANA-1.6B); `stage`, decoder and encoder of the
autoencoder (the autoencoder alone; then the vision encoder and its projector too, held near to what they were), 1
(queries and connector, on captions), 2 (SANA too; captions, and edits ten times as often), 3 (the same on few good
ones).

As the program has it: rate 1e-4 with a floor of a tenth, no decay, warm-up 0.003, text dropped from a tenth, times by a
logit-normal density, 5 epochs of BLIP3o-Pretrain's 36 million captions (stage 2: and 1.5 million edits, GPT-Image-Edit;
stage 3: BLIP3o-60k and ShareGPT-4o-Image). Of pictures of a step it says 32 a device: here 512. Different: packed rows
in place of padded ones; the autoencoder is learnt without LPIPS and a discriminator, at 448 pixels in both stages.

Slice: v5p-16 (8.2 of 95.7 GiB a chip; stage 1 of 1b takes 1.12 s a step, 875 chip-hours, as `plan` estimates), or
v5e-16 (6.6 of 15.8) and v4-16 (8.2), planned at low effort.

Curves, as expected (not run here): the autoencoder's `squared_error` falls steeply, then by a few per cent a thousand
steps; `dm_loss` of stage 1 as of `openuni.py`.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import family, recipes

AUTOENCODER = "image_decoder/autoencoder/.*"
# stage -> what is trained, steps of 512 pictures, epochs of captions and of edits
STAGES = {
    "decoder": (AUTOENCODER, 100_000, {"pairs": 1}),
    "encoder": (f"(vision_encoder/.*|visual_projector/.*|{AUTOENCODER})", 100_000, {"pairs": 1}),
    "1": (family.ONLY, 350_000, {"pairs": 1}),
    "2": (family.DENOISER, 500_000, {"pairs": 1, "edits": 10}),
    "3": (family.DENOISER, 2_400, {"pairs": 1, "edits": 3}),
}
CHOICES = {"size": ("1b", "2b"), "stage": tuple(STAGES)}


def get_config(arg: str = "") -> ConfigDict:
    given = recipes.parse(arg, CHOICES, size="1b", stage="1")
    trained, steps, epochs = STAGES[given.stage]
    name, reconstructs = f"unilip-{given.size}", given.stage in ("decoder", "encoder")
    model = family.internvl(given.size, name, name, prompting=family.prompting("unilip"))
    config = family.painting(model, trained, pictures=512, slots=8, length=family.LENGTHS["long"])
    config.rows.dream_size = 448
    if "edits" in epochs:
        config.rows.update(see_slots=8, length=4_608)
    if reconstructs:
        config.rows.update(length=2_432)
        config.model.teacher = given.stage == "encoder"
        config.objective = {"kind": "reconstruction", "distill_weight": float(config.model.teacher)}
    drops = {} if reconstructs else {"drop_text": 0.1}
    corpora = {corpus: {"mode": "creation", "epochs": float(often), **drops} for corpus, often in epochs.items()}
    config.data.corpora = corpora
    config.steps = steps
    config.optimizer.update(learning_rate=1e-4, warmup_ratio=0.003, end_value=0.1, b2=0.999)
    return config
