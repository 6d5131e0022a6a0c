"""The JSON Schema of recipes accepts and refuses what `build_loss_module` does, for every registered loss."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import jsonschema
import pytest

from helpers.command import run
from loss_core import LOSS_CONFIG_REGISTRY, LossConfig, build_loss_module, parse_flag, register_loss, unregister_loss
from loss_core.cli.schema import recipe_schema
from loss_core.dispatch.flags import all_flags

VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


def test_the_command_prints_it():
    printed = json.loads(run("losses", "--schema").stdout)
    assert printed == recipe_schema()
    jsonschema.Draft202012Validator.check_schema(printed)


@pytest.mark.parametrize("name", LOSS_CONFIG_REGISTRY)
def test_every_loss_with_its_defaults(name):
    data = LOSS_CONFIG_REGISTRY[name]().to_dict()
    for recipe in (data, {"name": name}, name, [data, name], {"loss": {**data, "backend": "torch:eager"}, "steps": 3}):
        VALIDATOR.validate(recipe)
    properties = recipe_schema()["$defs"][name]["properties"]
    assert {key: properties[key]["default"] for key in data if key != "name"} == {
        key: value for key, value in data.items() if key != "name"
    }
    assert all(properties[key]["description"] for key in data)
    assert "tp_group" not in properties


def test_its_flags_are_those_that_are_parsed():
    flags = recipe_schema()["$defs"]["KDLoss"]["properties"]["backend"]["enum"]
    assert set(all_flags()) < set(flags)
    assert all(parse_flag(flag) for flag in flags)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"name": "MaskedCrossEntropi"}, TypeError),
        ({"name": "KDLoss", "temprature": 2.0}, TypeError),
        ({"name": "KDLoss", "temperature": 0}, ValueError),
        ({"name": "KDLoss", "temperature": "1e-3"}, ValueError),
        ({"name": "KDLoss", "chunk_size": -1}, ValueError),
        ({"name": "KDLoss", "ignore_index": 0.5}, ValueError),
        ({"name": "MaskedCrossEntropy", "reduction": "avg"}, ValueError),
        ({"name": "MaskedCrossEntropy", "fp32_upcast": "yes"}, ValueError),
        ({"name": "MaskedCrossEntropy", "label_smoothing": 1.0}, ValueError),
        ({"name": "FusedLinearCrossEntropy", "skip_ignored": "auto"}, ValueError),
        ({"name": "FusedLinearCrossEntropy", "logit_softcapping": -1}, ValueError),
        ({"name": "FusedLinearCrossEntropy", "backend": "torch:cce"}, ValueError),
    ],
)
def test_what_is_refused_when_it_is_built(fields, error):
    with pytest.raises(error):
        build_loss_module(fields)
    for recipe in (fields, [fields], {"loss": fields}):
        assert not VALIDATOR.is_valid(recipe), recipe


def test_a_users_loss():
    @dataclass
    class OwnConfig(LossConfig):
        """A loss.

        Attributes:
            kind: which.
        """

        kind: Literal["a", "b"] = "a"
        weights: list[float] = field(default_factory=list)
        handle: Any = field(default=None, repr=False, compare=False)
        anything: Any = None

    register_loss("Own", OwnConfig, {"jax": lambda config: config})
    try:
        own = recipe_schema()["$defs"]["Own"]["properties"]
        validator = jsonschema.Draft202012Validator(recipe_schema())
    finally:
        unregister_loss("Own")
    assert own["kind"] == {"enum": ["a", "b"], "default": "a", "description": "which."}
    assert own["weights"] == {"type": "array", "default": []}
    assert own["anything"] == {"default": None}
    assert own["backend"]["enum"] == ["jax", "jax:auto", "jax:xla"]
    assert "handle" not in own
    validator.validate({"name": "Own", "anything": {"x": 1}})
    assert not validator.is_valid({"name": "Own", "kind": "c"})


def test_a_class_that_needs_arguments():
    @dataclass
    class NeedyConfig(LossConfig):
        weight: float

        def validate(self):
            if self.weight < 0:
                raise ValueError("weight must be >= 0.")

    register_loss("Needy", NeedyConfig, {"torch": lambda config: config})
    try:
        needy = recipe_schema()["$defs"]["Needy"]
    finally:
        unregister_loss("Needy")
    assert needy["required"] == ["name", "weight"]
    assert needy["properties"]["weight"] == {"type": "number"}
