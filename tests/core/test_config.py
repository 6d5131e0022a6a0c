"""Configs: fields, validation, errors, the table of build_loss_config, round trips, user-defined losses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import threading
from dataclasses import dataclass, fields

import numpy as np
import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

import loss_core
from loss_core import (
    LOSS_CONFIG_REGISTRY,
    BackendUnavailable,
    ChunkedCEConfig,
    FusedLinearCEConfig,
    FusedLinearKDConfig,
    FusedLinearLogProbsConfig,
    FusedLinearTopKDistillationConfig,
    KDLossConfig,
    LogProbsConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
    TopKDistillationConfig,
    build_loss_config,
    build_loss_module,
    register_loss,
    unregister_loss,
)

# Fields of nemo_automodel.components.loss.loss, in its order, with its defaults. Written out by hand.
NEMO = {
    MaskedCrossEntropyConfig: {"fp32_upcast": True, "ignore_index": -100, "reduction": "sum"},
    FusedLinearCEConfig: {"ignore_index": -100, "logit_softcapping": 0.0, "reduction": "sum"},
    TEParallelCEConfig: {"ignore_index": -100, "reduction": "sum", "tp_group": None},
    KDLossConfig: {"ignore_index": -100, "temperature": 1.0, "fp32_upcast": True, "tp_group": None, "chunk_size": 0},
    LossFromFactoryConfig: {"factory": None, "kwargs": {}},
    ChunkedCEConfig: {"chunk_len": 512, "compile": True, "ignore_index": -100, "reduction": "sum"},
}
REGISTRY = {
    "MaskedCrossEntropy": MaskedCrossEntropyConfig,
    "FusedLinearCrossEntropy": FusedLinearCEConfig,
    "TEParallelCrossEntropy": TEParallelCEConfig,
    "ChunkedCrossEntropy": ChunkedCEConfig,
    "KDLoss": KDLossConfig,
    "FusedLinearKDLoss": FusedLinearKDConfig,
    "TopKDistillation": TopKDistillationConfig,
    "FusedLinearTopKDistillation": FusedLinearTopKDistillationConfig,
    "LogProbs": LogProbsConfig,
    "FusedLinearLogProbs": FusedLinearLogProbsConfig,
}
# No field has its default, so that a round trip that drops one shows.
CHANGED = {
    "MaskedCrossEntropy": MaskedCrossEntropyConfig(fp32_upcast=False, ignore_index=0, reduction="none"),
    "FusedLinearCrossEntropy": FusedLinearCEConfig(
        ignore_index=-1, logit_softcapping=30.0, reduction="mean", sequence_parallel=True
    ),
    "TEParallelCrossEntropy": TEParallelCEConfig(ignore_index=7, reduction="mean"),
    "KDLoss": KDLossConfig(
        ignore_index=3, temperature=2.5, fp32_upcast=False, chunk_size=128, divergence="jsd", beta=0.25
    ),
    "LogProbs": LogProbsConfig(ignore_index=3, temperature=2.5, logit_softcapping=30.0, entropy=True),
    "FusedLinearLogProbs": FusedLinearLogProbsConfig(
        ignore_index=3, temperature=0.5, logit_softcapping=5.0, entropy=True, sequence_parallel=True
    ),
    "FusedLinearKDLoss": FusedLinearKDConfig(
        ignore_index=3, temperature=2.5, divergence="jsd", beta=0.25, sequence_parallel=True
    ),
    "TopKDistillation": TopKDistillationConfig(
        ignore_index=3, temperature=2.5, fp32_upcast=False, logit_softcapping=30.0, tail=False
    ),
    "ChunkedCrossEntropy": ChunkedCEConfig(chunk_len=7, compile=False, ignore_index=3, reduction="none"),
    "FusedLinearTopKDistillation": FusedLinearTopKDistillationConfig(
        ignore_index=3, temperature=2.5, logit_softcapping=30.0, tail=False, sequence_parallel=True
    ),
}
TYPED = list(REGISTRY.values())
WITH_GROUP = [cls for cls in TYPED if cls is not ChunkedCEConfig]
DISTILLATIONS = [KDLossConfig, FusedLinearKDConfig]
WITH_REDUCTION = [MaskedCrossEntropyConfig, FusedLinearCEConfig, TEParallelCEConfig, ChunkedCEConfig]

by_class = pytest.mark.parametrize("cls", TYPED, ids=lambda cls: cls.__name__)
by_config = pytest.mark.parametrize("config", CHANGED.values(), ids=CHANGED)


class Group:
    """Stands for a process group: can't be copied, pickled or compared."""

    def __init__(self):
        self.lock = threading.Lock()

    def __eq__(self, other):
        raise AssertionError("a process group was compared")

    __hash__ = None


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


