"""Saving and restoring a run with Orbax.

Under `workdir/checkpoints`, each step holds the trained parameters (`params`), the optimizer's state (`optimizer`) and
`run`: the position in the data, and checksums and shapes of everything. The frozen parameters are written once, to
`workdir/frozen`, their checksums to `workdir/frozen.json`.
"""

import functools
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from dreamllm_jax.checkpoints.checksums import checksums
from dreamllm_jax.checkpoints.saved import AVERAGE, CHECKPOINTS, FROZEN, PARAMS
from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.common.directories import absolute, make_folder, write_whole
from dreamllm_jax.data.loader import Loader, joined_states
from dreamllm_jax.experiment.settings import CheckpointConfig
from dreamllm_jax.parallel.distributed import gather

_logger = logging.getLogger(__name__)
BROKEN = "broken"
OPTIMIZER, _RUN = "optimizer", "run"
ITEMS = (PARAMS, AVERAGE, OPTIMIZER)
_FINISH_SECONDS = 300  # that a run which fails waits for the checkpoint that is being written
T = TypeVar("T")


def _write_small_arrays_whole() -> None:
    """Of an array that several chips have each writes a part, by a program for each shape: not of small ones."""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**24)
    said = logging.getLogger("absl")  # by which Orbax warns of what is meant
    level = said.level
    said.setLevel(logging.ERROR)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    said.setLevel(level)


