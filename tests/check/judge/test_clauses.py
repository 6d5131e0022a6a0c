"""An implementation judged clause by clause: right ones pass, and each defect is found in its own clause alone."""

import json

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F

from helpers.wrong_gradients import with_gradient
from loss_core import KDLossConfig, MaskedCrossEntropyConfig
from loss_core.check import check
from loss_core.check.judge.clauses import CLAUSES
from loss_core.check.judge.implementation import flag_implementation

# One case for each kind of clause, so that a verdict takes a second.
CASES = ("basic", "mean", "none", "all-ignored", "nan-where-ignored", "strided")
QUICK = {"dtypes": ["float32", "bfloat16"], "only": CASES}


def reduced(loss_T, keep, config):
    if config.reduction == "none":
        return loss_T
    return loss_T.sum() / keep.sum().clip(min=1) if config.reduction == "mean" else loss_T.sum()


def torch_tokens(config, logits, labels):
    """The loss of each token, and which tokens are valid."""
    keep = labels != config.ignore_index
    logits = torch.where(keep[..., None], logits, 0).to(torch.promote_types(logits.dtype, torch.float32))
    known = (labels >= 0) & (labels < logits.shape[-1])
    log_p = logits.log_softmax(-1).gather(-1, torch.where(known, labels, 0)[..., None])[..., 0]
    return torch.where(keep, torch.where(known, -log_p, torch.nan), 0), keep


def right(config):
    return lambda logits, labels: reduced(*torch_tokens(config, logits, labels), config)


def right_jax(config):
    def loss(logits, labels):
        keep = labels != config.ignore_index
        logits = jnp.where(keep[..., None], logits, 0).astype(jnp.promote_types(logits.dtype, jnp.float32))
        known = (labels >= 0) & (labels < logits.shape[-1])
        at = jnp.where(known, labels, 0)[..., None]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), at, -1)[..., 0]
        return reduced(jnp.where(keep, jnp.where(known, -log_p, jnp.nan), 0), keep, config)

    return loss


def statuses(report):
    return {verdict.clause: verdict.status for verdict in report.verdicts}


def broken(report):
    return {verdict.clause for verdict in report.broken}


def test_a_right_torch_loss_is_ok_in_every_clause():
    report = check("MaskedCrossEntropy", implementations={"mine": right}, **QUICK)
    assert report.passed, str(report)
    # It takes no loss_weights.
    assert {clause for clause, status in statuses(report).items() if status != "ok"} == {"gradient of loss_weights"}


def test_a_right_jax_loss_is_ok_in_every_clause_that_jax_can_test():
    report = check("MaskedCrossEntropy", implementations={"mine": right_jax}, framework="jax",
                   dtypes=["float32"], only=CASES)  # fmt: skip
    assert report.passed, str(report)
    not_ok = {clause: status for clause, status in statuses(report).items() if status != "ok"}
    assert not_ok == {
        "gradient of loss_weights": "not seen", "strided rows": "not seen", "strided columns": "not seen",
    }  # fmt: skip


@pytest.mark.parametrize("loss", ["MaskedCrossEntropy", "FusedLinearCrossEntropy", "KDLoss", "LogProbs"])
def test_this_library_satisfies_its_contract(loss):
    report = check(loss, implementations=[flag_implementation("torch:eager")], dtypes=["float32"])
    assert report.passed, str(report)
    not_seen = [verdict for verdict in report.verdicts if verdict.status == "not seen"]
    assert all("labels only" in verdict.words[0] or "no case" in verdict.words[0] for verdict in not_seen), str(report)


# Clause -> a loss for a config that breaks it.
DEFECTS = {}


def defect(clause):
    def enter(builder):
        DEFECTS[clause] = builder
        return builder

    return enter


@defect("values")
def value_off_by_a_thousandth(config):
    def loss(logits, labels):
        result = right(config)(logits, labels)
        return result + 1e-3 * result.detach()

    return loss


@defect("gradient of logits")
def gradient_off_by_a_hundredth(config):
    return lambda logits, labels: right(config)(with_gradient(logits, lambda grad: 1.01 * grad), labels)


