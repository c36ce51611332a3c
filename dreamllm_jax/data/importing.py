"""Brings a corpus from a public layout into a data set, in processes or on machines that share its parts.

DIR/.NAME.unfinished/       while it is under way: of each finished part its shards, and part-*.json with the counts
DIR/NAME/1.0.0/             the corpus, when it is whole
DIR/dataset.json            what all corpora hold
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shlex
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pyarrow as pa
from etils import epath
from tqdm import tqdm

from dreamllm_jax.common.directories import is_remote, local_folder, write_whole
from dreamllm_jax.data import images, storage
from dreamllm_jax.data.corpora.records import NOT_FETCHED, Dropped, Format, Part, Record, setting
from dreamllm_jax.data.document import Document, Image, Segment, Text
from dreamllm_jax.data.tokenizer import load_tokenizer

_SETTINGS = "settings.json"
_COUNTED = ("documents", "images", "tokens", "records", "bad")
_EXAMPLES = 3
Job = tuple[Format, Part, int, str, "Options"]
_DAMAGED = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, pa.ArrowException)


@dataclasses.dataclass(frozen=True)
class Options:
    """How records become documents."""

    # 512 is what Stable Diffusion paints, and a wider picture is only a larger file.
    size: int = setting(512, "pixels on the shorter side of a stored image, at most")
    least: int = setting(16, "images with a shorter side are left out")
    tokenizer: str = setting("", "counts tokens: a .model, a tokenizer.json, a directory")

    def __post_init__(self):
        if self.size < self.least or self.least < 1:
            raise ValueError(f"size must be at least least, and least at least 1, got {self.size} and {self.least}")


def import_corpus(
    source: Format,
    to: str | os.PathLike,
    name: str,
    options: Options,
    *,
    workers: int,
    beam: str,
    max_bad: float,
) -> dict[str, Any]:
    """Imports a corpus as `to`/`name`; started again after an interruption it does only what is not done.

    Args:
      workers: processes; 0 for as many as there are cores.
      beam: options of an Apache Beam pipeline that takes the processes' place; `to` may then be a bucket, which all
        of its machines see.
      max_bad: the largest share of records that may be unusable.

    Returns:
      What the data set's summary says of it: documents, images, tokens, what was dropped by reason, settings.

    Raises:
      FileExistsError: `to` holds a corpus of this name, or a begun one, made with other settings.
      FileNotFoundError, ValueError: what is wrong with the source, or with too much of it, in one line.
    """
    if is_remote(to) and not beam:
        raise ValueError(f"without --beam a data set is made in a local directory and then copied to {to}")
    if not name.isidentifier():
        raise ValueError(f"a corpus's name is made of letters, digits and underscores, got {name!r}")
    to = epath.Path(to)
    final, work = to / name, to / f".{name}.unfinished"
    parts = source.parts()
    if not parts:
        raise ValueError(f"{source.source} holds no records")
    settings = {"format": type(source).__name__, **dataclasses.asdict(source), **dataclasses.asdict(options)}
    settings["parts"] = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    corpora = storage.read_summary(to)["corpora"] if (to / storage.SUMMARY).exists() else {}
    if name in corpora:
        _require_same(corpora[name].get("settings"), settings, final)
        return corpora[name]
    if final.exists() and not work.exists():
        raise FileExistsError(f"{final} exists and is not a corpus of {to}; choose another --name or remove it")
    _begin(work, settings)
    results = _import_parts(source.prepare(work), parts, work, options, workers, beam)
    summary = _summary(results, settings)
    _require_good(summary, source.source, max_bad, work)
    shards = [
        storage.Shard(work / file, records, size) for result in results for file, records, size in result["shards"]
    ]
    storage.finish_corpus(final / storage.VERSION, name, shards)
    if any(names := [each for result in results for each in result["names"]]):
        storage.write_names(final, names)
    storage.add_corpus(to, name, summary)
    work.rmtree()
    return summary


def _begin(work: epath.Path, settings: Mapping[str, Any]) -> None:
    if (work / _SETTINGS).exists():
        _require_same(json.loads((work / _SETTINGS).read_text()), settings, work)
        return
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / _SETTINGS, json.dumps(settings) + "\n")


def _require_same(before: Mapping[str, Any] | None, now: Mapping[str, Any], where: epath.Path) -> None:
    before = before or {}
    if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        raise FileExistsError(
            f"{where} was made with another {' and '.join(sorted(changed))}: remove it, or choose another --name"
        )


def _import_parts(
    source: Format, parts: list[Part], work: epath.Path, options: Options, workers: int, beam: str
) -> list[dict[str, Any]]:
    """What was counted in each part, in their order."""
    missing = [i for i in range(len(parts)) if not _told(work, i).exists()]
    jobs = [(source, parts[i], i, str(work), options) for i in missing]
    if beam:
        _on_beam(jobs, beam)
    else:
        with tqdm(total=len(parts), initial=len(parts) - len(jobs), desc="parts", unit="part") as bar:
            for _ in _in_processes(jobs, workers or os.cpu_count() or 1):
                bar.update()
    return [json.loads(_told(work, i).read_text()) for i in range(len(parts))]


def _on_beam(jobs: Sequence[Job], options: str) -> None:
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--beam needs Apache Beam: pip install 'dreamllm_jax[beam]'") from None
    with apache_beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        # Reshuffled, so that a runner does not fuse the parts into one piece of work.
        _ = pipeline | apache_beam.Create(jobs) | apache_beam.Reshuffle() | apache_beam.MapTuple(import_part)


def _in_processes(jobs: Sequence[Job], workers: int) -> Iterator[None]:
    """Does the jobs, and yields after each."""
    workers = min(workers, max(len(jobs), 1))
    if workers == 1:
        for job in jobs:
            yield import_part(*job)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        futures = [pool.submit(import_part, *job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise OSError(
                "a process of the import was killed, perhaps for its memory; what is finished is kept: start again "
                "with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _told(work: epath.Path, index: int) -> epath.Path:
    return work / f"part-{index:05d}.json"


class Losses:
    """What was dropped for which reason, and where that was seen first.

    Attributes:
      place: where what is dropped next stands.
    """

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self.places: dict[str, str] = {}
        self.place = ""

    def add(self, reason: str) -> None:
        self.counts[reason] += 1
        self.places.setdefault(reason, self.place)


def import_part(source: Format, part: Part, index: int, work: str, options: Options) -> None:
    """Writes the documents of one part; the file that says so comes last and at once."""
    counts, dropped, names = collections.Counter(dict.fromkeys(_COUNTED, 0)), Losses(), []
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    with local_folder(work) as folder:  # array_record writes to local files only
        writer = storage.ShardWriter(lambda shard: folder / f"part-{index:05d}.{shard}")
        for number, record in enumerate(_records(source, part), 1):
            dropped.place = f"{_named(part)} record {number}"
            document = _document(record, options, dropped)
            if record == NOT_FETCHED:
                continue
            counts["records"] += 1
            if document is None:
                counts["bad"] += 1
                continue
            writer.write(document)
            names.append(record.name)
            counts["documents"] += 1
            counts["images"] += len(document.images)
            if tokenizer:
                counts["tokens"] += sum(len(tokenizer.encode_text(text.text)) for text in document.texts)
        writer.close()
    shards = [(shard.path.name, shard.records, shard.size) for shard in writer.shards]
    told = {**counts, "dropped": dropped.counts, "examples": dropped.places, "shards": shards}
    told["names"] = names if any(names) else []
    write_whole(_told(epath.Path(work), index), json.dumps(told) + "\n")


def _named(part: Part) -> str:
    """The part in words: a file, and where in it what is read begins."""
    return f"{epath.Path(part.path).name}{f' from {part.start}' if part.start else ''}"


def _records(source: Format, part: Part) -> Iterator[Record | Dropped]:
    """The records of a part; a file that breaks off ends with one that says so."""
    try:
        yield from source.records(part)
    except _DAMAGED:
        yield Dropped("damaged_file")


def _document(record: Record | Dropped, options: Options, dropped: Losses) -> Document | None:
    """The record as a document, its images as they are stored; None, and why it was dropped, if it cannot be one.

    Of pages an image that cannot be used is left out, from others it takes the record with it.
    """
    if isinstance(record, Dropped):
        dropped.add(record.reason)
        return None
    may_lack = record.kind in ("interleaved", "instruct_interleaved")
    segments: list[Segment] = []
    for segment in record.segments:
        if isinstance(segment, Image):
            try:
                data = images.normalise(segment.data, options.size, options.least)
                segment = dataclasses.replace(segment, data=data)
            except images.ImageError as error:
                segment = Dropped(error.reason)
        if isinstance(segment, Dropped):
            dropped.add(segment.reason)
            if not may_lack:
                return None
            continue
        if isinstance(segment, Text):
            segment = dataclasses.replace(segment, text=_encodable(segment.text))
        segments.append(segment)
    try:
        if not any(isinstance(segment, Image) or segment.text.strip() for segment in segments):
            raise ValueError("nothing is left")
        return Document(record.kind, tuple(segments))
    except ValueError:
        dropped.add("no_document")
        return None


def _encodable(text: str) -> str:
    """The same without halves of characters, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _summary(results: list[dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was counted, and by reason up to `_EXAMPLES` places where something was dropped for it, of as many parts."""
    dropped: collections.Counter[str] = collections.Counter()
    examples: dict[str, list[str]] = {}
    for result in results:
        dropped.update(result["dropped"])
        for reason, place in result["examples"].items():
            examples[reason] = [*examples.get(reason, []), place][:_EXAMPLES]
    totals = {name: sum(result[name] for result in results) for name in _COUNTED}
    return totals | {
        "dropped": dict(sorted(dropped.items())),
        "examples": dict(sorted(examples.items())),
        "settings": dict(settings),
    }


def _require_good(summary: Mapping[str, Any], source: str, max_bad: float, work: epath.Path) -> None:
    bad, records = summary["bad"], summary["records"]
    if not records and not summary["dropped"]:
        work.rmtree()
        raise ValueError(f"{source} holds no records")
    if not summary["documents"] or bad > max_bad * records:
        reasons = ", ".join(
            f"{reason} {count}: {summary['examples'][reason][0]}" for reason, count in summary["dropped"].items()
        )
        raise ValueError(
            f"{source}: {bad} of {records} records cannot be used ({reasons}), more than --max_bad={max_bad} allows; "
            f"what was read is in {work}: start again with another --max_bad to take it, or remove it"
        )