_write_small_arrays_whole()


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for unfinished saves when left.

    Left by an error it waits too, for a while: what is being written may be whole a moment later.
    """

    def __init__(self, workdir: epath.PathLike, config: CheckpointConfig):
        self._workdir, self._config = absolute(workdir), config
        self._frozen = self._workdir / FROZEN
        self._frozen_checksums = self._workdir / f"{FROZEN}.json"
        kept: list[preservation.PreservationPolicy] = [preservation.LatestN(config.keep)]
        if config.keep_every:
            kept.append(preservation.EveryNSteps(config.keep_every))
        if config.keep_best:
            best = preservation.BestN(
                get_metric_fn=lambda m: m[config.best],
                reverse=True,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        self._manager = ocp.CheckpointManager(
            self._workdir / CHECKPOINTS,
            item_names=(*ITEMS, _RUN),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation.AnyPreservationPolicy(kept),
                best_fn=(lambda metrics: metrics[config.best]) if config.keep_best else None,
                best_mode="min",
                cleanup_tmp_directories=True,  # what a killed process had begun
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, _) -> None:
        if error is None:
            self._close()
            return
        if self._manager.is_saving_in_progress():
            _logger.warning("%s: %s; the checkpoint that is being written is finished first", kind.__name__, error)
        closing = threading.Thread(target=self._close_after_error, daemon=True, name="closing of checkpoints")
        closing.start()
        closing.join(_FINISH_SECONDS)  # other hosts may not take part in it any more
        if closing.is_alive():
            _logger.warning("the checkpoint that is being written was not finished within %g s", _FINISH_SECONDS)

    def _close(self) -> None:
        self.finish()
        self._manager.close()

    def _close_after_error(self) -> None:
        try:
            self._close()
        except Exception as problem:  # perhaps the same error
            _logger.warning("the checkpoint that is being written could not be finished: %s", problem)

    def finish(self) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        frozen: Mapping[str, jax.Array],
        data: Loader,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves in the background, unless the step is saved already; all hosts must call it.

        Args:
          items: trees of arrays by name, those of `ITEMS` that there are.
          frozen: the parameters that never change, by path.
          data: what feeds the run.
          metrics: by which the best are kept.
        """
        if self._manager.latest_step() == step:
            return
        # Those of a run that was begun again in the same directory may be others. Their checksums are written last.
        if frozen and (self._manager.latest_step() is None or not self._frozen_checksums.exists()):
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self._frozen, frozen, force=True)
            sums = checksums(frozen)
            if jax.process_index() == 0:
                write_whole(self._frozen_checksums, json.dumps(sums) + "\n")
        record = {
            "data": joined_states(gather(data.get_state())),
            "checksums": {name: checksums(item) for name, item in items.items()},
            "shapes": {name: _shapes(item) for name, item in {**items, FROZEN: frozen}.items()},
        }
        args = ocp.args.Composite(
            run=ocp.args.JsonSave(record | {"digest": _digest(record)}),
            **{name: ocp.args.StandardSave(item) for name, item in items.items()},
        )
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(
        self, items: Mapping[str, Any], frozen: Mapping[str, jax.ShapeDtypeStruct], data: Loader
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """The newest whole checkpoint's items and frozen parameters; `data` is set to where it was.

        Where a checkpoint cannot be read, or its arrays are not those that were saved, the one before it is taken; a
        warning names it, and it is moved aside to `workdir/broken`.

        Args:
          items, frozen: as they were saved, abstract: shapes, types and shardings.

        Raises:
          FileNotFoundError: if there is no checkpoint.
          ConfigError: if the configuration makes other arrays than those that were saved.
          ValueError: if none is whole, or the frozen parameters are not.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise FileNotFoundError(f"{self._manager.directory} does not hold a checkpoint")
        found: dict[str, jax.Array] | None = None
        damaged: list[tuple[int, str]] = []
        for step in steps:
            record, problem = _together(functools.partial(self._record, step))
            restored = None
            if not problem:
                self._require_same_shapes(record.get("shapes", {}), {**items, FROZEN: frozen})
                found = self._restore_frozen(frozen) if found is None else found
                restored, problem = self._restore(step, items, record)
            if problem:
                damaged.append((step, problem))
                del restored
                continue
            for other, reason in damaged:
                aside = self._set_aside(other)
                _logger.warning("the checkpoint of step %d is damaged and was moved to %s (%s)", other, aside, reason)
            data.set_state(record["data"], self._config.accept_changes)
            return restored, found
        raise ValueError(
            f"none of the checkpoints {sorted(steps)} in {self._workdir / CHECKPOINTS} can be restored; the newest: "
            f"{damaged[0][1]}. Put back a copy of one, or choose another --workdir"
        )

    def _record(self, step: int) -> dict[str, Any]:
        """What is known of a step: its place in the data, checksums and shapes."""
        path = self._manager.directory / str(step) / _RUN
        record = ocp.JsonCheckpointHandler().restore(path)
        digest = record.pop("digest")
        if digest != _digest(record):
            raise ValueError(f"{path} is not what was written")
        return record

    def _restore(self, step: int, items: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """The items of a step, verified, or what is wrong with them."""
        directory = self._manager.directory / str(step)
        restored, problem = _together(lambda: {name: _read(directory / name, item) for name, item in items.items()})
        for name in {} if problem else restored:
            problem = problem or _wrong(record["checksums"][name], restored[name], directory / name)
        return restored, problem

    def _require_same_shapes(self, saved: Mapping[str, Mapping[str, str]], items: Mapping[str, Any]) -> None:
        """Raises ConfigError, naming an array, if the configuration makes others than those that were saved."""
        for name in {**saved, **items} if saved else ():
            there, here = saved.get(name, {}), _shapes(items.get(name, {}))
            if path := next((path for path in {**there, **here} if there.get(path) != here.get(path)), None):
                raise ConfigError(
                    f"{self._workdir} holds {name}{path} as {there.get(path, 'nothing')}, this configuration makes it "
                    f"{here.get(path, 'nothing')}: restore what was changed, or begin another run with "
                    f"--config.parameters.init_from={self._workdir}"
                )

    def _set_aside(self, step: int) -> epath.Path:
        target = self._workdir / BROKEN / str(step)
        if jax.process_index() == 0:
            number = 0
            while target.exists():
                number += 1
                target = self._workdir / BROKEN / f"{step}.{number}"
            make_folder(target.parent)
            (self._manager.directory / str(step)).rename(target)
        gather(step)  # nobody goes on before it is done
        self._manager.reload()
        return target

    def _restore_frozen(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        if not abstract:
            return {}
        found, problem = _together(
            lambda: (_read(self._frozen, abstract), json.loads(self._frozen_checksums.read_text()))
        )
        if not problem:
            frozen, sums = found
            problem = _wrong(sums, frozen, self._frozen)
        if problem:
            raise ValueError(
                f"the frozen parameters in {self._frozen} are damaged ({problem}); put back a copy, or remove the "
                "directory's checkpoints and begin again"
            )
        return frozen


def _together(attempt: Callable[[], T]) -> tuple[T | None, str]:
    """What an attempt gives, and the problem if it fails on any host: then none goes on to where it would wait for it.

    Args:
      attempt: something that each host does without the others.
    """
    found, problem = None, ""
    try:
        found = attempt()
    except Exception as error:  # whatever a damaged file leads Orbax, TensorStore or JSON to
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found, next((problem for problem in gather(problem) if problem), "")


def _read(directory: epath.Path, abstract: Any) -> Any:
    """The arrays, as `abstract` lays them out. It waits for no other host: one may fail where another does not."""
    return ocp.StandardCheckpointHandler().restore(directory, args=ocp.args.StandardRestore(abstract))


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _wrong(saved: Mapping[str, int], arrays: Any, where: epath.Path) -> str:
    """What is wrong with arrays that were read, by their checksums; hosts compute them together and know the same."""
    found = checksums(arrays)
    wrong = [path for path in {**saved, **found} if saved.get(path) != found.get(path)]
    return f"{len(wrong)} arrays in {where} are not those that were saved, such as {sorted(wrong)[0]}" if wrong else ""


def _shapes(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
