"""Building and calling a loss never change it: two threads may call one module."""

import pickle
import threading

import pytest
import torch

from helpers.torch_calls import assert_same, cells, configs, count_of, inputs, over_hidden_states, run

# Sizes and dtypes for which `auto` may choose different kernels.
CALLS = {
    "small": {"lead": (6,), "vocab": 11, "hidden": 5},
    "one-token": {"lead": (), "vocab": 3, "hidden": 2},
    "wide": {"lead": (4,), "vocab": 5000, "hidden": 16},
    "tall": {"lead": (700,), "vocab": 40, "hidden": 8},
    "bfloat16": {"lead": (2, 8), "vocab": 300, "hidden": 16, "dtype": torch.bfloat16},
    "float64": {"lead": (2, 8), "vocab": 300, "hidden": 16, "dtype": torch.float64},
}


def state(module):
    """All that a module holds, in values and in objects."""
    return {name: (id(value), repr(value)) for name, value in vars(module).items()}


def sizes(flag):
    # Compilation takes too long for all of them.
    names = CALLS if flag != "torch:compile" else ("small", "bfloat16")
    return {name: CALLS[name] for name in names}


@cells(configs(), interpreted=False)
def test_a_call_does_not_change_the_module(flag, config):
    loss = config.build(backend=flag)
    before, stored, shown = state(loss), pickle.dumps(loss), repr(loss)
    for options in sizes(flag).values():
        run(loss, inputs(config, **options))
        loss(**inputs(config, **options, requires_grad=False))
        loss(**inputs(config, **options), **count_of(config, 4))
        assert state(loss) == before
    with pytest.raises(ValueError, match="labels has shape"):
        loss(**inputs(config) | {"labels": torch.zeros(7, dtype=torch.int64)})
    assert state(loss) == before
    assert pickle.dumps(loss) == stored
    assert repr(loss) == shown


@cells(configs(), interpreted=False)
def test_kernel_for_does_not_change_the_module(flag, config):
    loss = config.build(backend=flag)
    before = state(loss)
    for shape in ((2, 3, 4), (4096, 32000, 4096)):
        loss.kernel_for(torch.device("cpu"), torch.float32, shape if over_hidden_states(config) else shape[:2])
    assert state(loss) == before


@cells(configs(), interpreted=False)
def test_two_threads_with_one_module(flag, config):
    loss = config.build(backend=flag)
    # Each thread calls with its own size while the other calls with another.
    work = [inputs(config, **options) for options in list(sizes(flag).values())[:4]]
    expected = [run(config.build(backend=flag), arguments) for arguments in work]
    start = threading.Barrier(len(work))
    found = [[] for _ in work]
    rounds = 2 if flag == "torch:compile" else 4

    def calls(i):
        start.wait()
        for _ in range(rounds):
            found[i].append(run(loss, work[i]))

    threads = [threading.Thread(target=calls, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, wanted in zip(found, expected, strict=True):
        assert len(results) == rounds
        for got in results:
            assert_same(got, wanted, rtol=0, atol=0)
