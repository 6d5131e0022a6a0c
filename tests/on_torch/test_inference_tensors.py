"""Inference tensors, which autograd can't save: every argument without a gradient may be one.

A teacher runs in inference mode; so do data loaders of evaluation loops, and frozen heads come from there.
"""

import pytest
import torch

from helpers.torch_calls import assert_same, built, cells, configs, count_of, inputs, leaves, name_of, run, takes
from loss_core import BackendUnavailable


def all_arguments(config):
    """The arguments of a loss, with all of its optional tensors."""
    arguments = inputs(config)
    shape = arguments["labels"].shape
    arguments |= count_of(config, torch.tensor(3))
    if takes(config, "mask"):
        arguments["mask"] = torch.arange(shape.numel()).view(shape) % 4 != 1
    if takes(config, "loss_weights"):
        arguments["loss_weights"] = torch.linspace(0.5, 1.5, shape.numel()).view(shape)
    return arguments


def as_inference_tensors(arguments, names):
    """The arguments, the named ones as inference tensors."""
    with torch.inference_mode():
        return {name: x.detach().clone() if name in names else x for name, x in arguments.items()}


def frozen(arguments, names):
    """The arguments, the named ones without a gradient."""
    return {name: x.detach() if name in names else x for name, x in arguments.items()}


def assert_one_can_be_trained(loss, arguments):
    for trained in leaves(arguments):
        others = [name for name in arguments if name != trained]
        got = run(loss, as_inference_tensors(arguments, others))
        assert_same(got, run(loss, frozen(arguments, others)), rtol=0, atol=0)


@cells(configs())
def test_all_but_one_argument(flag, config):
    assert_one_can_be_trained(built(config, flag), all_arguments(config))


@cells(configs(), interpreted=False)
def test_each_argument_alone(flag, config):
    arguments = all_arguments(config)
    loss = built(config, flag)
    for name in arguments:
        if set(leaves(arguments)) == {name}:
            continue
        got = run(loss, as_inference_tensors(arguments, [name]))
        assert_same(got, run(loss, frozen(arguments, [name])), rtol=0, atol=0)


@cells(configs(), interpreted=False)
def test_calls_without_optional_arguments(flag, config):
    # No optional argument and no ignored token: fast paths run.
    assert_one_can_be_trained(built(config, flag), inputs(config, ignored=0))


@cells(configs(), interpreted=False)
def test_all_arguments(flag, config):
    arguments = all_arguments(config)
    loss = built(config, flag)
    expected = loss(**frozen(arguments, arguments))
    with torch.inference_mode():
        inside = loss(**as_inference_tensors(arguments, arguments))
        assert torch.equal(inside, expected)
    outside = loss(**as_inference_tensors(arguments, arguments))
    assert torch.equal(outside, expected)


@cells([config for config in configs() if hasattr(config, "inplace_grad")])
def test_with_inplace_grad(flag, config):
    config = type(config)(reduction=config.reduction, inplace_grad=True)
    if flag in ("torch:plain", "torch:te"):
        with pytest.raises(BackendUnavailable, match="inplace_grad"):
            built(config, flag)
        return
    loss = built(config, flag)
    arguments = inputs(config)
    results = []
    for made in (arguments, as_inference_tensors(arguments, ["labels"])):
        leaf = arguments["logits"].detach().clone().requires_grad_()
        value = loss(**made | {"logits": leaf * 1.0})
        results.append(torch.autograd.grad(value.sum(), leaf)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", ["torch", "jax"])
# The bridge supports only losses with one result.
@pytest.mark.parametrize("config", [config for config in configs() if not hasattr(config, "entropy")], ids=name_of)
def test_over_the_bridge(config, backend):
    pytest.importorskip("jax")
    from loss_core_bridge import build_torch_loss

    arguments = all_arguments(config)
    loss = build_torch_loss(config, backend=backend)
    for trained in leaves(arguments):
        others = [name for name in arguments if name != trained]
        got = run(loss, as_inference_tensors(arguments, others))
        assert_same(got, run(loss, frozen(arguments, others)))
