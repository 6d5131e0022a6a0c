"""Values of fields: which are refused, when and with which message, and which are accepted."""

import dataclasses

import numpy as np
import pytest
import yaml

from helpers.configs import TYPED
from loss_core import (
    ChunkedCEConfig,
    FusedLinearCEConfig,
    FusedLinearKDConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
    build_loss_module,
)

DISTILLATIONS = [KDLossConfig, FusedLinearKDConfig]
WITH_REDUCTION = [MaskedCrossEntropyConfig, FusedLinearCEConfig, TEParallelCEConfig, ChunkedCEConfig]

# (class, field, value, message after the field's name)
REFUSED = [
    *((cls, "reduction", value, None) for cls in WITH_REDUCTION for value in ("avg", "SUM", "", None, 1, ["mean"])),
    *((cls, "ignore_index", value, "an integer") for cls in TYPED for value in (1.5, "1", None, True, -100.0)),
    *(
        (cls, "temperature", value, "a finite number > 0")
        for cls in DISTILLATIONS
        for value in (0, 0.0, -1.0, float("nan"), float("inf"), "1", None, True)
    ),
    *((KDLossConfig, "chunk_size", value, "an integer >= 0") for value in (-1, 1.5, "8", None, True)),
    *(
        (cls, "divergence", value, "one of 'forward_kl', 'reverse_kl', 'jsd'")
        for cls in DISTILLATIONS
        for value in ("kl", "JSD", "", None, 0, ["jsd"])
    ),
    *(
        (cls, "beta", value, "a number in [0, 1]")
        for cls in DISTILLATIONS
        for value in (-1e-9, 1.001, float("nan"), "0.5", None, True)
    ),
    *(
        (FusedLinearCEConfig, "logit_softcapping", value, "a finite number >= 0")
        for value in (-1.0, -1e-9, float("nan"), float("inf"), "30", None, False)
    ),
    *((cls, "fp32_upcast", v, "True or False") for cls in (MaskedCrossEntropyConfig, KDLossConfig) for v in (1, "no")),
    *((ChunkedCEConfig, "chunk_len", value, "an integer >= 1") for value in (0, -1, True, 1.5, "8", None)),
    *((ChunkedCEConfig, "compile", value, "True or False") for value in (1, "no", None)),
]


def refused_id(value):
    return value.__name__ if isinstance(value, type) else None


def check_refusal(error, name, value, accepted):
    """The message names field, value and what is accepted."""
    message = str(error.value)
    assert name in message
    assert repr(value) in message
    if name == "reduction":
        assert message.startswith("Invalid reduction:")
        assert all(repr(choice) in message for choice in ("sum", "mean", "none"))
    else:
        assert message.startswith(f"{name} must be {accepted}")


@pytest.mark.parametrize(("cls", "name", "value", "accepted"), REFUSED, ids=refused_id)
def test_a_bad_value_is_refused_on_creation(cls, name, value, accepted):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        cls(**{name: value})
    check_refusal(error, name, value, accepted)


@pytest.mark.parametrize(("cls", "name", "value", "accepted"), REFUSED, ids=refused_id)
@pytest.mark.parametrize("how", ["build", "build_loss_module"])
def test_a_bad_value_set_later_is_refused_on_build(cls, name, value, accepted, how):
    config = cls()
    setattr(config, name, value)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        config.build() if how == "build" else build_loss_module(config)
    check_refusal(error, name, value, accepted)


@pytest.mark.parametrize("make", [lambda cls, **k: dataclasses.replace(cls(), **k), lambda cls, **k: cls.from_dict(k)])
def test_every_way_to_make_a_config_validates(make):
    with pytest.raises(ValueError, match=r"^Invalid reduction: 'avg'"):
        make(MaskedCrossEntropyConfig, reduction="avg")
    with pytest.raises(ValueError, match=r"^temperature must be a finite number > 0, got -1\.$"):
        make(KDLossConfig, temperature=-1)


def test_a_number_that_yaml_read_as_text_gets_a_hint():
    # YAML 1.1 reads 1e-3 as a string: the error must say how to write it.
    values = yaml.safe_load("temperature: 1e-3")
    assert values == {"temperature": "1e-3"}
    with pytest.raises(ValueError, match=r"temperature .*got '1e-3' .*write 1\.0e-3"):
        KDLossConfig(**values)


@pytest.mark.parametrize("value", [np.int64(-1), np.int32(5), 2**40, 0, -(2**40)])
def test_any_integer_is_an_ignore_index(value):
    assert MaskedCrossEntropyConfig(ignore_index=value).ignore_index == value


@pytest.mark.parametrize("value", [1, 0.5, np.float32(2.0), np.int64(3), 1e-6])
def test_any_positive_number_is_a_temperature(value):
    assert KDLossConfig(temperature=value).temperature == value


def test_limits_that_are_legal():
    assert FusedLinearCEConfig(logit_softcapping=0).logit_softcapping == 0
    assert KDLossConfig(chunk_size=0).chunk_size == 0
    assert [KDLossConfig(beta=value).beta for value in (0, 1, 1e-30)] == [0, 1, 1e-30]


def test_to_dict_gives_plain_values_for_numpy_numbers():
    config = KDLossConfig(ignore_index=np.int64(-1), temperature=np.float32(2.0))
    assert LossConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
