"""Captured calls: --inputs."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest

from helpers.command import run
from loss_core.check.captured import read_call
from loss_core.cli.configs import read_configs
from loss_core.losses import definition_of
from loss_core.registry import LOSS_CONFIG_REGISTRY
from loss_core.usage import UsageProblem


def captured(loss="MaskedCrossEntropy", tokens=6, vocab=11, dtype=np.float32):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, vocab, tokens)
    labels[1] = -100

    def floats(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return {
        "MaskedCrossEntropy": lambda: {"logits": floats(tokens, vocab), "mask": np.ones(tokens, bool)},
        "TEParallelCrossEntropy": lambda: {"logits": floats(tokens, vocab), "loss_weights": np.abs(floats(tokens))},
        "FusedLinearCrossEntropy": lambda: {"hidden_states": floats(tokens, 5), "lm_weight": floats(vocab, 5),
                                            "num_label_tokens": np.asarray(4)},
        "LogProbs": lambda: {"logits": floats(tokens, vocab), "temperature": np.abs(floats(tokens)) + 1},
        "FusedLinearLogProbs": lambda: {"hidden_states": floats(tokens, 5), "lm_weight": floats(vocab, 5)},
        "FusedLinearKDLoss": lambda: {
            "student_hidden_states": floats(tokens, 5), "student_lm_weight": floats(vocab, 5),
            "teacher_hidden_states": floats(tokens, 7), "teacher_lm_weight": floats(vocab, 7),
        },
        "ChunkedCrossEntropy": lambda: {"hidden_states": floats(tokens, 5), "lm_weight": floats(vocab, 5)},
        "KDLoss": lambda: {"student_logits": floats(tokens, vocab), "teacher_logits": floats(tokens, vocab)},
        "FusedLinearTopKDistillation": lambda: {"hidden_states": floats(tokens, 5), "lm_weight": floats(vocab, 5),
                                                **top_k(floats(tokens, vocab))},
        "TopKDistillation": lambda: {"student_logits": floats(tokens, vocab), **top_k(floats(tokens, vocab))},
    }[loss]() | {"labels": labels}  # fmt: skip


def top_k(logits):
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    indices = np.argsort(-logits)[:, :3]
    log_p = np.take_along_axis(log_p, indices, 1).astype(logits.dtype)
    return {"teacher_indices": indices, "teacher_logprobs": log_p}


@pytest.mark.parametrize("loss", list(LOSS_CONFIG_REGISTRY))
def test_a_captured_call_is_checked_in_its_own_dtype(loss, tmp_path):
    path = tmp_path / "call.npz"
    np.savez(path, **captured(loss, dtype=np.float16))
    result = run("check", "--config", loss, "--backend", "torch:eager", "--inputs", path)
    assert result.exit_code == 0, result.output
    assert re.search(r"ok torch:eager +float64 float16 +1 ", result.stdout)
    assert result.stdout.count("ok torch:eager") == 1
    # every floating input with a gradient was compared, not only the loss
    definition = definition_of(loss)
    trained = [a.name for a in definition.arguments if a.differentiated]
    config = LOSS_CONFIG_REGISTRY[loss]()
    values = captured(loss)["labels"].size if definition.reduction(config) == "none" else 1
    values += sum(a.size for n, a in captured(loss).items() if n in trained and a.dtype.kind == "f")
    assert f" {values} values" in result.stdout


def test_bfloat16_from_safetensors(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "call.safetensors"
    arrays = captured()
    logits = torch.from_numpy(arrays["logits"]).to(torch.bfloat16)
    weights = torch.rand(6)
    save_file({"logits": logits, "labels": torch.from_numpy(arrays["labels"]), "loss_weights": weights}, path)
    call = read_call(path, "MaskedCrossEntropy")
    assert call.dtype == "bfloat16"
    np.testing.assert_array_equal(call.arrays["logits"], logits.float().numpy())
    result = run("check", "--config", "MaskedCrossEntropy", "--backend", "torch:eager", "--inputs", path)
    assert result.exit_code == 0, result.output
    assert re.search(r"ok torch:eager +float64 bfloat16 +1 ", result.stdout)
    assert "loss_weights is float32, but logits is bfloat16" in result.stderr
    wide = run(
        "check", "--config", "MaskedCrossEntropy", "--backend", "torch:eager", "--inputs", path, "--dtype", "float32"
    )
    assert re.search(r"ok torch:eager +float64 float32 +1 ", wide.stdout)


def test_a_captured_call_that_fails_is_reproduced_with_its_file(forgetful, tmp_path):
    path = tmp_path / "a call.npz"
    np.savez(path, **captured("KDLoss"))
    result = run("check", "--config", "{name: ForgetfulKD, temperature: 2.0}", "--backend", "torch:eager", "--inputs",
                 path)  # fmt: skip
    assert result.exit_code == 1
    line = next(line.strip() for line in result.stdout.splitlines() if "loss-core check" in line)
    assert line.endswith(f"--dtype float32 --inputs '{path}'")
    assert run(*shlex.split(line)[1:]).exit_code == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels is missing. MaskedCrossEntropy takes logits [..., V], labels [...]"),
        ({"logits": None, "labels": None}, "logits, labels are missing"),
        ({"logit": np.ones((6, 11)), "logits": None}, "unknown argument 'logit'; did you mean 'logits'?"),
        ({"labels": np.ones(6)}, "labels must be integers, got float64"),
        ({"labels": np.ones(5, int)}, "labels has shape (5,) but logits has shape (6, 11)"),
        ({"labels": np.full(6, 11)}, "labels[0] is 11, which is outside [0, 11)"),
        ({"labels": np.ones((0,), int), "logits": np.ones((0, 11))}, "labels is empty"),
        ({"logits": np.ones((6, 11), int)}, "logits must be one of"),
        ({"logits": np.ones((6, 0))}, "V = 0"),
        ({"mask": np.ones(4)}, "mask has shape (4,)"),
        ({"loss_weights": np.ones(4)}, "loss_weights has shape (4,)"),
        ({"num_label_tokens": np.ones(2)}, "num_label_tokens must be one whole number"),
        ({"num_label_tokens": np.asarray(1.5)}, "num_label_tokens must be one whole number"),
        ({"logits": np.asarray([object()])}, "no .npz file of plain arrays"),
        ({"logits": np.zeros((6, 11), "V2")}, "store such tensors as .safetensors"),
    ],
)
def test_captured_calls_that_do_not_fit(change, message, tmp_path):
    path = tmp_path / "call.npz"
    np.savez(path, **{name: a for name, a in (captured() | change).items() if a is not None})
    with pytest.raises(UsageProblem) as error:
        read_call(path, "MaskedCrossEntropy")
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_captured_call_must_fit_the_config_and_the_other_losses_shapes(tmp_path):
    path = tmp_path / "call.npz"
    np.savez(path, **captured("KDLoss") | {"teacher_logits": np.ones((6, 12))})
    with pytest.raises(UsageProblem, match="V = 12, but student_logits has V = 11"):
        read_call(path, "KDLoss")
    np.savez(path, **captured("FusedLinearCrossEntropy") | {"lm_weight": np.ones((11, 4))})
    with pytest.raises(UsageProblem, match=r"lm_weight has shape \(11, 4\)"):
        read_call(path, "FusedLinearCrossEntropy")
    np.savez(path, **captured() | {"num_label_tokens": 3})
    with pytest.raises(UsageProblem, match="goes with reduction 'sum' only"):
        read_call(path, read_configs("{name: MaskedCrossEntropy, reduction: mean}")[0])
    np.savez(path, **captured() | {"labels": np.full(6, 99), "mask": np.zeros(6)})
    assert read_call(path, "MaskedCrossEntropy").dtype == "float32", "a masked label may be anything"


def test_broken_files_are_refused(tmp_path):
    for name, content in (
        ("a.npz", b"PK\x03\x04"),
        ("b.npz", b"nothing"),
        ("c.npz", b""),
        ("d.safetensors", b"12345678"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageProblem, match=name):
            read_call(tmp_path / name, "KDLoss")
    with open(tmp_path / "e.npz", "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(UsageProblem, match="holds a single array"):
        read_call(tmp_path / "e.npz", "KDLoss")
