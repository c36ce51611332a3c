"""Where a run's numbers go: a progress line, `metrics.jsonl`, TensorBoard and Weights & Biases."""

import contextlib
import html
import json
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from dreamllm_jax.common.directories import is_remote, write_whole
from dreamllm_jax.common.upload import Upload
from dreamllm_jax.training.samples import Sample

_logger = logging.getLogger(__name__)
Scalars = Mapping[str, float]
BEGUN = "begun.json"  # when the run was first begun, and its name for others
VALIDATION = "validation.jsonl"
_REPLACE_SECONDS = 60  # between two uploads
_CLOSE_SECONDS = 60  # that a run which ends waits for the last one


class MetricsLog:
    """`metrics.jsonl` (one line a step) and TensorBoard files in a run's directory, perhaps Weights & Biases too.

    A run that continues at `step` drops the lines of the steps after it, so that no step stands there twice. Of several
    hosts the first writes; for the others `active` is False and nothing happens. What goes to a bucket, where files are
    replaced as a whole, goes there in other threads (`Upload`).

    Args:
      project: of Weights & Biases; empty for none. A run that continues is the same run there.

    Raises:
      ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, workdir: epath.PathLike, step: int, active: bool = True, project: str = ""):
        self._active = active
        if not active:
            return
        workdir = epath.Path(workdir)
        self._path, self._validation_path = workdir / "metrics.jsonl", workdir / VALIDATION
        self._lines = [line for line in _lines_of(self._path) if _step_of(line) <= step]
        self._validation = _lines_of(self._validation_path)
        self._remote = is_remote(workdir)
        write_whole(self._path, "".join(self._lines))
        self._replaced, self._flushed = time.monotonic(), len(self._lines)
        self._useful = sum(json.loads(line).get("seconds_per_step", 0.0) for line in self._lines)
        begun = workdir / BEGUN
        if not begun.exists():
            write_whole(begun, json.dumps({"time": time.time(), "id": uuid.uuid4().hex}) + "\n")
        told = json.loads(begun.read_text())
        self._begun = told["time"]
        from tensorboardX import SummaryWriter  # imports torch where there is one, which takes seconds

        # Written here and then copied: tensorboardX's own thread would end with the first request that fails.
        self._events = workdir / "tensorboard"
        self._written = tempfile.TemporaryDirectory() if self._remote else None
        self._board = SummaryWriter(self._written.name if self._written else str(self._events), purge_step=step + 1)
        self._wandb = _wandb_run(project, told["id"], workdir) if project else None
        if self._remote:
            self._numbers = Upload(self._write_lines, self._path)
            self._looks = Upload(self._write_looks, self._validation_path)
            self._curves = Upload(self._write_curves, self._events)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, *_) -> None:
        if not self._active:
            return
        self._board.close()
        try:
            self.flush(at_once=True, timeout=_CLOSE_SECONDS)
        except Exception as error:
            if kind is None:
                raise
            _logger.warning("what was logged last is lost: %s", error)  # and why the run ends is what counts
        finally:
            if self._written:
                try:
                    self._curves.finish(_CLOSE_SECONDS)
                except Exception as error:
                    _logger.warning("the last curves are lost: %s", error)
                self._written.cleanup()
            if self._wandb:
                self._wandb.finish()

    def write(self, step: int, scalars: Scalars) -> None:
        """Takes one line, and `goodput` with it: the share of the time since the run was first begun that was spent in
        steps whose results are kept."""
        if not self._active:
            return
        self._useful += scalars.get("seconds_per_step", 0.0)
        scalars = {**scalars, "goodput": self._useful / max(time.time() - self._begun, 1e-9)}
        self._lines.append(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def is_validated(self, step: int) -> bool:
        """Whether `write_validation` was called for this step; False on hosts that do not write."""
        if not self._active:
            return False
        return any(_step_of(line) == step for line in self._validation)

    def write_validation(self, step: int, means: Scalars) -> None:
        """Takes the losses on held-out documents: a line of `validation.jsonl`, in place of those of this and later
        steps, and `validation/...` for TensorBoard and Weights & Biases."""
        if not self._active:
            return
        kept = [line for line in self._validation if _step_of(line) < step]
        self._validation = [*kept, json.dumps({"step": step, **means}) + "\n"]
        if self._remote:
            self._looks.ask()
        else:
            self._write_looks()
        named = {f"validation/{name}": value for name, value in means.items()}
        for name, value in named.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(named, step=step)

    def write_samples(self, step: int, samples: Mapping[str, Sample]) -> None:
        """Takes what the model made of held-out documents, as `samples/...` for TensorBoard and Weights & Biases."""
        if not self._active:
            return
        for name, sample in samples.items():
            self._board.add_text(f"samples/{name}", sample.text, step)
            if sample.picture is not None:
                self._board.add_image(f"samples/{name}", sample.picture, step, dataformats="HWC")
        if self._wandb:
            self._wandb.log({f"samples/{name}": _for_wandb(sample) for name, sample in samples.items()}, step=step)

    def flush(self, at_once: bool, timeout: float | None = None) -> None:
        """Appends the lines taken to the file; in a bucket, which knows no appending, it is replaced now and then.

        Args:
          at_once: not now and then but now, and waiting for it, because a checkpoint follows: the lines must reach as
            far. Curves need not.
          timeout: seconds to wait at most.

        Raises:
          OSError: the file could not be written; of one in a bucket only if it was to be at once.
        """
        if not self._active:
            return
        if not self._remote:
            with self._path.open("a") as file:
                file.write("".join(self._lines[self._flushed :]))
        elif at_once or time.monotonic() - self._replaced > _REPLACE_SECONDS:
            self._replaced = time.monotonic()
            self._curves.ask()
            self._numbers.ask()
            if at_once:
                self._numbers.finish(timeout)
                self._looks.finish(timeout)
        self._flushed = len(self._lines)

    def _write_lines(self) -> None:
        write_whole(self._path, "".join(self._lines[:]))  # of a copy: others may follow meanwhile

    def _write_looks(self) -> None:
        write_whole(self._validation_path, "".join(self._validation))

    def _write_curves(self) -> None:
        self._board.flush()
        for file in epath.Path(self._written.name).iterdir():
            write_whole(self._events / file.name, file.read_bytes())


def _wandb_run(project: str, name: str, workdir: epath.Path) -> Any:
    import wandb  # an option

    folder = tempfile.gettempdir() if is_remote(workdir) else str(workdir)
    return wandb.init(project=project, id=name, name=workdir.name, dir=folder, resume="allow")


def _for_wandb(sample: Sample) -> Any:
    import wandb

    if sample.picture is None:
        return wandb.Html(html.escape(sample.text))
    return wandb.Image(sample.picture, caption=sample.text)


def _lines_of(path: epath.Path) -> list[str]:
    """The lines of a file, each with its end; none if it is not there."""
    return [f"{line}\n" for line in path.read_text().splitlines()] if path.exists() else []


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut short by a killed process
        return float("inf")


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The steps' numbers of a run, in order.

    Raises:
      FileNotFoundError: if the run has written none.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: no training has run in this directory")
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed process may leave a piece of one


class Progress:
    """Rates since the last line, and the line itself.

    Args:
      steps: of the whole run.
      metrics: the names of the objective's, which a line tells.
      flops_per_chip: model FLOPs of one step, divided among the chips (see `dreamllm_jax.experiment.flops`).
      peak_flops: FLOP/s that a chip is capable of; None where that is not known: then there is no MFU.
    """

    def __init__(
        self,
        steps: int,
        metrics: Sequence[str],
        flops_per_chip: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.metrics = metrics
        self._steps, self._clock = steps, clock
        self._flops_per_chip, self._peak_flops = flops_per_chip, peak_flops
        self._since, self._waited, self._untimed = clock(), 0.0, 0

    def restart(self, untimed: int = 0) -> None:
        """Begins to count time now; so many steps were finished before (the first one, with its compilation)."""
        self._since, self._waited, self._untimed = self._clock(), 0.0, untimed

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for input."""
        began = self._clock()
        yield
        self._waited += self._clock() - began

    def rates(self, steps: Sequence[Scalars]) -> dict[str, float]:
        """Rates over the steps since the last call; none if no step among them was timed.

        `input_wait` is the share of the time that was spent waiting for input.

        Args:
          steps: how many `tokens` and `images` each has read.
        """
        timed, seconds, waited = steps[self._untimed :], max(self._clock() - self._since, 1e-9), self._waited
        self.restart()
        if not timed:
            return {}
        flops_per_second = len(timed) * self._flops_per_chip / seconds
        rates = {
            "seconds_per_step": seconds / len(timed),
            "input_wait": waited / seconds,
            "tokens_per_second": sum(step["tokens"] for step in timed) / seconds,
            "images_per_second": sum(step["images"] for step in timed) / seconds,
            "tflops_per_second_per_chip": flops_per_second / 1e12,
        }
        return rates | ({"mfu": flops_per_second / self._peak_flops} if self._peak_flops else {})

    def line(self, step: int, scalars: Scalars) -> str:
        """How far the run is: losses, and rates where there are any."""
        told = (f"{name.removesuffix('_loss')} {scalars[name]:.4f}" for name in self.metrics)
        losses = f"step {step}/{self._steps}  {'  '.join(told)}"
        if "seconds_per_step" not in scalars:
            return losses
        left = int((self._steps - step) * scalars["seconds_per_step"])
        mfu = f" (MFU {scalars['mfu']:.1%})" if "mfu" in scalars else ""
        return (
            f"{losses}  {scalars['tokens_per_second']:,.0f} tokens/s  "
            f"{scalars['images_per_second']:,.1f} images/s  "
            f"{scalars['tflops_per_second_per_chip']:,.3g} TFLOP/s/chip{mfu}  "
            f"input wait {scalars['input_wait']:.0%}  "
            f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )
