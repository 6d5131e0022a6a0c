"""Tuned choices: which are stored, and for which calls they are read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from helpers.bench import row
from loss_core.bench.report import BenchReport
from loss_core.bench.tune import choices_of
from loss_core.dispatch.tuned import cache_file, store_choices, tuned_choice

# Arguments with which `torch:auto` reads a tuned choice.
CALL = {"loss": "KDLoss", "device": "cpu", "dtype": "float32", "shape": (64, 1000), "version": "2.13.0", "threads": 4}
ENTRY = {**CALL, "backend": "torch", "flag": "torch:eager"}


def report() -> BenchReport:
    """Flags of torch and JAX on one call."""
    rows = [row("roofline", 0.1), row("torch:eager", 1.0), row("torch:compile", 2.0), row("torch:auto", 0.5),
            row("jax:xla", 3.0)]  # fmt: skip
    versions = {"torch": "2.13.0", "jax": "0.10.2"}
    return BenchReport(rows=[replace(r, shape=(64, 1000)) for r in rows], versions=versions,
                       settings={"threads": 4, "device": "cpu"})  # fmt: skip


def test_the_fastest_flag_that_names_a_kernel_is_stored_and_read(tmp_path):
    file = tmp_path / "new" / "choices.json"
    store_choices(choices_of(report()), file)
    assert tuned_choice(**CALL, file=file) == "torch:eager"
    assert tuned_choice(**CALL | {"version": "0.10.2"}, backend="jax", file=file) == "jax:xla"
    assert tuned_choice(**CALL | {"shape": (70, 900)}, file=file) == "torch:eager"


@pytest.mark.parametrize(
    "other",
    [
        {"shape": (512, 1000)},
        {"dtype": "bfloat16"},
        {"device": "NVIDIA H100"},
        {"version": "2.14.0"},
        {"threads": 8},
    ],
)
def test_a_choice_is_not_used_for_another_call_version_or_count_of_threads(tmp_path, other):
    file = tmp_path / "choices.json"
    store_choices([ENTRY], file)
    assert tuned_choice(**CALL, file=file) == "torch:eager"
    assert tuned_choice(**CALL | other, file=file) is None


def test_threads_are_ignored_on_an_accelerator(tmp_path):
    file = tmp_path / "choices.json"
    store_choices([ENTRY | {"device": "NVIDIA H100", "flag": "torch:triton"}], file)
    assert tuned_choice(**CALL | {"device": "NVIDIA H100", "threads": 96}, file=file) == "torch:triton"


@pytest.mark.parametrize("field", ["version", "threads", "loss_core"])
def test_an_entry_without_the_conditions_of_its_measurement_is_ignored(tmp_path, field):
    file = tmp_path / "choices.json"
    store_choices([ENTRY], file)
    data = json.loads(file.read_text())
    del data["choices"][0][field]
    file.write_text(json.dumps(data))
    assert tuned_choice(**CALL, file=file) is None


def test_a_newer_choice_replaces_the_older_one(tmp_path):
    file = tmp_path / "choices.json"
    store_choices([ENTRY], file)
    store_choices([ENTRY | {"flag": "torch:triton"}, ENTRY | {"threads": 8}], file)
    assert len(json.loads(file.read_text())["choices"]) == 2
    assert tuned_choice(**CALL, file=file) == "torch:triton"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "choices": []}', '{"format": 1, "choices": [3]}'])
def test_an_invalid_cache_has_no_choices(tmp_path, text):
    file = tmp_path / "choices.json"
    file.write_text(text)
    assert tuned_choice(**CALL, file=file) is None


def test_the_environment_sets_the_folder_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOSS_CORE_CACHE", str(tmp_path))
    assert cache_file() == tmp_path / "choices.json"
