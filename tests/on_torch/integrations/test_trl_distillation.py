"""The fused distillation in TRL's DistillationTrainer: every logged number and the parameters are the trainer's own."""

import pytest
import torch

from helpers.largest_tensor import LargestTensor
from helpers.tiny_models import made, with_biased_head
from helpers.trl_trainers import assert_same_training, distillation, trained
from loss_core import BackendUnavailable
from loss_core.dispatch.observed import names, observing
from loss_core_torch.integrations.trl_distillation import use_fused_distillation

pytest.importorskip("trl")


@pytest.fixture
def fused():
    undo = use_fused_distillation(backend="torch:eager")
    yield
    undo()


def trainer_of(folder, student, teacher, **settings):
    return distillation(student, folder, teacher, learning_rate=1e-2, **settings)


def teacher():
    """A teacher with another width and other weights than the student."""
    return made(hidden_size=24)


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.0}, {"beta": 1.0, "temperature": 0.7}, {"beta": 0.3, "gradient_accumulation_steps": 3}],
    ids=["forward", "reverse", "jsd"],
)
def test_training(settings, tmp_path):
    expected = trained(trainer_of(tmp_path, made(), teacher(), **settings))
    undo = use_fused_distillation(backend="torch:eager")
    try:
        with observing() as seen:
            found = trained(trainer_of(tmp_path, made(), teacher(), **settings))
    finally:
        undo()
    assert names(seen) == "torch:eager"
    assert_same_training(found, expected)
    assert (found[1].lm_head.weight - made().lm_head.weight).abs().max() > 1e-4


def arguments(**changed):
    """Of TRL's function, for 3 completions of 4 tokens, 5 of which are valid."""
    draw = torch.Generator().manual_seed(0)
    made_of = {
        "student_hidden_states": (3, 4, 8),
        "teacher_hidden_states": (3, 4, 6),
        "student_lm_head_weight": (11, 8),
        "teacher_lm_head_weight": (11, 6),
    }
    given = {name: torch.randn(shape, generator=draw) for name, shape in made_of.items()}
    for name in ("student_hidden_states", "student_lm_head_weight"):
        given[name].requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    return given | {"completion_mask": mask, "beta": 0.0, "temperature": 1.0} | changed


def called(given):
    """Results and gradients of TRL's function, or of its replacement."""
    from trl.trainer import distillation_trainer

    loss, entropy, count = distillation_trainer._chunked_divergence_loss(**given)
    trained = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return loss, entropy, count, *torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 0.3), (0.5, 2.0)], ids=str)
@pytest.mark.parametrize("count", [None, torch.tensor(7.0)], ids=["mean", "count"])
def test_a_call(beta, scales, count):
    given = arguments(
        beta=beta, temperature=1.7, num_items_in_batch=count, student_logit_scale=scales[0],
        teacher_logit_scale=scales[1],
    )  # fmt: skip
    expected = called(given)
    undo = use_fused_distillation(backend="torch:eager")
    found = called(given)
    undo()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_no_valid_token(fused):
    loss, entropy, count, *grads = called(arguments(completion_mask=torch.zeros(3, 4)))
    assert (loss, entropy, count) == (0, 0, 0)
    assert all((grad == 0).all() for grad in grads)


def test_no_logits_are_made(fused):
    # Logits of 128 MiB: more than a block of the kernel's.
    given = arguments(
        student_hidden_states=torch.randn(32, 32, 4, requires_grad=True),
        teacher_hidden_states=torch.randn(32, 32, 4),
        student_lm_head_weight=torch.randn(2**15, 4, requires_grad=True),
        teacher_lm_head_weight=torch.randn(2**15, 4),
        completion_mask=torch.ones(32, 32),
    )
    with LargestTensor() as largest:
        called(given)
    assert 0 < largest.numel < 32 * 32 * 2**15


def test_heads_that_are_refused(fused, tmp_path):
    for name in ("student_lm_head_bias", "teacher_lm_head_bias"):
        with pytest.raises(ValueError, match=f"{name} is given, which FusedLinearKDLoss does not have"):
            called(arguments(**{name: torch.zeros(11)}))
    with pytest.raises(ValueError, match="teacher_final_logit_softcapping is given"):
        called(arguments(teacher_final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match=r"The student's logit scale is 0\.0; it must be > 0"):
        called(arguments(student_logit_scale=0.0))
    with pytest.raises(ValueError, match="student_lm_head_bias is given"):
        trained(trainer_of(tmp_path, with_biased_head(), teacher()))
    partitioned = torch.zeros(11, 6)
    partitioned.ds_id = 0  # As DeepSpeed marks what it has partitioned.
    with pytest.raises(ValueError, match="The teacher's head is partitioned by DeepSpeed ZeRO-3"):
        called(arguments(teacher_lm_head_weight=partitioned))


def test_patching_twice_and_undoing(monkeypatch):
    from trl.trainer import distillation_trainer

    theirs = distillation_trainer._chunked_divergence_loss
    with pytest.raises(BackendUnavailable):
        use_fused_distillation(backend="torch:te")
    assert distillation_trainer._chunked_divergence_loss is theirs
    undo = use_fused_distillation()
    with pytest.raises(ValueError, match="from loss_core already"):
        use_fused_distillation()
    undo()
    assert distillation_trainer._chunked_divergence_loss is theirs
    with pytest.raises(RuntimeError, match="is not this one any more"):
        undo()
    # A version of TRL with other arguments.
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", lambda logits: logits)
    with pytest.raises(RuntimeError, match=r"pip install 'trl==1\.16"):
        use_fused_distillation()
