"""Measures what a model can do:

python -m dreamllm_jax.evaluate recall --workdir=runs/tiny
python -m dreamllm_jax.evaluate scenes --workdir=runs/scenes
python -m dreamllm_jax.evaluate language --checkpoint=DIR --tasks=paper
python -m dreamllm_jax.evaluate comprehension --checkpoint=DIR --task=vqav2 --annotations=Q.json,A.json --images=val2014
python -m dreamllm_jax.evaluate reference --images=DIR --inception=inception-2015-12-05.pt --to=val2014.npz
python -m dreamllm_jax.evaluate creation --checkpoint=DIR --captions=captions_val2014.json --limit=30000
python -m dreamllm_jax.evaluate table runs/one runs/two
"""

import argparse
import dataclasses
from pathlib import Path
from typing import get_args

import jax
from absl.flags import argparse_flags
from etils import epath

from dreamllm_jax import command_line
from dreamllm_jax.command_line import add_guidance_interval, finite, not_negative, positive, seed_number
from dreamllm_jax.data import images
from dreamllm_jax.data.corpora.records import under
from dreamllm_jax.data.document import Text
from dreamllm_jax.data.scenes.documents import HELD_OUT
from dreamllm_jax.data.storage import Corpus, read_summary
from dreamllm_jax.data.templates import NAMES
from dreamllm_jax.diffusion import samplers
from dreamllm_jax.diffusion.samplers import SamplerConfig
from dreamllm_jax.evaluation import (
    annotations,
    composition,
    comprehension,
    creation,
    features,
    fid,
    recall,
    scores,
    table,
)
from dreamllm_jax.evaluation.pairs import picture
from dreamllm_jax.generation.documents import generate_documents, save_document
from dreamllm_jax.generation.images import require_interval, require_sampler, require_size
from dreamllm_jax.parallel import distributed
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, use
from dreamllm_jax.runs.load import Trained, load_model, load_run, require_run

PAPER, NONE = "paper", "none"
_BY = ("reference", "inception", "clip")  # what painted pictures are measured by


def recall_pairs(arguments: argparse.Namespace) -> None:
    """Asks a run for its own pairs, and lets it tell a story."""
    trained, checkpoint, target = _trained(arguments)
    pairs = [pair for _, pair in Corpus(trained.experiment.data.path, "pairs").first(arguments.pairs)]
    sampling = {"steps": arguments.sampling_steps, "guidance": arguments.guidance}
    result = recall.recall(trained, pairs, **sampling)
    recall.save(result, checkpoint.step, target)
    found, errors = scores.summary(result.right)
    scores.write(scores.Score("recall", checkpoint, len(pairs), found, errors, sampling), target)
    print(f"creation: {found['creation_top1']:.1%} of {len(pairs)} captions are painted nearest to their own picture")
    print(f"comprehension: {found['comprehension_exact']:.1%} of {len(pairs)} pictures read as exactly their caption")
    _tell(trained, result.captions[0], target, arguments)


def compose(arguments: argparse.Namespace) -> None:
    """Asks a run for scenes that it has learnt and for such that were held out, and lets it tell a story."""
    trained, checkpoint, target = _trained(arguments)
    path = trained.experiment.data.path
    if HELD_OUT not in read_summary(path)["corpora"]:
        raise ValueError(f"{path} is not what `data prepare scenes` makes: it has no corpus `{HELD_OUT}`")
    corpora = {"seen": Corpus(path, "pairs"), "unseen": Corpus(path, HELD_OUT)}
    seen = [(pair.texts[0].text, picture(trained, pair)) for _, pair in corpora["seen"].first(len(corpora["seen"]))]
    sampling = {"steps": arguments.sampling_steps, "guidance": arguments.guidance}
    found, rights = {}, {}
    for name, corpus in corpora.items():
        pairs = [pair for _, pair in corpus.first(arguments.scenes)]
        asked = composition.ask_scenes(trained, pairs, **sampling)
        found[name] = asked, composition.report(asked, seen)
        rights |= {f"{name}_{way}": marks["all"] for way, marks in asked.marks.items()}
        print("\n".join(composition.lines(name, found[name][1])))
    composition.save(found, checkpoint.step, target)
    metrics, errors = scores.summary(rights)
    scores.write(scores.Score("scenes", checkpoint, arguments.scenes, metrics, errors, sampling), target)
    _tell(trained, found["seen"][0].captions[0], target, arguments)


