"""Saving and restoring a run with Orbax.

Under `workdir/checkpoints`, each step holds the trained parameters (`params`), the optimizer's state (`optimizer`) and
the position in the data (`data`); the frozen parameters are written once, to `workdir/frozen`.
"""

import dataclasses
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from grain.checkpoint import CheckpointRestore, CheckpointSave
from orbax.checkpoint.checkpoint_managers import save_decision_policy as policies

from dreamllm_jax.training.saved import CHECKPOINTS, FROZEN, PARAMS
from dreamllm_jax.training.state import Leaves, TrainState


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Attributes:
      every: steps between two checkpoints; one more is written at the end.
      keep: how many of the newest are kept.
    """

    every: int = 1000
    keep: int = 3

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"every and keep must be positive, got {self.every} and {self.keep}")


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for unfinished saves when left."""

    def __init__(self, workdir: epath.PathLike, config: CheckpointConfig = CheckpointConfig()):
        workdir = epath.Path(workdir).absolute()
        self._frozen = workdir / FROZEN
        self._manager = ocp.CheckpointManager(
            workdir / CHECKPOINTS,
            item_names=(PARAMS, "optimizer", "data"),
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.AnySavePolicy(
                    [policies.FixedIntervalPolicy(config.every), policies.PreemptionCheckpointingPolicy()]
                ),
                max_to_keep=config.keep,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: Any, last: bool = False) -> None:
        """Saves in the background if a checkpoint is due at `step`, or if it is the `last` one.

        Args:
          data: the grain iterator that feeds the run.
        """
        if self._manager.latest_step() == step:
            return
        if state.frozen and not self._frozen.exists():
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self._frozen, state.frozen)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.trainable),
            optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
            data=CheckpointSave(data),
        )
        self._manager.save(step, args=items, force=last)

    def restore(self, abstract: TrainState, data: Any) -> TrainState:
        """The newest checkpoint, laid out as `abstract` asks; `data` is set to where it was.

        Raises:
          FileNotFoundError: if there is no checkpoint.
        """
        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"{self._manager.directory} does not hold a checkpoint")
        optimizer = {"step": abstract.step, "state": abstract.opt_state}
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.trainable),
                optimizer=ocp.args.StandardRestore(optimizer),
                data=CheckpointRestore(data),
            ),
        )
        frozen = self._restore_frozen(abstract.frozen)
        return TrainState(items.optimizer["step"], items.params, items.optimizer["state"], frozen)

    def _restore_frozen(self, abstract: Leaves) -> Leaves:
        if not abstract:
            return {}
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self._frozen, abstract)