@defect("result dtype")
def loss_in_the_dtype_of_the_logits(config):
    return lambda logits, labels: right(config)(logits, labels).to(logits.dtype)


@defect("inputs left alone")
def labels_overwritten(config):
    def loss(logits, labels):
        result = right(config)(logits, labels.clone())
        labels.masked_fill_(labels == config.ignore_index, 0)
        return result

    return loss


@defect("ignored positions")
def mean_over_all_tokens(config):
    def loss(logits, labels):
        loss_T, keep = torch_tokens(config, logits, labels)
        return reduced(loss_T, torch.ones_like(keep), config)

    return loss


@defect("all ignored")
def zero_divided_by_zero(config):
    def loss(logits, labels):
        loss_T, keep = torch_tokens(config, logits, labels)
        return loss_T.sum() / keep.sum() if config.reduction == "mean" else reduced(loss_T, keep, config)

    return loss


@defect("labels that are no class")
def last_class_taken_for_labels_beyond_it(config):
    def loss(logits, labels):
        return right(config)(logits, labels.where(labels == config.ignore_index, labels.clip(0, logits.shape[-1] - 1)))

    return loss


@defect("upstream gradient")
def factor_of_the_loss_ignored(config):
    def loss(logits, labels):
        result = right(config)(logits, labels)
        return with_gradient(result, torch.ones_like) if result.ndim == 0 else result

    return loss


@defect("upstream per token")
def first_upstream_gradient_used_for_all(config):
    return lambda logits, labels: with_gradient(
        right(config)(logits, labels), lambda grad: grad.flatten()[:1].expand(grad.numel()).reshape(grad.shape)
    )


@defect("more dimensions")
def divided_by_the_batch(config):
    def loss(logits, labels):
        return right(config)(logits, labels) / (labels.shape[0] if labels.ndim > 1 else 1)

    return loss


def read_as_if_contiguous(x):
    return x.as_strided(x.shape, torch.empty(x.shape).stride())


@defect("strided rows")
def stride_of_the_sequence_assumed(config):
    def loss(logits, labels):
        return right(config)(read_as_if_contiguous(logits) if logits.ndim > 2 else logits, labels)

    return loss


@defect("strided columns")
def stride_of_rows_assumed(config):
    def loss(logits, labels):
        return right(config)(read_as_if_contiguous(logits) if logits.ndim == 2 else logits, labels)

    return loss


@defect("determinism")
def last_bit_by_chance(config):
    calls = []

    def loss(logits, labels):
        calls.append(1)
        result = right(config)(logits, labels)
        last_bit = torch.nextafter(result.detach(), torch.tensor(torch.inf, dtype=result.dtype)) - result.detach()
        return result + last_bit * (len(calls) % 2)

    return loss


@defect("backward twice")
def gradient_scaled_where_it_is_kept(config):
    def loss(logits, labels):
        factor = torch.ones(())
        return with_gradient(right(config)(logits, labels), lambda grad: grad * factor.add_(1).sub(1).clone())

    return loss


@defect("no host sync")
def labels_read_on_the_host(config):
    def loss(logits, labels):
        return right(config)(logits, labels) * (1 if labels.max().item() < 10**6 else 2)

    return loss


def test_every_clause_has_a_defect():
    assert DEFECTS.keys() == {clause.name for clause in CLAUSES} | {"gradient of logits"}


@pytest.mark.parametrize("clause", DEFECTS)
def test_a_defect_is_found_in_its_own_clause_alone(clause):
    report = check("MaskedCrossEntropy", implementations={"mine": DEFECTS[clause]}, **QUICK)
    assert broken(report) == {clause}, str(report)
    assert not report.passed
    assert report.failures
    assert all(clause in str(report) and finding.reproduce for finding in report.failures)


