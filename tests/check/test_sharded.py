"""`check --tp`: invalid rank counts and options; the ranks themselves are tested in tests/workers."""

import pytest

from loss_core import TEParallelCEConfig
from loss_core.check import check


@pytest.mark.parametrize(("tp", "text"), [([0], "whole numbers >= 1, got 0"), ([2.0], "got 2.0"), ([True], "got True")])
def test_bad_numbers_of_ranks(tp, text):
    with pytest.raises(ValueError, match=text):
        check(TEParallelCEConfig(), ["torch:eager"], tp=tp)


def test_options_that_tp_can_not_be_combined_with():
    with pytest.raises(ValueError, match="leave out against"):
        check(TEParallelCEConfig(), ["torch:eager"], tp=[2], against="jax")
    with pytest.raises(ValueError, match="leave out device"):
        check(TEParallelCEConfig(), ["torch:eager"], tp=[2], device="cuda")
