"""Turns nested settings into typed, frozen dataclasses, refusing what does not fit by the name of its key."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from dreamllm_jax.common import former_names

T = TypeVar("T")
LARGEST = 2**31 - 1  # of whole numbers: steps, seeds and sizes are counted in 32 bits


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


def read(cls: type[T], config: Any, path: str = "config") -> T:
    """Reads a nested mapping (ConfigDict or dict) as the frozen dataclass `cls`.

    Raises:
      ConfigError: naming the first key that is unknown (with the nearest known one), missing, of the wrong type, or in
        conflict with another.
    """
    if isinstance(config, cls):
        return config
    if not isinstance(config, Mapping) and not hasattr(config, "items"):
        raise ConfigError(f"{path} must be a group of settings, got {config!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = dict(config.items())
    for name in given:
        if name not in fields:
            raise ConfigError(_unknown(path, name, list(fields), given.get("kind") if "kind" in fields else None))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ConfigError(f"{path}.{name} is missing")
    values = {name: _value(hints[name], value, f"{path}.{name}") for name, value in given.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings (dataclasses or mappings) as dotted path -> value."""
    if dataclasses.is_dataclass(config):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if not hasattr(config, "items") or not config:
        return {prefix.removesuffix("."): config}
    return {path: value for name, item in config.items() for path, value in flat(item, f"{prefix}{name}.").items()}


def differences(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted paths of the settings that differ -> both values, None where there is none."""
    old, new = flat(before), flat(after)
    return {path: (old.get(path), new.get(path)) for path in {**old, **new} if old.get(path) != new.get(path)}


def changes(before: Any, after: Any) -> str:
    """The `differences` in words; empty if there are none."""
    return "; ".join(f"{path}: {old!r}, now {new!r}" for path, (old, new) in differences(before, after).items())


def _unknown(path: str, name: str, known: list[str], kind: Any) -> str:
    # Of a model or a run at rest the path begins with its file.
    saved = re.sub(r"^.*/model\.json", "config.model", re.sub(r"^.*/config\.json", "config", path))
    if now := former_names.SETTINGS.get(f"{saved}.{name}"):
        return f"{path}.{name} is called {now} now"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {path}.{near[0]}?" if near else f"there are {', '.join(known)}"
    of_kind = "" if kind is None else f" of kind {kind!r}"
    return f"{path}.{name} is not a setting{of_kind}; {hint}"


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return read(hint, value, path)
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, path)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), map(str, args), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path} must be one of {', '.join(map(repr, args))}, got {value!r}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{path} must have {len(args)} entries, got {len(value)}")
        return tuple(_value(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not hasattr(value, "items"):
            raise ConfigError(f"{path} must be a group of settings, got {value!r}")
        return {name: _value(args[1], item, f"{path}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path} must be {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{path} must be a number, got {value!r}")
    if hint is int and abs(value) > LARGEST:
        raise ConfigError(f"{path} must not be beyond {LARGEST}, got {value!r}")
    return value


def _union(args: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [arg for arg in args if arg is not type(None)]
    if all(map(dataclasses.is_dataclass, choices)):
        return _tagged(choices, value, path)
    errors = []
    for kind in choices:
        try:
            return _value(kind, value, path)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _tagged(choices: list[type], value: Any, path: str) -> Any:
    """Reads settings as that of several classes whose `kind` they name; where there is one alone, they need not."""
    if any(isinstance(value, choice) for choice in choices):
        return value
    if len(choices) == 1 or not hasattr(value, "items"):
        return read(choices[0], value, path)
    kinds = {kind: choice for choice in choices for kind in typing.get_args(typing.get_type_hints(choice)["kind"])}
    named = ", ".join(map(repr, kinds))
    if "kind" not in value:
        raise ConfigError(f"{path}.kind is missing: it is one of {named}")
    if not isinstance(value["kind"], str) or value["kind"] not in kinds:
        near = difflib.get_close_matches(str(value["kind"]), kinds, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{path}.kind must be one of {named}, got {value['kind']!r}{hint}")
    return read(kinds[value["kind"]], value, path)
