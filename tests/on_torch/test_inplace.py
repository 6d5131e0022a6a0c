"""inplace_grad=True on torch: the gradient overwrites the logits, and no later use of them is silently wrong."""

import pytest
import torch

from loss_core import (
    BackendUnavailable,
    KernelChoice,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
    build_loss_module,
)
from loss_core.check import check

T, V = 6, 37
EAGER = "torch:eager"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = {
    "whole": lambda x: x,
    "sliced": lambda x: x[:, :-1],
    "columns": lambda x: x[..., ::2],
    "transposed": lambda x: x.permute(2, 1, 0),
}


def _logits(dtype=torch.float32, lead=(2, T)):
    """(leaf, logits computed from it), like the output of a model's head, which may be overwritten."""
    leaf = torch.randn(*lead, V, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    return leaf, leaf.clone()


def _labels(logits):
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(1))
    labels.view(-1)[::3] = -100
    return labels


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_bitwise_the_same_and_aliases_the_logits(dtype, layout, reduction):
    results = []
    for inplace in (False, True):
        _, whole = _logits(dtype)
        logits = LAYOUTS[layout](whole)
        loss = MaskedCrossEntropyConfig(reduction=reduction, inplace_grad=inplace).build(backend=EAGER)(
            logits, _labels(logits)
        )
        before, version = logits.detach().clone(), logits._version
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        (grad,) = torch.autograd.grad(loss, logits, upstream)
        if inplace:
            assert grad.data_ptr() == logits.data_ptr()
            assert torch.equal(grad, logits)
            assert logits._version > version
            assert whole._version == logits._version
        else:
            assert torch.equal(logits, before)
        results.append((loss.detach(), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_gradient_reaches_the_head():
    hidden = torch.randn(T, 5)
    weights = [torch.randn(V, 5, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2)]
    labels = torch.randint(0, V, (T,))
    for weight, inplace in zip(weights, (False, True), strict=True):
        MaskedCrossEntropyConfig(inplace_grad=inplace).build(backend=EAGER)(hidden @ weight.T, labels).backward()
    assert torch.equal(weights[0].grad, weights[1].grad)


def test_the_logits_are_unchanged_until_the_backward():
    leaf, logits = _logits()
    loss = MaskedCrossEntropyConfig(inplace_grad=True).build(backend=EAGER)(logits, _labels(logits))
    assert torch.equal(logits, leaf)
    assert logits._version == 0
    loss.backward()
    assert torch.equal(leaf.grad, logits)


def test_a_second_backward_says_what_to_do():
    for config in (MaskedCrossEntropyConfig(inplace_grad=True), TEParallelCEConfig(inplace_grad=True)):
        _, logits = _logits()
        loss = config.build(backend=EAGER)(logits, _labels(logits))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"Second backward .*Compute logits and loss again.*inplace_grad=False"):
            loss.backward()


@pytest.mark.parametrize("other", [lambda z: z.pow(2).sum(), lambda z: z.logsumexp(-1).sum()])
def test_another_consumer_of_the_logits_is_never_silently_wrong(other):
    _, logits = _logits()
    loss, regulariser = (
        MaskedCrossEntropyConfig(inplace_grad=True).build(backend=EAGER)(logits, _labels(logits)),
        other(logits),
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        regulariser.backward()


def test_two_losses_over_the_same_logits_are_never_silently_wrong():
    _, logits = _logits()
    first, second = (
        MaskedCrossEntropyConfig(inplace_grad=inplace).build(backend=EAGER)(logits, _labels(logits))
        for inplace in (True, False)
    )
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_logits_changed_before_the_backward_raise():
    _, logits = _logits()
    loss = MaskedCrossEntropyConfig(inplace_grad=True).build(backend=EAGER)(logits, _labels(logits))
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_refused():
    _, logits = _logits()
    loss = MaskedCrossEntropyConfig(inplace_grad=True).build(backend=EAGER)(logits, _labels(logits))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_without_a_gradient_nothing_is_overwritten():
    loss_fn = MaskedCrossEntropyConfig(inplace_grad=True).build(backend=EAGER)
    plain = torch.randn(T, V)
    before = plain.clone()
    weights = torch.rand(T, requires_grad=True)
    loss_fn(plain, _labels(plain), loss_weights=weights).backward()
    leaf, logits = _logits()
    with torch.no_grad():
        loss_fn(leaf, _labels(leaf))
    loss = loss_fn(logits, _labels(logits), loss_weights=torch.rand(2, T, requires_grad=True))
    assert torch.equal(plain, before)
    assert (plain._version, leaf._version, logits._version) == (0, 0, 0)
    assert loss.requires_grad


def test_what_pytorch_forbids_is_refused():
    loss_fn = MaskedCrossEntropyConfig(inplace_grad=True).build(backend=EAGER)
    leaf, logits = _logits()
    labels = _labels(leaf)
    for wrong in (leaf, leaf[:, :-1], leaf.view(-1, V)):
        with pytest.raises(RuntimeError, match="a leaf tensor that requires a gradient"):
            loss_fn(wrong, torch.zeros(wrong.shape[:-1], dtype=torch.int64))
    for wrong in (logits[:1].expand(2, T, V), logits.view(-1).as_strided((2, T, V), (1, 1, 1))):
        with pytest.raises(RuntimeError, match="place of their own in memory"):
            loss_fn(wrong, labels)
    with pytest.raises(RuntimeError, match=r"traced.*torch\.func"):
        torch.func.grad(lambda z: loss_fn(z * 1, labels))(leaf.detach())


def test_under_torch_compile_it_is_refused_or_works_outside_of_the_graph():
    loss_fn = MaskedCrossEntropyConfig(inplace_grad=True).build(backend=EAGER)
    leaf, logits = _logits()
    labels = _labels(leaf)
    expected = torch.autograd.grad(MaskedCrossEntropyConfig().build(backend=EAGER)(leaf, labels), leaf)[0]
    with pytest.raises(Exception, match="inplace_grad=True does not work inside a traced call"):
        torch.compile(loss_fn, fullgraph=True, backend="aot_eager")(logits, labels)
    torch._dynamo.reset()
    torch.compile(lambda z: loss_fn(z * 1.0, labels), backend="aot_eager")(leaf).backward()
    assert torch.equal(leaf.grad, expected)
    torch._dynamo.reset()


def test_through_the_check():
    configs = [cls(reduction=r, inplace_grad=True) for cls in (MaskedCrossEntropyConfig, TEParallelCEConfig)
               for r in ("sum", "none")]  # fmt: skip
    report = check(configs, ["torch:eager"], dtypes=["float32", "bfloat16"], shape=(5, 33))
    assert report.passed, str(report)


def test_auto_chooses_no_kernels_that_do_not_overwrite():
    # Without inplace_grad, torch:plain runs small calls.
    for config in (MaskedCrossEntropyConfig(inplace_grad=True), TEParallelCEConfig(inplace_grad=True)):
        loss_fn, (_, logits) = config.build(backend="torch"), _logits()
        assert "plain" not in loss_fn.kernel_choice.candidates
        assert loss_fn.kernel_for(logits.device, logits.dtype, (2 * T, V)).flag == "torch:eager"
        (grad,) = torch.autograd.grad(loss_fn(logits, _labels(logits)), logits)
        assert grad.data_ptr() == logits.data_ptr()


def test_every_other_flag_refuses_it():
    for flag in ("torch:te", "torch:plain"):
        with pytest.raises(BackendUnavailable, match=rf"'{flag}' does not write the gradient over the logits"):
            MaskedCrossEntropyConfig(inplace_grad=True).build().with_kernel_choice(KernelChoice(flag, "test"))
    for name in ("MaskedCrossEntropy", "TEParallelCrossEntropy"):
        with pytest.raises(BackendUnavailable, match=r"jax\.Array can't be written to.*donate_argnums"):
            build_loss_module(name, inplace_grad=True, backend="jax")
    with pytest.raises(ValueError, match=r"^inplace_grad must be True or False, got 1\.$"):
        MaskedCrossEntropyConfig(inplace_grad=1)


def test_the_bridge_refuses_it():
    from loss_core_bridge import build_jax_loss, build_torch_loss

    with pytest.raises(ValueError, match=r"inplace_grad=True, but a jax\.Array can't be overwritten"):
        build_jax_loss(MaskedCrossEntropyConfig(inplace_grad=True), backend="torch")
    with pytest.raises(BackendUnavailable, match="donate_argnums"):
        build_torch_loss(MaskedCrossEntropyConfig(inplace_grad=True), backend="jax")
