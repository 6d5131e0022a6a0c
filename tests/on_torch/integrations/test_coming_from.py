"""Old line -> new line of docs/coming-from.md: both are run, with the old library itself, and return the same."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from loss_core import ChunkedCEConfig, FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, build_loss_module

PAGE = (Path(__file__).parents[3] / "docs" / "coming-from.md").read_text("utf-8")
T, V, H = 16, 100, 32

# Library -> (old, new), each as it stands on the page.
PAIRS = {
    "torch": [
        ("F.cross_entropy(logits.flatten(0, 1), labels.flatten())", "ce(logits, labels)"),
        (
            "F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)",
            'MaskedCrossEntropyConfig(reduction="mean", label_smoothing=0.1).build()(logits, labels)',
        ),
        (
            "F.linear_cross_entropy(hidden_states.flatten(0, 1), weight, labels.flatten())",
            "fused(hidden_states, labels, weight)",
        ),
        (
            'T**2 * F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")',
            "kd(student_logits, teacher_logits, no_padding)",
        ),
    ],
    "nemo_automodel": [
        ("MaskedCrossEntropy(fp32_upcast=True)(logits, labels)", "MaskedCrossEntropyConfig().build()(logits, labels)"),
        (
            'build_loss_module(MaskedCrossEntropy, reduction="mean")(logits, labels)',
            'build_loss_module("MaskedCrossEntropy", reduction="mean")(logits, labels)',
        ),
        (
            "KDLoss(temperature=2.0)(student_logits, teacher_logits, labels)",
            "KDLossConfig(temperature=2.0).build()(student_logits, teacher_logits, labels)",
        ),
        (
            "ChunkedCrossEntropy(compile=False)(hidden_states, labels, weight)",
            "ChunkedCEConfig(compile=False).build()(hidden_states, labels, weight)",
        ),
    ],
    "liger_kernel": [
        ("LigerCrossEntropyLoss()(logits.flatten(0, 1), labels.flatten())", "ce(logits, labels)"),
        (
            "LigerFusedLinearCrossEntropyLoss()(weight, hidden_states.flatten(0, 1), labels.flatten())",
            "fused(hidden_states, labels, weight)",
        ),
        (
            "LigerCrossEntropyLoss(label_smoothing=0.1)(logits.flatten(0, 1), labels.flatten())",
            'MaskedCrossEntropyConfig(reduction="mean", label_smoothing=0.1).build()(logits, labels)',
        ),
    ],
    "cut_cross_entropy": [
        (
            'linear_cross_entropy(hidden_states, weight, labels, impl="torch_compile")',
            'FusedLinearCEConfig(reduction="mean").build(backend="torch:eager")(hidden_states, labels, weight)',
        ),
        (
            'linear_cross_entropy(hidden_states, weight, labels, softcap=30.0, impl="torch_compile")',
            'FusedLinearCEConfig(reduction="mean", logit_softcapping=30.0).build()(hidden_states, labels, weight)',
        ),
        (
            'linear_cross_entropy(hidden_states, weight, tokens, shift=True, impl="torch_compile")',
            "fused(hidden_states, shifted, weight)",
        ),
    ],
    "optax": [
        (
            "softmax_cross_entropy_with_integer_labels(logits_jax, tokens_jax)",
            'MaskedCrossEntropyConfig(reduction="none").build(backend="jax")(logits_jax, tokens_jax)',
        ),
        (
            "softmax_cross_entropy_with_integer_labels(logits_jax, tokens_jax, where=keep)",
            "softmax_cross_entropy()(logits_jax, tokens_jax, where=keep)",
        ),
        (
            "softmax_cross_entropy_with_integer_labels(logits_jax, tokens_jax).mean(where=keep)",
            'MaskedCrossEntropyConfig(reduction="mean").build(backend="jax")(logits_jax, tokens_jax, mask=keep)',
        ),
        (
            "softmax_cross_entropy_with_integer_labels(hidden_jax @ kernel_HV, tokens_jax)",
            "linear_softmax_cross_entropy()(hidden_jax, tokens_jax, lm_weight_HV=kernel_HV)",
        ),
    ],
}
SLOW = {"cut_cross_entropy"}  # it compiles its programs
ROWS = [
    pytest.param(library, old, new, id=f"{library} {i}", marks=[pytest.mark.slow] if library in SLOW else [])
    for library, pairs in PAIRS.items()
    if library != "liger_kernel"
    for i, (old, new) in enumerate(pairs)
]


def names(library):
    """What the lines of a library use: the page's names, its inputs, and what it is imported as."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden_states, weight = draw(2, T // 2, H), draw(V, H)
    tokens = torch.randint(0, V, (2, T // 2), generator=generator)
    labels = tokens.clone()
    labels[:, 6:] = -100
    shifted = tokens.roll(-1, dims=-1)
    shifted[:, -1] = -100
    student_logits, teacher_logits = draw(2, T // 2, V), draw(2, T // 2, V)
    log_s, log_t = (F.log_softmax(x.flatten(0, 1) / 2.0, -1) for x in (student_logits, teacher_logits))
    found = {
        "F": F, "T": 2.0, "hidden_states": hidden_states, "weight": weight, "logits": hidden_states @ weight.T,
        "labels": labels, "tokens": tokens, "shifted": shifted, "no_padding": tokens, "log_s": log_s, "log_t": log_t,
        "student_logits": student_logits, "teacher_logits": teacher_logits, "KDLossConfig": KDLossConfig,
        "ChunkedCEConfig": ChunkedCEConfig,
        "MaskedCrossEntropyConfig": MaskedCrossEntropyConfig, "FusedLinearCEConfig": FusedLinearCEConfig,
        "ce": MaskedCrossEntropyConfig(reduction="mean").build(), "kd": KDLossConfig(temperature=2.0).build(),
        "fused": FusedLinearCEConfig(reduction="mean").build(), "build_loss_module": build_loss_module,
    }  # fmt: skip
    if library == "optax":
        import jax.numpy as jnp

        from loss_core_jax.integrations import functional

        found |= {
            "logits_jax": jnp.asarray(found["logits"].numpy()), "tokens_jax": jnp.asarray(tokens.numpy()),
            "hidden_jax": jnp.asarray(hidden_states.numpy()), "kernel_HV": jnp.asarray(weight.T.numpy()),
            "keep": jnp.asarray((labels != -100).numpy()), "softmax_cross_entropy": functional.softmax_cross_entropy,
            "linear_softmax_cross_entropy": functional.linear_softmax_cross_entropy,
        }  # fmt: skip
    return found


# Imports of the old lines; for NeMo AutoModel the same names are its own.
IMPORTS = {
    "torch": "",
    "optax": "from optax import softmax_cross_entropy_with_integer_labels",
    "cut_cross_entropy": "from cut_cross_entropy import linear_cross_entropy",
    "liger_kernel": "from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss",
    "nemo_automodel": "from nemo_automodel.components.loss.loss import build_loss_module\n"
    "from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy\n"
    "from nemo_automodel.components.loss.kd_loss import KDLoss\n"
    "from nemo_automodel.components.loss.chunked_ce import ChunkedCrossEntropy",
}


def same(library, old, new):
    namespace = names(library)
    exec(IMPORTS[library], before := dict(namespace))
    was, now = eval(old, before), eval(new, namespace)
    if library == "optax":
        was, now = torch.tensor(was.tolist()), torch.tensor(now.tolist())
    torch.testing.assert_close(now, was.float(), rtol=2e-6, atol=2e-5)


def needs(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize(("old", "new"), [pair for pairs in PAIRS.values() for pair in pairs])
def test_the_page_contains_both_lines(old, new):
    assert re.search(rf"^\| `{re.escape(old)}` \| `{re.escape(new)}`", PAGE, re.MULTILINE), (old, new)


@pytest.mark.parametrize(("library", "old", "new"), ROWS)
def test_both_lines_give_the_same_result(library, old, new):
    needs(library)
    same(library, old, new)


def test_ligers_lines_give_the_same_result():
    # Its kernels are Triton's, which interprets them on a CPU if TRITON_INTERPRET is set before the import.
    needs("liger_kernel")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "liger_kernel"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == len(PAIRS["liger_kernel"])


if __name__ == "__main__":
    for pair in PAIRS[sys.argv[1]]:
        same(sys.argv[1], *pair)
    print(len(PAIRS[sys.argv[1]]))
