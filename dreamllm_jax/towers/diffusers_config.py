"""Reads a diffusers `config.json` into one of our config dataclasses, refusing whatever we would have to ignore."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def read_diffusers_config(cls: type[T], settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> T:
    """Builds `cls` from a diffusers config.

    Args:
      cls: a dataclass whose fields are named as in the config.
      settings: the parsed `config.json`; keys that begin with an underscore (`_class_name`, ...) are passed over.
      fixed: further keys, each with the only value that is implemented.

    Raises:
      ValueError: naming every key that is unknown, or whose value is not implemented.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    settings = {key: _hashable(value) for key, value in settings.items() if not key.startswith("_")}
    unknown = [f"{key}={settings[key]!r} (unknown)" for key in settings.keys() - fields - fixed.keys()]
    wrong = [
        f"{key}={settings[key]!r} (only {fixed[key]!r} is implemented)"
        for key in settings.keys() & fixed.keys()
        if (settings[key] or None) != (fixed[key] or None)  # null, false and zero all mean off
    ]
    if problems := sorted(unknown + wrong):
        raise ValueError(f"{cls.__name__} does not support: {'; '.join(problems)}")
    return cls(**{key: value for key, value in settings.items() if key in fields})


def require(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
