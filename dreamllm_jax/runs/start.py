"""A run's directory: what is in force there, and the model that was trained in it.

workdir/config.json      the complete configuration
workdir/model.json, tokenizer/, frozen/, checkpoints/    see `checkpoints.saved`
workdir/writer.json      who trains in it, while somebody does (`training.claim`)
workdir/data/            the documents, if the run prepared them itself
workdir/metrics.jsonl    a line a step; tensorboard/ beside it
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from dreamllm_jax.checkpoints.saved import CONFIG_FILE, TOKENIZER, write_description
from dreamllm_jax.common.configuration import ConfigError, differences, read
from dreamllm_jax.common.directories import absolute, is_remote, read_json, write_whole
from dreamllm_jax.data.chat_template import find_template
from dreamllm_jax.data.preparation import SOURCES, prepare
from dreamllm_jax.data.settings import DataConfig
from dreamllm_jax.data.storage import SUMMARY, open_tokenizer
from dreamllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from dreamllm_jax.experiment.experiment import Experiment, read_experiment, require_packages
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.parallel.distributed import gather, require_same
from dreamllm_jax.runs.initial import open_initial, require_same_model, restore_initial

DATA = "data"
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment with its data prepared and its tokenizer known."""

    workdir: epath.Path
    experiment: Experiment
    tokenizer: Tokenizer
    config: Mapping[str, Any]

    @property
    def initial(self) -> Callable[[Mapping[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]] | None:
        """What gives the parameters that `parameters.init_from` names, if it names any."""
        name = self.experiment.parameters.init_from
        return functools.partial(restore_initial, name, self.experiment.model) if name else None

    def record(self) -> None:
        """Writes, on the first host, that this configuration is in force. Of a run that continues, with other settings
        perhaps, only when its state was found to fit them."""
        if jax.process_index() == 0:
            write_whole(self.workdir / CONFIG_FILE, json.dumps(self.config, indent=2, sort_keys=True) + "\n")
            write_description(self.workdir, self.experiment.model, self.tokenizer)


def start_run(config: Mapping[str, Any], workdir: epath.PathLike) -> Run:
    """Checks a configuration and readies a run's directory for it, new or to be continued.

    Pictures that `data.path` names as a source or a folder are turned into documents under the directory.

    Raises:
      ConfigError: a setting that cannot be used, or one that differs from what the run began with.
      FileNotFoundError, ValueError: data or a tokenizer that is missing or does not fit.
    """
    require_same({"config": config, "workdir": str(workdir)}, "command line")
    workdir = absolute(workdir)
    first = jax.process_index() == 0
    begun = (workdir / CONFIG_FILE).exists()
    config, initial_tokenizer = with_initial(config, workdir if begun else None)
    experiment = read_experiment(config)
    require_packages(experiment)
    if begun:
        changed = _changes(read_recorded(workdir), experiment)
        if changed and not experiment.checkpoint.accept_changes:
            raise ConfigError(
                f"{workdir} was begun with another {'; '.join(changed)}: restore it, choose another --workdir, or "
                "accept it with --config.checkpoint.accept_changes=True"
            )
        for change in changed:
            _logger.warning("%s was begun with another %s", workdir, change)
    else:
        require_initial(experiment)
        if first:
            workdir.mkdir(parents=True, exist_ok=True)

    data = experiment.data
    if initial_tokenizer is not None and not data.tokenizer:
        if first and not begun:
            load_tokenizer(initial_tokenizer).save(workdir / TOKENIZER)
        data = dataclasses.replace(data, tokenizer=str(workdir / TOKENIZER))
    if not _is_data_set(data.path):
        data = _prepared(experiment, data, workdir / DATA)
    gather("")  # nobody goes on before the first host has written what all read

    tokenizer = open_tokenizer(data.path, data.tokenizer)
    require_room(tokenizer, experiment.model)
    require_templates(tokenizer, data, experiment.model)
    model = dataclasses.replace(experiment.model, special_tokens=tokenizer.special)
    run = Run(workdir, dataclasses.replace(experiment, model=model, data=data), tokenizer, config)
    if not begun:
        run.record()
    return run


def read_recorded(workdir: epath.Path) -> Experiment:
    """The experiment of a run's directory.

    Raises:
      ConfigError: its configuration is of another version, or damaged.
    """
    file = workdir / CONFIG_FILE
    return read(Experiment, read_json(file), str(file))


def _is_data_set(path: str) -> bool:
    """Whether all hosts find a data set there.

    Raises:
      ConfigError: some do, others do not.
    """
    found = gather(bool(path) and (epath.Path(path) / SUMMARY).exists())
    if any(found) and not all(found):
        raise ConfigError(f"config.data.path: process {found.index(False)} does not see {path}, others do")
    return all(found)


def _prepared(experiment: Experiment, data: DataConfig, target: epath.Path) -> DataConfig:
    """The data after the first host has made documents of its pictures; all hosts must call it.

    Raises:
      ConfigError, ValueError, OSError: the first host's problem, on all.
    """
    if not data.path:
        raise ConfigError(f"config.data.path is empty: name a data set, a folder of pictures, or {', '.join(SOURCES)}")
    if is_remote(data.path):
        raise ConfigError(f"config.data.path: there is no {SUMMARY} in {data.path}, so it is no data set")
    rows, problem = experiment.rows, None
    sides = [side for group in (*rows.see, *rows.painted) for side in (group.height, group.width)]
    if jax.process_index() == 0:
        try:
            prepare(
                data.path,
                target,
                pairs=data.pairs,
                size=max(experiment.model.vision_encoder.image_size, *rows.sample_size, *sides),
                vocab_size=experiment.model.language_model.vocab_size,
                text_tokenizer=data.tokenizer,
            )
        except Exception as error:  # the others wait
            problem = error
    told = gather("" if problem is None else str(problem) or repr(problem))[0]
    if problem is not None:
        raise problem
    if told:
        raise ValueError(f"process 0 could not prepare {data.path}: {told}")
    return dataclasses.replace(data, path=str(target))


def require_room(tokenizer: Tokenizer, model: DreamLLMConfig) -> None:
    """Raises ConfigError if the model has fewer embeddings than the tokenizer ids."""
    room = model.language_model.vocab_size
    if tokenizer.vocab_size > room:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, config.model.language_model.vocab_size has room for {room}"
        )


