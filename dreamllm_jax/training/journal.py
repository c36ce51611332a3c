"""What a run says of its steps as they are finished, and when it gives up."""

import collections
import json
import logging
import math
from collections.abc import Callable

import jax
from etils import epath

from dreamllm_jax.data.loader import Loader, joined_states
from dreamllm_jax.parallel.distributed import gather
from dreamllm_jax.training.metrics import MetricsLog, Progress
from dreamllm_jax.training.step import IN_FLIGHT

_logger = logging.getLogger(__name__)
BAD_STEPS = "bad_steps"


class Journal:
    """Gathers the metrics of steps, and writes them when told.

    A step that is not finished keeps its batch on the chips. So that this memory has a bound, whoever adds a step waits
    for an earlier one, with no word to other hosts; the chips are still at work on the one between, and never idle.

    Args:
      learning_rate: after so many updates, of which steps that are left out are none.
      max_skipped: so many steps in a row that changed nothing end the run.
    """

    def __init__(
        self,
        workdir: epath.Path,
        log: MetricsLog,
        progress: Progress,
        batches: Loader,
        learning_rate: Callable[[int], float],
        max_skipped: int,
    ):
        self._workdir, self._log, self._progress, self._batches = workdir, log, progress, batches
        self._learning_rate, self._max_skipped = learning_rate, max_skipped
        self._running: collections.deque[tuple[dict[str, jax.Array], list[list[int]]]] = collections.deque()
        self._finished: list[tuple[dict[str, float], list[list[int]]]] = []
        self._skipped: list[dict] = []  # the latest steps in a row that were left out

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the next step's metrics, which may not be computed yet, and notes what it trains on.

        It waits for earlier steps, so that with the batch that is read next no more than `IN_FLIGHT` are on the chips.
        """
        self._running.append((metrics, self._batches.records))
        self._finish(IN_FLIGHT - 1)

    def _finish(self, left: int) -> None:
        """Waits until so many steps are left that are not finished."""
        while len(self._running) > left:
            metrics, records = self._running.popleft()
            fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self._finished.append((fetched, records))

    def write(self, step: int, at_once: bool = False) -> dict[str, float]:
        """Waits for the steps up to `step`, writes their metrics and a progress line; all hosts must call it.

        Args:
          at_once: so that everybody can read them (see `MetricsLog.flush`).

        Returns:
          The metrics, averaged over these steps.

        Raises:
          FloatingPointError: too many steps in a row were left out; `workdir/bad_steps` says which documents they had.
        """
        self._finish(0)
        fetched = [metrics for metrics, _ in self._finished]
        common = self._progress.rates(fetched) | self._dropped()
        for at, (metrics, records) in enumerate(self._finished, step - len(fetched) + 1):
            learning_rate = float(self._learning_rate(metrics.pop("updates")))
            line = {**metrics, "learning_rate": learning_rate, **common}
            self._log.write(at, line)
            self._skipped = [*self._skipped, {"step": at, **metrics, "rows": records}] if metrics["skipped"] else []
            if len(self._skipped) == self._max_skipped:
                self._give_up()
        self._finished = []
        self._log.flush(at_once)
        _logger.info("%s", self._progress.line(step, {**fetched[-1], **common}))
        return {name: sum(metrics[name] for metrics in fetched) / len(fetched) for name in fetched[0]}

    def _dropped(self) -> dict[str, float]:
        """How many documents all hosts have left out since the run began, by reason."""
        dropped: dict[str, float] = {}
        state = self._batches.get_state()
        first = next(iter(state["streams"]))  # tells hosts apart; where their streams stand is not asked here
        parts = gather({**state, "settings": {}, "streams": {first: None}})
        for _, what, count in joined_states(parts)["totals"]:
            if what.startswith("dropped_"):
                dropped[what] = dropped.get(what, 0) + count
        return dropped

    def _give_up(self) -> None:
        for bad in self._skipped:
            bad["rows"] = self._batches.documents(bad["rows"])
        first, last = self._skipped[0]["step"], self._skipped[-1]
        path = self._workdir / BAD_STEPS / f"{first}-{last['step']}.{jax.process_index()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._skipped, indent=1) + "\n")
        terms = {name: last[name] for name in (*self._progress.metrics[1:], "grad_norm")}
        odd = [name for name, value in terms.items() if not math.isfinite(value)] or ["grad_norm"]
        raise FloatingPointError(
            f"{len(self._skipped)} steps in a row, {first} to {last['step']}, were left out, for {' and '.join(odd)} "
            f"({', '.join(f'{name} {value:g}' for name, value in terms.items())}); their documents are listed in "
            f"{path}. Lower optimizer.learning_rate, or look at the data; the last checkpoint is kept"
        )
