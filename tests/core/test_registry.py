"""The registry: the losses of this library, and what register_loss and unregister_loss add, refuse and remove."""

from __future__ import annotations

import pytest

from helpers.configs import REGISTRY, ZLossConfig, of_another_library
from loss_core import LOSS_CONFIG_REGISTRY, KDLossConfig, LossConfig, build_loss_config, register_loss, unregister_loss


def test_registry():
    assert LOSS_CONFIG_REGISTRY == REGISTRY
    assert list(LOSS_CONFIG_REGISTRY) == list(REGISTRY)


def test_registered_loss_works_like_a_built_in_one(zloss):
    assert build_loss_config("ZLoss", weight=1.0) == zloss(1.0)
    assert LossConfig.from_dict(zloss(0.5).to_dict()) == zloss(0.5)
    assert zloss(0.5).to_dict() == {"name": "ZLoss", "weight": 0.5, "per_class": []}
    assert build_loss_config(of_another_library("ZLoss"), weight=2.0) == zloss(2.0)
    with pytest.raises(TypeError, match="Did you mean 'weight'"):
        build_loss_config("ZLoss", wieght=1.0)


def test_an_unregistered_loss_is_unknown():
    register_loss("ZLoss", ZLossConfig, {"torch": lambda config: None})
    unregister_loss("ZLoss")
    with pytest.raises(TypeError, match="Unknown loss name 'ZLoss'"):
        build_loss_config("ZLoss")
    with pytest.raises(NotImplementedError, match="ZLossConfig must implement build"):
        ZLossConfig().build()


@pytest.mark.parametrize("name", REGISTRY)
def test_the_names_of_this_library_are_taken(name):
    with pytest.raises(ValueError, match=f"{name!r} is taken by {REGISTRY[name].__name__}"):
        register_loss(name, ZLossConfig, {"torch": lambda config: None})
    with pytest.raises(ValueError, match=f"{name!r} is not a loss that was registered"):
        unregister_loss(name)
    assert LOSS_CONFIG_REGISTRY == REGISTRY


@pytest.mark.parametrize(
    ("name", "cls", "builders", "error", "message"),
    [
        ("New", dict, {}, TypeError, "dataclass that derives from LossConfig"),
        ("New", ZLossConfig(), {}, TypeError, "dataclass that derives from LossConfig"),
        ("", ZLossConfig, {}, TypeError, "non-empty string"),
        (3, ZLossConfig, {}, TypeError, "non-empty string"),
        ("New", ZLossConfig, {"tensorflow": dict}, ValueError, "Unknown backend flag 'tensorflow'"),
        ("New", ZLossConfig, {"torch": "dict"}, TypeError, "callable that takes the config, got 'dict'"),
    ],
)
def test_register_loss_refuses(name, cls, builders, error, message):
    with pytest.raises(error, match=message):
        register_loss(name, cls, builders)
    assert LOSS_CONFIG_REGISTRY == REGISTRY


def test_register_loss_refuses_a_class_that_forgot_its_decorator():
    # Without @dataclass its fields are class attributes: `Forgot(weight=2.0)` fails far away from the cause.
    class Forgot(LossConfig):
        weight: float = 1.0

    try:
        with pytest.raises(TypeError, match="dataclass that derives from LossConfig"):
            register_loss("Forgot", Forgot, {"torch": lambda config: None})
    finally:
        LOSS_CONFIG_REGISTRY.pop("Forgot", None)


@pytest.mark.parametrize("name", ["KDLoss", "MyKD"])
def test_register_loss_does_not_replace_the_losses_of_this_library(name):
    with pytest.raises(ValueError, match="KDLossConfig"):
        register_loss(name, KDLossConfig, {"torch": lambda config: "hijacked"})


def test_unregister_loss_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="'Nope' is not a loss that was registered"):
        unregister_loss("Nope")
