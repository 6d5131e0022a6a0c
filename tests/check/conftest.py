"""A fixture that registers a loss with an injected bug."""

from dataclasses import fields, make_dataclass

import pytest
import torch

from loss_core import LOSS_CONFIG_REGISTRY, register_loss, unregister_loss


@pytest.fixture
def inject():
    """Registers a loss "Wrong": the right one with a bug."""

    def register(loss, wrong, **changed):
        right_cls = LOSS_CONFIG_REGISTRY[loss]

        def build(config):
            right = right_cls(**{f.name: getattr(config, f.name) for f in fields(config)}).build(backend="torch:eager")

            class Wrong(torch.nn.Module):
                def forward(self, **call):
                    return wrong(right, config, **call)

            return Wrong()

        config_cls = make_dataclass("WrongConfig", (), bases=(right_cls,))
        register_loss("Wrong", config_cls, {"torch": build})
        return config_cls(**changed)

    yield register
    unregister_loss("Wrong")
