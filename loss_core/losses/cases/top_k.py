"""Test cases of top-k distillation: how the teacher is drawn, and the recipes."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, K = classes with teacher log-probabilities

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.losses.bounds.rounding import log_softmax
from loss_core.losses.definition import Floats, LossDef, Recipe, Sizes


def near_student(definition: LossDef, sizes: Sizes, scale: float, rng: np.random.Generator) -> dict[str, Any]:
    """A student, and the K likeliest classes of a teacher whose logits are perturbed student logits."""
    shape = sizes.shape(("T", "V"))
    student = rng.standard_normal(shape) * scale
    teacher = student + rng.standard_normal(shape) * scale / 2
    return {"student_logits": student} | likeliest_classes(teacher, sizes.shape(("K",))[0], rng)


def likeliest_classes(logits: Floats, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Indices and log-probabilities of the `count` likeliest classes of these logits, in random order."""
    vocab = logits.shape[-1]
    indices = rng.permuted(np.argsort(-logits, axis=-1)[..., :count], axis=-1)
    log_p = log_softmax(logits.reshape(-1, vocab)).reshape(logits.shape)
    return {"teacher_indices": indices, "teacher_logprobs": np.take_along_axis(log_p, indices, -1)}


def draw_indices(shape: tuple[int, ...], vocab: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Distinct, evenly spaced classes for each token."""
    first = rng.integers(0, max(vocab, 1), (*shape[:-1], 1))
    return (first + np.arange(shape[-1]) * max(vocab // shape[-1], 1)) % max(vocab, 1)


def draw_logprobs(shape: tuple[int, ...], vocab: int, rng: np.random.Generator) -> Floats:
    """Log-probabilities of a distribution, except those of one class."""
    logits = rng.standard_normal((int(np.prod(shape[:-1])), shape[-1] + 1)) * 2
    return log_softmax(logits)[:, :-1].reshape(shape)


def _junk_where_ignored(drawn: Any) -> None:
    ignored = (drawn.arrays["labels"] == drawn.ignore_index)[..., None]
    indices, log_p = (drawn.arrays[name] for name in ("teacher_indices", "teacher_logprobs"))
    drawn.arrays["teacher_indices"] = np.where(ignored, -(2**31), indices)
    drawn.arrays["teacher_logprobs"] = np.where(ignored, np.nan, log_p)


def _one_class(drawn: Any) -> None:
    for name in ("teacher_indices", "teacher_logprobs"):
        drawn.arrays[name] = drawn.arrays[name][..., :1]


def _certain_teacher(drawn: Any) -> None:
    """One class has probability 1: p_tail is 0."""
    _one_class(drawn)
    drawn.arrays["teacher_logprobs"] = np.zeros_like(drawn.arrays["teacher_logprobs"])


def _all_classes(drawn: Any) -> None:
    log_p = log_softmax(drawn.rng.standard_normal(drawn.arrays["student_logits"].shape))
    indices = drawn.rng.permuted(np.broadcast_to(np.arange(log_p.shape[-1]), log_p.shape), axis=-1)
    drawn.arrays["teacher_indices"], drawn.arrays["teacher_logprobs"] = indices, log_p


def _certain_student(drawn: Any) -> None:
    """The student's probability of the other classes is far below the unit roundoff."""
    index, z = drawn.arrays["teacher_indices"], drawn.arrays["student_logits"].copy()
    np.put_along_axis(z, index, np.take_along_axis(z, index, -1) + 60.0, -1)
    drawn.arrays["student_logits"] = z


def _masked_targets(drawn: Any) -> None:
    """The student rules out half of the teacher's classes, which have a probability of 0."""
    index = drawn.arrays["teacher_indices"]
    banned = drawn.rng.random(index.shape) < 0.5
    banned[..., 0] = False
    z = drawn.arrays["student_logits"].copy()
    np.put_along_axis(z, index, np.where(banned, -np.inf, np.take_along_axis(z, index, -1)), -1)
    drawn.arrays["student_logits"] = z
    drawn.arrays["teacher_logprobs"] = np.where(banned, -np.inf, drawn.arrays["teacher_logprobs"])


def _invalid_labels(drawn: Any) -> None:
    labels = drawn.arrays["labels"]
    drawn.arrays["labels"] = np.where(labels == drawn.ignore_index, labels, drawn.recipe.vocab + 7)


RECIPES = (
    Recipe("temperature", "a temperature before the softcap, or a missing T^2",
           {"temperature": 2.5, "logit_softcapping": 5.0}, extras=("upstream", "loss_weights", "count")),
    Recipe("no-tail", "a side that is renormalised", {"tail": False, "temperature": 0.5}, extras=("upstream",)),
    Recipe("one-class", "K = 1 with a shape of its own", change=_one_class, extras=("upstream",)),
    Recipe("nothing-left", "0 log 0, and a tail of 0 in the teacher's gradient", change=_certain_teacher),
    Recipe("all-classes", "a tail where there are no other classes", vocab=5, change=_all_classes,
           over_logits=True),
    Recipe("sure", "1 - sum q, where the sum rounds to 1", change=_certain_student, over_logits=True),
    Recipe("ruled-out", "NaN from -inf on both sides", change=_masked_targets, over_logits=True),
    Recipe("junk-where-ignored", "indices and log-probabilities of ignored tokens", change=_junk_where_ignored),
    Recipe("no-classes", "labels used as classes, where they only mark ignored tokens",
           change=_invalid_labels),
)  # fmt: skip
