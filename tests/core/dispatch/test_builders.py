"""The builder that a flag selects, for losses that a user has registered."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from loss_core import BackendUnavailable, MaskedCrossEntropyConfig, build_loss_module, register_loss, unregister_loss


@pytest.mark.parametrize(
    ("flag", "ran"),
    [
        (None, "torch"),
        ("torch", "torch"),
        ("torch:auto", "torch"),
        ("torch:eager", "torch"),
        ("jax", "jax"),
        ("jax:xla", "jax"),
    ],
)
def test_registered_loss_is_built_by_flag(zloss, flag, ran):
    with_flag = {} if flag is None else {"backend": flag}
    assert zloss(2.0).build(**with_flag) == (ran, 2.0)
    assert build_loss_module("ZLoss", weight=3.0, **with_flag) == (ran, 3.0)
    assert build_loss_module(zloss(4.0), backend=flag) == (ran, 4.0)


def test_registered_loss_is_validated_on_build(zloss):
    config = zloss()
    config.weight = -1
    with pytest.raises(ValueError, match="weight must be >= 0, got -1"):
        config.build(backend="jax")


def test_register_again_replaces_the_builders(zloss):
    register_loss("ZLoss", zloss, {"torch": lambda config: "new"})
    assert zloss().build() == "new"


@pytest.mark.parametrize("flag", ["torch:triton", "torch:plain"])
def test_a_named_kernel_never_falls_back_to_another(zloss, flag):
    with pytest.raises(BackendUnavailable, match=flag):
        zloss().build(backend=flag)


def test_a_registered_subclass_is_not_built_as_its_parent():
    @dataclass
    class SmoothedConfig(MaskedCrossEntropyConfig):
        smoothing: float = 0.1

    register_loss("Smoothed", SmoothedConfig, {"torch": lambda config: "smoothed"})
    try:
        assert SmoothedConfig().build() == "smoothed"
        with pytest.raises(BackendUnavailable, match="SmoothedConfig has no builder for 'jax"):
            SmoothedConfig().build(backend="jax")
    finally:
        unregister_loss("Smoothed")
