"""A run's directory: what is in force there, and the model that was trained in it.

workdir/config.json      the complete configuration
workdir/tokenizer.json
workdir/data/            the documents, if the run prepared them itself
workdir/frozen/          frozen parameters
workdir/checkpoints/     by step
workdir/metrics.jsonl    a line a step; tensorboard/ beside it
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from etils import epath
from jax.experimental import multihost_utils

from dreamllm_jax.configuration import ConfigError, Experiment, read_experiment
from dreamllm_jax.data.pipeline import data_tokenizer
from dreamllm_jax.data.preparation import prepare
from dreamllm_jax.data.storage import SUMMARY
from dreamllm_jax.data.tokenizer import FILE as TOKENIZER_FILE
from dreamllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from dreamllm_jax.models.dreamllm import DreamLLM
from dreamllm_jax.training.checkpoints import Checkpoints, host_template
from dreamllm_jax.training.state import abstract_params, merge_params, split_params

CONFIG_FILE = "config.json"
DATA = "data"


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment with its data prepared and its tokenizer known."""

    workdir: epath.Path
    experiment: Experiment
    tokenizer: Tokenizer


def start(config: Mapping[str, Any], workdir: epath.PathLike) -> Run:
    """Checks a configuration and readies a run's directory for it, new or to be continued.

    Pictures that `data.path` names as a source or a folder are turned into documents under the directory.

    Raises:
      ConfigError: a setting that cannot be used, or one that differs from what the run began with.
      FileNotFoundError, ValueError: data or a tokenizer that is missing or does not fit.
    """
    experiment = read_experiment(config)
    workdir = epath.Path(workdir).absolute()
    first = jax.process_index() == 0
    if (workdir / CONFIG_FILE).exists():
        _check_unchanged(json.loads((workdir / CONFIG_FILE).read_text()), config, workdir)
    elif first:
        workdir.mkdir(parents=True, exist_ok=True)

    data = experiment.data
    if not (epath.Path(data.path) / SUMMARY).exists():
        target = workdir / DATA
        if first:
            prepare(
                data.path,
                target,
                pairs=data.pairs,
                size=max(experiment.model.clip.image_size, experiment.rows.dream_size),
                vocab_size=experiment.model.llama.vocab_size,
                text_tokenizer=data.tokenizer,
            )
        data = dataclasses.replace(data, path=str(target))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("data prepared")

    tokenizer = data_tokenizer(data)
    room = experiment.model.llama.vocab_size
    if tokenizer.vocab_size > room:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, config.model.llama.vocab_size has room for {room}"
        )
    model = dataclasses.replace(experiment.model, special_tokens=tokenizer.special)
    if first:
        (workdir / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tokenizer.save(workdir / TOKENIZER_FILE)
    return Run(workdir, dataclasses.replace(experiment, model=model, data=data), tokenizer)


def _check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], workdir: epath.Path) -> None:
    """What the parameters and draws are made of must stay; the data's own settings are checked with their state."""
    now = json.loads(json.dumps(now))
    for name in ("model", "parameters", "objective", "seed", "steps"):
        old, new = before.get(name), now.get(name)
        if old != new:
            raise ConfigError(
                f"{workdir} was begun with another config.{name} ({_difference(old, new)}): restore it, or choose "
                "another --workdir"
            )


def _difference(old: Any, new: Any) -> str:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return f"{old!r}, now {new!r}"
    return "; ".join(
        f"{key}: {_difference(old.get(key), new.get(key))}" for key in {**old, **new} if old.get(key) != new.get(key)
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, ready to generate."""

    experiment: Experiment
    tokenizer: Tokenizer
    model: DreamLLM
    params: dict


def load(workdir: epath.PathLike, step: int | None = None) -> Trained:
    """The model of a run's directory, at `step` or the newest checkpoint, on the first local device.

    Raises:
      FileNotFoundError: no run or no such checkpoint in the directory.
    """
    workdir = epath.Path(workdir).absolute()
    if not (workdir / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{workdir} has no {CONFIG_FILE}: it is not the --workdir of a training run")
    experiment = read_experiment(json.loads((workdir / CONFIG_FILE).read_text()))
    if (workdir / DATA / SUMMARY).exists():
        experiment = dataclasses.replace(
            experiment, data=dataclasses.replace(experiment.data, path=str(workdir / DATA))
        )
    tokenizer = load_tokenizer(workdir / TOKENIZER_FILE)
    config = dataclasses.replace(experiment.model, special_tokens=tokenizer.special)
    parameters = experiment.parameters
    trainable, frozen = split_params(nn.unbox(abstract_params(config)), parameters.trainable)
    with Checkpoints(workdir, experiment.checkpoint) as checkpoints:
        leaves = checkpoints.restore_params(
            host_template(trainable, parameters.dtype), host_template(frozen, parameters.frozen_dtype), step
        )
    return Trained(dataclasses.replace(experiment, model=config), tokenizer, DreamLLM(config), merge_params(*leaves))
