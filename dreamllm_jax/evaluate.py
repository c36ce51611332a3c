"""Measures what a model can do:

python -m dreamllm_jax.evaluate recall --workdir=runs/tiny
python -m dreamllm_jax.evaluate language --checkpoint=DIR --tasks=paper
"""

import argparse

import jax
from absl.flags import argparse_flags
from etils import epath

from dreamllm_jax import command_line, distributed, runs
from dreamllm_jax.data.document import Text
from dreamllm_jax.data.storage import Corpus
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.evaluation import recall, scores
from dreamllm_jax.generation.documents import generate_documents, save_document
from dreamllm_jax.sharding import ShardingConfig, make_mesh, use

PAPER = "paper"


def recall_pairs(arguments: argparse.Namespace) -> None:
    """Asks a run for its own pairs, and lets it tell a story."""
    trained = runs.load(arguments.workdir, arguments.step)
    target = epath.Path(arguments.workdir) / scores.FOLDER

    corpus = Corpus(trained.experiment.data.path, "pairs")
    pairs = [corpus[i] for i in range(min(len(corpus), arguments.pairs))]
    sampling = {"steps": arguments.sampling_steps, "guidance": arguments.guidance}
    result = recall.recall(trained, pairs, **sampling)
    recall.save(result, target)
    name = arguments.workdir if arguments.step is None else f"{arguments.workdir}@{arguments.step}"
    scores.write(recall.score(result, scores.checkpoint_of(name), sampling), target)
    print(f"creation: {result.creation_top1:.1%} of {len(pairs)} captions are painted nearest to their own picture")
    print(
        f"comprehension: {result.comprehension_exact:.1%} of {len(pairs)} pictures are put into exactly their caption"
    )

    opening = [Text(f"{result.captions[0]}.")]
    told = generate_documents(
        trained.model,
        trained.params,
        trained.tokenizer,
        [opening],
        size=trained.experiment.rows.dream_size,
        max_tokens=64,
        max_images=3,
        sampler=SamplerConfig(steps=arguments.sampling_steps),
        guidance=arguments.guidance,
    )
    story = [*opening, *(event.segment for event in told if event.complete)]
    save_document(story, target / "story")
    print("story: " + " ".join(segment.text if isinstance(segment, Text) else "[picture]" for segment in story))


def language(arguments: argparse.Namespace) -> None:
    try:
        from dreamllm_jax.evaluation import language as tasks
    except ModuleNotFoundError as error:
        raise ImportError(f"language tasks need {error.name}: pip install 'dreamllm_jax[evaluation]'") from None
    given: dict[str, int | None] = {}
    for name in arguments.tasks.split(","):
        given |= tasks.PAPER if name == PAPER else {name: arguments.shots}
    manager = tasks.find_tasks(given, arguments.include)
    checkpoint, mesh, devices = _start(arguments)
    tokenizer, model, params = runs.load_model(arguments.checkpoint, mesh, devices)
    subject = tasks.LanguageModel(model, params, tokenizer, arguments.batch)
    with use(mesh, devices):
        found = tasks.evaluate(subject, checkpoint, given, manager, arguments.limit)
    for score in found:
        _keep(score, arguments)


def _start(arguments: argparse.Namespace) -> tuple[scores.Checkpoint, jax.sharding.Mesh, ShardingConfig]:
    """Meets the other hosts; the checkpoint, and this host's devices: each host has the whole model."""
    distributed.start(arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.timeout)
    checkpoint = scores.checkpoint_of(arguments.checkpoint)
    devices = ShardingConfig(fsdp=-1, tensor=arguments.tensor)
    return checkpoint, make_mesh(devices, jax.local_devices()), devices


def _keep(score: scores.Score, arguments: argparse.Namespace) -> None:
    path = scores.write(score, arguments.to or scores.folder_of(arguments.checkpoint))
    if jax.process_index() == 0:
        print(f"{scores.told(score)}\n{path}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def make_parser() -> argparse_flags.ArgumentParser:
    parser = argparse_flags.ArgumentParser(prog="python -m dreamllm_jax.evaluate", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("recall", help="what a run has learnt of its own pairs")
    add.set_defaults(main=recall_pairs)
    add.add_argument("--workdir", required=True, help="directory of the training run")
    add.add_argument("--step", type=int, help="checkpoint to take; the newest if not given")
    add.add_argument("--pairs", type=_positive, default=64, help="how many of the corpus `pairs` to ask for")
    add.add_argument("--sampling_steps", type=_positive, default=50, help="denoising steps of a picture")
    add.add_argument("--guidance", type=float, default=3.0, help="1 for none")

    add = commands.add_parser("language", help="language tasks, through lm-eval")
    add.set_defaults(main=language)
    _add_model(add)
    add.add_argument("--tasks", required=True, help=f"lm-eval's names with commas between, or {PAPER}: the paper's")
    add.add_argument("--shots", type=int, help="examples before each question; if not given, the task's own")
    add.add_argument("--include", default="", help="a folder with YAML files of your own tasks, to take instead")
    return parser


def _add_model(add: argparse.ArgumentParser) -> None:
    add.add_argument("--checkpoint", required=True, help="a run or an imported model: DIR, DIR@STEP, DIR@average")
    add.add_argument("--to", default="", help="folder for the results; if not given, evaluation/ beside the checkpoint")
    add.add_argument("--batch", type=_positive, default=8, help="rows at a time on each host")
    add.add_argument("--limit", type=_positive, help="only the first so many items")
    add.add_argument("--tensor", type=_positive, default=1, help="devices over which each layer is split")
    add.add_argument("--coordinator", default="", help="host:port of process 0; not needed on Cloud TPU or one host")
    add.add_argument("--num_processes", type=int, default=0, help="how many take part, one a host")
    add.add_argument("--process_id", type=int, default=-1, help="which of them this is, from 0")
    add.add_argument("--timeout", type=int, default=distributed.TIMEOUT, help="seconds that hosts wait for each other")


if __name__ == "__main__":
    command_line.run_commands(make_parser())
