"""The names that loss_core exports."""

import loss_core
from helpers.configs import NEMO
from loss_core import LossConfig


def test_all_lists_every_public_name():
    assert [name for name in loss_core.__all__ if not hasattr(loss_core, name)] == []
    assert {cls.__name__ for cls in (LossConfig, *NEMO)} <= set(loss_core.__all__)
