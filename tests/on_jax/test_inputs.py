"""Validation of arguments, and the target (a class or a marker) of each label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loss_core_jax import inputs
from loss_core_jax.inputs import ELSEWHERE, IGNORED, INVALID

LOGITS, LABELS = np.zeros((2, 3, 5), np.float32), np.zeros((2, 3), np.int32)
HIDDEN, WEIGHT = np.zeros((2, 3, 4), np.float32), np.zeros((5, 4), np.float32)


def cast(array, dtype):
    return jnp.asarray(array, dtype)


@pytest.mark.parametrize(
    ("dtype", "labels", "ignore_index", "vocab", "expected"),
    [
        ("int32", [0, 4, 5, -1, -100], -100, 5, [0, 4, INVALID, INVALID, IGNORED]),
        ("int32", [0, 1, 4], 0, 5, [IGNORED, 1, 4]),
        ("int64", [2**40, 1, -(2**40)], -100, 5, [INVALID, 1, INVALID]),
        # -100 as uint8 is 156, which is a class here.
        ("uint8", [156, 255, 0], -100, 200, [156, INVALID, 0]),
        ("uint8", [156, 255, 0], 255, 1000, [156, IGNORED, 0]),
        ("uint8", [254, 255, 0], -100, 255, [254, INVALID, 0]),
        ("int8", [-128, 127, 0], -128, 127, [IGNORED, INVALID, 0]),
        ("int32", [7, -100, -3], -100, None, [0, IGNORED, 0]),
    ],
)
def test_labels_of_any_width_become_classes_and_markers(dtype, labels, ignore_index, vocab, expected):
    labels = np.array(labels, dtype)
    assert inputs.classify(np, labels, None, ignore_index, vocab).tolist() == expected
    if dtype != "int64":
        assert inputs.classify(jnp, jnp.asarray(labels), None, ignore_index, vocab).tolist() == expected


def test_markers_are_negative_and_distinct():
    assert sorted({IGNORED, INVALID, ELSEWHERE}) == [-3, -2, -1]


@pytest.mark.parametrize("mask", [[[True, False, True]], [[2, 0, -1]], [[0.5, 0.0, np.nan]]])
def test_masked_positions_are_ignored_for_any_dtype_of_the_mask(mask):
    labels = np.array([[1, 9, 2], [0, 9, -100]])
    for of_mask in (np.array(mask), jnp.asarray(mask)):
        for of_labels in (labels, jnp.asarray(labels)):
            target = inputs.read_labels(of_labels, of_mask, -100, 5)
            assert target.tolist() == [[1, IGNORED, 2], [0, IGNORED, IGNORED]]
            # NumPy arguments give a NumPy array, which is readable under jit, too.
            assert isinstance(target, np.ndarray) == (type(of_mask) is type(of_labels) is np.ndarray)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([[1, 2], [7, 9]], r"^labels\[1, 0\] is 7, outside \[0, 5\) and not ignore_index \(-100\); 2 such"),
        (7, r"^labels is 7, outside"),
    ],
)
@pytest.mark.parametrize("make", [np.array, jnp.array])
def test_the_first_label_that_is_no_class_is_named(make, labels, text):
    with pytest.raises(ValueError, match=text):
        inputs.read_labels(make(labels), None, -100, 5)


def test_traced_labels_are_marked():
    target = jax.jit(lambda labels: inputs.read_labels(labels, None, -100, 5))(jnp.array([1, 7, -100]))
    assert target.tolist() == [1, INVALID, IGNORED]
    target = jax.jit(lambda mask: inputs.read_labels(np.array([1, 7, 7]), mask, -100, 5))(jnp.array([1, 1, 0]))
    assert target.tolist() == [1, INVALID, IGNORED]


@pytest.mark.parametrize(("count", "value"), [(3, 3), (0, 0), (2.5, 2.5), (np.float32(4), 4), (2**40, 2.0**40)])
def test_a_count_is_a_0d_array(count, value):
    target = inputs.read_count("n", count)
    assert (target.shape, float(target)) == ((), value)
    assert inputs.read_count("n", None) is None


@pytest.mark.parametrize(
    ("count", "kind", "text"),
    [
        (True, TypeError, "n must be a number or a 0-d array, got True"),
        ("3", TypeError, "n must be a number"),
        (np.ones(1), ValueError, r"n has shape \(1,\)"),
        (-0.5, ValueError, "n must be >= 0, got -0.5"),
        (np.array(np.nan), ValueError, "n must be >= 0, got nan"),
    ],
)
def test_invalid_counts_are_rejected(count, kind, text):
    with pytest.raises(kind, match=text):
        inputs.read_count("n", count)


REJECTED = [
    (lambda: inputs.check_arrays(x=[1.0]), TypeError, r"x must be a jax or NumPy array, got builtins\.list"),
    (lambda: inputs.check_floating(y=HIDDEN, x=LABELS), TypeError, "x must be a floating array, got dtype int32"),
    (lambda: inputs.check_logits("x", np.float32(0), LABELS), ValueError, r"x has shape \(\); it must be"),
    (lambda: inputs.check_logits("x", LOGITS[..., :0], LABELS), ValueError, "vocabulary .* must not be empty"),
    (lambda: inputs.check_labels("x", LOGITS, LABELS == 0), TypeError, "labels must be integers .* got dtype bool"),
    (lambda: inputs.check_labels("x", LOGITS, LABELS[:1]), ValueError, r"shape \(1, 3\) but x has shape \(2, 3, 5\)"),
    (lambda: inputs.check_linear(HIDDEN, LABELS, WEIGHT[0]), ValueError, r"lm_weight has shape \(4,\)"),
    (lambda: inputs.check_linear(HIDDEN[..., :3], LABELS, WEIGHT), ValueError, r"lm_weight has shape \(5, 4\)"),
    (lambda: inputs.check_linear(np.float32(0), LABELS, WEIGHT), ValueError, r"hidden_states has shape \(\)"),
    (lambda: inputs.check_linear(HIDDEN[..., :0], LABELS, WEIGHT[:, :0]), ValueError, "hidden dimension must not"),
    (lambda: inputs.check_linear(HIDDEN, LABELS, WEIGHT[:0]), ValueError, "vocabulary .* must not be empty"),
    (lambda: inputs.check_linear(HIDDEN, LABELS, cast(WEIGHT, "bfloat16")), TypeError, "they must match, or be"),
    (lambda: inputs.check_linear(cast(HIDDEN, "float16"), LABELS, cast(WEIGHT, "bfloat16")), TypeError, "must match"),
    (lambda: inputs.check_linear(HIDDEN, LABELS[:1], WEIGHT), ValueError, "but hidden_states has shape"),
    (lambda: inputs.check_bias(WEIGHT, WEIGHT[0]), ValueError, r"lm_bias has shape \(4,\) .* V = 5"),
    (lambda: inputs.check_bias(WEIGHT, LABELS), TypeError, "lm_bias must be a floating array"),
    (lambda: inputs.check_pair(LOGITS, LOGITS[..., :4], LABELS), ValueError, r"teacher_logits has shape \(2, 3, 4\)"),
    (lambda: inputs.check_pair(LOGITS, LABELS, LABELS), TypeError, "teacher_logits must be a floating"),
    (lambda: inputs.check_weights_have_count(1, None), ValueError, "only supported with num_batch_labels"),
    (lambda: inputs.check_mask(LABELS, np.ones((2, 3), complex)), TypeError, "mask must be bool"),
    (lambda: inputs.check_mask(LABELS, np.ones((2, 4))), ValueError, r"mask has shape \(2, 4\)"),
    (lambda: inputs.check_mask(LABELS, np.ones((7, 2, 3))), ValueError, r"mask has shape \(7, 2, 3\)"),
    (lambda: inputs.check_reduction_arguments("mean", LABELS, 3, None), ValueError, "num_label_tokens is only"),
    (lambda: inputs.check_reduction_arguments("none", LABELS, None, LOGITS), ValueError, "loss_weights is only"),
    (lambda: inputs.check_reduction_arguments("sum", LABELS, 3, LOGITS), ValueError, r"has shape \(2, 3, 5\) but"),
    (lambda: inputs.check_reduction_arguments("sum", LABELS, 3, LABELS * 1j), TypeError, "must be real"),
]


@pytest.mark.parametrize(("call", "kind", "text"), REJECTED)
def test_invalid_arguments_are_rejected(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_valid_arguments_are_accepted():
    inputs.check_arrays(x=LOGITS, y=jnp.zeros(3), z=np.float32(1), none=None)
    inputs.check_logits("x", LOGITS, LABELS)
    inputs.check_logits("x", LOGITS[..., :1], LABELS.astype(np.uint8))
    inputs.check_linear(HIDDEN, LABELS, WEIGHT)
    inputs.check_linear(HIDDEN[..., :1], LABELS, WEIGHT[:1, :1])
    for half in ("bfloat16", "float16"):
        inputs.check_linear(cast(HIDDEN, half), LABELS, WEIGHT)
    inputs.check_bias(WEIGHT, WEIGHT[:, 0])
    inputs.check_bias(WEIGHT, None)
    inputs.check_pair(LOGITS, cast(LOGITS, "bfloat16"), LABELS)
    for weights, count in ((None, None), (None, 3), (1, 3)):
        inputs.check_weights_have_count(weights, count)
    for mask in (None, np.ones(3), np.ones((2, 1), bool), LABELS):
        inputs.check_mask(LABELS, mask)
    for reduction, count, weights in (("sum", 3, LABELS), ("sum", None, None), ("mean", None, None)):
        inputs.check_reduction_arguments(reduction, LABELS, count, weights)


def test_in_host_memory():
    assert inputs.in_host_memory(LABELS)
    assert inputs.in_host_memory(jnp.zeros(3))
    assert jax.jit(lambda x: jnp.full((), inputs.in_host_memory(x)))(jnp.zeros(3)) == 0


def test_arithmetic_is_float64_if_any_array_is():
    array = jnp.zeros(3)
    assert inputs.as_jax(array) is array
    assert isinstance(inputs.as_jax(LOGITS), jax.Array)
    assert inputs.arithmetic_dtype(array, cast(array, "bfloat16")) == "float32"
    with jax.enable_x64(True):
        assert inputs.arithmetic_dtype(array, cast(LOGITS, "float64")) == "float64"
