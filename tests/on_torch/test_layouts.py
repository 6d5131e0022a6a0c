"""Inputs of any layout have the results of contiguous ones, with about as many steps in Python.

Steps are counted, not timed: every call of a Python function and of an operation. A loop over leading indices, or over
rows one by one, shows as thousands of them.
"""

import sys

import pytest
import torch

from helpers.torch_calls import assert_same, built, cells, configs, every_dtype, inputs, leaves, per_token, run

# Each layout: the shape of the memory, and the view of it, with labels of shape [..., last].
LAYOUTS = {
    "many-short-sequences": ((300, 3), lambda x: x[:, :-1]),
    "shifted-sequences": ((300, 3), lambda x: x[:, 1:]),
    "transposed": ((2, 300), lambda x: x.transpose(0, 1)),
    "sliced-4d": ((4, 60, 3), lambda x: x[1:, :, :-1]),
    "twice-sliced-4d": ((5, 60, 4), lambda x: x[::2, 1:-1, ::2]),
    "permuted-4d": ((3, 50, 4), lambda x: x.permute(2, 0, 1, *range(3, x.dim()))),
    "every-other": ((600,), lambda x: x[::2]),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def laid_out(config, layout, **options):
    """(arguments as views in a layout, the same as contiguous tensors)."""
    lead, view = layout
    whole = inputs(config, lead, requires_grad=False, **options)
    views = {name: view(x) if per_token(config, name) else x for name, x in whole.items()}
    return prepared(views), prepared({name: x.contiguous() for name, x in views.items()})


def prepared(arguments):
    return {name: x.requires_grad_() if x.is_floating_point() else x for name, x in arguments.items()}


def steps(call):
    """Number of Python functions and operations that run in a call."""
    call()
    number = 0

    def count(_frame, event, _argument):
        nonlocal number
        number += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return number


def few_steps(view, contiguous):
    assert view <= 3 * contiguous + 200, f"{view} steps, {contiguous} for contiguous inputs"


@every_layout
@cells(configs(), interpreted=False)
def test_a_view_costs_what_contiguous_inputs_cost(flag, config, layout):
    loss = built(config, flag)
    views, contiguous = laid_out(config, layout)
    assert_same(run(loss, views), run(loss, contiguous))
    few_steps(*(steps(lambda arguments=arguments: run(loss, arguments)) for arguments in (views, contiguous)))


@every_layout
@cells(configs(["mean", "none"]), interpreted=False)
def test_an_evaluation_of_a_view(flag, config, layout):
    loss = built(config, flag)
    with torch.no_grad():
        views, contiguous = laid_out(config, layout)
        torch.testing.assert_close(loss(**views), loss(**contiguous))
        few_steps(*(steps(lambda arguments=arguments: loss(**arguments)) for arguments in (views, contiguous)))


@cells(configs(["mean"]))
def test_expanded_inputs(flag, config):
    # One row of memory for all tokens, and the logits of one token for a full batch.
    loss = built(config, flag)
    one = inputs(config, (1, 1), requires_grad=False)
    lead = (3, 2)
    views = {name: x.expand(*lead, *x.shape[2:]) if per_token(config, name) else x for name, x in one.items()}
    views["labels"] = torch.arange(6).view(3, 2)
    results = []
    for arguments in (views, {name: x.contiguous() for name, x in views.items()}):
        # The gradient of an expanded leaf would have one row; that of what stands for its rows is wanted.
        results.append(run(loss, prepared({name: x.detach() for name, x in arguments.items()})))
    assert_same(*results)


@every_dtype
@cells(configs(["sum"]))
def test_classes_that_are_not_contiguous(flag, config, dtype):
    loss = built(config, flag)
    dense = inputs(config, dtype=dtype, requires_grad=False)

    def apart(x):
        spread = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        spread[..., ::2] = x
        return spread[..., ::2]

    views = {name: apart(x) if x.is_floating_point() else x for name, x in dense.items()}
    assert_same(run(loss, prepared(views)), run(loss, prepared(dense)))


@cells(configs())
def test_the_gradient_of_a_sliced_leaf(flag, config):
    # The logits are a view of a leaf: the gradient of its other elements is exactly 0.
    loss = built(config, flag)
    whole = inputs(config, (4, 5), ignored=0)
    views = {name: x[:, :-1] if per_token(config, name) else x for name, x in whole.items()}
    loss(**views).sum().backward()
    for name, x in leaves(whole).items():
        if per_token(config, name):
            assert not x.grad[:, -1].any()
            assert x.grad[:, :-1].any()
