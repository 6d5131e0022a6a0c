"""`LossDef` of built-in and user-defined losses, as check and bench use it."""

from dataclasses import FrozenInstanceError, dataclass, replace

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
from loss_core.bench.measure.job import Job, make_inputs
from loss_core.bench.measure.roofline import counted_text, least_work
from loss_core.check import check
from loss_core.losses import (
    LABELS,
    Argument,
    LossDef,
    Sizes,
    allowances,
    definition_of,
    evaluate,
    named_cases,
    random_cases,
)
from loss_core.losses.cross_entropy import COUNT, over_logits, token_cross_entropy
from loss_core.losses.definition import need_definition

by_loss = pytest.mark.parametrize("name", LOSS_CONFIG_REGISTRY)


@dataclass
class HalfConfig(LossConfig):
    """Half of the cross entropy, summed."""

    ignore_index: int = -100


def token_half(config, logits_TV, labels_T, keep_T):
    loss_T, grad_TV = token_cross_entropy(config, logits_TV, labels_T, keep_T)
    return loss_T / 2, grad_TV / 2


HALF = LossDef("half", (Argument("logits", ("T", "V")), LABELS), over_logits(token_half))


def build_half(factor):
    def build(config):
        import torch

        class Half(torch.nn.Module):
            def forward(self, logits, labels):
                keep = labels != config.ignore_index
                logits = torch.where(keep[..., None], logits, 0).double()
                log_p = logits.log_softmax(-1).gather(-1, torch.where(keep, labels, 0)[..., None])[..., 0]
                return torch.where(keep, -factor * log_p, 0.0).sum().float()

        return Half()

    return build


@pytest.fixture
def half(request):
    register_loss("Half", HalfConfig, {"torch": build_half(getattr(request, "param", 0.5))}, definition=HALF)
    yield HalfConfig
    unregister_loss("Half")


@by_loss
def test_every_gradient_has_the_shape_of_its_argument_and_a_bound(name):
    for case in named_cases(name):
        expected = evaluate(case.config, case.arrays, case.upstream)
        assert set(expected.grads) == set(case.grad_of)
        bounds = allowances(case.config, case.arrays, expected, "float32", upstream=case.upstream)
        for argument, grad in expected.grads.items():
            assert grad.shape == np.shape(case.arrays[argument]), case.name
            assert bounds[argument].shape == grad.shape
        assert bounds["loss"].shape == expected.loss.shape


@by_loss
def test_arguments_have_the_shapes_that_their_dimensions_say(name):
    definition = need_definition(name)
    case = named_cases(name, only=("basic",))[0]
    sizes = Sizes((4, 6), 507, 24)
    for argument in definition.arguments:
        if argument.name in case.arrays:
            assert case.arrays[argument.name].shape == sizes.shape(argument.dims)


@pytest.mark.parametrize(("vocab", "classes"), [(1, 1), (2, 1), (7, 3), (129, 64), (507, 64)])
def test_k_is_half_of_the_vocabulary_but_at_most_64(vocab, classes):
    assert Sizes((2, 3), vocab, 5).shape(("T", "K")) == (2, 3, classes)
    assert Sizes((2, 3), vocab, 5).shape(("V", "H_t")) == (vocab, 10)
    assert Sizes((2, 3), vocab).hidden == 0


@pytest.mark.parametrize(
    ("dims", "axis", "spread"), [(("T", "V"), -1, 3), (("V", "H"), 0, 3 / 4), (("V",), 0, None), (("T", "H"), None, 1)]
)
def test_the_axis_over_the_vocabulary_and_the_spread_that_gives_logits_their_scale(dims, axis, spread):
    argument = Argument("x", dims)
    assert argument.vocab_axis == axis
    assert spread is None or argument.spread(Sizes((2, 3), 9, 16), 3.0) == spread


@pytest.mark.parametrize("shared", [LABELS, HALF, random_cases("KDLoss", 1, seed=0)[0], named_cases("KDLoss")[0]])
def test_shared_objects_are_frozen(shared):
    with pytest.raises(FrozenInstanceError):
        shared.name = "another"


def test_a_class_inherits_the_definition_of_its_base():
    @dataclass
    class Own(KDLossConfig):
        pass

    assert definition_of(Own()) is definition_of(KDLossConfig) is definition_of("KDLoss")
    assert definition_of(LossConfig()) is None
    with pytest.raises(TypeError, match=r"no definition of LossConfig in float64.*definition=LossDef"):
        evaluate(LossConfig(), {})


def test_labels_of_distillation_only_mark_ignored_tokens():
    case = named_cases("KDLoss", only=("basic",))[0]
    other = {**case.arrays, "labels": np.where(case.arrays["labels"] == -100, -100, 9_999)}
    assert evaluate(case.config, other).loss == evaluate(case.config, case.arrays).loss