def _trained(arguments: argparse.Namespace) -> tuple[Trained, scores.Checkpoint, epath.Path]:
    """The model of a run's directory, its checkpoint, and the folder of its results."""
    require_run(arguments.workdir)
    name = arguments.workdir if arguments.step is None else f"{arguments.workdir}@{arguments.step}"
    checkpoint = scores.checkpoint_of(name)
    trained = load_run(arguments.workdir, checkpoint.step)
    return trained, checkpoint, epath.Path(arguments.workdir) / scores.FOLDER


def _tell(trained: Trained, caption: str, target: epath.Path, arguments: argparse.Namespace) -> None:
    """A story that begins with a caption."""
    opening = [Text(f"{caption}.")]
    told = generate_documents(
        trained.model,
        trained.params,
        trained.tokenizer,
        [opening],
        size=trained.experiment.rows.sample_size,
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
    model, params, tokenizer = load_model(arguments.checkpoint, mesh, devices)
    subject = tasks.LanguageModel(model, params, tokenizer, arguments.batch)
    with use(mesh, devices):
        found = tasks.evaluate(subject, checkpoint, given, manager, arguments.limit)
    for score in found:
        _keep(score, arguments)


def comprehend(arguments: argparse.Namespace) -> None:
    task, name = comprehension.TASKS[arguments.task], arguments.name or arguments.task
    comprehension.require_packages(arguments.task)
    files = [Path(file) for file in arguments.annotations.split(",")]
    try:
        questions = task.read(files, Path(arguments.images))[: arguments.limit]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        what = f"KeyError, a record has no {error}" if isinstance(error, KeyError) else repr(error)
        raise ValueError(f"{arguments.annotations} are not the annotations of {arguments.task}: {what}") from None
    if not questions:
        raise ValueError(f"{arguments.annotations} asks nothing")
    annotations.require_answers(questions, files)
    checkpoint, mesh, devices = _start(arguments)
    target = _target(arguments)
    template = "" if arguments.template == NONE else arguments.template
    model, params, tokenizer = load_model(arguments.checkpoint, mesh, devices, template)
    asking = {
        "beams": arguments.beams or task.beams,
        "max_tokens": arguments.max_tokens or comprehension.most_tokens(model),
        "template": template,
    }
    with use(mesh, devices):
        answers = comprehension.answer(model, params, tokenizer, task, questions, batch=arguments.batch, **asking)
    if jax.process_index() == 0:
        folder = target / f"{name}-{checkpoint.label}"
        print(comprehension.write_submission(arguments.task, answers, questions, folder))
    settings = {
        "annotations": [file.name for file in files],
        "limit": arguments.limit,
        **asking,
        **{part: getattr(task, part) for part in ("before", "after", "opening")},
    }
    score = comprehension.score(arguments.task, answers, questions, checkpoint, settings)
    if score is not None:
        _keep(dataclasses.replace(score, task=name), arguments)
    elif jax.process_index() == 0:
        print("no score: the annotators' answers are not in the annotations, or a server has them")


def create(arguments: argparse.Namespace) -> None:
    captions = creation.read_captions(arguments.captions, arguments.limit)
    require_interval(arguments.guidance_interval)
    reference = fid.load(arguments.reference) if arguments.reference else None
    if bool(reference) != bool(arguments.inception):
        raise ValueError("FID needs both --inception=FILE and --reference=FILE")
    if not reference and not arguments.clip:
        print("the pictures are only painted: FID needs --reference and --inception, the CLIP score --clip")
    if arguments.each > 1 and not arguments.clip:
        raise ValueError("the best of several pictures is the one most similar to its caption: give --clip=DIR")
    inception = features.inception(arguments.inception) if reference else None
    similarity = features.clip_similarity(arguments.clip) if arguments.clip else None
    checkpoint, mesh, devices = _start(arguments)
    model, params, tokenizer = load_model(arguments.checkpoint, mesh, devices)
    sampler = SamplerConfig(arguments.sampler or model.config.image_decoder.default_sampler, arguments.steps)
    require_sampler(model, sampler)
    painting = creation.Painting(
        require_size(model, arguments.size)[0],
        sampler,
        arguments.guidance,
        tuple(arguments.guidance_interval),
        arguments.each,
        arguments.seed,
    )
    settings = {"captions": Path(arguments.captions).name, "limit": arguments.limit, **dataclasses.asdict(painting)}
    pictures = epath.Path(arguments.pictures or _target(arguments) / f"{arguments.task}-{checkpoint.label}")
    creation.begin(
        pictures, captions, {"checkpoint": dataclasses.asdict(checkpoint), "batch": arguments.batch, **settings}
    )
    with use(mesh, devices):
        creation.paint(model, params, tokenizer, captions, painting, pictures, arguments.batch)
    found, errors = creation.measure(captions, pictures, arguments.each, reference, inception, similarity)
    measured = {name: getattr(arguments, name) and Path(getattr(arguments, name)).name for name in _BY}
    _keep(scores.Score(arguments.task, checkpoint, len(captions), found, errors, {**settings, **measured}), arguments)


def refer(arguments: argparse.Namespace) -> None:
    folder = epath.Path(arguments.images)
    files = under(folder, images.SUFFIXES) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"there are no pictures in {folder}")
    found = features.of_files(files, features.inception(arguments.inception), arguments.size)
    fid.save(fid.pooled([fid.statistics(found)]), arguments.to)
    print(f"{arguments.to}: {len(files):,} pictures, {found.shape[1]:,} features")


