"""torch:plain: PyTorch's own functions under the contract of the losses, with second derivatives and forward mode."""

import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from helpers.torch_calls import (
    DTYPES,
    PLAIN,
    built,
    cells,
    configs,
    count_of,
    inputs,
    leaves,
    per_token,
    right_or_names_plain,
    run,
    weights_of,
)
from loss_core import LOSS_CONFIG_REGISTRY, build_loss_module
from loss_core.check import check

# All but ChunkedCrossEntropy, which must not compute all logits at once.
LOSSES = [loss for loss in LOSS_CONFIG_REGISTRY if loss != "ChunkedCrossEntropy"]
plain = cells(configs(), flags=[PLAIN])
variants = cells(
    [*configs(), *configs(logit_softcapping=2.0), *configs(temperature=2.5), *configs(fp32_upcast=False)], flags=[PLAIN]
)


def of_floats(config, arguments):
    """The loss as a function of its floating arguments, and these."""
    loss = built(config, PLAIN)
    floats = leaves(arguments)
    rest = {name: x for name, x in arguments.items() if name not in floats}
    return lambda *xs: loss(**rest, **dict(zip(floats, xs, strict=True))), list(floats.values())


def test_it_is_available():
    for loss in LOSSES:
        assert build_loss_module(loss, backend=PLAIN).kernel_choice.flag == PLAIN


@pytest.mark.parametrize("loss", LOSSES)
def test_every_case_against_float64(loss):
    report = check(loss, [PLAIN])
    assert report.passed, "\n".join(map(str, report.failures[:5]))


@variants
def test_first_and_second_derivatives_against_differences(flag, config):
    arguments = inputs(config, (3,), 5, 2, dtype=torch.float64)
    arguments |= weights_of(config, torch.rand(3, dtype=torch.float64).requires_grad_())
    function, floats = of_floats(config, arguments)
    gradcheck(function, floats, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    gradgradcheck(function, floats, check_batched_grad=True)


@plain
def test_hessian_and_hessian_vector_products(flag, config):
    arguments = inputs(config, (3,), 5, 2, dtype=torch.float64)
    function, floats = of_floats(config, arguments)
    total = lambda *xs: function(*xs).sum()  # noqa: E731
    whole = torch.func.hessian(total, argnums=0)(*(x.detach() for x in floats))
    v = torch.randn_like(floats[0])
    (grad,) = torch.autograd.grad(total(*floats), floats[:1], create_graph=True)
    (product,) = torch.autograd.grad((grad * v).sum(), floats[:1])
    torch.testing.assert_close((whole.flatten(-v.dim()) @ v.flatten()).reshape(v.shape), product)
    _, forward = torch.func.jvp(torch.func.grad(lambda x: total(x, *floats[1:])), (floats[0].detach(),), (v,))
    torch.testing.assert_close(forward, product)


@plain
def test_forward_mode(flag, config):
    arguments = inputs(config)
    function, floats = of_floats(config, arguments)
    tangents = [torch.randn_like(x) for x in floats]
    with forward_ad.dual_level():
        value = function(*(forward_ad.make_dual(x.detach(), t) for x, t in zip(floats, tangents, strict=True)))
        tangent = forward_ad.unpack_dual(value).tangent
    grads = torch.autograd.grad(function(*floats).sum(), floats)
    expected = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    torch.testing.assert_close(tangent.sum(), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@plain
def test_values_of_ignored_tokens_have_no_effect(flag, config, dtype):
    loss = built(config, flag)
    clean = inputs(config, dtype=dtype)
    junk = {name: x.detach().clone() for name, x in clean.items()}
    ignored = clean["labels"] == config.ignore_index
    for name in leaves(clean):
        if per_token(config, name):
            junk[name][ignored] = torch.tensor([math.nan, math.inf])[:, None].to(dtype)
        junk[name].requires_grad_()
    got, expected = run(loss, junk), run(loss, clean)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
        if per_token(config, name) and name in junk:
            assert not got[name][ignored].any()


@plain
def test_all_ignored_is_a_connected_zero(flag, config):
    arguments = inputs(config, ignored=1)
    for x in leaves(arguments).values():
        x.data[0] = torch.nan
    got = run(built(config, flag), arguments)
    assert not any(value.any() for value in got.values())


@plain
def test_a_count_of_0_and_unchanged_inputs(flag, config):
    arguments = inputs(config)
    before = {name: x.detach().clone() for name, x in arguments.items()}
    versions = {name: x._version for name, x in arguments.items()}
    for count in (0, torch.tensor(0)) if count_of(config, 0) else ():
        got = run(built(config, flag), arguments | count_of(config, count))
        assert not any(value.any() for value in got.values())
    run(built(config, flag), arguments)
    assert all(torch.equal(x, before[name]) and x._version == versions[name] for name, x in arguments.items())


@cells(configs())
def test_other_kernels_name_plain_where_they_have_no_second_derivative(flag, config):
    arguments = inputs(config)
    scale = torch.ones((), requires_grad=True)
    value = built(config, flag)(**arguments).sum() * scale
    grads = torch.autograd.grad(value, list(leaves(arguments).values()), create_graph=True)
    wanted = [*leaves(arguments).values(), scale]

    def holds():
        got = torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), wanted)
        plain = built(config, PLAIN)(**arguments).sum() * scale
        firsts = torch.autograd.grad(plain, list(leaves(arguments).values()), create_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(sum(grad.pow(2).sum() for grad in firsts), wanted))

    right_or_names_plain(flag, holds)
