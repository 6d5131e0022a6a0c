"""The check can fail: realistic bugs, put into a kernel one at a time, turn its rows red, and no others."""

import json

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss_core import BackendUnavailable, FusedLinearCEConfig, KDLossConfig, LossConfig, MaskedCrossEntropyConfig
from loss_core.check import assert_backends_agree, check, compare
from loss_core_jax import cross_entropy, distillation, reduction
from loss_core_torch import (
    autograd,
    block_logits,
    checks,
    eager,
    eager_linear,
    eager_logits,
    module_logits,
)
from loss_core_torch import reduction as torch_reduction
from loss_core_torch.products import Products


def test_correct_kernels_pass():
    report = check(backends=["torch:eager"], dtypes=["float32", "bfloat16"])
    assert report.passed, str(report)
    assert {row.loss for row in report.rows} == {
        "MaskedCrossEntropy",
        "TEParallelCrossEntropy",
        "FusedLinearCrossEntropy",
        "KDLoss",
    }
    assert all(row.cases >= 15 and row.worst is not None for row in report.rows)


# Each bug: the loss it breaks, a case that must notice it, and what it does.
BUGS = {}


def bug(loss, case, dtype="float32"):
    def register(inject):
        BUGS[inject.__name__] = (loss, case, dtype, inject)
        return inject

    return register


@bug("MaskedCrossEntropy", "ignore-index-in-vocab")
def ignore_index_off_by_one(patch):
    real = checks.kept
    patch(checks, "kept", lambda labels, shape, ignore, mask=None: real(labels, shape, ignore + 1, mask))


@bug("MaskedCrossEntropy", "mean")
def mean_over_all_tokens(patch):
    real = torch_reduction.coefficients

    def coefficients(dtype, keep_T, bad_T, reduction, *rest):
        everything_T = torch.ones_like(keep_T) if reduction == "mean" else keep_T
        return torch.where(keep_T, real(dtype, everything_T, bad_T, reduction, *rest), 0.0)

    patch(torch_reduction, "coefficients", coefficients)


@bug("KDLoss", "temperature")
def missing_temperature_squared(patch):
    real = autograd.DistillationSum.apply

    def scaled(student, teacher, keep_T, coef_T, temperature, *rest):
        return real(student, teacher, keep_T, coef_T / temperature**2, temperature, *rest)

    patch(autograd.DistillationSum, "apply", scaled)


@bug("FusedLinearCrossEntropy", "many-tokens", "bfloat16")
def weight_gradient_accumulated_in_bfloat16(patch):
    real = Products.add
    patch(eager_linear, "_MIN_BLOCK_TOKENS", 8)
    patch(eager_linear, "_MAX_BLOCK_TOKENS", 8)

    def add(self, out, a, b):
        real(self, out, a, b)
        out.copy_(out.bfloat16())

    patch(Products, "add", add)


@bug("MaskedCrossEntropy", "ragged")
def columns_padded_with_zeros_and_not_masked(patch):
    real = eager.cross_entropy_with_grad

    def padded(logits, *rest):
        *row, grad = real(F.pad(logits, (0, 5)), *rest)
        return *row, grad[..., :-5]

    patch(eager, "cross_entropy_with_grad", padded)


@bug("MaskedCrossEntropy", "none")
def first_upstream_gradient_used_for_all(patch):
    real = eager.cross_entropy_grad

    def first(*args):
        return real(*args[:-1], args[-1][:1].expand_as(args[-1]) if args[-1].numel() else args[-1])

    patch(eager, "cross_entropy_grad", first)


@bug("KDLoss", "basic")
def teacher_and_student_swapped(patch):
    real = eager.distillation_with_grad
    patch(eager, "distillation_with_grad", lambda s, t, *rest: real(t, s, *rest))


@bug("KDLoss", "same-logits")
def cross_entropy_instead_of_divergence(patch):
    real = autograd.row_stats.finish_kd

    def soft_cross_entropy(xp, state):
        # KL plus the teacher's entropy; for equal distributions a and the difference of the lse vanish.
        return real(xp, state) + xp.log(state.s_t)

    patch(autograd.row_stats, "finish_kd", soft_cross_entropy)


@bug("FusedLinearCrossEntropy", "basic")
def upstream_gradient_ignored(patch):
    real = autograd.LinearCrossEntropySum.backward
    patch(
        autograd.LinearCrossEntropySum,
        "backward",
        staticmethod(lambda ctx, grad, *rest: real(ctx, torch.ones_like(grad), *rest)),
    )


@bug("FusedLinearCrossEntropy", "softcap")
def softcap_left_out_of_the_gradient(patch):
    patch(block_logits, "_slope", lambda tanh, out: out.fill_(1.0))


@bug("MaskedCrossEntropy", "huge-logits")
def exponentials_without_the_maximum(patch):
    patch(eager_logits, "_row_max", lambda z: torch.zeros_like(z[:, 0]))


@bug("MaskedCrossEntropy", "strided")
def strides_of_a_contiguous_tensor(patch):
    real = eager.cross_entropy_with_grad

    def wrong(logits, *rest):
        strides = logits.contiguous().stride()
        return real(logits.as_strided(logits.shape, strides), *rest)

    patch(eager, "cross_entropy_with_grad", wrong)


