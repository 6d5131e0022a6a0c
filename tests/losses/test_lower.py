"""Results in the next lower arithmetic, and that the standard cases detect it."""

from dataclasses import dataclass

import numpy as np
import pytest

from loss_core import (
    LOSS_CONFIG_REGISTRY,
    FusedLinearCEConfig,
    FusedLinearKDConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    register_loss,
    unregister_loss,
)
from loss_core.check.calls import Call, rounded_inputs
from loss_core.dtypes import FORMATS, TF32_BITS, round_bits, round_to
from loss_core.losses import LABELS, Argument, LossDef, allowances, evaluate, named_cases
from loss_core.losses.bounds.errors import errors_before_rounding
from loss_core.losses.bounds.rounding import result_dtypes
from loss_core.losses.definition import need_definition
from loss_core.losses.linear_cross_entropy import DEFINITION as LINEAR_CROSS_ENTROPY
from loss_core.losses.lower import lower_results

# Cases that can't detect it: no loss, one class, equal distributions; or differences of logits that are exact in 16
# bits, or as small as rounding errors.
INSENSITIVE = {"all-ignored", "vocab-1", "softcap-vocab-1", "same-logits", "jsd-same-logits", "same-heads"}
IN_SOME_DTYPES = {"offset", "huge-logits", "jsd-huge-logits", "entropy-minus-inf", "ragged", "softcap-ragged"}


def results(config, arrays, upstream=None):
    found = evaluate(config, arrays, upstream)
    return {"loss": found.loss, **found.grads}


def undetected(case, loss, dtype, product_dtype=None):
    """Names of the lower arithmetics that pass a comparison with float64, and of all."""
    arrays, upstream = rounded_inputs(Call(loss, loss, case, dtype, "", None, captured=False))
    expected = evaluate(case.config, arrays, upstream)
    allowed = allowances(case.config, arrays, expected, dtype, upstream=upstream, product_dtype=product_dtype)
    exact, dtypes = results(case.config, arrays, upstream), result_dtypes(case.config, dtype, expected.grads)
    found = lower_results(case.config, arrays, dtype, upstream)
    for got in found.values():
        assert all(np.array_equal(np.isnan(got[name]), np.isnan(exact[name])) for name in exact), case.name
        assert all(np.array_equal(got[name], round_to(got[name], dtypes[name]), equal_nan=True) for name in exact)
    return {
        arithmetic
        for arithmetic, got in found.items()
        if all(np.all(errors_before_rounding(got[t], exact[t], allowed[t], dtypes[t]).ratio <= 1) for t in exact)
    }, set(found)


@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("loss", LOSS_CONFIG_REGISTRY)
def test_every_row_of_the_standard_cases_detects_every_lower_arithmetic(loss, dtype):
    small = [case for case in named_cases(loss) if np.size(case.arrays["labels"]) < 100]
    cases = {case.name: undetected(case, loss, dtype) for case in small}
    blind = {name for name, (passes, _) in cases.items() if passes}
    assert blind <= INSENSITIVE | IN_SOME_DTYPES
    for arithmetic in set.union(*(names for _, names in cases.values())):
        assert any(arithmetic not in passes for passes, _ in cases.values()), arithmetic


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("loss", [loss for loss in LOSS_CONFIG_REGISTRY if need_definition(loss).products])
def test_rows_of_kernels_with_16_bit_operands_detect_lower_arithmetic_too(loss, dtype):
    left = {f"{dtype} logits", f"{dtype} accumulator"}
    for case in named_cases(loss, shape=(24, 507, 24)):
        left &= undetected(case, loss, dtype, product_dtype=dtype)[0]
        if not left:
            return
    pytest.fail(f"no case detects {left}")


def test_the_lower_softmax_rounds_distances_to_the_largest_logit():
    labels = np.array([1, 0, -100])
    logits = np.array([[100.0, 98.999], [-np.inf, -np.inf], [np.nan, np.inf]])
    found = lower_results(
        MaskedCrossEntropyConfig(ignore_index=-100), {"logits": logits[:1], "labels": labels[:1]}, "float32"
    )
    assert list(found) == ["bfloat16 softmax"]
    exact = evaluate(MaskedCrossEntropyConfig(), {"logits": np.array([[100.0, 99.0]]), "labels": labels[:1]})
    assert found["bfloat16 softmax"]["loss"] == np.float32(exact.loss)
    np.testing.assert_array_equal(found["bfloat16 softmax"]["logits"], np.float32(exact.grads["logits"]))
    ignored = {"logits": logits, "labels": np.array([1, -100, -100])}
    assert np.all(lower_results(MaskedCrossEntropyConfig(), ignored, "float32")["bfloat16 softmax"]["logits"][1:] == 0)


def test_an_infinite_logit_that_a_softcap_makes_finite_does_not_change_the_others():
    config, arrays = MaskedCrossEntropyConfig(logit_softcapping=2.0), {"labels": np.array([1])}
    arrays["logits"] = np.array([[np.inf, 1.0]])
    (found,) = lower_results(config, arrays, "float32").values()
    assert found["loss"] == np.float32(results(config, arrays)["loss"])


