"""The argument behind a configuration file's name: `configs/stage2_igpt.py:llm=13b,queries=128`."""

import dataclasses
import typing
from typing import TypeVar

from dreamllm_jax.configuration import ConfigError, read

T = TypeVar("T")


def parse(cls: type[T], argument: str) -> T:
    """Reads `name=value,name=value` as the frozen dataclass `cls`.

    Args:
      cls: with fields of type int, float, bool, str or a Literal of strings, all with defaults.
      argument: a first word without a name is the value of the first field.

    Raises:
      ConfigError: naming what is unknown (with the nearest name that is known), given twice, or of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    values = {name: _converted(hints.get(name), text) for name, text in words(cls, argument).items()}
    return read(cls, values, "argument")


def words(cls: type, argument: str) -> dict[str, str]:
    """The argument's names and what stands for them; errors as of `parse`, but for names and types."""
    found: dict[str, str] = {}
    for index, word in enumerate(argument.split(",") if argument else []):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals and not index:
            name, value = dataclasses.fields(cls)[0].name, name
        if not name or not value:
            raise ConfigError(f"argument {argument!r}: {word!r} is not name=value")
        if name in found:
            raise ConfigError(f"argument {argument!r} gives {name} twice")
        found[name] = value
    return found


def _converted(hint: type | None, text: str) -> object:
    """The text as its field wants it, or as it is, which the field's check then refuses."""
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return hint(text) if hint in (int, float) else text
    except ValueError:
        return text