@bug("MaskedCrossEntropy", "nan-where-ignored")
def ignored_rows_multiplied_by_zero(patch):
    patch(eager_logits, "counted_places", lambda keep, *tensors: None)
    patch(eager_logits, "some_ignored", lambda keep: False)


@bug("MaskedCrossEntropy", "nan-where-ignored")
def ignored_rows_taken_with_the_others(patch):
    patch(eager_logits, "counted_places", lambda keep, *tensors: torch.arange(keep.numel()))


@bug("MaskedCrossEntropy", "basic", "bfloat16")
def gradient_rounded_twice(patch):
    patch(eager, "cross_entropy_scale_grad", lambda grad, *rest: grad.mul_(rest[-1]))


@bug("MaskedCrossEntropy", "edge-labels")
def last_class_missed(patch):
    real = eager.cross_entropy_with_grad

    def missing(*args):
        *row, grad = real(*args)
        grad[..., -1] = 0
        return *row, grad

    patch(eager, "cross_entropy_with_grad", missing)


@bug("KDLoss", "basic")
def no_gradient_for_the_teacher(patch):
    real = eager.distillation_grad
    patch(eager, "distillation_grad", lambda *args: real(*args) * (not args[-1]))


@bug("MaskedCrossEntropy", "mask")
def labels_overwritten_by_the_mask(patch):
    real = module_logits._LogitsCrossEntropy.forward

    def overwriting(self, logits, labels, mask=None, *args, **kwargs):
        if mask is not None:
            labels.masked_fill_(mask == 0, self.ignore_index)
        return real(self, logits, labels, mask, *args, **kwargs)

    patch(module_logits._LogitsCrossEntropy, "forward", overwriting)


@bug("MaskedCrossEntropy", "basic", "bfloat16")
def loss_returned_in_bfloat16(patch):
    real = module_logits._LogitsCrossEntropy.forward
    patch(module_logits._LogitsCrossEntropy, "forward", lambda self, *a, **k: real(self, *a, **k).to(torch.bfloat16))


@bug("MaskedCrossEntropy", "count")
def count_ignored(patch):
    real = torch_reduction.coefficients

    def uncounted(dtype, keep_T, bad_T, reduction, num_tokens, weights_T):
        return real(dtype, keep_T, bad_T, reduction, None, weights_T)

    patch(torch_reduction, "coefficients", uncounted)


@pytest.fixture
def no_stale_traces():
    jax.clear_caches()
    yield
    jax.clear_caches()


def jax_mean_over_all_tokens(patch):
    real = reduction._row_scale

    def over_all(target_T, dtype, *, mean, **rest):
        scale_T = real(target_T, dtype, mean=False, **rest)
        return scale_T / target_T.size if mean else scale_T

    patch(reduction, "_row_scale", over_all)


def jax_ignored_rows_multiplied_by_zero(patch):
    real = cross_entropy.logits_gradient

    def times_zero(logits, target, m, s, grad):
        kept = jax.numpy.maximum(target, 0)
        return real(logits, kept, m, s, grad * (target >= 0))

    patch(cross_entropy, "logits_gradient", times_zero)
    patch(cross_entropy, "counted_or_zero", lambda rows, target: rows.astype(cross_entropy.arithmetic_dtype(rows)))


def jax_missing_temperature_squared(patch):
    real = distillation.finish_kd
    patch(distillation, "finish_kd", lambda xp, state: real(xp, state) / 2.5**2)


JAX_BUGS = {
    "mean": ("MaskedCrossEntropy", jax_mean_over_all_tokens),
    "nan-where-ignored": ("MaskedCrossEntropy", jax_ignored_rows_multiplied_by_zero),
    "temperature": ("KDLoss", jax_missing_temperature_squared),
}


@pytest.mark.parametrize("case", JAX_BUGS)
def test_an_injected_bug_in_jax_turns_its_row_red_and_not_torchs(case, monkeypatch, no_stale_traces):
    loss, inject = JAX_BUGS[case]
    inject(monkeypatch.setattr)
    report = check(loss, ["torch:eager", "jax:xla"], dtypes=["float32"], only=[case])
    rows = {(row.flag, row.against): row.passed for row in report.rows}
    assert rows == {
        ("torch:eager", "float64"): True,
        ("jax:xla", "float64"): False,
        ("torch:eager", "jax:xla"): False,
    }


@pytest.mark.parametrize("name", BUGS)
def test_an_injected_bug_turns_its_row_red_and_no_other(name, monkeypatch):
    loss, case, dtype, inject = BUGS[name]
    backends = ["torch:eager", "jax:xla"]
    inject(monkeypatch.setattr)
    report = check(loss, backends, dtypes=[dtype], only=[case])
    assert not report.passed, f"{name} went unnoticed"
    assert not next(row for row in report.rows if row.flag == "torch:eager").passed
    for row in report.rows:
        if row.flag == "jax:xla" and row.against == "float64":
            assert row.passed, str(report)
    finding = report.failures[0]
    assert finding.case == case
    assert "torch:eager" in finding.reproduce
    assert f"--case {case}" in finding.reproduce


