"""Libraries that parse dataclasses return the registered config or raise, and never drop its fields."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

import dacite
import pydantic
import pytest

from loss_core import (
    LOSS_CONFIG_REGISTRY,
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    build_loss_config,
    build_loss_module,
    register_loss,
    unregister_loss,
)


@dataclass
class Recipe:
    loss: LossConfig
    steps: int = 1


class Model(pydantic.BaseModel):
    loss: LossConfig


CONFIGS = [
    MaskedCrossEntropyConfig(reduction="mean"),
    FusedLinearCEConfig(logit_softcapping=30.0, skip_ignored=True),
    KDLossConfig(temperature=2.0, chunk_size=128),
]
by_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)


@by_config
def test_pydantic_reads_the_named_config(config):
    recipe = pydantic.TypeAdapter(Recipe).validate_python({"loss": config.to_dict(), "steps": 3})
    assert recipe == Recipe(config, 3)
    assert type(recipe.loss) is type(config)
    assert Model(loss=config.to_dict()).loss == config
    assert Model(loss=config).loss is config


@by_config
def test_pydantic_goes_through_json(config):
    model = Model(loss=config)
    assert model.model_dump() == {"loss": config.to_dict()}
    assert Model.model_validate_json(model.model_dump_json()) == model
    assert Model.model_json_schema()["properties"]["loss"]["required"] == ["name"]


def test_pydantic_reads_a_field_of_one_class():
    adapter = pydantic.TypeAdapter(KDLossConfig)
    assert adapter.validate_python({"temperature": 2.0}) == KDLossConfig(temperature=2.0)
    with pytest.raises(pydantic.ValidationError, match="which is not a KDLossConfig"):
        adapter.validate_python({"name": "MaskedCrossEntropy"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "needs the key 'name'"),
        ({"temperature": 2.0}, "needs the key 'name'"),
        ({"name": "Nope"}, "Unknown loss name 'Nope'"),
        ({"name": "KDLoss", "temprature": 2.0}, "Did you mean 'temperature'"),
        ({"name": "KDLoss", "temperature": -1.0}, "temperature must be a finite number > 0"),
        ("KDLoss", "expects a mapping"),
        (None, "expects a mapping"),
    ],
)
def test_pydantic_says_what_is_wrong(data, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        Model(loss=data)


def test_pydantic_reads_a_registered_loss():
    @dataclass
    class OwnConfig(LossConfig):
        weight: float = 1.0

    register_loss("Own", OwnConfig, {})
    try:
        assert Model(loss={"name": "Own", "weight": 2.0}).loss == OwnConfig(2.0)
    finally:
        unregister_loss("Own")


@pytest.mark.parametrize("data", [{"name": "KDLoss", "temperature": 2.0}, {"temperature": 2.0}, {}], ids=repr)
def test_dacite_makes_no_empty_loss(data):
    with pytest.raises(dacite.WrongTypeError, match="loss"):
        dacite.from_dict(Recipe, {"loss": data})


@by_config
def test_dacite_reads_the_named_config_with_a_hook(config):
    read = dacite.Config(type_hooks={LossConfig: LossConfig.from_dict})
    assert dacite.from_dict(Recipe, {"loss": config.to_dict()}, read) == Recipe(config)
    values = {k: v for k, v in config.to_dict().items() if k != "name"}
    # YAML has a list where the field is a tuple.
    assert dacite.from_dict(type(config), values, dacite.Config(cast=[tuple])) == config


def test_the_base_config_is_accepted_but_can_not_be_built():
    assert type(LossConfig()) is LossConfig
    assert Model(loss=LossConfig()).loss is not None
    with pytest.raises(NotImplementedError):
        LossConfig().build()


@pytest.mark.parametrize("cls", LOSS_CONFIG_REGISTRY.values(), ids=lambda cls: cls.__name__)
def test_every_field_can_be_an_argument_of_argparse(cls):
    # As transformers.HfArgumentParser does: the metadata of a field are passed to add_argument.
    parser, hints = argparse.ArgumentParser(), get_type_hints(cls)
    for f in fields(cls):
        kind = hints[f.name] if callable(hints[f.name]) else str
        parser.add_argument(f"--{f.name}", type=kind, default=f.default, **f.metadata)
    assert cls(**vars(parser.parse_args([]))) == cls()
    assert cls(**vars(parser.parse_args(["--ignore_index", "-1"]))) == cls(ignore_index=-1)


def test_a_runtime_handle_is_omitted_from_dicts():
    @dataclass
    class OwnConfig(LossConfig):
        weight: float = 1.0
        group: Any = field(default=None, repr=False, compare=False)

    register_loss("Own", OwnConfig, {})
    try:
        assert OwnConfig(2.0, object()).to_dict() == {"name": "Own", "weight": 2.0}
    finally:
        unregister_loss("Own")


@by_config
def test_a_mapping_builds_as_a_recipe_has_it(config):
    assert build_loss_config(config.to_dict()) == config
    assert build_loss_module(config.to_dict()).kernel_choice.flag.startswith("torch:")
    made = build_loss_module({**config.to_dict(), "backend": "torch:eager"})
    assert made.kernel_choice.flag == "torch:eager"
    assert build_loss_module({**config.to_dict(), "backend": "torch:eager"}, backend="torch:eager") is not None


def test_a_mapping_with_another_backend_than_the_argument_is_refused():
    with pytest.raises(ValueError, match="give one of them"):
        build_loss_module({"name": "KDLoss", "backend": "torch"}, backend="jax")
    with pytest.raises(ValueError, match="must be set on the config"):
        build_loss_module({"name": "KDLoss"}, temperature=2.0)
    with pytest.raises(TypeError, match="has no field 'backend'"):
        build_loss_config({"name": "KDLoss", "backend": "torch"})


@pytest.mark.parametrize("value", [1e20, 1e-20, 2.0**64, float("inf"), float("nan"), 0.0])
def test_a_temperature_that_float32_cannot_square_is_refused(value):
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        KDLossConfig(temperature=value)


@pytest.mark.parametrize("value", [1e20, 1e-20])
def test_a_softcap_that_float32_cannot_hold_is_refused(value):
    with pytest.raises(ValueError, match="logit_softcapping must be a finite number >= 0"):
        FusedLinearCEConfig(logit_softcapping=value)


@pytest.mark.parametrize("value", [2**70, 2**63, -(2**63) - 1])
@pytest.mark.parametrize("cls", LOSS_CONFIG_REGISTRY.values(), ids=lambda cls: cls.__name__)
def test_an_ignore_index_beyond_64_bits_is_refused(cls, value):
    with pytest.raises(ValueError, match="ignore_index must be an integer of 64 bits"):
        cls(ignore_index=value)
