"""Each cause, injected into one system of a small model, is reported, and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loss_core.mismatch import dump_of, explain

BF16 = torch.bfloat16
ELEVEN_BITS = "TF32 or float16 operands"


def tf32(values, away=True):
    """As cvt.rna.tf32 rounds, or as a matrix engine truncates."""
    bits = values.numpy().view(np.uint32) + np.uint32(0x1000 if away else 0)
    return torch.from_numpy((bits & np.uint32(0xFFFFE000)).view(np.float32))


def padded(logits, columns):
    return torch.nn.functional.pad(logits, (0, columns))


def late(model):
    return np.roll(model.logprobs(model.logits()), 1, axis=1)


# Name of the reported cause -> the engine's log-probabilities.
CAUSES = {
    "float32": lambda m: m.logprobs(m.logits()),
    "bfloat16 operands": lambda m: m.logprobs(m.hidden.to(BF16).float() @ m.weight.to(BF16).float().T),
    "bfloat16 logits": lambda m: m.logprobs(m.logits(BF16).float()),
    "bfloat16 logits of a float32 product": lambda m: m.logprobs(m.logits().to(BF16).float()),
    "bfloat16 log-softmax": lambda m: m.logprobs(m.logits(BF16)),
    "log-probabilities stored in bfloat16": lambda m: torch.from_numpy(m.logprobs(m.logits())).to(BF16).float().numpy(),
    "float16 logits": lambda m: m.logprobs(m.logits(torch.float16).float()),
    ELEVEN_BITS: lambda m: m.logprobs(tf32(m.hidden) @ tf32(m.weight).T),
    "float32, logit_softcapping 30 instead of none": lambda m: m.logprobs(30 * torch.tanh(m.logits() / 30)),
    "float32, logit_softcapping 7.5 instead of none": lambda m: m.logprobs(7.5 * torch.tanh(m.logits() / 7.5)),
    "float32, labels of one position later": lambda m: m.logprobs(m.logits(), m.labels.roll(-1, 1)),
    "float32, labels of one position earlier": lambda m: m.logprobs(m.logits(), m.labels.roll(1, 1)),
    "float32, log-probabilities written one position later": late,
    "float32, 42 columns of zeros take part in the softmax (a vocabulary padded to 192)": lambda m: m.logprobs(
        padded(m.logits(), 42)
    ),
    # A precision and a cause.
    "bfloat16 logits, 106 columns of zeros take part in the softmax (a vocabulary padded to 256)": lambda m: m.logprobs(
        padded(m.logits(BF16).float(), 106)
    ),
    "bfloat16 log-softmax, labels of one position later": lambda m: m.logprobs(m.logits(BF16), m.labels.roll(-1, 1)),
}


@pytest.mark.parametrize("name", CAUSES)
def test_an_injected_cause_is_named_and_no_other(name, model):
    report = explain(dump_of(model.arrays(engine_logprobs=CAUSES[name](model))))
    assert report.explanations["engine"].names == [name]
    assert report.explanations["trainer"].names == ["float32"]
    assert report.agree == (name == "float32")
    if not report.agree:
        assert report.conclusion.startswith(f"DIFFER: trainer: float32. engine: {name} -> ")


@pytest.mark.parametrize("temperature", [0.9, 0.76923])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_another_temperature_is_estimated(temperature, dtype, model):
    engine = model.logprobs(model.logits(dtype).float() / temperature)
    (name,) = explain(dump_of(model.arrays(engine_logprobs=engine))).explanations["engine"].names
    assert name.startswith(f"{'float32' if dtype == torch.float32 else 'bfloat16 logits'}, temperature {temperature:g}")
    assert name.endswith(f"instead of 1 (the same as a logit_scale of {1 / temperature:.4g})")


def test_recorded_parameters_are_applied_in_order_and_their_absence_is_named(model):
    bias = torch.linspace(-1, 1, 150)
    logits = model.logits() + bias
    correct = model.logprobs(20 * torch.tanh(1.5 * logits / 20) / 0.7)
    recorded = {"temperature": 0.7, "logit_softcapping": 20.0, "logit_scale": 1.5, "lm_bias": bias.numpy()}
    wrong = {
        "without temperature 0.7": 20 * torch.tanh(1.5 * logits / 20),
        "without logit_softcapping 20": 1.5 * logits / 0.7,
        "without logit_scale 1.5": 20 * torch.tanh(logits / 20) / 0.7,
        "logits divided by logit_scale 1.5": 20 * torch.tanh(logits / 1.5 / 20) / 0.7,
        "without lm_bias": 20 * torch.tanh(1.5 * model.logits() / 20) / 0.7,
        "logit_scale 2 instead of 1.5": 20 * torch.tanh(2 * logits / 20) / 0.7,
    }
    for name, logits_of_engine in wrong.items():
        arrays = model.arrays(trainer_logprobs=correct, engine_logprobs=model.logprobs(logits_of_engine), **recorded)
        report = explain(dump_of(arrays))
        assert report.explanations["trainer"].names == ["float32"]
        assert report.explanations["engine"].names == [f"float32, {name}"]


def test_rows_of_zeros_at_the_end_of_the_head_that_one_system_excludes(model):
    weight = np.concatenate([model.weight.numpy(), np.zeros((10, 48), np.float32)])
    trainer = model.logprobs(padded(model.logits(), 10))
    report = explain(dump_of(model.arrays(lm_weight=weight, trainer_logprobs=trainer)))
    assert report.explanations["engine"].names == ["float32, without the last 10 rows of lm_weight, which are zeros"]


def test_what_no_hypothesis_explains_is_reported(model):
    order = np.random.default_rng(0).permutation(200)
    trainer = model.logprobs(model.logits())
    noise = model.logprobs(model.logits() + 1e-3 * torch.randn(200, 150, generator=torch.Generator().manual_seed(1)))
    for engine in (trainer.reshape(-1)[order].reshape(5, 40), noise):
        report = explain(dump_of(model.arrays(engine_logprobs=engine)))
        assert report.explanations["engine"].causes == []
        assert "engine: none of " in report.conclusion
        assert not report.agree


def test_values_of_bfloat16_leave_precisions_that_are_the_same(model):
    rounded = model.arrays(
        hidden_states=model.hidden.to(BF16).float().reshape(5, 40, -1).numpy(),
        lm_weight=model.weight.to(BF16).float().numpy(),
    )
    exact = model.logprobs(model.hidden.to(BF16).float() @ model.weight.to(BF16).float().T)
    stored = model.logprobs(model.logits(BF16).float())
    report = explain(dump_of(rounded | {"trainer_logprobs": exact, "engine_logprobs": stored}))
    trainer = report.explanations["trainer"]
    assert trainer.names == ["float32"]
    assert {"float32", "bfloat16 operands", ELEVEN_BITS} <= {hypothesis.name for hypothesis in trainer.possible}
    assert report.explanations["engine"].names == ["bfloat16 logits"]
    assert explain(dump_of(rounded | {"trainer_logprobs": stored, "engine_logprobs": stored})).agree


def test_one_name_for_two_ways_to_round_is_no_agreement(model):
    on_a_gpu = torch.from_numpy(model.logprobs(model.logits(BF16).float())).to(BF16).float().numpy()
    arrays = model.arrays(trainer_logprobs=on_a_gpu, engine_logprobs=model.logprobs(model.logits(BF16)))
    report = explain(dump_of(arrays))
    assert [e.names for e in report.explanations.values()] == [["bfloat16 log-softmax"]] * 2
    assert not report.agree


def test_hidden_states_of_each_system_show_whether_the_head_is_to_blame(model):
    hidden = model.hidden.reshape(5, 40, -1).numpy()
    other = hidden + np.float32(1e-3)
    engine = model.logprobs(torch.from_numpy(other).reshape(200, -1) @ model.weight.T)
    both = {"hidden_states": None, "trainer_hidden_states": hidden, "engine_hidden_states": other}
    report = explain(dump_of(model.arrays(engine_logprobs=engine, **both)))
    assert not report.agree
    assert report.conclusion.startswith("DIFFER: the hidden states do. The heads compute the same (float32)")
    assert explain(dump_of(model.arrays(**both | {"engine_hidden_states": hidden}))).agree
    assert explain(dump_of(model.arrays(engine_logprobs=engine))).explanations["engine"].causes == []


def test_few_tokens_leave_several_causes_and_say_so(model):
    few = {name: a[:1, :2] for name, a in model.arrays().items() if name != "lm_weight"}
    engine = few["trainer_logprobs"] + np.float32(3e-6)
    report = explain(dump_of(few | {"lm_weight": model.weight.numpy(), "engine_logprobs": engine}))
    assert report.explanations["trainer"].is_clean
    # One token alone fits nearly any temperature.
    one = {name: a[:1, :1] for name, a in few.items()} | {"lm_weight": model.weight.numpy()}
    one["engine_logprobs"] = one["engine_logprobs"] - np.float32(0.3)
    names = explain(dump_of(one)).explanations["engine"].names
    assert len(names) != 1


def test_what_is_not_finite_is_counted_and_excluded(model):
    arrays = model.arrays()
    arrays["engine_logprobs"] = arrays["engine_logprobs"].copy()
    arrays["engine_logprobs"][0, :3] = [np.nan, np.inf, -np.inf]
    arrays["hidden_states"] = arrays["hidden_states"].copy()
    arrays["hidden_states"][1, 0, 0] = np.nan
    report = explain(dump_of(arrays))
    assert report.statistics.not_finite == {"trainer": 0, "engine": 3}
    assert report.explanations["engine"].names == ["float32"]
    assert report.explanations["engine"].tokens == 200 - 3 - 1
    assert "trainer_hidden_states: 1 numbers are NaN or infinite." in report.notes
    assert report.conclusion.startswith("DIFFER: log-probabilities are NaN or infinite: 3 of the engine")


def test_a_sample_is_seeded_has_the_worst_tokens_and_is_reported(model):
    engine = model.logprobs(model.logits())
    engine[4, 7] += 1
    dump = dump_of(model.arrays(engine_logprobs=engine))
    report = explain(dump, most_logits=50 * 150)
    assert report.explanations["engine"].tokens == 50
    assert report.explanations["engine"].nearest[0].within == 49
    assert report.notes[0].startswith("Explained on a sample of 50 of 200 tokens (seed 0)")
    assert report.to_json() == explain(dump, most_logits=50 * 150).to_json()


def test_without_a_head_only_the_distribution_is_known(model):
    near, far = model.logprobs(model.logits()) + np.float32(9e-4), model.logprobs(model.logits()) + np.float32(2e-3)
    bare = {"hidden_states": None, "lm_weight": None}
    assert explain(dump_of(model.arrays(engine_logprobs=near, **bare))).agree
    report = explain(dump_of(model.arrays(engine_logprobs=far, **bare)))
    assert not report.agree
    assert "Add hidden_states and lm_weight to the dump" in report.conclusion
