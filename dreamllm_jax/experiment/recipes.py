"""What configuration files are made of: the argument behind their name, other configurations, grids of variants.

An ablation (`configs/ablations/*.py`) takes a parent, another configuration, and changes what it is about. What follows
its name goes to whom it concerns: `configs/ablations/min_snr.py:parent=stage1_creation,gamma=5,llm=13b` has `gamma`,
the parent's `llm` is 13b. Its `SWEEP` lists the values to compare, for `launch/sweep.py`.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ml_collections import ConfigDict

from dreamllm_jax.common.configuration import ConfigError, read

_TRUTH = {"true": True, "false": False}


def parse(argument: str, choices: Mapping[str, Iterable[str]] | None = None, /, **defaults: Any) -> Any:
    """The argument behind a configuration file's name, as in `configs/stage2_igpt.py:llm=13b,queries=128`.

    Args:
      argument: `name=value,name=value`; a first word without a name is the value of the first of `defaults`.
      choices: the words of those arguments that must be one of a few.
      defaults: what may be given, with the value it has otherwise and so its type: int, float, bool or str.

    Returns:
      An object with the values under their names.

    Raises:
      ConfigError: naming what is unknown (with the nearest name that is known), given twice, or of the wrong type.
    """
    kinds = {name: type(default) for name, default in defaults.items()}
    kinds |= {name: Literal[tuple(known)] for name, known in (choices or {}).items()}
    fields = [(name, kinds[name], dataclasses.field(default=default)) for name, default in defaults.items()]
    values = {name: _converted(kinds.get(name), text) for name, text in _words(argument, next(iter(defaults))).items()}
    return read(dataclasses.make_dataclass("Arguments", fields, frozen=True), values, "argument")


def _words(argument: str, first: str) -> dict[str, str]:
    """The argument's names and what stands for them; a first word without a name is for `first`."""
    found: dict[str, str] = {}
    for index, word in enumerate(argument.split(",") if argument else []):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals and not index:
            name, value = first, name
        if not name or not value:
            raise ConfigError(f"argument {argument!r}: {word!r} is not name=value")
        if name in found:
            raise ConfigError(f"argument {argument!r} gives {name} twice")
        found[name] = value
    return found


def _converted(kind: Any, text: str) -> Any:
    """The text as its type wants it, or as it is, which the check of types then refuses."""
    if kind is bool:
        return _TRUTH.get(text.lower(), text)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def load(path: str | os.PathLike, argument: str = "") -> ConfigDict:
    """What a configuration file's `get_config` gives.

    Raises:
      ConfigError: there is no such file, or it refuses the argument, or fails.
    """
    loaded = module(path)
    with _naming(path):
        return loaded.get_config(*[argument] if argument else [])


def module(path: str | os.PathLike) -> ModuleType:
    """A configuration file as a module.

    Raises:
      ConfigError: there is no such file, or it fails, or has no get_config.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.py"))
        raise ConfigError(f"there is no {path}" + (f"; beside it are {', '.join(there)}" if there else ""))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    with _naming(path):
        spec.loader.exec_module(loaded)
    if not hasattr(loaded, "get_config"):
        raise ConfigError(f"{path} has no get_config(arg)")
    return loaded


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Whatever is wrong with a program of the user's is told as a mistake in that file."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error


def begin(
    file: str,
    argument: str,
    parent: str = "stage2_igpt",
    choices: Mapping[str, Iterable[str]] | None = None,
    **defaults: Any,
) -> tuple[Any, ConfigDict]:
    """Takes an ablation's own arguments, and its parent's configuration with the others.

    Args:
      file: the ablation's `__file__`.
      parent: the configuration that it changes unless told otherwise, a name in `configs/`.
      choices, defaults: its arguments, see `parse`.

    Raises:
      ConfigError: an argument that nobody takes, or a parent that does not exist.
    """
    defaults = {"parent": parent, **defaults}
    words = _words(argument, "parent")
    mine, theirs = (
        ",".join(f"{name}={value}" for name, value in words.items() if (name in defaults) == own)
        for own in (True, False)
    )
    given = parse(mine, choices, **defaults)
    path = Path(file).parent.parent / f"{given.parent}.py"
    try:
        config = load(path, theirs)
    except ConfigError as error:
        raise ConfigError(f"{error} (of parent={given.parent}; here there are {', '.join(sorted(defaults))})") from None
    config.parent = os.path.relpath(path) + (f":{theirs}" if theirs else "")
    return given, config


def override(config: ConfigDict, flags: Sequence[str]) -> ConfigDict:
    """Changes settings as flags such as `--config.optimizer.learning_rate=1e-3` say, and gives the configuration.

    Groups that the configuration leaves out are made. A value is a Python literal, true, false, or a word.

    Raises:
      ConfigError: a flag without a value, or for a setting within what is no group.
    """
    with config.unlocked(), config.ignore_type():  # types are checked with everything else
        for flag in flags:
            path, equals, text = flag.removeprefix("--config.").partition("=")
            *groups, name = path.split(".")
            if not equals or not name:
                raise ConfigError(f"{flag} is not --config.SETTING=VALUE")
            at = config
            for group in groups:
                if at.get(group) is None:
                    at[group] = ConfigDict()
                at = at[group]
                if not isinstance(at, ConfigDict):
                    raise ConfigError(f"{flag}: {group} is {at!r}, not a group of settings")
            at[name] = _literal(text, at.get(name))
    return config


def _literal(text: str, before: Any) -> Any:
    if isinstance(before, str) and text != "None":
        return text
    if text in _TRUTH:
        return _TRUTH[text]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


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