def test_factory_kwargs_are_not_shared_between_configs():
    one, two = LossFromFactoryConfig(), LossFromFactoryConfig()
    one.kwargs["a"] = 1
    assert two.kwargs == {}


@pytest.mark.parametrize("cls", NEMO, ids=lambda cls: cls.__name__)
def test_configs_are_plain_mutable_dataclasses(cls):
    config = cls()
    assert isinstance(config, LossConfig)
    for f in fields(cls):
        setattr(config, f.name, getattr(config, f.name))
    assert not cls.__dataclass_params__.frozen


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


def test_the_bare_base_can_not_be_built():
    with pytest.raises(NotImplementedError, match="LossConfig must implement build"):
        LossConfig().build()
    with pytest.raises(NotImplementedError):
        build_loss_module(LossConfig())


@pytest.mark.parametrize("factory", [None, "torch.nn.CrossEntropyLoss", 3])
def test_a_factory_that_is_not_callable(factory):
    with pytest.raises(AssertionError, match="must be a callable"):
        LossFromFactoryConfig(factory).build()
    with pytest.raises(AssertionError, match="must be a callable"):
        build_loss_module(LossFromFactoryConfig(factory))


def test_registry():
    assert LOSS_CONFIG_REGISTRY == REGISTRY
    assert list(LOSS_CONFIG_REGISTRY) == list(REGISTRY)


# The table of build_loss_config, row by row.


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


def of_another_library(name):
    return type(name, (), {"__module__": "elsewhere", "__init__": lambda self, **kwargs: vars(self).update(kwargs)})


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


# Round trips.


@by_config
def test_dict_round_trip(config):
    data = config.to_dict()
    assert data["name"] in REGISTRY
    assert LossConfig.from_dict(data) == config
    assert type(LossConfig.from_dict(data)) is type(config)
    assert type(config).from_dict(data) == config
    del data["name"]
    assert type(config).from_dict(data) == config


@by_config
def test_from_dict_does_not_change_its_argument(config):
    data = config.to_dict()
    before = copy.deepcopy(data)
    LossConfig.from_dict(data)
    assert data == before


@by_config
def test_yaml_round_trip(config):
    assert LossConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_to_dict_shares_nothing_with_the_config(zloss):
    config = zloss(per_class=[1.0, 2.0])
    config.to_dict()["per_class"].append(3.0)
    assert config.per_class == [1.0, 2.0]


def test_from_dict_refuses_a_mapping_that_names_no_loss():
    with pytest.raises(TypeError, match="needs the key 'name'"):
        LossConfig.from_dict({"ignore_index": 0})
    with pytest.raises(TypeError, match="Unknown loss name 'Nope'"):
        LossConfig.from_dict({"name": "Nope"})
    with pytest.raises(TypeError, match="KDLossConfig, which is not a MaskedCrossEntropyConfig"):
        MaskedCrossEntropyConfig.from_dict({"name": "KDLoss"})
    with pytest.raises(TypeError, match="mapping of field names to values, got list"):
        LossConfig.from_dict(["KDLoss"])


def test_to_dict_of_a_loss_in_no_registry():
    with pytest.raises(TypeError, match=r"register it with loss_core\.register_loss"):
        LossFromFactoryConfig(dict).to_dict()


@by_config
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(config, protocol):
    twin = pickle.loads(pickle.dumps(config, protocol))
    assert twin == config
    assert type(twin) is type(config)


@by_config
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, dataclasses.replace], ids=lambda f: f.__name__)
def test_copies_are_equal_and_independent(config, copier):
    before = copier(config)
    twin = copier(config)
    assert twin == config
    assert twin is not config
    twin.ignore_index = 12345
    assert config == before


def test_deepcopy_copies_the_kwargs_of_a_factory():
    config = LossFromFactoryConfig(dict, {"a": [1]})
    copy.deepcopy(config).kwargs["a"].append(2)
    assert config.kwargs == {"a": [1]}


