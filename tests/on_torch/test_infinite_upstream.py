"""An upstream gradient of inf or NaN (an overflowing loss scale, log or sqrt of a loss of 0) and ignored tokens.

What an ignored token gives is 0 times the upstream gradient, which must be 0 for every upstream gradient.
"""

import pytest
import torch

from helpers.torch_calls import built, cells, configs, count_of, every_dtype, inputs, leaves, per_token, weights_of

UPSTREAMS = {"inf": torch.inf, "nan": torch.nan}
every_upstream = pytest.mark.parametrize("upstream", UPSTREAMS.values(), ids=UPSTREAMS)


def with_weights(config, arguments):
    """The arguments, with loss_weights that require a gradient where the loss has them."""
    return arguments | weights_of(config, torch.rand(arguments["labels"].shape).requires_grad_())


def ignored_rows(config, arguments, wanted):
    """The part of each gradient that belongs to ignored tokens."""
    ignored = arguments["labels"] == config.ignore_index
    return {name: x[ignored] for name, x in wanted.items() if per_token(config, name)}


def gradients(arguments, value, upstream, **options):
    wanted = leaves(arguments)
    found = torch.autograd.grad(value, list(wanted.values()), torch.full_like(value, upstream), **options)
    return dict(zip(wanted, found, strict=True))


def assert_zero(gradients):
    wrong = {name: x.detach().flatten()[:4].tolist() for name, x in gradients.items() if bool((x != 0).any())}
    assert not wrong, f"not exactly 0: {wrong}"


@pytest.mark.parametrize("upstream", [*UPSTREAMS.values(), -torch.inf], ids=[*UPSTREAMS, "minus-inf"])
@cells(configs())
def test_rows_of_ignored_tokens_stay_0(flag, config, upstream):
    arguments = with_weights(config, inputs(config))
    value = built(config, flag)(**arguments)
    # Twice: kernels that return a stored gradient in the first backward recompute it in the second.
    for _ in range(2):
        found = gradients(arguments, value, upstream, retain_graph=True)
        assert_zero(ignored_rows(config, arguments, found))


@every_dtype
@cells(configs(), interpreted=False)
def test_rows_of_ignored_tokens_in_every_dtype(flag, config, dtype):
    arguments = inputs(config, dtype=dtype)
    value = built(config, flag)(**arguments)
    assert_zero(ignored_rows(config, arguments, gradients(arguments, value, torch.inf)))


@every_upstream
@cells([config for config in configs() if getattr(config, "reduction", "") == "none"])
def test_infinite_upstreams_of_only_ignored_tokens(flag, config, upstream):
    arguments = inputs(config)
    loss = built(config, flag)
    of_ignored = torch.where(arguments["labels"] == config.ignore_index, upstream, 0.5)
    wanted = leaves(arguments)
    found = torch.autograd.grad(loss(**arguments), list(wanted.values()), of_ignored)
    expected = torch.autograd.grad(loss(**arguments), list(wanted.values()), torch.full_like(of_ignored, 0.5))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@every_upstream
@cells(configs())
def test_all_ignored(flag, config, upstream):
    arguments = with_weights(config, inputs(config, ignored=1))
    value = built(config, flag)(**arguments)
    assert_zero(gradients(arguments, value, upstream))


@every_upstream
@pytest.mark.parametrize("count", [0, torch.tensor(0)], ids=["number", "tensor"])
@cells([config for config in configs() if count_of(config, 0)])
def test_a_count_of_0(flag, config, count, upstream):
    arguments = inputs(config)
    value = built(config, flag)(**arguments, **count_of(config, count))
    assert_zero(gradients(arguments, value, upstream))


@pytest.mark.parametrize("outer", [torch.sqrt, torch.log, lambda x: x.reciprocal()], ids=["sqrt", "log", "reciprocal"])
@cells(configs(), interpreted=False)
def test_functions_of_a_loss_of_0(flag, config, outer):
    # Their derivative at 0 is infinite, and autograd multiplies it with the gradient of the loss.
    arguments = inputs(config, ignored=1)
    outer(built(config, flag)(**arguments)).sum().backward()
    assert_zero({name: x.grad for name, x in leaves(arguments).items()})


@pytest.mark.slow
@cells(configs(), flags=["torch:plain", "torch:eager"])
def test_in_a_compiled_step(flag, config):
    loss = built(config, flag)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def scaled(arguments, scale):
        return loss(**arguments).sum() * scale

    for ignored in (3, 1):
        arguments = inputs(config, ignored=ignored)
        scaled(arguments, torch.tensor(torch.inf)).backward()
        found = {name: x.grad for name, x in leaves(arguments).items()}
        assert_zero(ignored_rows(config, arguments, found) if ignored > 1 else found)
    torch._dynamo.reset()
