"""What the public `config.json`s of the decoder's families have in common: how one is read, and written."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from dreamllm_jax.layers.rope import RopeScaling
from dreamllm_jax.towers.language_models.decoder import DecoderConfig
from dreamllm_jax.towers.public import PublicForm, reader, require_supported

_SHAPES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
# The decoder's settings that stand in every family's file by their names, and those that a file never has by them.
_EVERYWHERE = (*_SHAPES, "max_position_embeddings", "rms_norm_eps", "initializer_range")
_OTHERWISE = ("kind", "rope_theta", "rope_scaling", "lora")
# Settings of a file that would change the function computed here: name -> the one value that is supported.
_SUPPORTED = {"hidden_act": "silu", "attention_dropout": 0.0}


def causal_lm(torch_class: str, *types: str, without: tuple[str, ...] = ()) -> PublicForm:
    """The public form of a family: a class of transformers whose decoder is called `model`, and its `model_type`s.

    Args:
      without: settings of the decoder's shape that its files need not have.
    """
    return PublicForm(
        library="transformers",
        torch_class=torch_class,
        types=types,
        prefix="model.",
        outside=("lm_head.",),
        beside=r".*\brotary_emb\.inv_freq$",  # computed
        settings=tuple(name for name in _SHAPES if name not in without),
    )


@dataclasses.dataclass(frozen=True)
class PublicDecoder(DecoderConfig):
    """A family of language models that transformers has a class for, its `public`; its own defaults are that class's.

    Attributes:
      own: the decoder's settings that its files have beside those of every family.
      unsaid: `use_sliding_window` and `max_window_layers` (how many layers before the first with a window) of a file
        that does not say.
    """

    own: ClassVar[tuple[str, ...]] = ()
    unsaid: ClassVar[tuple[bool, int]] = (True, 0)

    @classmethod
    def from_public(cls, config: Mapping[str, Any]) -> Self:
        """Reads a `config.json`, of transformers 5 (`rope_parameters`) or before (`rope_theta`, `rope_scaling`).

        Raises:
          ValueError: naming a setting that is not supported.
        """
        reader((cls,), config)
        require_supported(config, _SUPPORTED)
        values = {name: config[name] for name in (*_EVERYWHERE, *cls.own) if config.get(name) is not None}
        ours = cls(**values, **_rope(config))
        window = config.get("sliding_window")
        if window is not None and window < ours.max_length and _windowed(config, ours.num_hidden_layers, *cls.unsaid):
            raise ValueError(
                f"sliding_window = {window} is not supported, as a layer sees fewer tokens than a document may have"
            )
        return ours

    def to_public(self) -> dict[str, Any]:
        """The settings of a `config.json`, understood by transformers 4 and 5 alike.

        Raises:
          ValueError: naming a setting that the public class does not know.
        """
        told = (*_EVERYWHERE, *self.own)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "attention_out_bias" and "attention_bias" in self.own:
                if value not in (None, self.attention_bias):
                    raise ValueError(
                        f"{self.public.torch_class} has biases at all projections of its attention or at none"
                    )
            elif field.name not in (*told, *_OTHERWISE) and value != field.default:
                raise ValueError(f"{self.public.torch_class} has no {field.name}={value!r}")
        scaling = None
        if self.rope_scaling is not None:
            scaling = {n: value for n, value in dataclasses.asdict(self.rope_scaling).items() if value is not None}
            scaling["type"] = self.rope_scaling.rope_type
        settings = {name: getattr(self, name) for name in told}
        return settings | {"rope_theta": self.rope_theta, "rope_scaling": scaling, "hidden_act": "silu"}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's `rope_theta`, if the file has one, and `rope_scaling`."""
    before, now = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    if before and now and before.get("rope_type", before.get("type")) != now.get("rope_type"):
        raise ValueError(f"rope_scaling {before} and rope_parameters {now} are of different types: leave one out")
    rope = {**before, **now}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (1.0, None):
        raise ValueError("partial_rotary_factor is not supported: the whole head is rotated")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if rope_type != "default":
        names = [field.name for field in dataclasses.fields(RopeScaling)[1:]]
        scaling = RopeScaling(rope_type, **{"factor": None, **{name: rope[name] for name in names if name in rope}})
    theta = rope.get("rope_theta", config.get("rope_theta"))
    return {"rope_scaling": scaling} | ({} if theta is None else {"rope_theta": theta})


def _windowed(config: Mapping[str, Any], layers: int, used: bool, first: int) -> bool:
    """Whether some layer has the window that the file has; `used` and `first` are those of a file that does not say."""
    if not config.get("use_sliding_window", used):
        return False
    if (kinds := config.get("layer_types")) is not None:
        return "sliding_attention" in kinds
    return config.get("max_window_layers", first) < layers