def test_an_error_in_backward_is_a_defect_and_one_before_the_result_is_a_refusal():
    def fails_in_backward(logits, labels):
        def fail(grad):
            raise NotImplementedError("no backward for you")

        return with_gradient(right(MaskedCrossEntropyConfig())(logits, labels), fail)

    def fails_in_forward(logits, labels):
        if logits.dtype == torch.bfloat16:
            raise NotImplementedError("float32 only")
        return right(MaskedCrossEntropyConfig())(logits, labels)

    report = check(implementations={"mine": fails_in_backward}, **QUICK)
    assert "gradient of logits" in broken(report)
    assert "values" not in broken(report)
    assert "no backward for you" in report.broken[0].worst.what
    report = check(implementations={"mine": fails_in_forward}, **QUICK)
    assert report.passed
    assert "NotImplementedError: float32 only" in report.verdicts[0].words[0]
    assert statuses(check(implementations={"mine": fails_in_forward}, dtypes=["bfloat16"], config="MaskedCrossEntropy",
                          only=CASES))["values"] == "unsupported"  # fmt: skip


def test_a_silent_lack_of_gradient_is_a_defect():
    report = check(implementations={"mine": lambda logits, labels: right(MaskedCrossEntropyConfig())(
        logits.detach(), labels)}, **QUICK)  # fmt: skip
    assert "gradient of logits" in broken(report)
    assert "values" not in broken(report)


def test_a_loss_is_judged_with_the_config_that_is_given():
    def mean(logits, labels):
        return right(MaskedCrossEntropyConfig(reduction="mean"))(logits, labels)

    assert check(MaskedCrossEntropyConfig(reduction="mean"), implementations={"mine": mean}, **QUICK).passed
    report = check(implementations={"mine": mean}, **QUICK)
    assert "values" in broken(report), "the defaults have reduction sum"
    assert {verdict.loss for verdict in report.verdicts} == {"MaskedCrossEntropy"}


def test_without_a_config_a_loss_is_judged_as_the_first_whose_arguments_it_accepts():
    kd = KDLossConfig().build(backend="torch:plain")
    report = check(implementations={"mine": kd}, dtypes=["float32"], only=["basic"])
    assert report.passed
    assert {verdict.loss for verdict in report.verdicts} == {"KDLoss"}


def test_arguments_that_a_loss_does_not_accept_are_unsupported_and_named():
    report = check("MaskedCrossEntropy", implementations={"mine": right}, dtypes=["float32"], only=["mask", "basic"])
    (verdict,) = [v for v in report.verdicts if v.clause == "ignored positions"]
    assert verdict.words == ("takes no mask; its arguments are logits, labels (float32 mask)",)


def test_what_is_neither_loss_nor_builder_is_refused():
    with pytest.raises(TypeError, match="must be a loss or a builder, got 3"):
        check(implementations={"mine": 3})
    with pytest.raises(TypeError, match="is the class CrossEntropyLoss: give an object of it"):
        check(implementations={"mine": torch.nn.CrossEntropyLoss})
    with pytest.raises(ValueError, match="framework must be one of torch, jax"):
        check(implementations={"mine": right}, framework="keras")


def test_a_loss_that_returns_no_tensor_says_so():
    report = check(implementations={"mine": lambda logits, labels: 0.0}, config="MaskedCrossEntropy", **QUICK)
    assert "A loss must return a torch.Tensor or a tuple of them, got float." in report.verdicts[0].words[0]
    assert not report.passed


def test_flags_run_beside_implementations_where_they_are_named():
    report = check("MaskedCrossEntropy", ["torch:plain"], implementations={"mine": right}, dtypes=["float32"],
                   only=["basic"])  # fmt: skip
    assert [row.flag for row in report.rows] == ["torch:plain"]
    assert report.verdicts
    assert json.loads(report.to_json())["verdicts"][0]["status"] == "ok"


def test_cross_entropy_of_torch_has_its_known_defects():
    def torch_own(config):
        return lambda logits, labels: F.cross_entropy(
            logits, labels, ignore_index=config.ignore_index, reduction=config.reduction
        )

    report = check("MaskedCrossEntropy", implementations={"torch": torch_own}, **QUICK)
    assert broken(report) >= {"result dtype", "ignored positions", "all ignored"}
    assert statuses(report)["more dimensions"] == "unsupported"
