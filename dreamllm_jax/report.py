"""Writes a run's report, one self-contained page: loss curves, and what the model paints, reads and tells; or compares
several runs, in a table and a page of curves.

python -m dreamllm_jax.report --workdir=runs/tiny
python -m dreamllm_jax.report runs/one runs/other [--to=DIR]
python -m dreamllm_jax.report runs/sweep
"""

import argparse
import html
import json
import sys

from absl.flags import argparse_flags
from etils import epath

from dreamllm_jax import command_line
from dreamllm_jax.common.directories import absolute, read_json
from dreamllm_jax.evaluation.composition import FACTS
from dreamllm_jax.reports.comparison import write_comparison
from dreamllm_jax.reports.pages import curves, embedded, page
from dreamllm_jax.training.metrics import read_metrics

SHOWN = 24  # scenes of each kind


def _picture(path: epath.Path, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" title="{html.escape(alt)}" src="{embedded(path.read_bytes(), "image/png")}">'


def _pairs(directory: epath.Path, recall: dict) -> str:
    cards = []
    for item in recall["items"]:
        right = item["nearest"] == item["caption"] == item["read"]
        nearest, read = html.escape(item["nearest"]), html.escape(item["read"])
        cards.append(
            f'<div class="pair{"" if right else " wrong"}"><b>{html.escape(item["caption"])}</b><br>'
            + _picture(directory / item["painted"], "painted from the caption")
            + " "
            + _picture(directory / item["picture"], "the true picture")
            + f"<br><small>nearest to: {nearest}<br>read: {read}</small></div>"
        )
    return f'<div class="grid">{"".join(cards)}</div>'


def _story(directory: epath.Path) -> str:
    parts = []
    for segment in json.loads((directory / "document.json").read_text()):
        if "text" in segment:
            parts.append(f"<p>{html.escape(segment['text'])}</p>")
        else:
            parts.append(_picture(directory / segment["image"], "painted by the model"))
    return f'<div class="story">{"".join(parts)}</div>'


_WAYS = {"read": "read from their pictures", "painted": "painted from their captions"}


def _scenes(directory: epath.Path, told: dict) -> str:
    """Of scenes that were learnt and of those that were held out: what is right, fact by fact, and some of them."""
    rows, pages = [], []
    for name, words in (("seen", "learnt"), ("unseen", "held out")):
        found = told[name]
        for way, how in _WAYS.items():
            low, high = found[way]["interval"]["all"]
            cells = [f"{found[way]['right'][fact]:.1%}" for fact in FACTS[:-1]]
            cells += [f"<b>{found[way]['right']['all']:.1%}</b> ({low:.1%} to {high:.1%})"]
            cells += [f"{found[way][other]['all']:.1%}" for other in ("nearest_learnt", "chance")]
            rows.append(f"<tr><th>{words}, {how}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        cards = []
        for item in found["items"][:SHOWN]:
            right = item["read_right"] and item["painted_right"]
            pictures = (
                _picture(directory / item["painted"], "painted") + " " + _picture(directory / item["picture"], "true")
            )
            cards.append(
                f'<div class="pair{"" if right else " wrong"}"><b>{html.escape(item["caption"])}</b><br>{pictures}'
                f"<br><small>read: {html.escape(item['read'])}</small></div>"
            )
        pages.append(
            f"<h2>Scenes that were {words}</h2><p>{found['scenes']} were asked for. Left, painted from the caption; "
            f"right, the true picture, from which they are {found['psnr']:.1f} dB, over things alone "
            f"{found['psnr_of_things']:.1f} dB.</p>"
            f'<div class="grid">{"".join(cards)}</div>'
        )
    heads = "".join(f"<th>{head}</th>" for head in ("", *FACTS[:-1], "all of it", "the nearest learnt", "chance"))
    table = f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<h2>Scenes</h2>{table}{''.join(pages)}"


def _recall(directory: epath.Path, told: dict) -> str:
    return (
        "<h2>Pairs</h2><p>Left, painted from the caption; right, the true picture; below, the text read from it.</p>"
        + _pairs(directory, told)
    )


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Renders `workdir/report.html` from what training and evaluation left in the directory.

    Raises:
      FileNotFoundError: the run has not been trained or not been evaluated.
    """
    workdir = absolute(workdir)
    metrics = read_metrics(workdir)
    evaluation = workdir / "evaluation"
    told = {name: read_json(evaluation / f"{name}.json") for name in _ASKED if (evaluation / f"{name}.json").exists()}
    if not told:
        raise FileNotFoundError(
            f"{evaluation} has no recall.json: run python -m dreamllm_jax.evaluate recall --workdir={workdir} "
            "(or scenes in the place of recall, after training on these)"
        )
    step = next(iter(told.values())).get("step", "unknown")
    figures: dict[str, object] = {"steps trained": metrics[-1]["step"], "step of the checkpoint that was asked": step}
    if "recall" in told:
        recall = told["recall"]
        figures = {
            "captions painted nearest to their own picture": f"{recall['creation_top1']:.1%}",
            "pictures read as exactly their caption": f"{recall['comprehension_exact']:.1%}",
            "pairs": recall["pairs"],
        } | figures
    listed = "".join(f"<div><b>{value}</b><br>{name}</div>" for name, value in figures.items())
    body = (
        f'<div class="figures">{listed}</div>'
        f"<h2>Training</h2>{curves({workdir.name: metrics}, {workdir.name: '#147'})}"
        + "".join(_ASKED[name](evaluation, found) for name, found in told.items())
        + "<h2>A document</h2><p>The model was given the first line; it wrote and painted the rest, seeing each "
        f"picture it had painted.</p>{_story(evaluation / 'story')}"
    )
    path = workdir / "report.html"
    path.write_text(page(f"DreamLLM: {workdir.name}", body))
    return path


_ASKED = {"scenes": _scenes, "recall": _recall}  # what an evaluation may have left, and how it is shown


def main(arguments: argparse.Namespace) -> None:
    if bool(arguments.directories) == bool(arguments.workdir):
        sys.exit("error: give --workdir=DIR for the report of one run, or the directories of several to compare them")
    if arguments.workdir:
        print(f"report: {write_report(arguments.workdir)}")
        return
    first = absolute(arguments.directories[0])
    to = arguments.to or (first if len(arguments.directories) == 1 else first.parent)
    print(f"comparison: {write_comparison(arguments.directories, to)}")


def make_parser() -> argparse_flags.ArgumentParser:
    parser = argparse_flags.ArgumentParser(prog="python -m dreamllm_jax.report", description=__doc__.split("\n\n")[0])
    parser.set_defaults(main=main)
    parser.add_argument("directories", nargs="*", help="of the runs to compare, or of their directories")
    parser.add_argument("--workdir", help="directory of one training run, trained and evaluated")
    parser.add_argument("--to", help="where a comparison is written: the first directory that was named, or its parent")
    return parser


if __name__ == "__main__":
    command_line.run_commands(make_parser())