def test_the_bug_of_one_loss_leaves_the_others_green(monkeypatch):
    BUGS["missing_temperature_squared"][-1](monkeypatch.setattr)
    report = check(backends=["torch:eager"], dtypes=["float32"])
    assert {row.loss for row in report.rows if not row.passed} == {"KDLoss"}


def test_a_kernel_that_raises_is_a_finding(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(eager, "cross_entropy_with_grad", broken)
    report = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"], only=["basic"])
    assert not report.passed
    assert "no such kernel image" in str(report)


def test_a_config_instance_is_kept_as_it_is():
    config = MaskedCrossEntropyConfig(reduction="none", ignore_index=3)
    report = check(config, ["torch:eager"], dtypes=["float32"])
    assert report.passed, str(report)
    cases = report.rows[0].cases
    assert cases < check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"]).rows[0].cases


def test_shapes_random_cases_and_captured_inputs():
    report = check("KDLoss", ["torch:eager"], dtypes=["float32"], shape=(5, 33), num_random=7, seed=3)
    assert report.passed, str(report)
    again = check("KDLoss", ["torch:eager"], dtypes=["float32"], shape=(5, 33), num_random=7, seed=3)
    assert [row.worst for row in again.rows] == [row.worst for row in report.rows]
    captured = {"logits": np.random.default_rng(0).standard_normal((4, 9)), "labels": np.arange(4)}
    report = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"], inputs=captured)
    assert report.passed
    assert report.rows[0].cases == 1


def test_report_is_json():
    report = check("KDLoss", ["torch:eager"], dtypes=["float16"], only=["basic"])
    data = json.loads(report.to_json())
    assert data["passed"] is True
    assert data["rows"][0]["worst"]["case"] == "basic"
    assert sum(map(sum, (h.tolist() for h in report.histograms.values()))) > 1000


def test_bad_arguments():
    with pytest.raises(ValueError, match="Unknown backend flag 'torch:egaer'"):
        check("KDLoss", ["torch:egaer"])
    with pytest.raises(BackendUnavailable, match="torch:triton"):
        check("KDLoss", ["torch:triton"])
    with pytest.raises(ValueError, match="Unknown dtype 'fp8'"):
        check("KDLoss", ["torch"], dtypes=["fp8"])
    with pytest.raises(ValueError, match="shape must be"):
        check("KDLoss", ["torch"], shape=(3,))
    with pytest.raises(TypeError, match="Unknown loss name 'KD'"):
        check("KD", ["torch"])
    with pytest.raises(TypeError, match=r"no float64 definition of LossConfig.*compare"):
        check(LossConfig(), ["torch"])


def test_assert_backends_agree(monkeypatch):
    assert_backends_agree(FusedLinearCEConfig(reduction="mean"), ["torch"], dtypes=["float32"])
    BUGS["no_gradient_for_the_teacher"][-1](monkeypatch.setattr)
    with pytest.raises(AssertionError, match=r"(?s)teacher_logits.*loss-core check --config"):
        assert_backends_agree(KDLossConfig(), ["torch"], dtypes=["float32"])


def _log_softmax_loss(x, y):
    wide = x.float() if x.dtype != torch.float64 else x
    return F.cross_entropy(wide, y)


def _logsumexp_loss(x, y):
    wide = x.float() if x.dtype != torch.float64 else x
    return (torch.logsumexp(wide, -1) - wide.gather(1, y[:, None])[:, 0]).mean()


INPUTS = {
    "x": np.random.default_rng(0).standard_normal((16, 100)) * 3,
    "y": np.random.default_rng(1).integers(0, 100, 16),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_compare_accepts_two_ways_to_compute_the_same(dtype):
    report = compare(_log_softmax_loss, _logsumexp_loss, INPUTS, dtype=dtype, frameworks=("torch", "torch"))
    assert report.passed, str(report)
    assert {row.worst.tensor for row in report.rows} <= {"loss", "x"}


def test_compare_sees_a_formula_that_is_off_by_a_millionth():
    def off(x, y):
        return _logsumexp_loss(x, y) * (1 + 1e-6)

    report = compare(_log_softmax_loss, off, INPUTS, frameworks=("torch", "torch"))
    assert not report.passed


def test_compare_sees_sums_in_bfloat16():
    def coarse(x, y):
        return F.cross_entropy(x, y)

    report = compare(_log_softmax_loss, coarse, INPUTS, dtype="bfloat16", frameworks=("torch", "torch"))
    assert not report.passed
    assert compare(
        coarse, coarse, INPUTS, dtype="bfloat16", arithmetic="bfloat16", frameworks=("torch", "torch")
    ).passed


def test_compare_names_inputs_it_cannot_differentiate():
    with pytest.raises(ValueError, match=r"grad_of names \['y'\].*\['x'\]"):
        compare(_log_softmax_loss, _logsumexp_loss, INPUTS, grad_of=["y"], frameworks=("torch", "torch"))
