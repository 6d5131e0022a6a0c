"""Which calls a check makes, in which order, and how a stopped check ends and is continued."""

from dataclasses import dataclass

import numpy as np
import pytest

from loss_core import KDLossConfig, register_loss, unregister_loss
from loss_core.check import Interrupted, check
from loss_core.check.plan import Cases, harder_calls, plan_calls
from loss_core.check.report import Row
from loss_core.losses.cases.drawing import random_case

LOSSES = ["MaskedCrossEntropy", "KDLoss"]
DTYPES = ["float32", "bfloat16"]
QUICK = {"backends": ["torch:eager"], "dtypes": ["float32"]}


def planned(only=None, num_random=0, first=None, tp=()):
    return plan_calls(LOSSES, DTYPES, Cases(None, only, None, num_random, 0, first), tp, None, "")


def test_named_cases_come_first_and_then_each_random_one_of_all_losses():
    plan = planned(["basic", "random-0-1", "random-0-2"], num_random=3)
    calls = [(call.case.name, call.name, call.dtype) for call in plan.calls]
    assert len(calls) == plan.total
    assert calls[:4] == [("basic", loss, dtype) for loss in LOSSES for dtype in DTYPES]
    assert calls[4:] == [(f"random-0-{n}", loss, dtype) for n in (1, 2) for loss in LOSSES for dtype in DTYPES]


def test_a_first_random_case_skips_those_before_it_and_the_named_ones():
    plan = planned(num_random=5, first=3)
    assert {call.case.name for call in plan.calls} == {"random-0-3", "random-0-4"}
    assert plan.total == 8


def test_the_number_of_calls_over_ranks_is_that_of_the_plan():
    plan = planned(["basic", "random-0-1"], num_random=2, tp=(2,))
    calls = list(plan.calls)
    assert len(calls) == plan.total > 8
    assert {call.ranks for call in calls} == {2}


def test_harder_calls_follow_for_as_long_as_a_row_is_insensitive():
    row = Row("KDLoss", "torch:eager tp=2", "float64", "bfloat16", lower={"bfloat16 softmax": 0})
    cases = Cases((2, 3), None, None, 5, 1, None)
    calls = harder_calls(LOSSES, DTYPES, cases, (2,), None, " --import mine", {"any": row})
    first = next(calls)
    assert (first.name, first.dtype, first.case_name, first.harder) == ("KDLoss", "bfloat16", "harder-1/uneven", True)
    # Without the shape, and without the random cases.
    assert first.reproduce("torch:eager", "float64").endswith(" --case harder-1 --tp 2 --import mine")
    assert [next(calls).case_name for _ in range(2)] == ["harder-1/empty", "harder-2/uneven"]
    row.lower["bfloat16 softmax"] = 1
    assert {call.case.name for call in calls} == {"harder-2"}


@pytest.mark.parametrize("loss", [*LOSSES, "FusedLinearCrossEntropy"])
def test_cases_of_a_kind_differ_in_values_and_in_nothing_that_is_compiled(loss):
    one, same, other = (random_case(loss, index, 0) for index in (0, 12, 1))
    assert one.config == same.config
    assert (one.arrays.keys(), one.grad_of) == (same.arrays.keys(), same.grad_of)
    assert all(one.arrays[name].shape == same.arrays[name].shape for name in one.arrays)
    assert any(not np.array_equal(one.arrays[name], same.arrays[name]) for name in one.grad_of)
    assert {name: x.shape for name, x in one.arrays.items()} != {name: x.shape for name, x in other.arrays.items()}


def test_the_kinds_change_with_the_cases():
    kinds = [str(random_case("MaskedCrossEntropy", n, 0).config) for n in range(100)]
    later = [str(random_case("MaskedCrossEntropy", n, 0).config) for n in range(1000, 1100)]
    assert len(set(kinds)) <= 12
    assert set(later) - set(kinds)


def test_a_check_of_a_billion_cases_stops_at_its_time_limit_and_can_be_continued():
    report = check("KDLoss", num_random=10**9, first=7, minutes=1e-9, **QUICK)
    assert report.passed
    assert report.stopped
    assert (report.calls, report.total, report.next_first) == (1, 10**9 - 7, 7)
    assert report.rows[0].cases == 1
    rest = check("KDLoss", num_random=9, first=report.next_first, **QUICK)
    assert not rest.stopped
    assert (rest.calls, rest.total) == (2, 2)
    assert rest.to_dict()["next_first"] is None


def test_a_check_that_is_stopped_among_named_cases_begins_again():
    report = check("KDLoss", num_random=3, minutes=1e-9, **QUICK)
    assert report.stopped
    assert report.next_first is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 3, "num_random": 3}, "at least 0 and below 3; got 3"),
        ({"first": 0}, "at least 0 and below 0; got 0"),
        ({"minutes": 0}, "minutes must be above 0, got 0"),
    ],
)
def test_invalid_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check("KDLoss", **QUICK, **options)


@dataclass
class StoppedConfig(KDLossConfig):
    pass


@pytest.mark.parametrize("calls", [0, 2])
def test_ctrl_c_has_the_report_of_completed_calls(calls):
    right, done = KDLossConfig().build(backend="torch:eager"), []

    def stopped(**arguments):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return right(**arguments)

    register_loss("Stopped", StoppedConfig, {"torch:eager": lambda config: stopped})
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            check("Stopped", only=["basic", "none-ignored", "temperature"], **QUICK)
    finally:
        unregister_loss("Stopped")
    # Without a completed call, Ctrl-C is a plain KeyboardInterrupt.
    assert isinstance(raised.value, Interrupted) == (calls > 0)
    if calls:
        assert raised.value.report.calls == calls
        assert raised.value.report.rows[0].cases == calls
