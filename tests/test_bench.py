"""The benchmark: real processes on small shapes. What a time is depends on the machine, so no time is asserted."""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loss_core import (
    FusedLinearCEConfig,
    KDLossConfig,
    MaskedCrossEntropyConfig,
    choices,
    oracle,
    unregister_loss,
)
from loss_core.backend import BackendUnavailable
from loss_core.bench import bench
from loss_core.bench_errors import Judge, relative
from loss_core.bench_floor import least_work
from loss_core.bench_html import bench_page
from loss_core.bench_job import BLOCK, Job, Tiled, input_bytes, make_inputs, sampled_tokens
from loss_core.bench_peers import PEERS, Peer
from loss_core.bench_process import WorkerFailed, WorkerProcess
from loss_core.bench_report import BenchReport, BenchRow, Missing, best_flag_of, best_peer_of
from loss_core.bench_tables import HEADINGS, lines_of, time_text, verdict, warnings_of
from loss_core.bench_text import bench_text, markdown
from loss_core.bench_tune import choices_of
from loss_core.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[1]

# Fewer threads than a test machine has cores: tests run beside others.
SMALL = {"threads": 1, "rounds": 4}


@pytest.fixture(scope="module")
def report():
    """One run on both frameworks, which several tests look at."""
    return bench("KDLoss", shapes=[(64, 1000)], peers=["plain-torch", "plain-jax"], ignored=0.25, **SMALL)


def by_name(report: BenchReport) -> dict[str, BenchRow]:
    return {row.implementation: row for row in report.rows}


def test_every_implementation_has_time_memory_and_error(report):
    rows = by_name(report)
    assert next(iter(rows)) == "floor"
    assert {"torch:eager", "jax:xla", "plain-torch", "plain-jax"} <= set(rows)
    for name, row in rows.items():
        assert row.error == "", f"{name}: {row.error}"
        assert len(row.rounds) == 4
        assert row.seconds > 0
        if name != "floor":
            assert row.first_call > 0
            assert row.calls >= 4
            assert row.loss_error < 1e-5
            assert row.grad_error < 1e-5
            assert not row.wrong
            assert row.share <= 1 or row.kind == "peer"
            assert row.error_shape == (64, 1000)


def test_the_floor_is_below_every_time(report):
    rows = by_name(report)
    assert all(rows["floor"].seconds < row.seconds for name, row in rows.items() if name != "floor")
    assert "2 reads + 1 write of the logits" in rows["floor"].note


def test_the_order_is_another_one_in_each_round(report):
    (orders,) = report.orders
    assert len(orders) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len({tuple(order) for order in orders}) > 1


def test_json_holds_the_whole_report(report):
    text = report.to_json()
    assert BenchReport.from_json(text) == report
    data = json.loads(text)
    assert data["settings"]["ignored"] == [0.25]
    assert {row["ignored"] for row in data["rows"]} == {0.25}
    assert data["versions"]["torch"]
    assert data["machine"]["cores"] >= 1
    assert all({"seconds", "spread", "peak", "grad_error"} <= set(row) for row in data["rows"])


def test_no_process_is_left(report):
    assert workers_of(os.getpid()) == []


def workers_of(pid: int) -> list[int]:
    """Worker processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            status = (entry / "status").read_text()
        except OSError:
            continue
        if b"loss_core_bench.worker" in command and f"\nPPid:\t{pid}\n" in status:
            found.append(int(entry.name))
    return found


def test_memory_is_that_of_the_gradient_and_more(tmp_path):
    # 16 MiB of logits: the gradient takes as much, and a plain implementation a multiple of it.
    job = Job(MaskedCrossEntropyConfig(reduction="mean").to_dict(), (512, 8192), "float32")
    size = 512 * 8192 * 4
    worker = WorkerProcess(1, "cpu", tmp_path)
    try:
        worker.ask({"do": "import", "framework": "torch", "device": "cpu", "imports": []}, timeout=120)
        for name, kind, least in (("torch:eager", "flag", 0.9), ("plain-torch", "peer", 1.9)):
            worker.ask({"do": "setup", "job": job.to_dict(), "kind": kind, "name": name}, timeout=120)
            peak = worker.ask({"do": "prepare", "file": str(tmp_path / "results")}, timeout=120)["peak"]
            assert size * least <= peak <= size * 6, name
    finally:
        worker.stop()


WRONG = """
import torch
from dataclasses import dataclass
from loss_core import MaskedCrossEntropyConfig, register_loss
from loss_core_torch.modules import MaskedCrossEntropy

