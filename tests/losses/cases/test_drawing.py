"""Cases have the properties of their recipe and of the arguments; tests of backends would pass without them."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from loss_core import (
    FusedLinearCEConfig,
    FusedLinearKDConfig,
    KDLossConfig,
    LogProbsConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
    register_loss,
    unregister_loss,
)
from loss_core.losses.cases.drawing import make_case, named_cases, random_case, recipe_names, recipes_of
from loss_core.losses.definition import Recipe, definition_of


@dataclass
class PlainConfig(LossConfig):
    """Without any field."""


@pytest.fixture
def plain():
    register_loss("Plain", PlainConfig, {}, definition=replace(definition_of("MaskedCrossEntropy"), name="plain"))
    yield PlainConfig()
    unregister_loss("Plain")


RECIPE = Recipe("own", "nothing", lead=(4, 6), vocab=7, hidden=5, ignored=0.5)


def drawn(config, *extras, **changes):
    return make_case(replace(RECIPE, extras=extras, **changes), config, seed=0)


def test_extras_are_drawn_only_for_recipes_that_name_them():
    plain = drawn(MaskedCrossEntropyConfig())
    assert {name: x.shape for name, x in plain.arrays.items()} == {"logits": (4, 6, 7), "labels": (4, 6)}
    assert (plain.upstream, plain.grad_of) == (None, ("logits",))
    more = drawn(MaskedCrossEntropyConfig(), "mask", "loss_weights", "count", "upstream")
    shapes = {"mask": (4, 6), "loss_weights": (4, 6), "num_label_tokens": ()}
    assert {name: more.arrays[name].shape for name in set(more.arrays) - set(plain.arrays)} == shapes
    assert set(np.unique(more.arrays["mask"])) == {0, 1}
    assert 1 < np.max(more.arrays["loss_weights"]) < 2
    assert more.grad_of == ("logits", "loss_weights")
    bias = drawn(FusedLinearCEConfig(), "lm_bias").arrays
    assert (bias["lm_bias"].shape, bias["lm_weight"].shape, bias["hidden_states"].shape) == ((7,), (7, 5), (4, 6, 5))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MaskedCrossEntropyConfig(), ()),
        (MaskedCrossEntropyConfig(reduction="none"), (4, 6)),
        (MaskedCrossEntropyConfig(metrics=("lse", "entropy")), (3,)),
        (LogProbsConfig(entropy=True), (2, 4, 6)),
        (LogProbsConfig(), (4, 6)),
    ],
    ids=str,
)
def test_an_upstream_gradient_has_the_shape_of_the_result(config, shape):
    assert drawn(config, "upstream").upstream.shape == shape


@pytest.mark.parametrize(("ignored", "least", "most"), [(0.0, 0, 0), (0.5, 1, 23), (1.0, 24, 24)])
def test_the_fraction_of_ignored_labels_is_that_of_the_recipe(ignored, least, most):
    labels = drawn(MaskedCrossEntropyConfig(ignore_index=-7), ignored=ignored).arrays["labels"]
    assert least <= np.sum(labels == -7) <= most
    assert set(np.unique(labels)) <= {-7, *range(7)}


@pytest.mark.parametrize(
    ("config", "of_head"), [(KDLossConfig(), False), (FusedLinearKDConfig(), True)], ids=["logits", "head"]
)
def test_a_teacher_is_the_student_perturbed_by_half_of_its_size(config, of_head):
    arrays = drawn(config, lead=(64,), vocab=501, hidden=64, scale=3.0).arrays
    if of_head:
        student, teacher = (
            arrays[f"{of}_hidden_states"] @ arrays[f"{of}_lm_weight"].T for of in ("student", "teacher")
        )
    else:
        student, teacher = arrays["student_logits"], arrays["teacher_logits"]
    assert np.std(student) == pytest.approx(3, rel=0.05)
    assert np.std(teacher - student) == pytest.approx(1.5, rel=0.05)
    assert np.corrcoef((teacher - student).ravel(), student.ravel())[0, 1] == pytest.approx(0, abs=0.05)


def test_labels_of_a_config_without_an_ignore_index_are_ignored_as_torch_does_it(plain):
    assert set(np.unique(drawn(plain, ignored=1.0).arrays["labels"])) == {-100}


def test_logits_have_the_scale_of_the_recipe_from_a_head_too():
    wide = {"lead": (64,), "vocab": 501, "hidden": 64, "scale": 3.0}
    logits = drawn(MaskedCrossEntropyConfig(), **wide).arrays["logits"]
    head = drawn(FusedLinearCEConfig(), **wide).arrays
    assert np.std(logits) == pytest.approx(3, rel=0.05)
    assert np.std(head["hidden_states"]) == pytest.approx(1, rel=0.05)
    assert np.std(head["hidden_states"] @ head["lm_weight"].T) == pytest.approx(3, rel=0.05)


def test_named_cases_are_selected_by_name_and_drawn_at_the_given_shape():
    names = [case.name for case in named_cases("MaskedCrossEntropy")]
    assert names[:2] == ["basic", "none-ignored"]
    assert set(names) <= set(recipe_names())
    assert [case.name for case in named_cases("MaskedCrossEntropy", only=("mask", "basic"))] == ["basic", "mask"]
    assert named_cases("MaskedCrossEntropy", only=("basic",))[0].arrays["logits"].shape == (4, 6, 507)
    shaped = named_cases("FusedLinearCrossEntropy", shape=(5, 3, 2))
    assert {case.arrays["hidden_states"].shape for case in shaped} == {(5, 2)}
    assert {case.arrays["lm_weight"].shape for case in shaped} == {(3, 2)}
    assert named_cases("FusedLinearCrossEntropy", shape=(5, 3))[0].arrays["lm_weight"].shape == (3, 24)
    # These recipes are about their shape.
    skipped = {case.name for case in named_cases("FusedLinearCrossEntropy")} - {case.name for case in shaped}
    assert skipped == {"vocab-1", "softcap-vocab-1", "many-tokens"}
    assert "offset" not in {case.name for case in shaped}, "about logits that are an argument"


def test_a_config_instance_is_kept_and_has_only_the_cases_that_match_it():
    config = MaskedCrossEntropyConfig(reduction="mean", ignore_index=0)
    cases = {case.name: case for case in named_cases(config)}
    assert all(case.config == config for case in cases.values())
    assert {"basic", "mean", "none", "ignore-index-0"} <= set(cases)
    assert not {"ignore-index-in-vocab", "no-upcast", "smoothing", "count", "loss-weights"} & set(cases)


def test_a_named_case_has_the_fields_and_extras_of_its_recipe():
    by_name = {recipe.name: recipe for recipe in recipes_of("MaskedCrossEntropy")}
    for case in named_cases("MaskedCrossEntropy"):
        recipe = by_name[case.name]
        assert all(getattr(case.config, name) == value for name, value in recipe.fields.items())
        assert (case.catches, case.strided) == (recipe.catches, recipe.strided)
        assert (case.upstream is not None) == ("upstream" in recipe.extras)


def test_a_random_case_is_reproducible_from_its_seed_and_index():
    first, again, other = (random_case("KDLoss", index, 3) for index in (5, 5, 6))
    assert first.name == "random-3-5"
    assert first.config == again.config
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    assert str(other.arrays) != str(first.arrays)
    assert str(random_case("KDLoss", 5, 4).arrays) != str(first.arrays)


def test_twelve_kinds_alternate_and_one_is_replaced_after_a_hundred_cases():
    def kind(index):
        case = random_case("MaskedCrossEntropy", index, 0)
        return str(case.config), {name: x.shape for name, x in case.arrays.items()}

    first = [kind(index) for index in range(12)]
    assert all(first.count(each) == 1 for each in first)
    assert [kind(index) for index in range(12, 24)] == first
    assert kind(99) == first[3]
    assert kind(100) == first[5]
    assert kind(107) not in first
    assert kind(203) not in [*first, kind(107)]


def test_random_cases_keep_a_given_shape_and_config():
    config = FusedLinearCEConfig(label_smoothing=0.125)
    for index in range(12):
        case = random_case(config, index, 0, shape=(5, 3, 2))
        assert case.config is config
        assert (case.arrays["hidden_states"].shape, case.arrays["lm_weight"].shape) == ((5, 2), (3, 2))


def test_random_cases_have_only_arguments_that_the_loss_accepts():
    for index in range(100):
        case = random_case("MaskedCrossEntropy", index, 0)
        sum_only = {"loss_weights", "num_label_tokens"} & set(case.arrays)
        assert case.config.reduction == "sum" or not sum_only
        assert "lm_bias" not in case.arrays
    for index in range(100):
        arrays = random_case("KDLoss", index, 0).arrays
        assert "num_batch_labels" in arrays or "loss_weights" not in arrays
        assert "mask" not in arrays


def test_labels_of_a_distillation_case_may_be_outside_the_vocabulary():
    case = next(case for case in named_cases("KDLoss") if case.name == "no-classes")
    labels = case.arrays["labels"][case.arrays["labels"] != KDLossConfig().ignore_index]
    assert labels.size > 5
    assert not np.any((labels >= 0) & (labels < 507))
