"""Measures what a run has learnt of its own pairs, and lets it tell a story:

python -m dreamllm_jax.evaluate --workdir=runs/tiny

Writes `workdir/evaluation/recall.json` and `workdir/evaluation/story/document.json`, with their pictures.
"""

import sys

from absl import flags
from etils import epath

from dreamllm_jax import command_line, runs
from dreamllm_jax.data.document import Text
from dreamllm_jax.data.storage import Corpus
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.evaluation import recall
from dreamllm_jax.generation.documents import generate_documents, save_document

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the training run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; the newest if not given.")
_PAIRS = flags.DEFINE_integer("pairs", 64, "How many pairs of the corpus `pairs` to ask for.", lower_bound=2)
_SAMPLING_STEPS = flags.DEFINE_integer("sampling_steps", 50, "Denoising steps of a picture.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", 3.0, "Classifier-free guidance scale; 1 for none.")


def main(_) -> None:
    if not _WORKDIR.value:
        sys.exit("error: give --workdir=DIR, the directory of a training run")
    trained = runs.load(_WORKDIR.value, _STEP.value)
    target = epath.Path(_WORKDIR.value) / "evaluation"

    corpus = Corpus(trained.experiment.data.path, "pairs")
    pairs = [corpus[i] for i in range(min(len(corpus), _PAIRS.value))]
    result = recall.recall(trained, pairs, steps=_SAMPLING_STEPS.value, guidance=_GUIDANCE.value)
    recall.save(result, target)
    print(f"creation: {result.creation_top1:.1%} of {len(pairs)} captions are painted nearest to their own picture")
    print(
        f"comprehension: {result.comprehension_exact:.1%} of {len(pairs)} pictures are put into exactly their caption"
    )

    opening = [Text(f"{result.captions[0]}.")]
    size = trained.experiment.rows.dream_size
    told = generate_documents(
        trained.model,
        trained.params,
        trained.tokenizer,
        [opening],
        size=size,
        max_tokens=64,
        max_images=3,
        sampler=SamplerConfig(steps=_SAMPLING_STEPS.value),
        guidance=_GUIDANCE.value,
    )
    story = [*opening, *(event.segment for event in told if event.complete)]
    save_document(story, target / "story")
    print("story: " + " ".join(segment.text if isinstance(segment, Text) else "[picture]" for segment in story))


if __name__ == "__main__":
    command_line.run(main)
