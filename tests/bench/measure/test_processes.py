"""Processes that measure one implementation, on one process and over ranks."""

from __future__ import annotations

import importlib

import pytest

from helpers.bench import LOSSES, job
from helpers.processes import all_gone
from loss_core import MaskedCrossEntropyConfig
from loss_core.baselines import TIMED
from loss_core.bench.measure.accuracy import AccuracyCheck
from loss_core.bench.measure.job import Job
from loss_core.bench.measure.processes import Processes, Rates, slowest_rates, slowest_times
from loss_core.bench.report import BASELINE, FLAG, ROOFLINE, BenchRow
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.workers.pool import RequestFailed


def start(framework, ranks, folder, imports=()):
    processes = Processes(framework, ranks, ranks, "cpu", imports, folder, limit=120)
    try:
        assert framework in processes.wait_started(180)["versions"]
    except BaseException:
        processes.stop()
        raise
    return processes


@pytest.fixture(scope="module")
def torch_ranks(tmp_path_factory):
    """Two ranks on gloo, which serve one implementation after another."""
    processes = start("torch", 2, tmp_path_factory.mktemp("torch"))
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def torch_process(tmp_path_factory):
    """One process with the full vocabulary."""
    processes = start("torch", 1, tmp_path_factory.mktemp("unsharded"))
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def jax_devices(tmp_path_factory):
    """One process with two devices."""
    processes = start("jax", 2, tmp_path_factory.mktemp("jax"))
    yield processes
    processes.stop()


def measured(processes, call, name, kind):
    """Prepare one implementation and compare it with float64; return its row and the first process's results."""
    row = BenchRow("loss", name, kind, "", call.shape, call.dtype)
    check = AccuracyCheck(call)
    processes.setup(call, kind, name)
    prepared = processes.prepare()
    check.fill_errors(row, processes.evaluate(check.job), [result.sample for result in prepared])
    return row, prepared[0]


TORCH = [("torch:eager", FLAG), ("plain-torch", BASELINE), ("torch-loss-parallel", BASELINE)]


@pytest.mark.parametrize(
    ("loss", "name", "kind"),
    [
        (loss, name, kind)
        for loss in LOSSES
        for name, kind in TORCH
        if kind == FLAG or TIMED[name].fits(job(loss, 301).definition.name, job(loss, 301).tp)
    ],
)
def test_torch_over_ranks_is_within_what_rounding_explains(torch_ranks, loss, name, kind):
    # 301 is not a multiple of the ranks; `check --tp` has the easier case.
    row, prepared = measured(torch_ranks, job(loss, 301), name, kind)
    assert row.error_ratio <= 1
    assert row.grad_error < 1e-5
    assert row.error_shape[1] == 301
    assert prepared.first_call > 0
    assert len(torch_ranks.times(0.0, 3)) == 1


def test_ranks_run_the_same_count_of_calls_although_each_has_its_own_clock(torch_ranks):
    torch_ranks.setup(job("cross_entropy", 301), FLAG, "torch:eager")
    # Rank 1 has budget left and would wait for rank 0 forever.
    for worker, budget in zip(torch_ranks.pool.workers, (0.0, 10.0), strict=True):
        worker.send("round", {"budget": budget, "max_calls": 50})
    assert [len(times) for times in torch_ranks.pool.receive(60)] == [1, 1]


@pytest.mark.parametrize("loss", LOSSES)
def test_jax_over_devices_is_within_what_rounding_explains(jax_devices, loss):
    for name, kind in (("jax:xla", FLAG), ("plain-jax", BASELINE)):
        row, prepared = measured(jax_devices, job(loss, 300), name, kind)
        assert row.error_ratio <= 1
        assert row.grad_error < 1e-5
        assert prepared.note == ""
        assert prepared.peak > 0


def test_jax_takes_unsharded_arrays_if_the_ranks_do_not_divide_the_vocabulary(jax_devices):
    row, prepared = measured(jax_devices, job("cross_entropy", 301), "jax:xla", FLAG)
    assert row.error_ratio <= 1
    assert prepared.note == "2 does not divide 301: takes whole arrays, which it pads and shards itself"
    with pytest.raises(BackendUnavailable, match="2 does not divide 301"):
        jax_devices.setup(job("cross_entropy", 301), BASELINE, "plain-jax")


def test_the_roofline_is_measured_on_every_rank_at_once(torch_ranks, jax_devices):
    for processes in (torch_ranks, jax_devices):
        processes.setup(job("linear_cross_entropy", 301), ROOFLINE, ROOFLINE)
        rates = processes.rates(0.0, 1)
        assert rates.copy > 0
        assert rates.product > 0


def test_an_error_on_every_rank_is_raised_and_the_ranks_still_serve(torch_ranks):
    with pytest.raises(RequestFailed, match=r"^KeyError"):
        torch_ranks.setup(job("cross_entropy", 300), BASELINE, "no-such-baseline")
    torch_ranks.setup(job("cross_entropy", 300), FLAG, "torch:eager")
    assert len(torch_ranks.times(0.0, 1)) == 1


def test_a_call_before_setup_and_a_missing_module_raise(torch_process, tmp_path):
    # A setup that fails leaves no runner.
    with pytest.raises(RequestFailed, match=r"^KeyError"):
        torch_process.setup(job("cross_entropy", 300), BASELINE, "no-such-baseline")
    with pytest.raises(RequestFailed, match="AssertionError: setup comes first"):
        torch_process.unload()
    absent = Processes("jax", 1, 1, "cpu", ["no_such_module"], tmp_path, limit=120)
    with pytest.raises(BackendUnavailable, match="no_such_module"):
        absent.wait_started(180)
    assert all_gone([worker.pid for worker in absent.pool.workers])


def test_too_few_devices_raise():
    torch = importlib.import_module("torch")
    ranks = torch.cuda.device_count() + 2
    with pytest.raises(BackendUnavailable, match=f"{ranks} ranks need {ranks} CUDA devices; torch sees {ranks - 2}"):
        importlib.import_module("loss_core_bench.torch_ranks").join(0, ranks, "", "cuda")
    with pytest.raises(BackendUnavailable, match="99 ranks need 99 devices; JAX sees"):
        importlib.import_module("loss_core_bench.jax_runner").join(0, 99, "", "cpu")


def test_peak_memory_includes_the_gradient(torch_process):
    # 16 MiB of logits: the gradient takes as much, and a plain implementation a multiple of that.
    call = Job(MaskedCrossEntropyConfig(reduction="mean").to_dict(), (512, 8192), "float32")
    size = 512 * 8192 * 4
    for name, kind, least in (("torch:eager", FLAG, 0.9), ("torch:plain", FLAG, 1.9)):
        torch_process.setup(call, kind, name)
        assert size * least <= torch_process.prepare()[0].peak <= size * 6, name


def test_a_call_is_as_slow_as_its_slowest_rank():
    assert slowest_times([[1.0, 5.0], [2.0, 4.0]]) == [2.0, 5.0]
    assert slowest_rates([Rates(2.0, 5.0), Rates(3.0, 4.0)]) == Rates(2.0, 4.0)