@pytest.mark.parametrize(
    ("dtype", "name", "distance"),
    [("float64", "float32", 1 + 2.0**-30), ("bfloat16", "bfloat16", 256.5), ("float16", "float16", 2048.5)],
)
def test_distances_have_the_bits_of_the_next_lower_format(dtype, name, distance):
    arrays = {"student_logits": np.array([[distance, 0.0]]), "teacher_logits": np.array([[0.0, 1.0]])}
    arrays["labels"] = np.array([0])
    found = lower_results(KDLossConfig(), arrays, dtype)
    assert list(found) == [f"{name} softmax"]
    nearest = {**arrays, "student_logits": np.array([[np.floor(distance), 0.0]])}
    exact = results(KDLossConfig(), nearest)["loss"]
    assert found[f"{name} softmax"]["loss"] == round_to(exact, "float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize(("dtype", "lost"), [("float32", 2.0**-11), ("float64", 2.0**-30)])
def test_lower_products_have_rounded_operands(dtype, lost):
    arrays = {"hidden_states": np.array([[1 + lost, 2.0]]), "lm_weight": np.array([[1.0, 0.5], [0.0, 1 + lost]])}
    arrays["labels"] = np.array([1])
    name = {"float32": "TF32 products", "float64": "float32 products"}[dtype]
    found = lower_results(FusedLinearCEConfig(), arrays, dtype)
    assert list(found) == [name]
    short = {"hidden_states": np.array([[1.0, 2.0]]), "lm_weight": np.array([[1.0, 0.5], [0.0, 1.0]])}
    for tensor, value in results(FusedLinearCEConfig(), arrays | short).items():
        np.testing.assert_array_equal(found[name][tensor], round_to(value, dtype), err_msg=tensor)


def test_tf32_has_eleven_bits():
    np.testing.assert_array_equal(
        round_bits(np.array([2048.0, 2049.0, 2051.0, -np.inf]), TF32_BITS), [2048, 2048, 2052, -np.inf]
    )


def test_products_of_16_bits_are_rounded_as_logits_or_as_they_are_summed():
    # h . W = 257 and 1: bfloat16 has 256.
    arrays = {"hidden_states": np.array([[1.0, 1.0]]), "lm_weight": np.array([[256.0, 1.0], [1.0, 255.0]])}
    arrays["labels"] = np.array([1])
    found = lower_results(FusedLinearCEConfig(), arrays, "bfloat16")
    assert list(found) == ["bfloat16 logits", "bfloat16 accumulator"]
    assert found["bfloat16 logits"]["loss"] == np.float32(np.log(2))
    assert found["bfloat16 accumulator"]["loss"] == np.float32(np.log1p(np.exp(-1)) + 1)


def test_a_sum_in_16_bits_stops_growing():
    # Of each token the gradient is (-1/2, 1/2): 4 a block, half of the distance between bfloat16 numbers from 1024 on.
    tokens = 2400
    arrays = {
        "hidden_states": np.ones((tokens, 1)),
        "lm_weight": np.zeros((2, 1)),
        "labels": np.zeros(tokens, np.int64),
    }
    found = lower_results(FusedLinearCEConfig(), arrays, "bfloat16")
    np.testing.assert_array_equal(found["bfloat16 logits"]["lm_weight"], [[-1200], [1200]])
    np.testing.assert_array_equal(found["bfloat16 accumulator"]["lm_weight"], [[-1024], [1024]])
    np.testing.assert_array_equal(found["bfloat16 accumulator"]["hidden_states"], np.zeros((tokens, 1)))


def test_both_heads_of_a_distillation_are_lowered():
    case = named_cases("FusedLinearKDLoss", only=("basic",))[0]
    arrays = {name: round_to(a, "bfloat16") if a.dtype.kind == "f" else a for name, a in case.arrays.items()}
    exact = results(FusedLinearKDConfig(), arrays)
    found = lower_results(FusedLinearKDConfig(), arrays, "bfloat16")["bfloat16 accumulator"]
    for side in ("student", "teacher"):
        assert not np.array_equal(found[f"{side}_lm_weight"], round_to(exact[f"{side}_lm_weight"], "bfloat16"))
        np.testing.assert_array_equal(
            found[f"{side}_hidden_states"], round_to(exact[f"{side}_hidden_states"], "bfloat16")
        )


@dataclass
class OwnConfig(LossConfig):
    """A user-defined fused linear loss whose definition has no `lower`."""

    ignore_index: int = -100
    logit_softcapping: float = 0.0


OWN = LossDef(
    "own",
    (Argument("hidden_states", ("T", "H")), Argument("lm_weight", ("V", "H")), LABELS),
    LINEAR_CROSS_ENTROPY.oracle,
)


@pytest.fixture
def own():
    register_loss("Own", OwnConfig, {}, definition=OWN)
    yield OwnConfig()
    unregister_loss("Own")


def test_a_users_products_have_a_lower_arithmetic_too(own):
    arrays = {
        "hidden_states": np.array([[1 + 2.0**-11]]),
        "lm_weight": np.array([[1.0], [0.0]]),
        "labels": np.array([0]),
    }
    right = results(own, {**arrays, "hidden_states": np.array([[1.0]])})
    (found,) = lower_results(own, arrays, "float32").items()
    assert found[0] == "TF32 products"
    for tensor, value in right.items():
        np.testing.assert_array_equal(found[1][tensor], round_to(value, "float32"), err_msg=tensor)
    (found,) = lower_results(own, {**arrays, "hidden_states": np.array([[1.0]])}, "bfloat16").items()
    assert found[0] == "bfloat16 result"
    assert found[1]["loss"] == round_to(right["loss"], "bfloat16") != np.float32(right["loss"])
