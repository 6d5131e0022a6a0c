"""The table of build_loss_config, row by row, and configs with a `build` of their own."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest

from helpers.configs import CHANGED, NEMO, REGISTRY, by_config, of_another_library
from loss_core import LossConfig, LossFromFactoryConfig, build_loss_config, build_loss_module


@by_config
def test_table_instance_is_returned_unchanged(config):
    assert build_loss_config(config) is config


@by_config
def test_table_instance_with_kwargs_is_refused(config):
    with pytest.raises(ValueError, match="must be set on the config") as error:
        build_loss_config(config, reduction="mean", ignore_index=0)
    assert "'ignore_index'" in str(error.value)
    assert "'reduction'" in str(error.value)


@pytest.mark.parametrize("cls", [*NEMO, LossConfig], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("kwargs", [{}, {"ignore_index": 0}])
def test_table_config_class_is_refused(cls, kwargs):
    name = cls.__name__
    with pytest.raises(TypeError) as error:
        build_loss_config(cls, **kwargs)
    assert str(error.value) == f"Pass a LossConfig instance, not the class {name} (e.g. {name}())."


@pytest.mark.parametrize("name", REGISTRY)
def test_table_registry_name(name):
    assert build_loss_config(name) == REGISTRY[name]()
    assert type(build_loss_config(name)) is REGISTRY[name]
    values = {k: v for k, v in CHANGED[name].to_dict().items() if k != "name"}
    assert build_loss_config(name, **values) == CHANGED[name]


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("MaskedCrossEntropy", "reducton", "reduction"),
        ("MaskedCrossEntropy", "ignore_idx", "ignore_index"),
        ("FusedLinearCrossEntropy", "logit_softcap", "logit_softcapping"),
        ("TEParallelCrossEntropy", "tp_grp", "tp_group"),
        ("KDLoss", "temprature", "temperature"),
        ("KDLoss", "chunksize", "chunk_size"),
    ],
)
@pytest.mark.parametrize("how", ["build_loss_config", "from_dict"])
def test_table_unknown_field_names_the_closest(name, wrong, right, how):
    with pytest.raises(TypeError) as error:
        build_loss_config(name, **{wrong: 1}) if how == "build_loss_config" else LossConfig.from_dict(
            {"name": name, wrong: 1}
        )
    message = str(error.value)
    assert repr(wrong) in message
    assert f"Did you mean {right!r}?" in message
    assert REGISTRY[name].__name__ in message


@pytest.mark.parametrize("how", ["build_loss_config", "from_dict"])
def test_table_nemo_automodels_name_of_an_implementation_leads_to_the_flag(how):
    with pytest.raises(TypeError) as error:
        build_loss_config("FusedLinearCrossEntropy", impl="cce") if how == "build_loss_config" else (
            LossConfig.from_dict({"name": "FusedLinearCrossEntropy", "impl": "torch_compile"})
        )
    message = str(error.value)
    assert message.startswith("FusedLinearCEConfig has no field 'impl'. The flag names the kernels:")
    for impl, flag in (("cce", "torch:triton"), ("torch_compile", "torch:eager")):
        assert f"backend={flag!r} for impl={impl!r}" in message


def test_table_unknown_field_with_nothing_close_lists_the_fields():
    with pytest.raises(TypeError, match="'zzz'") as error:
        build_loss_config("KDLoss", zzz=1)
    assert "Did you mean" not in str(error.value)
    assert "ignore_index, temperature, fp32_upcast, tp_group, chunk_size" in str(error.value)


def test_table_a_bad_value_by_name_is_refused():
    with pytest.raises(ValueError, match=r"^Invalid reduction: 'avg'"):
        build_loss_config("MaskedCrossEntropy", reduction="avg")


@pytest.mark.parametrize("name", ["CrossEntropy", "kdloss", "", "torch.nn.CrossEntropyLoss", "loss_core.KDLossConfig"])
@pytest.mark.parametrize("kwargs", [{}, {"reduction": "mean"}])
def test_table_other_string(name, kwargs):
    with pytest.raises(TypeError) as error:
        build_loss_config(name, **kwargs)
    message = str(error.value)
    assert message.startswith("Unknown loss name")
    assert repr(name) in message
    assert all(known in message for known in REGISTRY)
    assert "class/callable" in message
    assert "Resolve dotted paths in the caller" in message


@pytest.mark.parametrize("name", REGISTRY)
def test_table_class_with_a_registered_name_is_upgraded(name):
    assert build_loss_config(of_another_library(name)) == REGISTRY[name]()
    assert build_loss_config(of_another_library(name), ignore_index=0) == REGISTRY[name](ignore_index=0)


@pytest.mark.parametrize("name", REGISTRY)
def test_table_class_with_a_registered_name_but_other_kwargs(name):
    cls = of_another_library(name)
    config = build_loss_config(cls, ignore_index=0, focal_gamma=0.1)
    assert config == LossFromFactoryConfig(cls, {"ignore_index": 0, "focal_gamma": 0.1})
    built = config.build()
    assert type(built) is cls
    assert vars(built) == {"ignore_index": 0, "focal_gamma": 0.1}


@pytest.mark.parametrize(
    "factory",
    [dict, lambda **kwargs: kwargs, functools.partial(dict), of_another_library("Mine")],
    ids=["class", "function", "partial", "named"],
)
def test_table_any_other_callable(factory):
    config = build_loss_config(factory, a=1, reduction="avg")
    assert type(config) is LossFromFactoryConfig
    assert config.factory is factory
    assert config.kwargs == {"a": 1, "reduction": "avg"}
    built = config.build()
    assert (built if isinstance(built, dict) else vars(built)) == {"a": 1, "reduction": "avg"}


@pytest.mark.parametrize("loss", [None, 3, ["KDLoss"], b"KDLoss"], ids=repr)
def test_table_anything_else(loss):
    with pytest.raises(TypeError, match=type(loss).__name__):
        build_loss_config(loss)


@dataclass
class OwnBuildConfig(LossConfig):
    scale: float = 1.0

    def build(self):
        return ("own", self.scale)


def test_a_subclass_that_only_overrides_build():
    assert OwnBuildConfig(2.0).build() == ("own", 2.0)
    assert build_loss_config(OwnBuildConfig()) == OwnBuildConfig()
    assert build_loss_module(OwnBuildConfig(3.0)) == ("own", 3.0)


def test_a_subclass_whose_build_takes_no_flag_refuses_one():
    with pytest.raises(ValueError, match=r"backend='torch' can't be applied: OwnBuildConfig\.build\(\)"):
        build_loss_module(OwnBuildConfig(), backend="torch")
