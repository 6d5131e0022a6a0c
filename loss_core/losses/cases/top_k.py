"""Cases of distillation from K log-probabilities of a teacher: how it is drawn, and what finds bugs."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, K = classes of the teacher

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.losses.bounds.rounding import log_softmax
from loss_core.losses.definition import Floats, LossDef, Recipe, Sizes


def near_student(definition: LossDef, sizes: Sizes, scale: float, rng: np.random.Generator) -> dict[str, Any]:
    """A student, and some of the likeliest classes of a teacher that is a disturbed student."""
    shape = sizes.shape(("T", "V"))
    student = rng.standard_normal(shape) * scale
    teacher = student + rng.standard_normal(shape) * scale / 2
    return {"student_logits": student} | of_teacher(teacher, sizes.shape(("K",))[0], rng)


def of_teacher(logits: Floats, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Indices and log-probabilities of the likeliest classes of these logits, in any order."""
    vocab = logits.shape[-1]
    indices = rng.permuted(np.argsort(-logits, axis=-1)[..., :count], axis=-1)
    log_p = log_softmax(logits.reshape(-1, vocab)).reshape(logits.shape)
    return {"teacher_indices": indices, "teacher_logprobs": np.take_along_axis(log_p, indices, -1)}


def draw_indices(shape: tuple[int, ...], vocab: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Classes that differ in each token, evenly apart."""
    first = rng.integers(0, max(vocab, 1), (*shape[:-1], 1))
    return (first + np.arange(shape[-1]) * max(vocab // shape[-1], 1)) % max(vocab, 1)


def draw_logprobs(shape: tuple[int, ...], vocab: int, rng: np.random.Generator) -> Floats:
    """Log-probabilities of all but one of the classes of a distribution."""
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


def _all_of_the_teacher(drawn: Any) -> None:
    """One class has all of the probability: nothing is left for a tail."""
    _one_class(drawn)
    drawn.arrays["teacher_logprobs"] = np.zeros_like(drawn.arrays["teacher_logprobs"])


def _all_classes(drawn: Any) -> None:
    log_p = log_softmax(drawn.rng.standard_normal(drawn.arrays["student_logits"].shape))
    indices = drawn.rng.permuted(np.broadcast_to(np.arange(log_p.shape[-1]), log_p.shape), axis=-1)
    drawn.arrays["teacher_indices"], drawn.arrays["teacher_logprobs"] = indices, log_p


def _student_is_sure(drawn: Any) -> None:
    """What the student leaves for the other classes is far below the rounding of 1."""
    index, z = drawn.arrays["teacher_indices"], drawn.arrays["student_logits"].copy()
    np.put_along_axis(z, index, np.take_along_axis(z, index, -1) + 60.0, -1)
    drawn.arrays["student_logits"] = z


def _ruled_out(drawn: Any) -> None:
    """The student rules out half of the teacher's classes, which have a probability of 0."""
    index = drawn.arrays["teacher_indices"]
    banned = drawn.rng.random(index.shape) < 0.5
    banned[..., 0] = False
    z = drawn.arrays["student_logits"].copy()
    np.put_along_axis(z, index, np.where(banned, -np.inf, np.take_along_axis(z, index, -1)), -1)
    drawn.arrays["student_logits"] = z
    drawn.arrays["teacher_logprobs"] = np.where(banned, -np.inf, drawn.arrays["teacher_logprobs"])


def _no_classes(drawn: Any) -> None:
    labels = drawn.arrays["labels"]
    drawn.arrays["labels"] = np.where(labels == drawn.ignore_index, labels, drawn.recipe.vocab + 7)


RECIPES = (
    Recipe("temperature", "a temperature before the softcap, or a T^2 left out",
           {"temperature": 2.5, "logit_softcapping": 5.0}, extras=("upstream", "loss_weights", "count")),
    Recipe("no-tail", "a side that is renormalised", {"tail": False, "temperature": 0.5}, extras=("upstream",)),
    Recipe("one-class", "K = 1 with a shape of its own", change=_one_class, extras=("upstream",)),
    Recipe("nothing-left", "0 log 0, and a tail of 0 in the teacher's gradient", change=_all_of_the_teacher),
    Recipe("all-classes", "a tail where there are no other classes", vocab=5, change=_all_classes,
           over_logits=True),
    Recipe("sure", "1 minus a sum that is 1 but for rounding", change=_student_is_sure, over_logits=True),
    Recipe("ruled-out", "NaN from -inf on both sides", change=_ruled_out, over_logits=True),
    Recipe("junk-where-ignored", "indices and log-probabilities of ignored tokens", change=_junk_where_ignored),
    Recipe("no-classes", "a label compared with the classes, which only says whether its token counts",
           change=_no_classes),
)  # fmt: skip
