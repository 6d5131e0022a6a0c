"""`loss-core bench`: exit codes, messages, files."""

from __future__ import annotations

import sys
import time

import pytest

from helpers.command import interrupted, run, spawn
from helpers.processes import all_gone, wait_for_workers
from loss_core.bench.report import BenchReport
from loss_core.dispatch.tuned import tuned_choice


def test_a_missing_device_is_reported_and_exits_1():
    done = spawn("bench", "--config", "KDLoss", "--backend", "torch:eager", "--shape", "8,10", "--baselines", "none",
                   "--device", "cuda:99")  # fmt: skip
    assert done.returncode == 1
    assert "torch has no device 'cuda:99' here" in " ".join(done.stdout.split())
    assert "8 x 10" not in done.stdout


def test_the_command_prints_writes_and_tunes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSS_CORE_CACHE", str(tmp_path))
    done = spawn("bench",
        "--config", "FusedLinearCrossEntropy", "--shape", "8,50,4", "--backend", "torch:eager",
        "--baselines", "none", "--rounds", "1", "--threads", "1", "--dtype", "bfloat16", "--tune",
        "--json", str(tmp_path / "r.json"), "--report", str(tmp_path / "r.html"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FusedLinearCrossEntropy, 8 x 50 x 4, bfloat16, forward + backward" in done.stdout
    report = BenchReport.from_json((tmp_path / "r.json").read_text())
    assert report.command.startswith("loss-core bench --config FusedLinearCrossEntropy")
    assert report.rows[1].config["reduction"] == "mean"
    assert "<svg" in (tmp_path / "r.html").read_text()
    call = ("FusedLinearCrossEntropy", "cpu", "bfloat16", (8, 50, 4))
    assert tuned_choice(*call, version=report.versions["torch"], threads=1) == "torch:eager"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--baselines", "ligr"], "--baselines 'ligr' is unknown; did you mean 'liger'?"),
        (["--workload", "qwen3"], "--workload 'qwen3' is unknown; did you mean 'qwen3-8b'?"),
        (["--tokens", "5"], "--tokens goes with --workload"),
        (["--shape", "5"], "--shape '5': expected T,V or T,V,H"),
        (["--dtype", "bf16"], "--dtype 'bf16' is unknown"),
        (["--config", "KDLos"], "did you mean 'KDLoss'?"),
        (["--backend", "jax:fast"], "Unknown backend flag 'jax:fast'"),
        (["--ignored", "0.5", "--ignored", "2"], "ignored must be a share"),
        (["--tune", "--forward-only"], "leave out --forward-only"),
        (["--tune", "--tp", "2"], "leave out --tp"),
        (
            ["--count-known", "--config", "KDLoss", "--shape", "8,10", "--rounds", "1"],
            "count_known is for losses that take num_valid_tokens",
        ),
        (["--tune", "--ignored", "0", "--ignored", "0.5"], "give --ignored once"),
        (["--tp", "2", "--device", "cuda:1"], "name the kind alone, 'cuda'"),
        (["--json", "/nowhere/r.json"], "there is no folder /nowhere"),
    ],
)
def test_wrong_usage_is_one_line(arguments, text):
    done = run("bench", *arguments)
    assert done.exit_code == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_stops_every_worker_and_exits_quietly():
    workers = []

    def ready(process):
        # The roofline and the flag.
        workers.extend(wait_for_workers(process.pid, 2))
        time.sleep(2)

    arguments = ("bench", "--config", "KDLoss", "--shape", "64,1000", "--rounds", "100000", "--baselines", "none",
                 "--backend", "torch:eager")  # fmt: skip
    assert interrupted(arguments, ready) == (130, "", "loss-core: stopped.\n")
    assert all_gone(workers)
