"""Configs as schemas of OmegaConf and targets of Hydra."""

from dataclasses import fields

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from helpers.configs import NEMO, by_config
from loss_core import KDLossConfig, LossConfig, MaskedCrossEntropyConfig


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
