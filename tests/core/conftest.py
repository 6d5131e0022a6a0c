"""A fixture that registers a loss."""

import pytest

from helpers.configs import REGISTRY, ZLossConfig
from loss_core import LOSS_CONFIG_REGISTRY, register_loss, unregister_loss


@pytest.fixture
def zloss():
    """A loss registered for torch and jax, whose builders return the flag that they were called for."""
    builders = {"torch": lambda config: ("torch", config.weight), "jax:xla": lambda config: ("jax", config.weight)}
    register_loss("ZLoss", ZLossConfig, builders)
    yield ZLossConfig
    unregister_loss("ZLoss")
    assert LOSS_CONFIG_REGISTRY == REGISTRY
