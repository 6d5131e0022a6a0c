"""`bench --tp`: real ranks on small shapes. Results are held to float64; what a time is depends on the machine."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, unregister_loss
from loss_core.bench import bench
from loss_core.bench_errors import Judge
from loss_core.bench_floor import least_work, left_out, words
from loss_core.bench_job import Job, Tiled, input_bytes
from loss_core.bench_peers import PEERS, peers_for
from loss_core.bench_process import WorkerFailed, WorkerProcess
from loss_core.bench_report import FLAG, PEER, BenchRow
from loss_core.bench_shards import rank_sizes, views
from loss_core.bench_team import Team, _together
from loss_core.bench_text import bench_text

LOSSES = {
    "logits": MaskedCrossEntropyConfig(reduction="mean"),
    "fused": FusedLinearCEConfig(reduction="mean", logit_softcapping=5.0),
    "kd": KDLossConfig(temperature=2.0),
}


def job(kind: str, vocab: int, **more: object) -> Job:
    shape = (24, vocab, 16) if kind == "fused" else (24, vocab)
    return Job(LOSSES[kind].to_dict(), shape, "float32", ignored=0.25, tp=2, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def torch_team(tmp_path_factory):
    """Two ranks on gloo, which serve one implementation after the other."""
    team = Team("torch", 2, 2, "cpu", tmp_path_factory.mktemp("torch"))
    try:
        team.load([])
        assert "torch" in team.receive(120)["versions"]
        yield team
    finally:
        team.stop()


@pytest.fixture(scope="module")
def jax_team(tmp_path_factory):
    """One process with two devices."""
    team = Team("jax", 2, 2, "cpu", tmp_path_factory.mktemp("jax"))
    try:
        team.load([])
        assert "jax" in team.receive(120)["versions"]
        yield team
    finally:
        team.stop()


def ask(team: Team, **request: object) -> dict:
    team.send(request)
    answer = team.receive(120)
    assert "error" not in answer, answer
    return answer


def measured(team: Team, call: Job, name: str, kind: str, folder: Path) -> tuple[BenchRow, dict, dict]:
    """One implementation, prepared, judged, and timed once: its row, and the answers."""
    row = BenchRow("loss", name, kind, call.shape, call.dtype)
    judge = Judge(call, folder)
    ask(team, do="setup", job=call.to_dict(), kind=kind, name=name)
    prepared = ask(team, do="prepare", file=judge.file)
    sample = team.results(judge.file)
    ask(team, do="evaluate", job=judge.job.to_dict(), file=judge.file)
    judge.judge(row, team.results(judge.file), sample)
    return row, prepared, ask(team, do="round", budget=0.0, most=3)


TORCH = [("torch:eager", FLAG), ("plain-torch", PEER), ("torch-loss-parallel", PEER)]


@pytest.mark.parametrize(
    ("kind", "name", "of"),
    [(kind, name, of) for kind in LOSSES for name, of in TORCH if of == FLAG or kind in PEERS[name].kinds],
)
def test_torch_over_ranks_is_within_what_rounding_explains(torch_team, tmp_path, kind, name, of):
    # Two ranks don't divide it. What divides is the easier case, and `check --tp` has it.
    vocab = 301
    row, prepared, timed = measured(torch_team, job(kind, vocab), name, of, tmp_path)
    assert row.share <= 1
    assert row.grad_error < 1e-5
    assert row.error_shape[1] == vocab
    assert prepared["first_call"] > 0
    assert len(timed["seconds"]) == 1


def test_ranks_make_the_same_number_of_calls_though_each_has_its_own_clock(torch_team):
    call = job("logits", 301).to_dict()
    ask(torch_team, do="setup", job=call, kind=FLAG, name="torch:eager")
    # Rank 1 would go on, and wait for the other for ever.
    for process, budget in zip(torch_team.processes, (0.0, 10.0), strict=True):
        process.send({"do": "round", "budget": budget, "most": 50})
    assert len(torch_team.receive(20)["seconds"]) == 1


@pytest.mark.parametrize("kind", LOSSES)
def test_jax_over_devices_is_within_what_rounding_explains(jax_team, tmp_path, kind):
    for name, of in (("jax:xla", FLAG), ("plain-jax", PEER)):
        row, prepared, _ = measured(jax_team, job(kind, 300), name, of, tmp_path)
        assert row.share <= 1
        assert row.grad_error < 1e-5
        assert prepared["note"] == ""
        assert prepared["peak"] > 0


def test_jax_takes_whole_arrays_where_the_ranks_do_not_divide(jax_team, tmp_path):
    row, prepared, _ = measured(jax_team, job("logits", 301), "jax:xla", FLAG, tmp_path)
    assert row.share <= 1
    assert prepared["note"] == "2 does not divide 301: takes whole arrays, which it pads and shards itself"
    jax_team.send({"do": "setup", "job": job("logits", 301).to_dict(), "kind": PEER, "name": "plain-jax"})
    assert "2 does not divide 301" in jax_team.receive(60)["unusable"]


def test_the_floor_is_measured_on_every_rank_at_once(torch_team, jax_team):
    for team in (torch_team, jax_team):
        call = job("fused", 301)
        ask(team, do="setup", job=call.to_dict(), kind="floor", name="floor")
        rates = ask(team, do="round", budget=0.0, most=1)
        assert rates["copy_rate"] > 0
        assert rates["product_rate"] > 0


def test_an_error_on_every_rank_is_an_answer_and_the_ranks_go_on(torch_team):
    request = {"do": "setup", "job": job("logits", 300).to_dict(), "kind": PEER, "name": "nobody"}
    torch_team.send(request)
    assert torch_team.receive(60)["error"].startswith("KeyError")
    assert ask(torch_team, do="setup", job=job("logits", 300).to_dict(), kind=FLAG, name="torch:eager") == {}


def test_an_error_on_one_rank_ends_the_others(torch_team, tmp_path):
    # The last one to use these ranks. Rank 1 can't write its file, rank 0 goes on.
    (tmp_path / "file.1").mkdir()
    ask(torch_team, do="setup", job=job("logits", 300).to_dict(), kind=FLAG, name="torch:eager")
    torch_team.send({"do": "evaluate", "job": job("logits", 300).to_dict(), "file": str(tmp_path / "file")})
    with pytest.raises(WorkerFailed, match=r"^rank 1 of 2: IsADirectoryError"):
        torch_team.receive(60)
    assert not any(process.alive for process in torch_team.processes)


DEADLY = """
import os
import torch.distributed as dist
from dataclasses import dataclass
from loss_core import MaskedCrossEntropyConfig, register_loss

