"""Configuration files that are made of others: a file for each difference, none copied.

An ablation (`configs/ablations/*.py`) takes a parent, another configuration, and changes what it is about. What follows
its name goes to whom it concerns: `configs/ablations/min_snr.py:parent=stage1_creation,gamma=5,llm=13b` has `gamma`,
the parent's `llm` is 13b. Its `SWEEP` lists the values to compare, for `launch/sweep.py`.
"""

import ast
import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ml_collections import ConfigDict

from dreamllm_jax.arguments import parse, words
from dreamllm_jax.configuration import ConfigError

T = TypeVar("T", bound="Ablation")


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What every ablation takes; its own arguments are the fields of a class that extends this one.

    Attributes:
      parent: the configuration that it changes, a name in `configs/`.
    """

    parent: str = "stage2_igpt"


def load(path: str | os.PathLike, argument: str = "") -> ConfigDict:
    """What a configuration file's `get_config` gives.

    Raises:
      ConfigError: there is no such file, or it refuses the argument.
    """
    return module(path).get_config(argument)


def module(path: str | os.PathLike) -> ModuleType:
    """A configuration file as a module.

    Raises:
      ConfigError: there is no such file, or it has no get_config.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.py"))
        raise ConfigError(f"there is no {path}" + (f"; beside it are {', '.join(there)}" if there else ""))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    if not hasattr(loaded, "get_config"):
        raise ConfigError(f"{path} has no get_config(arg)")
    return loaded


def begin(file: str, cls: type[T], argument: str) -> tuple[T, ConfigDict]:
    """Takes an ablation's own arguments, and its parent's configuration with the others.

    Args:
      file: the ablation's `__file__`.
      cls: its arguments.

    Raises:
      ConfigError: an argument that nobody takes, or a parent that does not exist.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    given = words(cls, argument)
    ours = parse(cls, ",".join(f"{name}={value}" for name, value in given.items() if name in names))
    theirs = ",".join(f"{name}={value}" for name, value in given.items() if name not in names)
    path = Path(file).parent.parent / f"{ours.parent}.py"
    try:
        config = load(path, theirs)
    except ConfigError as error:
        raise ConfigError(f"{error} (of parent={ours.parent}; here there are {', '.join(sorted(names))})") from None
    config.parent = os.path.relpath(path) + (f":{theirs}" if theirs else "")
    return ours, config


def override(config: ConfigDict, flags: Sequence[str]) -> dict[str, Any]:
    """The settings with those of flags such as `--config.optimizer.learning_rate=1e-3` in their places."""
    settings = config.to_dict()
    for flag in flags:
        path, _, text = flag.removeprefix("--config.").partition("=")
        *groups, name = path.split(".")
        at = settings
        for group in groups:
            at = at.setdefault(group, {})
        try:
            at[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            at[name] = text
    return settings


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of the values: `grid(queries=(4, 64), seed=(0, 1))` has four."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def set_share(config: ConfigDict, corpus: str, share: float) -> None:
    """Gives a corpus, there already or not, this share of the documents; the others keep their proportions.

    Raises:
      ConfigError: a share that is none, or one below 1 of a mixture without another corpus.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"argument.share must lie in [0, 1], got {share}")
    corpora = config.data.corpora.to_dict()
    mine = corpora.pop(corpus, {})
    rest = sum(other.get("weight", 1.0) for other in corpora.values())
    if share < 1 and not corpora:
        raise ConfigError(f"config.data.corpora has nothing beside {corpus!r}, whose share is then 1, not {share}")
    for other in corpora.values():
        other["weight"] = other.get("weight", 1.0) / rest * (1 - share)
    chosen = {**({} if share == 1 else corpora), **({corpus: {**mine, "weight": share}} if share else {})}
    config.data = {**config.data.to_dict(), "corpora": chosen}
