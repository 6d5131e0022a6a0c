"""Fake tensors, traces and batches of calls: they work, or the error names torch:plain, which supports all of them.

Memory estimates and launchers of large jobs run on fake tensors; exporters trace with make_fx; per-sample gradients and
ensembles take vmap.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.torch_calls import DTYPES, built, cells, configs, inputs, leaves, right_or_names_plain, run


def assert_like(got, expected):
    """Compare shapes and dtypes; there are no values."""
    found = {name: (tuple(x.shape), x.dtype) for name, x in got.items()}
    assert found == {name: (tuple(x.shape), x.dtype) for name, x in expected.items()}


def fake(loss, arguments):
    with FakeTensorMode() as mode:
        return run(loss, {name: mode.from_tensor(x) for name, x in arguments.items()})


def fake_outside_of_its_mode(loss, arguments):
    mode = FakeTensorMode()
    return run(loss, {name: mode.from_tensor(x) for name, x in arguments.items()})


def meta(loss, arguments):
    return run(loss, {name: x.detach().to("meta").requires_grad_(x.requires_grad) for name, x in arguments.items()})


def dry_run_is_right_or_names_plain(dry_run, flag, config, dtype=torch.float32):
    loss = built(config, flag)
    expected = run(loss, inputs(config, dtype=dtype))
    right_or_names_plain(flag, lambda: assert_like(dry_run(loss, inputs(config, dtype=dtype)), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@cells(configs())
def test_fake_tensors(flag, config, dtype):
    dry_run_is_right_or_names_plain(fake, flag, config, dtype)


@pytest.mark.parametrize("dry_run", [fake_outside_of_its_mode, meta], ids=lambda dry_run: dry_run.__name__)
@cells(configs(), interpreted=False)
def test_meta_tensors_and_fake_tensors_outside_of_their_mode(flag, config, dry_run):
    dry_run_is_right_or_names_plain(dry_run, flag, config)


# "fake" is "symbolic" with sizes that are numbers.
@pytest.mark.parametrize("mode", ["real", pytest.param("fake", marks=pytest.mark.slow), "symbolic"])
@cells(configs(), interpreted=False)
def test_make_fx(flag, config, mode):
    loss = built(config, flag)
    arguments = {name: x.detach() for name, x in inputs(config).items()}

    def step(*values):
        made = ((name, x.detach()) for name, x in zip(arguments, values, strict=True))
        return tuple(run(loss, {name: x.requires_grad_(x.is_floating_point()) for name, x in made}, 1.0).values())

    def holds():
        traced = make_fx(step, tracing_mode=mode)(*arguments.values())
        # Other values than those that were traced.
        others = inputs(config, seed=1)
        got = traced(*(others[name].detach() for name in arguments))
        torch.testing.assert_close(got, tuple(run(loss, others, 1.0).values()))

    right_or_names_plain(flag, holds)


def stacked(config, number=3):
    """(arguments of several calls, the same stacked along a new first dimension)."""
    ones = [inputs(config, seed=seed, requires_grad=False) for seed in range(number)]
    return ones, {name: torch.stack([one[name] for one in ones]) for name in ones[0]}


@cells(configs(), interpreted=False)
def test_vmap(flag, config):
    loss = built(config, flag)
    ones, many = stacked(config)
    names = list(many)
    expected = torch.stack([loss(**one) for one in ones])

    def holds():
        got = torch.func.vmap(lambda *xs: loss(**dict(zip(names, xs, strict=True))))(*many.values())
        torch.testing.assert_close(got, expected)

    right_or_names_plain(flag, holds)


@cells(configs(), interpreted=False)
def test_vmap_over_one_argument(flag, config):
    # Such as the logits of an ensemble with the same labels.
    loss = built(config, flag)
    ones, many = stacked(config)
    for name in leaves(inputs(config)):

        def holds(name=name):
            got = torch.func.vmap(lambda x: loss(**ones[0] | {name: x}))(many[name])
            torch.testing.assert_close(got, torch.stack([loss(**ones[0] | {name: one[name]}) for one in ones]))

        right_or_names_plain(flag, holds)


@cells(configs(), interpreted=False)
def test_vmap_of_grad(flag, config):
    loss = built(config, flag)
    ones, many = stacked(config)
    names = list(many)
    for trained in leaves(inputs(config)):

        def value(x, *others, trained=trained):
            rest = dict(zip([name for name in names if name != trained], others, strict=True))
            return loss(**rest, **{trained: x}).sum()

        def ordered(arguments, trained=trained):
            return [arguments[trained], *(x for name, x in arguments.items() if name != trained)]

        def holds(value=value, ordered=ordered):
            expected = torch.stack([torch.func.grad(value)(*ordered(one)) for one in ones])
            torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(*ordered(many)), expected)

        right_or_names_plain(flag, holds)


@cells(configs())
def test_batches_of_upstream_gradients(flag, config):
    loss = built(config, flag)

    def holds():
        arguments = inputs(config)
        wanted = list(leaves(arguments).values())
        value = loss(**arguments)
        upstream = torch.linspace(-1.0, 2.0, 3 * value.numel()).view(3, *value.shape)
        each = [torch.autograd.grad(value, wanted, u, retain_graph=True) for u in upstream]
        got = torch.autograd.grad(value, wanted, upstream, is_grads_batched=True)
        torch.testing.assert_close(list(got), [torch.stack(parts) for parts in zip(*each, strict=True)])

    right_or_names_plain(flag, holds)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@cells(configs(), flags=["torch:plain"])
def test_plain_runs_dry_in_every_dtype(flag, config, dtype):
    loss = built(config, flag)
    assert_like(fake(loss, inputs(config, dtype=dtype)), run(loss, inputs(config, dtype=dtype)))