@dataclass
class TwiceConfig(MaskedCrossEntropyConfig):
    pass

@dataclass
class DiesConfig(MaskedCrossEntropyConfig):
    pass

@dataclass
class ForgetsConfig(MaskedCrossEntropyConfig):
    pass

class Dies(torch.nn.Module):
    def forward(self, logits, labels):
        import os, sys
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)

def twice(config):
    right = MaskedCrossEntropy(reduction="mean")
    return lambda logits, labels: 2 * right(logits, labels)

register_loss("Twice", TwiceConfig, {"torch": twice})
def forgets(config):
    right = MaskedCrossEntropy(reduction="sum")
    return lambda logits, labels: right(logits[:256], labels[:256]) / len(labels)

register_loss("Forgets", ForgetsConfig, {"torch": forgets})
register_loss("Dies", DiesConfig, {"torch": lambda c: Dies()})
"""


@pytest.fixture
def wrong_losses(tmp_path, monkeypatch):
    """A module of a user, whose losses are wrong and deadly."""
    (tmp_path / "wrong_losses.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("wrong_losses")
    yield "wrong_losses"
    unregister_loss("Twice")
    unregister_loss("Dies")
    unregister_loss("Forgets")
    del sys.modules["wrong_losses"]


def test_a_wrong_loss_wins_nothing_and_a_deadly_one_is_a_row_with_its_error(wrong_losses):
    # The deadly one last, so that the process of the others serves it, too.
    report = bench(["Twice", "Forgets", "Dies"], ["torch:eager"], shapes=[(300, 100)], peers=[],
                   imports=[wrong_losses], rounds=1, threads=1)  # fmt: skip
    twice, forgets, dies = report.groups()
    rows = {row.implementation: row for row in twice}
    assert rows["torch:eager"].wrong
    assert rows["torch:eager"].loss_error == pytest.approx(1.0, rel=1e-3)
    assert best_flag_of(report.rows) is None
    assert choices_of(report) == []
    assert "WRONG" in bench_text(report)

    # Right on the 256 tokens of the reduced call, wrong beyond them.
    rows = {row.implementation: row for row in forgets}
    assert rows["torch:eager"].loss_error < 1e-5
    assert rows["torch:eager"].grad_error > 0.1
    assert rows["torch:eager"].wrong

    # A process that dies is a row with its error, and the others go on.
    rows = {row.implementation: row for row in dies}
    assert rows["torch:eager"].error == "its process was ended by SIGKILL (out of memory?): the last words"
    assert rows["torch:eager"].seconds is None
    assert rows["floor"].seconds > 0
    assert "SIGKILL" in bench_text(report)


def test_a_worker_without_an_answer_is_stopped():
    worker = WorkerProcess(1, "cpu", ROOT)
    try:
        with pytest.raises(WorkerFailed, match=r"no result within 0 s"):
            worker.ask({"do": "import", "framework": "torch", "device": "cpu", "imports": []}, timeout=0.01)
        assert not worker.alive
    finally:
        worker.stop()


def test_an_unknown_request_is_an_error_and_the_worker_goes_on(tmp_path):
    worker = WorkerProcess(1, "cpu", tmp_path)
    try:
        assert worker.ask({"do": "dance"}, timeout=60) == {"error": "KeyError: 'dance'"}
        assert worker.ask({"do": "drop"}, timeout=60)["error"].startswith("AssertionError")
    finally:
        worker.stop()


def test_what_a_worker_prints_does_not_disturb_its_answers(tmp_path, monkeypatch):
    (tmp_path / "prints.py").write_text("import os\nprint('loud', flush=True)\nos.system('echo louder')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = WorkerProcess(1, "cpu", tmp_path)
    try:
        request = {"do": "import", "framework": "jax", "device": "cpu", "imports": ["prints"]}
        assert "jax" in worker.ask(request, timeout=60)["versions"]
        assert "no_such_module" in worker.ask(request | {"imports": ["no_such_module"]}, timeout=60)["unusable"]
    finally:
        worker.stop()


def test_ctrl_c_stops_every_worker_and_leaves_quietly():
    command = [sys.executable, "-m", "loss_core.cli", "bench", "--config", "KDLoss", "--shape", "64,1000",
               "--rounds", "100000", "--peers", "none", "--backend", "torch:eager", "--tp", "2"]  # fmt: skip
    # A shell starts its background jobs with SIGINT ignored, which they inherit: these tests may be one.
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=heeded)  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        # The floor and the flag, on two ranks each.
        while len(workers_of(process.pid)) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = workers_of(process.pid)
        assert len(workers) == 4
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (out, err) == ("", "loss-core: stopped.\n")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_workload_brings_its_softcap_and_peers_that_cannot_run_are_listed(monkeypatch):
    absent = Peer("absent", "nowhere", "torch", ("fused",), ("no_such_package",), "pip install no-such-package")
    monkeypatch.setitem(PEERS, "absent", absent)
    tiny = Workload("tiny", 8, 10, 4, softcap=5.0, source="nobody/tiny")
    report = bench("FusedLinearCrossEntropy", ["torch:eager"], workloads=[tiny], peers=["torch-linear-ce", "absent"],
                   rounds=1, threads=1)  # fmt: skip
    rows = by_name(report)
    assert list(rows) == ["floor", "torch:eager"]
    ours = rows["torch:eager"]
    assert (ours.loss, ours.shape) == ("FusedLinearCrossEntropy, tiny", (8, 10, 4))
    assert ours.config["logit_softcapping"] == 5.0
    assert ours.share <= 1
    assert report.missing == [
        Missing("absent", "needs no_such_package", "pip install no-such-package"),
        Missing("torch-linear-ce", "FusedLinearCrossEntropy, tiny: F.linear_cross_entropy has no softcap."),
    ]
    assert "absent: needs no_such_package: pip install no-such-package" in bench_text(report)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"peers": ["nobody"]}, ValueError, "Unknown peer 'nobody'"),
        ({"config": "NoLoss"}, ValueError, "Unknown loss 'NoLoss'"),
        ({"backends": ["torch:fast"]}, ValueError, "Unknown backend flag 'torch:fast'"),
        ({"backends": ["jax:pallas"]}, BackendUnavailable, "jax:pallas"),
        ({"shapes": [(4,)]}, ValueError, r"shape must be \(T, V\)"),
        ({"config": "FusedLinearCrossEntropy", "shapes": [(4, 5)]}, ValueError, "hidden size"),
        ({"dtypes": ["int8"]}, ValueError, "int8"),
        ({"ignored": 1.0}, ValueError, "ignored must be a share"),
        ({"ignored": [0.5, -0.1]}, ValueError, r"ignored must be a share in \[0, 1\), got -0.1"),
        ({"rounds": 0}, ValueError, "rounds must be >= 1"),
        ({"count_known": True}, ValueError, "count_known is for FusedLinearCrossEntropy alone: KDLossConfig"),
        ({"config": "FusedLinearCrossEntropy", "count_known": True, "tp": 2}, ValueError, "not for tp=2"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_started(options, error, text):
    with pytest.raises(error, match=text):
        bench(**{"config": "KDLoss", "shapes": [(8, 10)], "peers": []} | options)


def test_a_device_that_is_not_there_is_told_and_no_success():
    done = run_cli("--config", "KDLoss", "--backend", "torch:eager", "--shape", "8,10", "--peers", "none",
                   "--device", "cuda:99")  # fmt: skip
    assert done.returncode == 1
    assert "torch has no device 'cuda:99' here" in " ".join(done.stdout.split())
    assert "8 x 10" not in done.stdout


def test_inputs_are_equal_everywhere_and_ignored_labels_are_counted():
    job = Job(FusedLinearCEConfig().to_dict(), (40, 30, 8), "float32", ignored=0.25)
    (tiles, labels), (again, labels_again) = make_inputs(job), make_inputs(job)
    assert all(np.array_equal(tiles[name].full(), again[name].full()) for name in tiles)
    assert np.array_equal(labels, labels_again)
    assert (labels == -100).sum() == 10
    assert job.num_kept == 30
    assert tiles["lm_weight"].full().shape == (30, 8)
    assert input_bytes(job) == 4 * (40 * 8 + 30 * 8)


def test_no_two_rows_of_a_repeated_block_are_equal():
    rng = np.random.default_rng(0)
    tile = Tiled(rng.standard_normal(BLOCK, np.float32), (300, 32_768))
    rows = tile.full()
    assert len(np.unique(rows[:, :3], axis=0)) == 300
    assert np.array_equal(tile.rows(np.array([0, 7, 299])), rows[[0, 7, 299]])


def test_torch_and_jax_get_the_same_values():
    torch_inputs = importlib.import_module("loss_core_bench.torch_inputs")
    jax_runner = importlib.import_module("loss_core_bench.jax_runner")
    tile = Tiled(np.random.default_rng(0).standard_normal(1000, np.float32), (70, 50))
    ours = torch_inputs.place(tile, torch_inputs.DTYPES["bfloat16"], "cpu").float().numpy()
    theirs = np.asarray(jax_runner._place(tile, "bfloat16")).astype(np.float32)
    assert np.array_equal(ours, theirs)
    assert ours.shape == (70, 50)
    assert ours[1, 0] == pytest.approx(tile.full()[1, 0], rel=2**-8)


def test_the_floor_counts_what_must_be_done():
    ce = Job(MaskedCrossEntropyConfig().to_dict(), (100, 1000), "bfloat16", ignored=0.5)
    assert least_work(ce).moved == 2 * (50 * 1000 + 100 * 1000)
    kd = Job(KDLossConfig().to_dict(), (100, 1000), "float32")
    assert least_work(kd).moved == 4 * 3 * 100 * 1000
    fused = Job(FusedLinearCEConfig().to_dict(), (100, 1000, 10), "float32", ignored=0.5)
    assert least_work(fused).operations == 3 * 2 * 50 * 1000 * 10
    forward = Job(FusedLinearCEConfig().to_dict(), (100, 1000, 10), "float32", forward_only=True)
    assert least_work(forward).operations == 2 * 100 * 1000 * 10
    assert least_work(forward).seconds(copy_rate=1e9, product_rate=1e6) == pytest.approx(2.0)


def row(name: str, kind: str, seconds: float, **more: object) -> BenchRow:
    return BenchRow("KDLoss", name, kind, (8, 10), "float32", {"name": "KDLoss"}, rounds=[seconds], **more)  # type: ignore[arg-type]


def test_ratios_stay_within_a_framework():
    rows = [
        row("floor", "floor", 1.0),
        row("torch:eager", "flag", 2.0),
        row("jax:xla", "flag", 3.0),
        row("plain-torch", "peer", 4.0),
        row("plain-jax", "peer", 1.5),
        row("compiled-torch", "peer", 2.5),
    ]
    cells = {line.cells[0]: dict(zip(HEADINGS, line.cells, strict=True)) for line in lines_of(rows)}
    assert cells["torch:eager"]["x plain"] == "0.50"
    assert cells["torch:eager"]["x peer"] == "0.80"
    assert cells["jax:xla"]["x peer"] == "2.00"
    assert cells["torch:eager"]["of floor"] == "50%"
    assert verdict(BenchReport(rows=rows)).splitlines() == [
        "KDLoss 8x10 float32: torch:eager 2.00 s, 0.80 of compiled-torch's 2.50 s",
        "KDLoss 8x10 float32: jax:xla 3.00 s, 2.00 of plain-jax's 1.50 s",
    ]


def test_a_wrong_peer_is_no_best_peer():
    rows = [row("plain-torch", "peer", 4.0), row("cce", "peer", 1.0, loss_error=float("inf"))]
    assert best_peer_of(rows, "torch") is rows[0]
    again = BenchReport.from_json(BenchReport(rows=rows).to_json())
    assert again.rows[1].loss_error == float("inf")


def test_errors_count_what_is_not_a_number_and_what_has_another_shape():
    assert relative(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == float("inf")
    assert relative(np.zeros(3), np.ones(2)) == float("inf")
    assert relative(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0
    assert relative(np.zeros(2), np.array([3.0, 4.0])) == 1


def test_a_weight_gradient_that_misses_a_block_of_tokens_is_found(tmp_path):
    job = Job(FusedLinearCEConfig(reduction="mean").to_dict(), (64, 40, 8), "float32", ignored=0.25)
    tiles, labels = make_inputs(job)
    arrays = {name: tile.full().astype(np.float64) for name, tile in tiles.items()} | {"labels": labels}
    right = oracle.evaluate(job.loss_config(), arrays)
    hidden, weight = arrays["hidden_states"], arrays["lm_weight"]
    sample = {"loss": right.loss, "rows": right.grads["hidden_states"][sampled_tokens(job)]}
    of_hidden = float(np.sum(hidden * right.grads["hidden_states"]))
    of_weight = float(np.sum(weight * right.grads["lm_weight"]))
    judge = Judge(job, tmp_path)
    whole = {"loss": right.loss, **right.grads}
    rows = [row("torch:eager", "flag", 1.0) for _ in range(2)]
    judge.judge(rows[0], [whole], [sample | {"inner": np.array([of_hidden, of_weight])}])
    judge.judge(rows[1], [whole], [sample | {"inner": np.array([of_hidden, 0.75 * of_weight])}])
    assert rows[0].grad_error < 1e-12
    assert rows[1].grad_error == pytest.approx(0.25, rel=1e-6)


def test_a_loss_of_the_full_call_that_stands_alone_is_an_error(tmp_path):
    job = Job(KDLossConfig().to_dict(), (8, 10), "float32", forward_only=True)
    judge = Judge(job, tmp_path)
    rows = [row(name, "flag", 1.0) for name in ("a", "b", "c")]
    for found, value in zip(rows, (1.0, 1.0001, 1.5), strict=True):
        judge.judge(found, [{"loss": judge._expected.loss}], [{"loss": np.asarray(value)}])
    judge.compare_losses(rows)
    assert [found.wrong for found in rows] == [False, False, True]


def test_a_busy_machine_is_told():
    busy = BenchReport(machine={"load": 6.0, "cores": 2})
    assert "busy" in warnings_of(busy)[0]
    assert warnings_of(BenchReport(machine={"load": 0.1, "cores": 2})) == []


@pytest.mark.parametrize(("seconds", "text"), [(2.0, "2.00 s"), (0.0123, "12.3 ms"), (456e-6, "456 µs"), (None, "")])
def test_a_time_has_three_digits(seconds, text):
    assert time_text(seconds) == text


def test_the_page_holds_every_table_and_escapes_what_it_shows(report):
    text = report.to_json().replace("KDLoss", "KD<b>Loss")
    page = bench_page(BenchReport.from_json(text))
    assert "KD&lt;b&gt;Loss, 64 x 1,000" in page
    assert "<b>Loss" not in page
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_markdown_has_a_row_for_each_implementation(report):
    table = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(report.rows)
    assert len({line.count("|") for line in table}) == 1


def test_tuned_choices_are_read_back(report, tmp_path):
    file = tmp_path / "new" / "choices.json"
    entries = choices_of(report)
    best = {entry["backend"]: entry["flag"] for entry in entries}
    # Whichever of the two was faster today.
    assert best["torch"] in ("torch:eager", "torch:compile")
    assert best["jax"] == "jax:xla"
    choices.store_choices(entries, file)
    ask = {"loss": "KDLoss", "device": "cpu", "dtype": "float32", "file": file}
    assert choices.tuned_choice(shape=(64, 1000), **ask) == best["torch"]
    assert choices.tuned_choice(shape=(70, 900), **ask) == best["torch"]
    assert choices.tuned_choice(shape=(64, 1000), backend="jax", **ask) == "jax:xla"
    assert choices.tuned_choice(shape=(512, 1000), **ask) is None
    assert choices.tuned_choice(shape=(64, 1000), **ask | {"dtype": "bfloat16"}) is None
    assert choices.tuned_choice(shape=(64, 1000), **ask | {"device": "NVIDIA H100"}) is None


def test_a_newer_choice_replaces_the_older_one(tmp_path):
    file = tmp_path / "choices.json"
    entry = {"loss": "KDLoss", "device": "cpu", "dtype": "float32", "shape": [64, 1000], "backend": "torch"}
    choices.store_choices([entry | {"flag": "torch:eager"}], file)
    choices.store_choices([entry | {"flag": "torch:triton"}], file)
    assert len(json.loads(file.read_text())["choices"]) == 1
    assert choices.tuned_choice("KDLoss", "cpu", "float32", (64, 1000), file=file) == "torch:triton"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "choices": []}', '{"format": 1, "choices": [3]}'])
def test_a_cache_that_cannot_be_read_chooses_nothing(tmp_path, text):
    file = tmp_path / "choices.json"
    file.write_text(text)
    assert choices.tuned_choice("KDLoss", "cpu", "float32", (64, 1000), file=file) is None


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LOSS_CORE_CACHE", str(tmp_path))
    assert choices.cache_file() == tmp_path / "choices.json"


def test_workloads_have_sizes_and_a_source():
    for name, load in WORKLOADS.items():
        assert load.name == name
        assert all(size > 0 for size in load.shape)
        assert "/" in load.source


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loss_core.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_prints_writes_and_tunes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSS_CORE_CACHE", str(tmp_path))
    done = run_cli(
        "--config", "FusedLinearCrossEntropy", "--shape", "8,50,4", "--backend", "torch:eager",
        "--peers", "none", "--rounds", "1", "--threads", "1", "--dtype", "bfloat16", "--tune",
        "--json", str(tmp_path / "r.json"), "--report", str(tmp_path / "r.html"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FusedLinearCrossEntropy, 8 x 50 x 4, bfloat16, forward + backward" in done.stdout
    report = BenchReport.from_json((tmp_path / "r.json").read_text())
    assert report.command.startswith("loss-core bench --config FusedLinearCrossEntropy")
    assert report.rows[1].config["reduction"] == "mean"
    assert "<svg" in (tmp_path / "r.html").read_text()
    assert choices.tuned_choice("FusedLinearCrossEntropy", "cpu", "bfloat16", (8, 50, 4)) == "torch:eager"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--peers", "ligr"], "--peers 'ligr' is unknown; did you mean 'liger'?"),
        (["--workload", "qwen3"], "--workload 'qwen3' is unknown; did you mean 'qwen3-8b'?"),
        (["--tokens", "5"], "--tokens goes with --workload"),
        (["--shape", "5"], "--shape '5': expected T,V or T,V,H"),
        (["--dtype", "bf16"], "--dtype 'bf16' is unknown"),
        (["--config", "KDLos"], "did you mean 'KDLoss'?"),
        (["--backend", "jax:pallas"], "jax:pallas"),
        (["--ignored", "0.5", "--ignored", "2"], "ignored must be a share"),
        (["--tune", "--forward-only"], "leave out --forward-only"),
        (["--tune", "--tp", "2"], "leave out --tp"),
        (
            ["--count-known", "--config", "KDLoss", "--shape", "8,10", "--rounds", "1"],
            "count_known is for FusedLinearCrossEntropy alone",
        ),
        (["--tune", "--ignored", "0", "--ignored", "0.5"], "give --ignored once"),
        (["--tp", "2", "--device", "cuda:1"], "name the kind alone, 'cuda'"),
        (["--json", "/nowhere/r.json"], "there is no folder /nowhere"),
    ],
)
def test_wrong_usage_is_one_line(arguments, text):
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
