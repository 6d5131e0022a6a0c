"""Fields of the configs: names, order, defaults, construction, equality."""

import dataclasses
from dataclasses import fields

import pytest

from helpers.configs import CHANGED, NEMO, TYPED, by_class
from loss_core import (
    ChunkedCEConfig,
    FusedLinearCEConfig,
    KDLossConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)


@pytest.mark.parametrize("cls", NEMO, ids=lambda cls: cls.__name__)
def test_fields_order_and_defaults_are_those_of_nemo_automodel(cls):
    config = cls()
    assert [(f.name, getattr(config, f.name)) for f in fields(cls)][: len(NEMO[cls])] == list(NEMO[cls].items())


def test_new_fields_come_last_and_have_defaults():
    for cls, defaults in NEMO.items():
        for f in fields(cls)[len(defaults) :]:
            assert f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING, (cls, f.name)


def test_positional_construction():
    assert MaskedCrossEntropyConfig(False, 5, "mean") == MaskedCrossEntropyConfig(
        fp32_upcast=False, ignore_index=5, reduction="mean"
    )
    assert FusedLinearCEConfig(5, 30.0, "none") == FusedLinearCEConfig(
        ignore_index=5, logit_softcapping=30.0, reduction="none"
    )
    group = object()
    te = TEParallelCEConfig(5, "mean", group)
    assert (te.ignore_index, te.reduction, te.tp_group) == (5, "mean", group)
    kd = KDLossConfig(5, 2.0, False, group, 64)
    assert (kd.ignore_index, kd.temperature, kd.fp32_upcast, kd.tp_group, kd.chunk_size) == (5, 2.0, False, group, 64)
    chunked = ChunkedCEConfig(7, False, 5, "mean")
    assert (chunked.chunk_len, chunked.compile, chunked.ignore_index, chunked.reduction) == (7, False, 5, "mean")
    assert LossFromFactoryConfig(dict, {"a": 1}).build() == {"a": 1}


@pytest.mark.parametrize("cls", NEMO, ids=lambda cls: cls.__name__)
def test_configs_are_plain_mutable_dataclasses(cls):
    config = cls()
    assert isinstance(config, LossConfig)
    for f in fields(cls):
        setattr(config, f.name, getattr(config, f.name))
    assert not cls.__dataclass_params__.frozen


def test_replace_changes_one_field():
    assert dataclasses.replace(CHANGED["KDLoss"], temperature=4.0) == KDLossConfig(
        3, 4.0, False, None, 128, "jsd", 0.25
    )


@by_class
def test_equality_is_by_value_and_class(cls):
    assert cls() == cls()
    assert cls() != cls(ignore_index=1)
    assert all(cls() != other() for other in TYPED if other is not cls)
