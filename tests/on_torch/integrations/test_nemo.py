"""Losses in recipes of NeMo AutoModel: loss and parameters after five steps are those of its own losses."""

# B = batch, S = sequence, V = vocabulary, H = hidden

import importlib.util
import tempfile

import pytest
import torch
import torch.nn.functional as F

from helpers.process_group import over_processes
from loss_core_torch.integrations import nemo

B, S, V, H = 2, 12, 97, 32
NEMO = "nemo_automodel.components.loss"
OURS = "loss_core_torch.integrations.nemo"

if importlib.util.find_spec("nemo_automodel") is None:
    pytest.skip("nemo-automodel is not installed", allow_module_level=True)


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def assert_same_training(world, ours, own, kept, **settings):
    from helpers.nemo_recipe import trained

    with tempfile.TemporaryDirectory() as folder:
        expected, other = trained(world, folder, **own, **settings)
        losses, recipe = trained(world, folder, **ours, **settings)
    assert type(recipe.loss_fn).__name__ == kept
    assert len(losses) == 5
    assert losses == pytest.approx(expected, abs=1e-5)
    for parameter, own_one in zip(recipe.model_parts[0].parameters(), other.model_parts[0].parameters(), strict=True):
        torch.testing.assert_close(whole(parameter), whole(own_one), rtol=0, atol=1e-5)
    return recipe


NEMOS = {"_target_": f"{NEMO}.masked_ce.MaskedCrossEntropy"}


def ours(name, **fields):
    return {"_target_": f"{OURS}.{name}", "backend": "torch:eager", **fields}


@pytest.mark.parametrize("name", ["masked_ce", "fused_ce"])
@over_processes(1, 2)
def test_in_its_recipe(world, name):
    # Four batches a step, two on each of two ranks: the recipe multiplies by the ranks, and DDP divides by them.
    kept = {"masked_ce": "MaskedCE", "fused_ce": "FusedCE"}[name]
    assert_same_training(world, {"loss_fn": ours(name, reduction="sum")}, {"loss_fn": NEMOS}, kept)


@over_processes(2)
def test_under_fsdp2(world):
    # The weight of the head is gathered by NeMo, and its gradient goes back over the ranks.
    assert_same_training(world, {"loss_fn": ours("fused_ce")}, {"loss_fn": NEMOS}, "FusedCE", sharded=True)


@over_processes(1)
def test_distillation_in_its_recipe(world):
    mixed = {"loss_fn": ours("masked_ce"), "kd_loss_fn": ours("kd", temperature=2.0)}
    own = {"loss_fn": NEMOS, "kd_loss_fn": {"_target_": f"{NEMO}.kd_loss.KDLoss", "temperature": 2.0}}
    recipe = assert_same_training(world, mixed, own, "MaskedCE", kd_ratio=0.3, teacher_model={})
    assert recipe.kd_loss_fn.kernel_choice.flag == "torch:eager"
    assert recipe.kd_loss_fn.temperature == 2.0


@over_processes(1)
def test_a_model_without_logits_to_keep(world):
    # The recipe then accepts only a loss over logits that is an instance of NeMo's class, and replaces any other.
    for name, kept in (("masked_ce", "MaskedCE"), ("fused_ce", "MaskedCrossEntropy")):
        assert_same_training(world, {"loss_fn": ours(name)}, {"loss_fn": NEMOS}, kept, without_logits_to_keep=True)


def problem():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(H, V, bias=False)
    hidden = torch.randn(B, S, H, generator=generator)
    tokens = torch.randint(0, V, (B, S + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    inputs = {"logits": model.lm_head(hidden), "hidden_states": hidden, "labels": labels, "model": model}
    return inputs, tokens[:, :-1]


BOTH = pytest.mark.parametrize("factory", [nemo.masked_ce, nemo.fused_ce], ids=["masked_ce", "fused_ce"])


@BOTH
def test_calculate_loss_passes_counts_and_weights(factory):
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    from nemo_automodel.components.loss.utils import calculate_loss
    from nemo_automodel.recipes.llm.train_ft import _supports_loss_weights

    inputs, _ = problem()
    loss_fn, weights = factory(), torch.rand(B, S)
    assert _supports_loss_weights(loss_fn)
    got = calculate_loss(loss_fn, **inputs, num_label_tokens=19, loss_weights=weights)
    expected = calculate_loss(MaskedCrossEntropy(), **inputs, num_label_tokens=19, loss_weights=weights)
    torch.testing.assert_close(got, expected)
    # The ignored label of its datasets is replaced by the ignore_index of the loss.
    other, _ = problem()
    torch.testing.assert_close(calculate_loss(factory(ignore_index=-1), **other), calculate_loss(loss_fn, **inputs))


@BOTH
def test_unshifted_labels_give_another_number(factory):
    from nemo_automodel.components.loss.utils import calculate_loss

    inputs, tokens = problem()
    right = calculate_loss(factory(reduction="mean"), **inputs)
    unshifted = tokens.masked_fill(inputs["labels"] == -100, -100)
    wrong = calculate_loss(factory(reduction="mean"), **{**inputs, "labels": unshifted})
    assert (right - wrong).abs() > 0.01


def test_nemo_replaces_classes_by_name():
    from nemo_automodel.components.loss.loss import LossFromFactoryConfig, build_loss_config

    from loss_core_torch.modules.cross_entropy import MaskedCrossEntropy

    assert type(build_loss_config(MaskedCrossEntropy).build()).__module__ == f"{NEMO}.masked_ce"
    for factory in (nemo.masked_ce, nemo.fused_ce, nemo.kd):
        assert type(build_loss_config(factory)) is LossFromFactoryConfig


@BOTH
def test_the_flag_and_the_fields_reach_the_loss(factory):
    loss_fn = factory(backend="torch:plain", label_smoothing=0.1, reduction="mean", ignore_index=3)
    assert loss_fn.loss.kernel_choice.flag == "torch:plain"
    assert (loss_fn.ignore_index, loss_fn.reduction, loss_fn.loss.label_smoothing) == (3, "mean", 0.1)
    inputs, _ = problem()
    given = inputs["logits"] if factory is nemo.masked_ce else inputs["hidden_states"]
    weight = () if factory is nemo.masked_ce else (inputs["model"].lm_head.weight,)
    labels = inputs["labels"].masked_fill(inputs["labels"] == 3, -100)
    expected = F.cross_entropy(inputs["logits"].flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss_fn(given, inputs["labels"], *weight), expected)


@pytest.mark.parametrize("factory", [nemo.masked_ce, nemo.fused_ce, nemo.kd])
def test_what_is_refused(factory):
    with pytest.raises(TypeError, match="impl"):
        factory(impl="cce")
    with pytest.raises(ValueError, match="Unknown backend flag 'cce'"):
        factory(backend="cce")