@pytest.mark.parametrize(
    ("config", "shape", "counted", "moved", "operations"),
    [
        (MaskedCrossEntropyConfig(), (8, 10), "1 read + 1 write of the logits", 6 * 10 + 8 * 10, 0),
        (KDLossConfig(), (8, 10), "2 reads + 1 write of the logits", 2 * 6 * 10 + 8 * 10, 0),
        (FusedLinearCEConfig(), (8, 10, 4), "3 matrix products", (6 + 10) * 4 + (8 + 10) * 4, 3 * 2 * 6 * 10 * 4),
        (
            FusedLinearKDConfig(),
            (8, 10, 4),
            "4 matrix products",
            (6 + 10) * (4 + 8) + (8 + 10) * 4,
            2 * 6 * 10 * (3 * 4 + 8),
        ),
    ],
    ids=["MaskedCrossEntropy", "KDLoss", "FusedLinearCrossEntropy", "FusedLinearKDLoss"],
)
def test_the_least_work_of_a_call(config, shape, counted, moved, operations):
    job = Job(config.to_dict(), shape, "float32", ignored=0.25)
    assert counted_text(job) == counted
    assert (least_work(job).num_bytes, least_work(job).num_flops) == (4 * moved, operations)


@pytest.mark.parametrize(
    ("name", "terms", "products"),
    # m, s and t; with an entropy e; of a pair of distributions m and s of both, and a; of K targets m, s and K of t.
    [
        ("MaskedCrossEntropy", 3, 0),
        ("FusedLinearCrossEntropy", 3, 1),
        ("LogProbs", 4, 0),
        ("FusedLinearLogProbs", 4, 1),
        ("KDLoss", 5, 0),
        ("FusedLinearKDLoss", 5, 2),
        ("TopKDistillation", 2 + 64, 0),
        ("FusedLinearTopKDistillation", 2 + 64, 1),
    ],
)
def test_a_loss_has_a_product_per_head_and_ranks_exchange_the_terms_of_a_row(name, terms, products):
    assert (definition_of(name).row_numbers, definition_of(name).products) == (terms, products)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_estimated_bound_includes_the_rounding_of_a_probability_near_1(half, dtype):
    # p - 1 is 0, and so is its change for any perturbation of the logits.
    arrays, upstream = (
        {"logits": np.array([[[800.0, 0.0], [1.0, 2.0]]]), "labels": np.array([[0, -100]])},
        np.array(-3.0),
    )
    expected = evaluate(half(), arrays, upstream)
    allowed = allowances(half(), arrays, expected, dtype, upstream=upstream)
    assert not expected.grads["logits"].any()
    np.testing.assert_allclose(allowed["logits"], [[[3 * 6 * 2.0**-24] * 2, [2.0**-126] * 2]])
    # The loss is returned in the compute dtype.
    assert allowed["loss"].tolist() == 2.0**-126


def test_an_estimated_bound_treats_labels_and_count_as_exact(half):
    arrays = {"logits": np.array([[0.5, -1.0, 2.25]]), "labels": np.array([1])}
    alone = allowances(half(), arrays, evaluate(half(), arrays), "float32")
    # Labels are no numbers: a perturbed one would be another class.
    assert 0 < alone["loss"] < 1e-5
    unregister_loss("Half")
    register_loss("Half", half, {}, definition=replace(HALF, arguments=(*HALF.arguments, COUNT)))
    arrays |= {"num_label_tokens": np.array(4)}
    counted = allowances(half(), arrays, evaluate(half(), arrays), "float32")
    for name, allowed in counted.items():
        np.testing.assert_allclose(4 * allowed, alone[name], rtol=1e-9)


def test_a_users_loss_is_checked(half):
    assert definition_of("Half") is HALF
    report = check(half(), ["torch"], dtypes=["float32"], num_random=2)
    assert report.passed, str(report)
    assert {"basic", "ragged", "strided"} <= {case.name for case in named_cases("Half")}
    assert "mask" not in {case.name for case in named_cases("Half")}


@pytest.mark.parametrize("half", [0.5001], indirect=True)
def test_a_users_loss_that_is_wrong_fails(half):
    report = check("Half", ["torch"], dtypes=["float32"], only=["basic"])
    assert {finding.tensor for finding in report.failures} == {"loss", "logits"}


def test_a_users_loss_has_inputs_and_a_roofline_for_bench(half):
    job = Job(half().to_dict(), (8, 10), "float32")
    tiles, labels = make_inputs(job)
    assert job.float_shapes == {"logits": (8, 10)} == {name: tile.shape for name, tile in tiles.items()}
    assert labels.shape == (8,)
    assert counted_text(job) == "1 read + 1 write of the logits"


def test_unregistering_forgets_the_definition(half):
    unregister_loss("Half")
    assert definition_of(half) is None
    register_loss("Half", half, {}, definition=HALF)


def test_a_definition_of_another_type_is_refused():
    with pytest.raises(TypeError, match="definition must be a"):
        register_loss("Half", HalfConfig, {}, definition="half")  # type: ignore[arg-type]


def test_weights_that_need_a_count_are_drawn_with_one():
    cases = random_cases("KDLoss", 60, seed=0)
    weighted = [case for case in cases if "loss_weights" in case.arrays]
    assert weighted
    assert all("num_batch_labels" in case.arrays for case in weighted)
