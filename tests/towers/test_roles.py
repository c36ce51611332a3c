"""Whatever stands in the registry has all that its role is asked for, and is found by its kind."""

import dataclasses
import typing

import pytest

from dreamllm_jax.common.configuration import ConfigError, read
from dreamllm_jax.objectives import interface
from dreamllm_jax.towers import registry, roles

ROLES = (
    (registry.LANGUAGE_MODELS, roles.LanguageModelRole, roles.LanguageModel),
    (registry.VISION_ENCODERS, roles.VisionEncoderRole, roles.VisionEncoder),
    (registry.CONNECTORS, roles.ConnectorRole, roles.Connector),
    (registry.IMAGE_DECODERS, roles.ImageDecoderRole, roles.ImageDecoder),
)


def members(protocol) -> set[str]:
    named = {*vars(protocol), *typing.get_type_hints(protocol)}
    return {name for name in named if not name.startswith("_") or name == "__call__"}


@pytest.mark.parametrize(
    ("tower", "role", "module"),
    [(tower, role, module) for towers, role, module in ROLES for tower in towers],
    ids=lambda value: value.__name__,
)
def test_a_tower_has_what_its_role_is_asked_for(tower, role, module):
    fields = {field.name for field in dataclasses.fields(tower)}
    assert members(role) - fields <= set(dir(tower)), members(role) - fields - set(dir(tower))
    make = getattr(tower, "make_connector" if role is roles.ConnectorRole else "make")
    made = typing.get_type_hints(make)["return"]
    assert members(module) <= set(dir(made)), members(module) - set(dir(made))
    assert tower.PUBLISHED and all("kind" in settings for settings in tower.PUBLISHED.values())


PARTS = {"denoiser": roles.DenoiserRole, "autoencoder": roles.AutoencoderRole}


@pytest.mark.parametrize("decoder", registry.IMAGE_DECODERS, ids=lambda cls: cls.__name__)
def test_parts_of_image_decoders_have_what_is_asked_of_them(decoder):
    for name, role in PARTS.items():
        annotated = typing.get_type_hints(decoder)[name]
        for part in typing.get_args(annotated) or (annotated,):
            fields = {field.name for field in dataclasses.fields(part)}
            assert not members(role) - fields - set(dir(part)), (part, members(role) - fields - set(dir(part)))


def test_objectives_have_what_is_asked_of_them():
    for objective in typing.get_args(interface.ObjectiveConfig):
        missing = members(interface.ObjectiveRole) - set(dir(objective))
        assert not missing, missing
        made = (typing.get_type_hints(getattr(objective, name))["return"] for name in ("make", "held_out"))
        for module, protocol in zip(made, (interface.Objective, interface.HeldOutLosses), strict=True):
            assert members(protocol) <= set(dir(module))


def test_kinds_are_told_apart():
    """Of several classes a configuration names one; nothing is guessed from the fields."""

    @dataclasses.dataclass(frozen=True)
    class One:
        kind: typing.Literal["one"] = "one"
        size: int = 1

    @dataclasses.dataclass(frozen=True)
    class Other:
        kind: typing.Literal["two", "three"] = "two"
        size: int = 1

    holder = dataclasses.make_dataclass("Holder", [("tower", registry._any_of((One, Other)))], frozen=True)
    assert read(holder, {"tower": {"kind": "three", "size": 3}}).tower == Other("three", 3)
    for given, message in (
        ({"size": 1}, "config.tower.kind is missing: it is one of 'one', 'two', 'three'"),
        ({"kind": "tow"}, "config.tower.kind must be one of 'one', 'two', 'three', got 'tow'; did you mean 'two'?"),
        (
            {"kind": "one", "seize": 1},
            "config.tower.seize is not a setting of kind 'one'; did you mean config.tower.size?",
        ),
        (3, "config.tower must be a group of settings, got 3"),
    ):
        with pytest.raises(ConfigError) as refused:
            read(holder, {"tower": given})
        assert str(refused.value) == message