def compare(arguments: argparse.Namespace) -> None:
    print(table.markdown([score for directory in arguments.directory for score in table.read(directory)]))


def _start(arguments: argparse.Namespace) -> tuple[scores.Checkpoint, jax.sharding.Mesh, ShardingConfig]:
    """Meets the other hosts; the checkpoint, and this host's devices: each host has the whole model."""
    distributed.start(arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.timeout)
    checkpoint = scores.checkpoint_of(arguments.checkpoint)
    devices = ShardingConfig(fsdp=-1, tensor=arguments.tensor)
    return checkpoint, make_mesh(devices, jax.local_devices()), devices


def _target(arguments: argparse.Namespace) -> epath.Path:
    return epath.Path(arguments.to) if arguments.to else scores.folder_of(arguments.checkpoint)


def _keep(score: scores.Score, arguments: argparse.Namespace) -> None:
    path = scores.write(score, _target(arguments))
    if jax.process_index() == 0:
        print(f"{scores.told(score)}\n{path}")


def make_parser() -> argparse_flags.ArgumentParser:
    parser = argparse_flags.ArgumentParser(prog="python -m dreamllm_jax.evaluate", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("recall", help="what a run has learnt of its own pairs")
    add.set_defaults(main=recall_pairs)
    add.add_argument("--pairs", type=positive, default=64, help="how many of the corpus `pairs` to ask for")
    _add_run(add, steps=50, guidance=3.0)

    add = commands.add_parser("scenes", help="scenes that a run has learnt, and scenes held out, fact by fact")
    add.set_defaults(main=compose)
    add.add_argument("--scenes", type=positive, default=300, help="how many of each to ask for")
    _add_run(add, steps=30, guidance=2.0)

    add = commands.add_parser("language", help="language tasks, through lm-eval")
    add.set_defaults(main=language)
    _add_model(add)
    add.add_argument("--tasks", required=True, help=f"lm-eval's names with commas between, or {PAPER}: the paper's")
    add.add_argument("--shots", type=not_negative, help="examples before each question; if not given, the task's own")
    add.add_argument("--include", default="", help="a folder with YAML files of your own tasks, to take instead")

    add = commands.add_parser("comprehension", help="questions about images")
    add.set_defaults(main=comprehend)
    _add_model(add)
    add.add_argument("--task", required=True, choices=comprehension.TASKS, help="the benchmark")
    add.add_argument("--name", default="", help="the result's name, such as pope_random; if not given, the task's")
    add.add_argument("--annotations", required=True, help="the benchmark's file; of VQA, questions,annotations")
    add.add_argument("--images", default=".", help="folder of the benchmark's images")
    add.add_argument("--beams", type=positive, help="if not given, as the original: 5, of pope 1")
    add.add_argument("--max_tokens", type=positive, help="if not given, 1024 or half of what the model reads")
    templates = [NONE, *NAMES]
    add.add_argument("--template", default=comprehension.TEMPLATE, choices=templates, help="%(default)s if not given")

    add = commands.add_parser("creation", help="pictures for captions, their FID and CLIP score")
    add.set_defaults(main=create)
    _add_model(add)
    add.add_argument("--captions", required=True, help="COCO's .json, .jsonl of image_id and caption, or lines")
    add.add_argument("--task", default="creation", help="the result's name; ms_coco and ln_coco are the paper's")
    add.add_argument("--pictures", default="", help="folder for the pictures; if not given, beside the results")
    add.add_argument("--each", type=positive, default=1, help="pictures of each caption, of which CLIP finds the best")
    add.add_argument("--seed", type=seed_number, default=42, help="of all pictures; %(default)s if not given")
    add.add_argument(
        "--size", type=positive, help="pixels on a side; if not given, what the image decoder was made for"
    )
    known = get_args(samplers.Name)
    add.add_argument("--sampler", choices=known, help="if not given, the image decoder's own")
    add.add_argument("--steps", type=positive, default=150, help="of denoising; %(default)s if not given")
    add.add_argument("--guidance", type=finite, default=2.0, help="1 for none; %(default)s if not given")
    add_guidance_interval(add)
    add.add_argument("--inception", default="", help="TorchScript file of the features, inception-2015-12-05.pt")
    add.add_argument("--reference", default="", help="statistics of the true pictures, from `reference`")
    add.add_argument("--clip", default="", help="folder of a CLIP of transformers, for CLIP score and --each")

    add = commands.add_parser("reference", help="statistics of a folder of pictures, for FID")
    add.set_defaults(main=refer)
    add.add_argument("--images", required=True, help="folder of the true pictures")
    add.add_argument("--inception", required=True, help="TorchScript file of the features, inception-2015-12-05.pt")
    add.add_argument("--to", required=True, help="file .npz for the statistics")
    add.add_argument("--size", type=positive, default=0, help="crop to so many pixels; 256 as in the paper's protocol")

    add = commands.add_parser("table", help="results of several checkpoints, and the paper's, as Markdown")
    add.set_defaults(main=compare)
    add.add_argument("directory", nargs="+", help="runs, or folders of results")
    return parser


def _add_run(add: argparse.ArgumentParser, steps: int, guidance: float) -> None:
    add.add_argument("--workdir", required=True, help="directory of the training run")
    add.add_argument("--step", type=not_negative, help="checkpoint to take; the newest if not given")
    add.add_argument("--sampling_steps", type=positive, default=steps, help="denoising steps of a picture")
    add.add_argument("--guidance", type=finite, default=guidance, help="1 for none")


def _add_model(add: argparse.ArgumentParser) -> None:
    add.add_argument("--checkpoint", required=True, help="a run or an imported model: DIR, DIR@STEP, DIR@average")
    add.add_argument("--to", default="", help="folder for the results; if not given, evaluation/ beside the checkpoint")
    add.add_argument("--batch", type=positive, default=8, help="rows at a time on each host")
    add.add_argument("--limit", type=positive, help="only so many items: of captions, drawn ones")
    add.add_argument("--tensor", type=positive, default=1, help="devices over which each layer is split")
    distributed.add_flags(add)


if __name__ == "__main__":
    command_line.run_commands(make_parser())
