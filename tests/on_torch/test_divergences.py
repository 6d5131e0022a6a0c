"""Divergences of a distillation: the one of each config, limits, logits of -inf, weights of tokens."""

import pytest
import torch
import torch.nn.functional as F

from helpers.operations import Operations
from helpers.torch_calls import assert_same, cells, inputs, leaves, run
from loss_core import KDLossConfig
from loss_core.check import check
from loss_core_torch.kernels.eager import EagerKernels

REVERSE = KDLossConfig(divergence="reverse_kl", temperature=2.0)
JSD = KDLossConfig(divergence="jsd", beta=0.3, temperature=2.0)
each_divergence = cells([KDLossConfig(), REVERSE, JSD])


def by_hand(config, student, teacher):
    """TRL's generalized_jsd_loss for each token, times T^2."""
    log_s, log_t = ((x.double() / config.temperature).log_softmax(-1) for x in (student, teacher))
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(config.divergence, config.beta)
    if beta in (0, 1):
        first, second = (log_t, log_s) if beta == 0 else (log_s, log_t)
        return config.temperature**2 * F.kl_div(second, first, reduction="none", log_target=True).sum(-1)
    log_m = torch.logaddexp(log_t + torch.tensor(beta).double().log(), log_s + torch.tensor(1 - beta).double().log())
    of_teacher, of_student = (F.kl_div(log_m, x, reduction="none", log_target=True).sum(-1) for x in (log_t, log_s))
    return config.temperature**2 * (beta * of_teacher + (1 - beta) * of_student)


@each_divergence
def test_value_and_gradients_of_the_definition(flag, config):
    arguments = inputs(config)
    got, kept = run(config.build(backend=flag), arguments, 1.0), arguments["labels"] != config.ignore_index
    expected = by_hand(config, *(arguments[name] for name in ("student_logits", "teacher_logits")))[kept].mean()
    wanted = torch.autograd.grad(expected, list(leaves(arguments).values()))
    torch.testing.assert_close(got.pop("loss").double(), expected, rtol=1e-5, atol=1e-6)
    for name, grad in zip(leaves(arguments), wanted, strict=True):
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6)


@cells([KDLossConfig(temperature=2.0)])
def test_the_ends_of_beta_are_the_two_kls(flag, config):
    for beta, divergence in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        ends = [KDLossConfig(temperature=2.0, divergence=name, beta=beta) for name in ("jsd", divergence)]
        got, expected = (run(end.build(backend=flag), inputs(end)) for end in ends)
        assert_same(got, expected, rtol=0, atol=0)


@each_divergence
def test_roles_exchanged(flag, config):
    """KL(s || t) is KL(t || s) of exchanged logits, and so is jsd with 1 - beta."""
    other = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}.get(config.divergence, "jsd")
    mirrored = KDLossConfig(temperature=config.temperature, divergence=other, beta=1 - config.beta)
    arguments = inputs(config)
    exchanged = arguments | {
        "student_logits": arguments["teacher_logits"], "teacher_logits": arguments["student_logits"]
    }  # fmt: skip
    got, expected = run(config.build(backend=flag), arguments), run(mirrored.build(backend=flag), exchanged)
    for name, other_name in (("loss",) * 2, ("student_logits", "teacher_logits"), ("teacher_logits", "student_logits")):
        torch.testing.assert_close(got[name], expected[other_name], rtol=1e-5, atol=1e-7)


@each_divergence
def test_equal_distributions_have_none(flag, config):
    arguments = inputs(config)
    arguments["teacher_logits"] = arguments["student_logits"].detach().clone().requires_grad_()
    for value in run(config.build(backend=flag), arguments, 1.0).values():
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=2e-6)


