"""Which integers are labels: classes for a cross entropy; for a distillation only whether they are ignore_index."""

from dataclasses import replace

import pytest
import torch

from helpers.torch_calls import DTYPES, assert_same, cells, configs, count_of, inputs, run, takes

# A distillation has a teacher: labels do not enter its loss.
DISTILLATIONS = [config for config in configs() if takes(config, "mark")]
CROSS_ENTROPIES = [config for config in configs() if takes(config, "label")]
# Values that recipes use for padding and special tokens, and those around the classes [0, 11).
OTHERS = [-1, -2, -101, 11, 12, 50_256, 2**31 - 1, -(2**31), 2**62]


@pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("count", [None, 4], ids=["mean", "count"])
# Labels do not reach Triton's kernels.
@cells(DISTILLATIONS, interpreted=False)
def test_a_distillation_takes_any_integer(flag, config, count, requires_grad):
    loss = config.build(backend=flag)
    counts = {} if count is None else count_of(config, count)
    for other in OTHERS:
        arguments = inputs(config, requires_grad=requires_grad)
        expected = run(loss, arguments | counts) if requires_grad else {"loss": loss(**arguments, **counts)}
        # All labels other than ignore_index have this value, or only one of them.
        for positions in (arguments["labels"] != config.ignore_index, (1, 1)):
            labels = arguments["labels"].clone()
            labels[positions] = other
            changed = arguments | counts | {"labels": labels}
            got = run(loss, changed) if requires_grad else {"loss": loss(**changed)}
            assert_same(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@cells(DISTILLATIONS, interpreted=False)
def test_a_distillation_with_nothing_ignored(flag, config, dtype):
    arguments = inputs(config, ignored=0, dtype=dtype)
    loss = config.build(backend=flag)
    expected = run(loss, arguments)
    assert_same(run(loss, arguments | {"labels": torch.full_like(arguments["labels"], -1)}), expected, rtol=0, atol=0)


@pytest.mark.slow
@cells(DISTILLATIONS, flags=["torch", "torch:plain", "torch:eager"])
def test_a_distillation_under_a_trace(flag, config):
    arguments = inputs(config)
    loss = config.build(backend=flag)
    expected = run(loss, arguments)
    arguments["labels"][arguments["labels"] != config.ignore_index] = 10**6
    assert_same(run(torch.compile(loss, backend="aot_eager", fullgraph=True), arguments), expected)
    torch._dynamo.reset()


@cells(DISTILLATIONS, interpreted=False)
def test_another_ignore_index_than_the_recipe_uses(flag, config):
    # The recipe marks padding by -100, the loss ignores another value: these tokens are valid then.
    arguments = inputs(config)
    all_count = config.build(backend=flag)(**arguments | {"labels": torch.zeros_like(arguments["labels"])})
    other = replace(config, ignore_index=-7).build(backend=flag)
    torch.testing.assert_close(other(**arguments), all_count)


@pytest.mark.parametrize("other", OTHERS)
@cells(CROSS_ENTROPIES, interpreted=False)
def test_a_cross_entropy_names_the_label_that_is_no_class(flag, config, other):
    arguments = inputs(config)
    arguments["labels"][1, 1] = other
    with pytest.raises(ValueError, match=rf"labels\[1, 1\] is {other}\b"):
        config.build(backend=flag)(**arguments)
