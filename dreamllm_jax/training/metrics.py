"""Where a run's numbers go: a progress line, `metrics.jsonl` and TensorBoard."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from etils import epath
from tensorboardX import SummaryWriter

Scalars = Mapping[str, float]


class MetricsLog:
    """`metrics.jsonl` (one line a step) and TensorBoard files in a run's directory.

    A run that continues at `step` drops the lines of the steps after it, so that no step stands there twice. Of several
    hosts the first writes; for the others `active` is False and nothing happens.
    """

    def __init__(self, workdir: epath.PathLike, step: int, active: bool = True):
        self._active = active
        if not active:
            return
        workdir = epath.Path(workdir)
        self._path = workdir / "metrics.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self._path.write_text("".join(line + "\n" for line in kept))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        if self._active:
            self._file.close()
            self._board.close()

    def write(self, step: int, scalars: Scalars) -> None:
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)


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
    return [json.loads(line) for line in path.read_text().splitlines()]


class Progress:
    """Rates since the last line, and the line itself.

    Args:
      steps: of the whole run.
      flops_per_chip: model FLOPs of one step, divided among the chips (see `dreamllm_jax.flops`).
      peak_flops: FLOP/s that a chip is capable of; None where that is not known: then there is no MFU.
    """

    def __init__(
        self,
        steps: int,
        flops_per_chip: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._steps, self._clock = steps, clock
        self._flops_per_chip, self._peak_flops = flops_per_chip, peak_flops
        self._since = clock()

    def restart(self) -> None:
        """Begins to count time now (the first step's includes compilation)."""
        self._since = self._clock()

    def rates(self, steps: int, tokens: float, images: float) -> dict[str, float]:
        """Rates over the `steps` since the last call, in which so many tokens and images were read."""
        seconds = max(self._clock() - self._since, 1e-9)
        self._since = self._clock()
        flops_per_second = steps * self._flops_per_chip / seconds
        rates = {
            "seconds_per_step": seconds / max(steps, 1),
            "tokens_per_second": tokens / seconds,
            "images_per_second": images / seconds,
            "tflops_per_second_per_chip": flops_per_second / 1e12,
        }
        return rates | ({"mfu": flops_per_second / self._peak_flops} if self._peak_flops else {})

    def line(self, step: int, scalars: Scalars) -> str:
        left = int((self._steps - step) * scalars["seconds_per_step"])
        mfu = f" (MFU {scalars['mfu']:.1%})" if "mfu" in scalars else ""
        return (
            f"step {step}/{self._steps}  loss {scalars['loss']:.4f}  lm {scalars['lm_loss']:.4f}  "
            f"dm {scalars['dm_loss']:.4f}  {scalars['tokens_per_second']:,.0f} tokens/s  "
            f"{scalars['images_per_second']:,.1f} images/s  "
            f"{scalars['tflops_per_second_per_chip']:,.3g} TFLOP/s/chip{mfu}  "
            f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )
