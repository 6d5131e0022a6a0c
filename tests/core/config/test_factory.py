"""LossFromFactoryConfig: its callable, its arguments, and no flag."""

import copy

import pytest

from loss_core import LossFromFactoryConfig, build_loss_module


def test_factory_kwargs_are_not_shared_between_configs():
    one, two = LossFromFactoryConfig(), LossFromFactoryConfig()
    one.kwargs["a"] = 1
    assert two.kwargs == {}


def test_deepcopy_copies_the_kwargs_of_a_factory():
    config = LossFromFactoryConfig(dict, {"a": [1]})
    copy.deepcopy(config).kwargs["a"].append(2)
    assert config.kwargs == {"a": [1]}


@pytest.mark.parametrize("factory", [None, "torch.nn.CrossEntropyLoss", 3])
def test_a_factory_that_is_not_callable(factory):
    with pytest.raises(AssertionError, match="must be a callable"):
        LossFromFactoryConfig(factory).build()
    with pytest.raises(AssertionError, match="must be a callable"):
        build_loss_module(LossFromFactoryConfig(factory))


@pytest.mark.parametrize("flag", ["torch", "jax", "torch:eager"])
def test_a_flag_with_a_raw_factory_is_refused(flag):
    message = f"backend={flag!r} can't be applied to the factory dict"
    with pytest.raises(ValueError, match=message):
        build_loss_module(dict, backend=flag, a=1)
    with pytest.raises(ValueError, match=message):
        LossFromFactoryConfig(dict).build(backend=flag)
    assert build_loss_module(dict, a=1) == {"a": 1}