@dataclass
class DiesConfig(MaskedCrossEntropyConfig):
    pass

def dies(config):
    def loss(logits, labels):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        dist.barrier()
    return loss

register_loss("Dies", DiesConfig, {"torch": dies})
"""


def test_a_run_over_ranks_has_every_column_and_a_rank_that_dies_is_a_row_with_its_error(tmp_path, monkeypatch):
    before = workers()
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("deadly")
    try:
        report = bench(["FusedLinearCrossEntropy", "Dies"], ["torch:eager"], shapes=[(40, 301, 16)], tp=2, rounds=2,
                       threads=2, imports=["deadly"], peers=["compiled-torch", "torch-linear-ce"])  # fmt: skip
    finally:
        unregister_loss("Dies")
        del sys.modules["deadly"]
    (floor, ours), (_, dead) = report.groups()
    assert floor.seconds > 0
    assert "of the largest of 2 parts" in floor.note
    assert "not counted: what the ranks tell each other, at least 3 numbers per token" in floor.note
    assert ours.error == ""
    assert ours.share <= 1
    assert len(ours.rounds) == 2
    assert ours.calls >= 2
    assert report.settings["tp"] == 2
    assert dead.error.startswith("rank 1 of 2: its process was ended by SIGKILL")
    assert dead.seconds is None
    text = bench_text(report)
    assert "FusedLinearCrossEntropy, 40 x 301 x 16, float32, forward + backward, over 2 ranks" in text
    assert "compiled-torch: not over tensor parallel" in text
    assert "torch-linear-ce: not over tensor parallel" in text
    assert workers() == before


def workers() -> list[str]:
    """Process ids of the workers of this process."""
    done = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [line.split()[0] for line in done.stdout.splitlines() if "loss_core_bench.worker" in line]


def test_a_rank_whose_parent_is_gone_does_not_wait_for_the_others(tmp_path):
    worker = WorkerProcess(1, "cpu", tmp_path)
    try:
        worker.send({"do": "import", "framework": "torch", "device": "cpu", "imports": [], "rank": 0, "ranks": 2,
                     "meet": str(tmp_path)})  # fmt: skip
        deadline = time.monotonic() + 60
        while not (tmp_path / "port").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        # It has left its port, and waits for rank 1.
        worker._process.stdin.close()
        assert worker._process.wait(timeout=30) == 0
    finally:
        worker.stop()


def test_ranks_share_the_vocabulary_as_torch_does():
    torch = importlib.import_module("torch")
    for vocab in (1, 2, 7, 12, 301):
        for ranks in (1, 2, 3, 4):
            chunks = [len(part) for part in torch.arange(vocab).chunk(ranks)]
            sizes = rank_sizes(vocab, ranks)
            assert [size for size in sizes if size] == chunks
            assert len(sizes) == ranks


def test_what_a_rank_holds_is_its_part_of_the_whole():
    torch_inputs = importlib.import_module("loss_core_bench.torch_inputs")
    # A block shorter than the array, so that it is repeated, and rows start anywhere in it.
    tile = Tiled(np.random.default_rng(0).standard_normal(997, np.float32), (50, 70))
    whole = tile.full()
    columns = torch_inputs.place_columns(tile, 20, 45, torch_inputs.DTYPES["float32"], "cpu").numpy()
    assert np.array_equal(columns, whole[:, 20:45])
    assert np.array_equal(tile.row_range(11, 30).full(), whole[11:30])
    wide = Tiled(tile.block, (3, 2000))
    columns = torch_inputs.place_columns(wide, 1500, 2000, torch_inputs.DTYPES["float32"], "cpu").numpy()
    assert np.array_equal(columns, wide.full()[:, 1500:])


def test_views_join_parts_and_keep_the_copy_of_every_rank():
    parts = [
        {"loss": np.array(1.0), "lm_weight": np.ones((3, 2)), "hidden_states": np.zeros((4, 2)),
         "rows": np.zeros((1, 2)), "inner": np.array([5.0, 2.0])},
        {"loss": np.array(1.0), "lm_weight": np.ones((2, 2)), "hidden_states": np.zeros((4, 2)),
         "rows": np.zeros((1, 2)), "inner": np.array([5.0, 3.0])},
    ]  # fmt: skip
    (same,) = views(parts, "hidden_states")
    assert same["lm_weight"].shape == (5, 2)
    assert list(same["inner"]) == [5.0, 5.0]
    parts[1]["hidden_states"] = np.full((4, 2), np.nan)
    assert [view["hidden_states"][0, 0] for view in views(parts, "hidden_states")] == pytest.approx(
        [0, np.nan], nan_ok=True
    )
    rows = [{"rows": np.zeros((2, size))} for size in (3, 2)]
    assert views(rows, "logits")[0]["rows"].shape == (2, 5)


def test_a_gradient_that_is_wrong_on_one_rank_is_found(tmp_path):
    call = job("fused", 40)
    judge = Judge(call, tmp_path)
    right = {"loss": judge._expected.loss, **judge._expected.grads}
    row = BenchRow("loss", "torch:eager", FLAG, call.shape, call.dtype)
    of_ranks = [
        {name: value[:20] if name == "lm_weight" else value for name, value in right.items()},
        {name: value[20:] if name == "lm_weight" else 2 * value if name == "hidden_states" else value
         for name, value in right.items()},
    ]  # fmt: skip
    sample = [{"loss": right["loss"], "rows": judge._rows}] * 2
    judge.judge(row, of_ranks, sample)
    assert row.grad_error == pytest.approx(1.0)
    assert row.loss_error == 0


def test_a_call_is_as_slow_as_its_slowest_rank():
    answers = [
        {"seconds": [1.0, 5.0], "first_call": 1.0, "peak": 7, "note": "a"},
        {"seconds": [2.0, 4.0], "first_call": 3.0, "peak": 6, "note": "b"},
    ]
    assert _together(answers) == {"seconds": [2.0, 5.0], "first_call": 3.0, "peak": 7, "note": "a"}
    rates = [{"copy_rate": 2.0, "product_rate": 5.0}, {"copy_rate": 3.0, "product_rate": 4.0}]
    assert _together(rates) == {"copy_rate": 2.0, "product_rate": 4.0}


def test_the_floor_is_that_of_the_largest_part():
    ce = Job(MaskedCrossEntropyConfig().to_dict(), (100, 1001), "bfloat16", tp=4)
    assert least_work(ce).moved == 2 * 2 * 100 * 251
    assert words(ce) == "1 read + 1 write of the logits, of the largest of 4 parts,"
    fused = Job(FusedLinearCEConfig().to_dict(), (100, 1000, 10), "float32", tp=2)
    assert least_work(fused).operations == 3 * 2 * 100 * 500 * 10
    assert "the sum of the gradients of hidden_states" in left_out(fused)
    assert "5 numbers per token" in left_out(Job(KDLossConfig().to_dict(), (100, 1000), "float32", tp=2))
    assert input_bytes(fused) == 4 * (2 * 100 * 10 + 1000 * 10)
    assert left_out(Job(KDLossConfig().to_dict(), (100, 1000), "float32")) == ""


def test_peers_are_those_that_exist_over_ranks():
    alone = {peer.name for kind in LOSSES for peer in peers_for(kind, "bfloat16")}
    over = {peer.name for kind in LOSSES for peer in peers_for(kind, "bfloat16", tp=2)}
    assert over == {"plain-torch", "plain-torch-upcast", "torch-loss-parallel", "te", "plain-jax"}
    assert alone == set(PEERS) - {"torch-loss-parallel"}


def test_too_few_devices_are_told():
    torch = importlib.import_module("torch")
    unusable = importlib.import_module("loss_core_bench.runner").Unusable
    ranks = torch.cuda.device_count() + 2
    with pytest.raises(unusable, match=f"{ranks} ranks need {ranks} CUDA devices; torch sees {ranks - 2}"):
        importlib.import_module("loss_core_bench.torch_team").join(0, ranks, "", "cuda")
    with pytest.raises(unusable, match="99 ranks need 99 devices; JAX sees"):
        importlib.import_module("loss_core_bench.jax_runner").join(0, 99, "", "cpu")


@pytest.mark.parametrize("options", [{"tp": 0}, {"tp": True}, {"tp": 2, "device": "cuda:1"}])
def test_a_wrong_number_of_ranks_is_refused_before_anything_is_started(options):
    with pytest.raises(ValueError, match=r"tp must be a whole number >= 1|name the kind alone, 'cuda'"):
        bench("KDLoss", ["torch:eager"], shapes=[(8, 10)], peers=[], **options)
