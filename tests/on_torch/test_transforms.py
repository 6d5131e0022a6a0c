"""Functional transforms (`torch.func`), inside and outside of torch.compile, and full compiled training steps.

Whether a gradient is wanted can't be read from `requires_grad` there. Every gradient is right, or it is an error that
names torch:plain; it is never 0 or None in silence.
"""

import pytest
import torch

from helpers.torch_calls import PLAIN, built, cells, configs, inputs, leaves, right_or_names_plain, usable_flags

NAMED = [flag for flag in usable_flags() if flag != "torch"]
TRANSFORMS = ("grad", "vjp", "jacrev")
every_transform = pytest.mark.parametrize("transform", TRANSFORMS)


def differentiated(transform, loss, name, arguments):
    """A function of one argument that returns the gradient of the (summed) loss with respect to it."""
    others = {key: x.detach() for key, x in arguments.items() if key != name}

    def value(x):
        return loss(**others, **{name: x})

    if transform == "grad":
        return torch.func.grad(lambda x: value(x).sum())
    if transform == "vjp":

        def pulled_back(x):
            result, pull = torch.func.vjp(value, x)
            return pull(torch.ones_like(result))[0]

        return pulled_back
    return lambda x: torch.func.jacrev(value)(x).reshape(-1, *x.shape).sum(0)


def expected_gradients(loss, arguments):
    wanted = leaves(arguments)
    return dict(zip(wanted, torch.autograd.grad(loss(**arguments).sum(), list(wanted.values())), strict=True))


@every_transform
@cells(configs())
def test_gradient_of_every_argument(flag, config, transform):
    loss = built(config, flag)
    arguments = inputs(config)
    for name, expected in expected_gradients(loss, arguments).items():

        def holds(name=name, expected=expected):
            got = differentiated(transform, loss, name, arguments)(arguments[name].detach())
            torch.testing.assert_close(got, expected)

        right_or_names_plain(flag, holds)


@pytest.mark.slow
@every_transform
@cells(configs(), flags=NAMED)
def test_gradient_of_every_argument_inside_torch_compile(flag, config, transform):
    loss = built(config, flag)
    arguments = inputs(config)
    for name, expected in expected_gradients(loss, arguments).items():

        def holds(name=name, expected=expected):
            function = torch.compile(differentiated(transform, loss, name, arguments), backend="aot_eager")
            torch.testing.assert_close(function(arguments[name].detach()), expected)

        right_or_names_plain(flag, holds)
    torch._dynamo.reset()


@pytest.mark.slow
@cells(configs(), flags=NAMED)
def test_gradients_of_all_arguments_at_once(flag, config):
    loss = built(config, flag)
    arguments = inputs(config)
    expected = expected_gradients(loss, arguments)
    names = tuple(expected)
    rest = {name: x for name, x in arguments.items() if name not in names}

    def holds():
        transformed = torch.func.grad_and_value(
            lambda *xs: loss(**rest, **dict(zip(names, xs, strict=True))).sum(), argnums=tuple(range(len(names)))
        )
        for function in (transformed, torch.compile(transformed, backend="aot_eager")):
            got, _ = function(*(arguments[name].detach() for name in names))
            for a, b in zip(got, expected.values(), strict=True):
                torch.testing.assert_close(a, b)

    right_or_names_plain(flag, holds)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled_autograd", [False, True], ids=["autograd", "compiled-autograd"])
@pytest.mark.slow
@cells(configs(), flags=NAMED)
def test_a_full_training_step_in_torch_compile(flag, config, compiled_autograd):
    loss = built(config, flag)
    expected = expected_gradients(loss, inputs(config))

    def holds():
        arguments = inputs(config)
        with torch._dynamo.config.patch(compiled_autograd=compiled_autograd):

            @torch.compile(backend="aot_eager")
            def step():
                loss(**arguments).sum().backward()

            step()
        for name, gradient in expected.items():
            torch.testing.assert_close(arguments[name].grad, gradient)

    right_or_names_plain(flag, holds)
    torch._dynamo.reset()


def test_plain_supports_all_transforms():
    # A flag may refuse and name torch:plain, which must then work.
    config = configs()[0]
    loss = built(config, PLAIN)
    arguments = inputs(config)
    for transform in TRANSFORMS:
        for name, expected in expected_gradients(loss, arguments).items():
            got = differentiated(transform, loss, name, arguments)(arguments[name].detach())
            torch.testing.assert_close(got, expected)