def test_replace_changes_one_field():
    assert dataclasses.replace(CHANGED["KDLoss"], temperature=4.0) == KDLossConfig(
        3, 4.0, False, None, 128, "jsd", 0.25
    )


@by_class
def test_equality_is_by_value_and_class(cls):
    assert cls() == cls()
    assert cls() != cls(ignore_index=1)
    assert all(cls() != other() for other in TYPED if other is not cls)


# tp_group is a runtime handle: omitted from dicts, repr and comparison.


@pytest.mark.parametrize("cls", WITH_GROUP, ids=lambda cls: cls.__name__)
class TestGroup:
    def test_not_in_the_dict(self, cls):
        assert "tp_group" not in cls(tp_group=Group()).to_dict()
        assert cls(tp_group=Group()).to_dict() == cls().to_dict()

    def test_not_in_the_repr(self, cls):
        assert "group" not in repr(cls(tp_group=Group())).lower()
        assert repr(cls(tp_group=Group())) == repr(cls())

    def test_not_compared(self, cls):
        assert cls(tp_group=Group()) == cls(tp_group=Group())
        assert cls(tp_group=Group()) == cls()

    @pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, dataclasses.replace], ids=lambda f: f.__name__)
    def test_copies_share_it(self, cls, copier):
        config = cls(tp_group=Group())
        assert copier(config).tp_group is config.tp_group


# OmegaConf and Hydra.


@by_config
def test_omegaconf_structured_config_round_trip(config):
    schema = OmegaConf.structured(type(config))
    changes = {k: v for k, v in config.to_dict().items() if k != "name"}
    made = OmegaConf.to_object(OmegaConf.merge(schema, changes))
    assert type(made) is type(config)
    assert made == config
    assert OmegaConf.to_object(OmegaConf.structured(config)) == config
    assert OmegaConf.to_object(schema) == type(config)()


@pytest.mark.parametrize("cls", NEMO, ids=lambda cls: cls.__name__)
def test_omegaconf_takes_every_config_as_a_schema(cls):
    assert list(OmegaConf.structured(cls)) == [f.name for f in fields(cls)]


def test_omegaconf_refuses_an_unknown_field_and_a_wrong_type():
    schema = OmegaConf.structured(KDLossConfig)
    with pytest.raises(ConfigKeyError, match="temprature"):
        OmegaConf.merge(schema, {"temprature": 2.0})
    with pytest.raises(ValidationError, match="hot"):
        OmegaConf.merge(schema, {"temperature": "hot"})


def test_omegaconf_to_object_validates():
    merged = OmegaConf.merge(OmegaConf.structured(KDLossConfig), {"temperature": -1.0})
    with pytest.raises(ValueError, match=r"temperature must be a finite number > 0, got -1\.0"):
        OmegaConf.to_object(merged)
    merged = OmegaConf.merge(OmegaConf.structured(MaskedCrossEntropyConfig), {"reduction": "avg"})
    with pytest.raises(ValueError, match="Invalid reduction: 'avg'"):
        OmegaConf.to_object(merged)


def test_from_dict_takes_an_omegaconf_container():
    container = OmegaConf.create({"name": "KDLoss", "temperature": 2.0})
    assert LossConfig.from_dict(OmegaConf.to_container(container)) == KDLossConfig(temperature=2.0)


@by_config
def test_hydra_instantiates_by_target(config):
    values = {k: v for k, v in config.to_dict().items() if k != "name"}
    made = instantiate({"_target_": f"loss_core.{type(config).__name__}", **values})
    assert type(made) is type(config)
    assert made == config
    assert instantiate(OmegaConf.create({"_target_": f"loss_core.{type(config).__name__}", **values})) == config


def test_hydra_shows_the_refusal():
    with pytest.raises(Exception, match="temperature must be a finite number > 0, got 0") as error:
        instantiate({"_target_": "loss_core.KDLossConfig", "temperature": 0})
    assert isinstance(error.value.__cause__, ValueError)


def test_hydra_reaches_build_loss_module_with_a_flag(zloss):
    made = instantiate({"_target_": "loss_core.build_loss_module", "loss": "ZLoss", "backend": "jax", "weight": 2.0})
    assert made == ("jax", 2.0)


