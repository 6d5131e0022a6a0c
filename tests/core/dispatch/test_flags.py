"""The flag `BACKEND[:KERNEL]`: what is not one is refused."""

import pytest

from loss_core import build_loss_module


@pytest.mark.parametrize("flag", ["tensorflow", "torch:", "torch:cuda", "TORCH", "", "jax:eager", 3])
def test_an_unknown_flag_lists_the_choices(zloss, flag):
    with pytest.raises(ValueError, match="Choose one of: torch, torch:auto") as error:
        zloss().build(backend=flag)
    assert repr(flag) in str(error.value)
    with pytest.raises(ValueError, match="Choose one of"):
        build_loss_module("ZLoss", backend=flag)