def require_templates(tokenizer: Tokenizer, data: DataConfig, model: DreamLLMConfig) -> None:
    """Raises ConfigError for a template of conversations that the tokenizer cannot write."""
    templates = {f"data.corpora.{name}": corpus.template for name, corpus in data.corpora.items()}
    if model.prompting is not None:
        templates["model.prompting"] = model.prompting.template
    for name, template in templates.items():
        try:
            find_template(template, tokenizer)
        except ValueError as error:
            raise ConfigError(f"config.{name}.template: {error}") from None


def with_initial(
    config: Mapping[str, Any], begun: epath.Path | None
) -> tuple[Mapping[str, Any], epath.PathLike | None]:
    """Takes from the model that a run begins with what its configuration leaves out: the model's shape, the tokenizer.

    Args:
      begun: the run's directory if it was begun before, which then knows both.

    Returns:
      The complete configuration, and the tokenizer of the model that the run begins with.
    """
    parameters = config.get("parameters")
    init_from = parameters.get("init_from", "") if isinstance(parameters, Mapping) else ""
    if not init_from:
        return config, None
    if begun is None:
        initial = open_initial(init_from)
        model, text_tokenizer = dataclasses.asdict(initial.config), initial.tokenizer
    else:
        model, text_tokenizer = read_json(begun / CONFIG_FILE)["model"], begun / TOKENIZER
    return {**config, "model": _merged(model, config.get("model", {}))}, text_tokenizer


def require_initial(experiment: Experiment) -> None:
    """Raises ValueError, naming a setting, if the model that a run begins with is another than its own; special tokens
    are left out, which a tokenizer tells later."""
    if name := experiment.parameters.init_from:
        theirs = open_initial(name).config
        ours = dataclasses.replace(experiment.model, special_tokens=theirs.special_tokens)
        require_same_model(theirs, ours, name)


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    if "kind" in above and above["kind"] != below.get("kind", above["kind"]):
        return above  # settings of another class
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _changes(before: Experiment, now: Experiment) -> list[str]:
    """What parameters and draws are made of must stay; the data's own settings are checked with their state."""
    names = ("model", "parameters", "objective", "optimizer", "seed", "steps")
    return [
        f"config.{path} ({old!r}, now {new!r})"
        for path, (old, new) in differences(before, now).items()
        if path.split(".")[0] in names
    ]
