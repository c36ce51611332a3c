"""How a tower is stored by the library that published it: declared in the tower's own file, read by `interop`."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

# Names of the files of tensors, without their endings.
_STEMS = {"transformers": ("model", "pytorch_model"), "diffusers": ("diffusion_pytorch_model",)}


@dataclasses.dataclass(frozen=True)
class PublicForm:
    """The public class of a tower, and what its files hold.

    Attributes:
      library: whose class it is.
      torch_class: the class; a config.json names it as `architectures` or, of diffusers, `_class_name`.
      types: the `model_type`s that are read, of which the first is written; none of diffusers.
      folder: where it lies in a directory of several towers.
      prefix: before the names of its tensors, relative to which ours are.
      outside: beginnings of names that have no prefix.
      beside: regular expression, from the beginning of a name, of tensors that may lie there and are nothing of ours.
      renamed: regular expressions of names in older files, and what they are called today.
      stacked: regular expressions of tensors (by today's names) that older files have in the place of several, one
        above the other, and what stands in the names of these.
      settings: those under the same name in config.json and here, by which models of other shapes are told apart.
    """

    library: Literal["transformers", "diffusers"]
    torch_class: str
    types: tuple[str, ...] = ()
    folder: str = ""
    prefix: str = ""
    outside: tuple[str, ...] = ()
    beside: str = r"(?!)"
    renamed: tuple[tuple[str, str], ...] = ()
    stacked: tuple[tuple[str, tuple[str, ...]], ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def stems(self) -> tuple[str, ...]:
        """What its file of tensors may be called, without the ending."""
        return _STEMS[self.library]

    @property
    def names(self) -> tuple[str, ...]:
        """What a config.json that is read may call itself."""
        return self.types or (self.torch_class,)

    def ours(self, name: str) -> str | None:
        """A tensor's name relative to our part of the model; None for what is nothing of ours."""
        if re.match(self.beside, name):
            return None
        name = name.removeprefix(self.prefix)
        for pattern, today in self.renamed:
            name = re.sub(pattern, today, name)
        return name

    def parts(self, name: str) -> tuple[str, ...]:
        """What a tensor with one of our names is made of: itself, or those that are `stacked` in it, from the top."""
        for pattern, names in self.stacked:
            if re.search(pattern, name):
                return tuple(re.sub(pattern, part, name) for part in names)
        return (name,)

    def theirs(self, name: str) -> str:
        """The inverse of `ours`."""
        return name if name.startswith(self.outside) else self.prefix + name


class PublicTower(Protocol):
    """What `interop` asks of the configuration class of a language model, a vision encoder or a part of a decoder.

    Attributes:
      public: its public form; None if it has none, and then nothing of this.
      from_public, to_public: its settings from, and as those of, a config.json.
    """

    public: PublicForm

    @classmethod
    def from_public(cls, settings: Mapping[str, Any]) -> "PublicTower": ...
    def to_public(self) -> dict[str, Any]: ...


class PublicVisionEncoder(PublicTower, Protocol):
    """What it asks of a vision encoder's.

    Attributes:
      with_processor: the encoder for the pixels that its image processor's settings say, or a refusal of these.
      processor: the settings of the image processor that makes our pixels.
      run_public: our features as the public class computes them from normalised pixels.
    """

    def with_processor(self, settings: Mapping[str, Any]) -> "PublicVisionEncoder": ...
    def processor(self) -> dict[str, Any]: ...
    def run_public(self, module: Any, pixels: Any) -> Any: ...


class PublicImageDecoder(Protocol):
    """What it asks of an image decoder's, a directory of diffusers.

    Attributes:
      public_parts: field of the configuration -> classes that may stand there; those have `run_public` too. None of a
        decoder without a public form, and then nothing of what follows.
      describes: whether the config.json of such parts, by name, are of this decoder and not of another with the same
        classes.
      public_scheduler: place of the scheduler's file.
      public_sampler: a class of diffusers that samples by it, if it does not say which.
      public_trainer: the class as which programs that train read any such file.
      public_noise_levels: by the file as its own class and as that one read it.
      noise_levels: what `public_noise_levels` says of our schedule.
    """

    public_parts: Mapping[str, tuple[type[PublicTower], ...]]
    public_scheduler: str
    public_sampler: str
    public_trainer: str

    @classmethod
    def describes(cls, parts: Mapping[str, Mapping[str, Any]]) -> bool: ...
    @classmethod
    def from_public(cls, parts: Mapping[str, Any], scheduler: Mapping[str, Any]) -> "PublicImageDecoder": ...
    def to_public_scheduler(self) -> dict[str, Any]: ...
    @property
    def noise_levels(self) -> Any: ...
    @staticmethod
    def public_noise_levels(own: Any, trainer: Any) -> Any: ...


def require_supported(settings: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raises ValueError, naming it, for a setting that has another value than the one that is supported.

    What is left out, or null, passes.
    """
    for name, value in supported.items():
        if settings.get(name, value) not in (value, None):
            raise ValueError(f"{name} = {settings[name]!r} is not supported: only {value!r} is")


def reader(classes: Sequence[type], settings: Mapping[str, Any]) -> type:
    """The configuration class that reads a config.json; the first of them for one that does not say what it is of.

    Raises:
      ValueError: none of them does.
    """
    key = "model_type" if classes[0].public.library == "transformers" else "_class_name"
    name = settings.get(key)
    for cls in classes:
        if name is None or name in cls.public.names:
            return cls
    known = tuple(known for cls in classes for known in cls.public.names)
    raise ValueError(f"{key} {name!r} is not supported: expected one of {known}")
