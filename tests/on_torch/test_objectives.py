"""A custom objective: every kernel set computes its values and their gradient from row terms."""

from typing import NamedTuple

import pytest
import torch

from loss_core.row_terms import Sums, is_objective
from loss_core.row_terms.rows import entropy, log_sum_exp, with_target
from loss_core_torch.autograd.rows import Call, RowLoss
from loss_core_torch.kernels import Rows, find

T, V = 6, 37
# Losses and gradients are between 1 and 50, and computed from values that are rounded about ten times.
ROUNDINGS = 16 * torch.finfo(torch.float32).eps


@is_objective
class Squares(NamedTuple):
    """Squared cross entropy, and entropy times a factor: they need every term but z_sum."""

    factor: float

    sums = Sums(e=True)
    num_values = 1
    headroom = 0

    def of_rows(self, at):
        return self

    def values(self, xp, terms):
        return ((log_sum_exp(xp, terms) - terms.t) ** 2 + self.factor * entropy(xp, terms),)

    def coefficients(self, xp, terms, upstreams):
        of_loss = 2.0 * (log_sum_exp(xp, terms) - terms.t) * upstreams[0]
        share = self.factor * upstreams[0] / terms.s
        return with_target(xp, terms, -of_loss, of_loss / terms.s + share * (terms.e / terms.s), slope=-share)


def _expected(logits, labels_T, coef_T, factor):
    z_TV = logits.detach().double().requires_grad_()
    log_p_TV = z_TV.log_softmax(-1)
    loss_T = log_p_TV.gather(1, labels_T[:, None])[:, 0] ** 2 - factor * (log_p_TV.exp() * log_p_TV).sum(-1)
    return loss_T, torch.autograd.grad(loss_T, z_TV, coef_T.double())[0]


@pytest.mark.parametrize("name", ["plain", "eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_values_and_gradient_are_those_of_float64(name):
    kernels, objective = find(name), Squares(0.5)
    logits, labels_T, coef_T = torch.randn(T, V).requires_grad_(), torch.randint(0, V, (T,)), torch.linspace(0.5, 2, T)
    rows = Rows(logits, labels_T, None)
    if name == "plain":
        (loss_T,) = kernels.values(rows, objective)
        grads = [torch.autograd.grad(loss_T, logits, coef_T)[0]]
    else:
        with torch.no_grad():
            terms, made, coefficients = kernels.row_terms_and_grad(rows, coef_T, objective)
            (loss_T,), grads = objective.values(torch, terms), [made, kernels.row_grad(rows, terms, coefficients)]
            call = Call(kernels, objective, grad_in_forward=True)
        total = RowLoss.apply(logits, labels_T, None, None, None, coef_T, call)[0]
        grads.append(torch.autograd.grad(2.0 * total, logits)[0] / 2.0)
    expected_T, expected_TV = _expected(logits, labels_T, coef_T, 0.5)
    torch.testing.assert_close(loss_T.double(), expected_T, rtol=ROUNDINGS, atol=0.0)
    for grad in grads:
        torch.testing.assert_close(grad.double(), expected_TV, rtol=ROUNDINGS, atol=ROUNDINGS)