@cells([REVERSE, JSD])
def test_a_teacher_that_rules_out_what_the_student_does_not(flag, config):
    """Reverse KL is infinite then, a divergence against the mixture finite."""
    arguments = inputs(config, ignored=0)
    arguments["teacher_logits"].data[..., 3:6] = -torch.inf
    got = run(config.build(backend=flag), arguments, 1.0)
    if config.divergence == "reverse_kl":
        assert got["loss"] == torch.inf
        return
    expected = by_hand(config, arguments["student_logits"], arguments["teacher_logits"].clamp(min=-1e30)).mean()
    torch.testing.assert_close(got["loss"].double(), expected, rtol=1e-5, atol=1e-6)
    assert all(grad.isfinite().all() for grad in got.values())
    assert not got["teacher_logits"][..., 3:6].any()


@cells([KDLossConfig(), REVERSE, JSD])
def test_weights_of_tokens_and_their_gradient(flag, config):
    arguments = inputs(config) | {"num_batch_labels": 4}
    weights = torch.rand(2, 3, requires_grad=True)
    got = run(config.build(backend=flag), arguments | {"loss_weights": weights}, 1.0)
    kept = arguments["labels"] != config.ignore_index
    each = by_hand(config, *(arguments[name] for name in ("student_logits", "teacher_logits"))).where(kept, 0.0)
    wanted = {**leaves(arguments), "loss_weights": weights}
    grads = torch.autograd.grad((each * weights).sum() / 4, list(wanted.values()))
    torch.testing.assert_close(got["loss"].double(), ((each * weights).sum() / 4).detach(), rtol=1e-5, atol=1e-6)
    for name, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6)


@cells([JSD], ["torch:plain", "torch:eager"])
def test_weights_without_a_count_are_refused(flag, config):
    with pytest.raises(ValueError, match="loss_weights is only supported with num_batch_labels"):
        config.build(backend=flag)(**inputs(config), loss_weights=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"loss_weights has shape \(3,\) but labels has shape \(2, 3\)"):
        config.build(backend=flag)(**inputs(config), num_batch_labels=4, loss_weights=torch.ones(3))


@pytest.mark.parametrize("beta", [0.1, 0.7, 0.9])
@cells([JSD])
def test_ignored_tokens_have_exactly_none(flag, config, beta):
    # Rows of zeros in their place are two equal distributions, whose divergence is rounded.
    arguments = inputs(config, vocab=7, ignored=1) | {"num_batch_labels": 2}
    loss = KDLossConfig(divergence="jsd", beta=beta).build(backend=flag)
    assert not any(value.any() for value in run(loss, arguments, 1.0).values())


def test_a_kl_makes_no_sums_to_a_mixture():
    class Kernels(EagerKernels):
        def pair_mixture(self, *args):
            raise AssertionError("not for a KL")

    for config in (KDLossConfig(), REVERSE):
        run(config.build(backend="torch:eager").with_kernels(Kernels()), inputs(config))
    with pytest.raises(AssertionError, match="not for a KL"):
        run(JSD.build(backend="torch:eager").with_kernels(Kernels()), inputs(JSD))


def test_the_mixture_makes_no_tensor_of_tokens_times_vocabulary():
    tokens, vocab = 300, 8000
    student, teacher = torch.randn(tokens, vocab), torch.randn(tokens, vocab)
    labels = torch.zeros(tokens, dtype=torch.int64)
    loss = KDLossConfig(divergence="jsd", chunk_size=10).build(backend="torch:eager")
    with torch.no_grad(), Operations((student, teacher, labels)) as seen:
        loss(student, teacher, labels)
    assert 0 < seen.largest <= 10 * vocab * 4 + 1024


@pytest.mark.parametrize("flag", ["torch:eager", "jax:xla"])
def test_over_ranks(flag):
    report = check("KDLoss", [flag], dtypes=["float32"], only=["reverse", "jsd", "jsd-ruled-out"], tp=[2])
    assert report.passed, "\n".join(map(str, report.failures))
    assert [row.flag for row in report.rows] == [f"{flag} tp=2"]
