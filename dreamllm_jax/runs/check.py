"""What `train --check` does: everything that can be said of a configuration before anything is computed."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dreamllm_jax.checkpoints.marks import require_frozen
from dreamllm_jax.common.configuration import ConfigError, differences, flat
from dreamllm_jax.data.preparation import SOURCES
from dreamllm_jax.data.settings import CorpusConfig
from dreamllm_jax.data.storage import SUMMARY, open_tokenizer, read_summary
from dreamllm_jax.experiment import recipes
from dreamllm_jax.experiment.experiment import Experiment, read_experiment, require_mesh_fits, require_packages
from dreamllm_jax.model import abstract_params
from dreamllm_jax.parallel.mesh import MESH_AXES
from dreamllm_jax.runs.start import require_initial, require_room, require_templates, with_initial
from dreamllm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from dreamllm_jax.training.parameters import RANDOM_AND_FROZEN, count_and_bytes, count_parameters, parameter_lines
from dreamllm_jax.training.state import Leaves, split_params

WIDTH, HEIGHT = 64, 8  # of the plot, in characters
_BLOCKS = " ▁▂▃▄▅▆▇█"


def check(config: Mapping[str, Any]) -> tuple[Experiment, Leaves, Leaves]:
    """Reads a configuration and tries whatever needs no device: shapes, what is trained, mesh, the data's place.

    Returns:
      The experiment, and the shapes of the parameters that are trained and of those that are not.

    Raises:
      ConfigError, ValueError, FileNotFoundError: what cannot be used, in one line.
    """
    complete, _ = with_initial(config, None)
    experiment = read_experiment(complete)
    require_initial(experiment)
    require_packages(experiment)
    mesh = {name: max(getattr(experiment.sharding, name), 1) for name in MESH_AXES}  # what is left to the devices: 1
    require_mesh_fits(experiment, mesh)
    try:
        weights = abstract_params(experiment.model)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"config.model: no model has these shapes: {' '.join(str(error).split())[:300]}") from None
    trainable, frozen = split_params(weights, experiment.parameters.trainable)
    jax.eval_shape(make_optimizer(experiment.optimizer, experiment.steps).init, trainable)
    require_frozen(experiment.model, experiment.data.stored, trainable)
    _require_data(experiment)
    parameters = experiment.parameters

    def typed(leaves: Leaves, dtype: str) -> Leaves:
        return {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in leaves.items()}

    return experiment, typed(trainable, parameters.dtype), typed(frozen, parameters.frozen_dtype)


def _require_data(experiment: Experiment) -> None:
    data = experiment.data
    path = epath.Path(data.path)
    if not data.path or data.path in SOURCES or (path.is_dir() and not (path / SUMMARY).exists()):
        return  # named later, or made by the run
    there = read_summary(data.path)["corpora"]
    if missing := [name for name in data.corpora if name not in there]:
        raise ConfigError(
            f"config.data.corpora.{missing[0]} is not in {data.path}: there are {', '.join(sorted(there))}; import it "
            f"with --name={missing[0]}, or leave it out of config.data.corpora"
        )
    if not experiment.parameters.init_from or data.tokenizer:  # otherwise that model has one
        tokenizer = open_tokenizer(data.path, data.tokenizer)
        require_room(tokenizer, experiment.model)
        require_templates(tokenizer, data, experiment.model)


def describe(config: Mapping[str, Any]) -> str:
    """What a configuration comes to, for people; errors as of `check`."""
    experiment, trainable, frozen = check(config)
    lines = ["config", *_table({path: _written(value) for path, value in flat(experiment).items()})]
    if experiment.parent:
        name, _, argument = experiment.parent.partition(":")
        parent = read_experiment(with_initial(recipes.load(name, argument).to_dict(), None)[0])
        changed = differences(parent, experiment)
        changed.pop("parent")
        changes = {path: f"{_written(old)} -> {_written(new)}" for path, (old, new) in changed.items()}
        lines += ["", f"differences from {experiment.parent}", *(_table(changes) or ["  none"])]
    lines += ["", "parameters", *parameter_lines(count_parameters(trainable, frozen))]
    for name, leaves in (("trained", trainable), ("frozen", frozen)):
        lines.append(f"  {name + ' in all':20} {count_and_bytes(leaves)[0]:>15,}")
    if frozen and not experiment.parameters.init_from:
        lines.append(f"  warning: {RANDOM_AND_FROZEN}")
    return "\n".join(
        [*lines, "", *_mixture_lines(experiment), "", *_step_lines(experiment), "", *_schedule(experiment)]
    )


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {name:{width}}  {value}".rstrip() for name, value in rows.items()]


def _mixture_lines(experiment: Experiment) -> list[str]:
    data = experiment.data
    corpora: Mapping[str, CorpusConfig] = data.corpora
    total = sum(corpus.weight for corpus in corpora.values())
    rows = {}
    for name, corpus in corpora.items():
        share = f"{corpus.epochs:g} epochs" if corpus.epochs else f"{corpus.weight / total:.1%} of the documents"
        rows[name] = f"{share}, {corpus.mode}"
    where = data.path or "config.data.path is still empty"
    return [f"data: {where}", *(_table(rows) or ["  all of its corpora"])]


def _step_lines(experiment: Experiment) -> list[str]:
    rows, shape, steps = experiment.rows, experiment.row_shape, experiment.steps
    amounts = {
        "tokens": rows.per_step * rows.length,
        "images to see": rows.per_step * shape.see_slots,
        "images to paint": rows.per_step * shape.dream_slots,
    }
    lines = [f"a step, and all {steps:,} (room for them, filled or not)"]
    return lines + [f"  {name:16} {count:>12,} {count * steps:>18,}" for name, count in amounts.items()]


def _schedule(experiment: Experiment) -> list[str]:
    """The learning rate over the run, drawn."""
    schedule = learning_rate_schedule(experiment.optimizer, experiment.steps)
    steps = np.linspace(0, experiment.steps, WIDTH)
    rates = np.asarray(schedule(steps))
    eighths = np.round(rates / max(rates.max(), 1e-30) * HEIGHT * 8).astype(int)
    drawn = [
        "".join(_BLOCKS[min(max(height - 8 * row, 0), 8)] for height in eighths) for row in reversed(range(HEIGHT))
    ]
    peak = f"{experiment.optimizer.learning_rate:g}"
    axis = f"{0:<{WIDTH // 2}}{f'step {experiment.steps:,}':>{WIDTH // 2}}"
    return [
        "learning rate",
        *(f"  {peak if not i else '':>8} |{line}" for i, line in enumerate(drawn)),
        f"  {0:>8} |{axis}",
    ]