@by_config
def test_hydra_passes_a_nested_config_on_as_it_is(config):
    # A recipe may nest a config in the arguments of a call; a config is a dataclass, which Hydra could wrap.
    values = {k: v for k, v in config.to_dict().items() if k != "name"}
    nested = {"_target_": f"loss_core.{type(config).__name__}", **values}
    made = instantiate({"_target_": "loss_core.build_loss_config", "loss": nested})
    assert type(made) is type(config)
    assert made == config


# User-defined losses.


@dataclass
class ZLossConfig(LossConfig):
    weight: float = 1e-4
    per_class: list[float] = dataclasses.field(default_factory=list)

    def validate(self):
        if self.weight < 0:
            raise ValueError(f"weight must be >= 0, got {self.weight!r}.")


@pytest.fixture
def zloss():
    """A loss registered for torch and jax, whose builders return the flag that they were called for."""
    builders = {"torch": lambda config: ("torch", config.weight), "jax:xla": lambda config: ("jax", config.weight)}
    register_loss("ZLoss", ZLossConfig, builders)
    yield ZLossConfig
    unregister_loss("ZLoss")
    assert LOSS_CONFIG_REGISTRY == REGISTRY


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


def test_registered_loss_works_like_a_built_in_one(zloss):
    assert build_loss_config("ZLoss", weight=1.0) == zloss(1.0)
    assert LossConfig.from_dict(zloss(0.5).to_dict()) == zloss(0.5)
    assert zloss(0.5).to_dict() == {"name": "ZLoss", "weight": 0.5, "per_class": []}
    assert build_loss_config(of_another_library("ZLoss"), weight=2.0) == zloss(2.0)
    with pytest.raises(TypeError, match="Did you mean 'weight'"):
        build_loss_config("ZLoss", wieght=1.0)


def test_registered_loss_is_validated_on_build(zloss):
    config = zloss()
    config.weight = -1
    with pytest.raises(ValueError, match="weight must be >= 0, got -1"):
        config.build(backend="jax")


@pytest.mark.parametrize("flag", ["torch:triton", "torch:plain"])
def test_a_named_kernel_never_falls_back_to_another(zloss, flag):
    with pytest.raises(BackendUnavailable, match=flag):
        zloss().build(backend=flag)


@pytest.mark.parametrize("flag", ["tensorflow", "torch:", "torch:cuda", "TORCH", "", "jax:eager", 3])
def test_an_unknown_flag_lists_the_choices(zloss, flag):
    with pytest.raises(ValueError, match="Choose one of: torch, torch:auto") as error:
        zloss().build(backend=flag)
    assert repr(flag) in str(error.value)
    with pytest.raises(ValueError, match="Choose one of"):
        build_loss_module("ZLoss", backend=flag)


def test_an_unregistered_loss_is_unknown():
    register_loss("ZLoss", ZLossConfig, {"torch": lambda config: None})
    unregister_loss("ZLoss")
    with pytest.raises(TypeError, match="Unknown loss name 'ZLoss'"):
        build_loss_config("ZLoss")
    with pytest.raises(NotImplementedError, match="ZLossConfig must implement build"):
        ZLossConfig().build()


def test_register_again_replaces_the_builders(zloss):
    register_loss("ZLoss", zloss, {"torch": lambda config: "new"})
    assert zloss().build() == "new"


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


def test_to_dict_gives_plain_values_for_numpy_numbers():
    config = KDLossConfig(ignore_index=np.int64(-1), temperature=np.float32(2.0))
    assert LossConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_unregister_loss_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="'Nope' is not a loss that was registered"):
        unregister_loss("Nope")


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


@pytest.mark.parametrize("flag", ["torch", "jax", "torch:eager"])
def test_a_flag_with_a_raw_factory_is_refused(flag):
    message = f"backend={flag!r} can't be applied to the factory dict"
    with pytest.raises(ValueError, match=message):
        build_loss_module(dict, backend=flag, a=1)
    with pytest.raises(ValueError, match=message):
        LossFromFactoryConfig(dict).build(backend=flag)
    assert build_loss_module(dict, a=1) == {"a": 1}


def test_all_lists_every_public_name():
    assert [name for name in loss_core.__all__ if not hasattr(loss_core, name)] == []
    assert {cls.__name__ for cls in (LossConfig, *NEMO)} <= set(loss_core.__all__)
