"""Dumps are read as they were written, and invalid ones are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loss_core.mismatch import dump_of, read_dump, write_dump
from loss_core.usage import UsageProblem


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_bfloat16_of_torch_and_jax_is_written_exactly(library, tmp_path):
    values = np.array([[1.5, -0.375, 2.0**-120]], np.float32)
    if library == "torch":
        logprobs, weight = torch.tensor(values, dtype=torch.bfloat16, requires_grad=True), torch.tensor(values.T)
    else:
        import jax.numpy as jnp

        logprobs, weight = jnp.asarray(values, jnp.bfloat16), jnp.asarray(values.T)
    path = tmp_path / "dump.npz"
    write_dump(
        path, labels=[[0, 2, -1]], trainer_logprobs=logprobs, engine_logprobs=logprobs, lm_bias=None, temperature=0.5,
        hidden_states=logprobs[..., None], lm_weight=weight, ignore_index=-1,
    )  # fmt: skip
    dump = read_dump(path)
    np.testing.assert_array_equal(dump.trainer_logprobs, values)
    assert (dump.temperature, dump.logit_softcapping, dump.logit_scale, dump.ignore_index) == (0.5, 0, 1, -1)
    assert dump.shares_hidden_states
    assert dump.hidden_states("engine").shape == (3, 1)
    assert dump.lm_bias is None


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "dump.safetensors"
    logprobs = torch.tensor([-1.5, -2.0], dtype=torch.bfloat16)
    save_file({"labels": torch.tensor([1, 2]), "trainer_logprobs": logprobs, "engine_logprobs": logprobs * 2}, path)
    assert read_dump(path).engine_logprobs.tolist() == [-3.0, -4.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels is missing. A dump has labels, trainer_logprobs, engine_logprobs, and optionally"),
        ({"trainer_logprob": np.ones(4), "trainer_logprobs": None}, "unknown array 'trainer_logprob'; did you mean"),
        ({"labels": np.ones(4)}, "labels must be integers [...], got float64 of shape (4,)"),
        ({"labels": np.ones((0,), int)}, "labels is empty (shape (0,))"),
        ({"labels": np.array([0, 1, 9, 0])}, "labels[2] is 9, which is outside [0, 5) and not ignore_index (-100)"),
        ({"labels": np.full(4, -100)}, "every label is ignore_index (-100)"),
        ({"labels": np.full(4, 3), "ignore_index": np.asarray(3)}, "every label is ignore_index (3)"),
        ({"engine_logprobs": np.ones(3)}, "engine_logprobs has shape (3,), but must have (4,)"),
        (
            {"engine_logprobs": np.ones(4, int)},
            "engine_logprobs must be float64, float32, bfloat16 or float16, got int",
        ),
        ({"hidden_states": np.ones((4, 2))}, "hidden_states has shape (4, 2), but must have (4, 3)"),
        ({"hidden_states": None}, "got lm_weight without hidden_states"),
        ({"lm_weight": None}, "got hidden_states without lm_weight"),
        ({"lm_weight": np.ones(5)}, "lm_weight has shape (5,), but must be [V, H]"),
        ({"lm_bias": np.ones(4)}, "lm_bias has shape (4,), but must have (5,)"),
        ({"trainer_hidden_states": np.ones((4, 3))}, "give hidden_states, or both of trainer_hidden_states and"),
        ({"temperature": np.ones(2)}, "temperature must be one finite number, got float64 of shape (2,)"),
        ({"temperature": np.asarray(0.0)}, "temperature must be > 0, got 0"),
        ({"logit_softcapping": np.asarray(-1.0)}, "logit_softcapping must be >= 0 (0 for none), got -1"),
    ],
)
def test_invalid_dumps_are_refused(change, message, tmp_path):
    arrays = {
        "labels": np.array([0, 1, -100, 4]), "trainer_logprobs": -np.ones(4), "engine_logprobs": -np.ones(4),
        "hidden_states": np.ones((4, 3)), "lm_weight": np.ones((5, 3)),
    }  # fmt: skip
    assert dump_of(arrays).shares_hidden_states
    arrays = {name: a for name, a in (arrays | change).items() if a is not None}
    path = tmp_path / "dump.npz"
    np.savez(path, **arrays)
    with pytest.raises(UsageProblem) as error:
        read_dump(path)
    assert str(error.value).startswith(f"--logprobs {path}: ")
    assert message in str(error.value)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the whole text is compared)
        write_dump(tmp_path / "other.npz", **arrays)
    assert str(error.value) == f"--logprobs {path}: {refused.value}"
    assert not (tmp_path / "other.npz").exists()


def test_a_dump_is_written_as_npz_only(tmp_path):
    with pytest.raises(ValueError, match=r"writes \.npz, got the name '.*dump\.pt'"):
        write_dump(tmp_path / "dump.pt", labels=[1], trainer_logprobs=[-1.0], engine_logprobs=[-1.0])
