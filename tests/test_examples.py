"""Each example, run as a user runs it: in a separate process and an empty folder."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.losses import oracle

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# One thread each: the tests run in parallel.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends"), str(EXAMPLES)]),
    "OMP_NUM_THREADS": "1",
}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def example(folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run(folder, str(EXAMPLES / name), *options)


# The held-out text takes most of the time of a short run.
LESS_TEXT = """
import runpy, sys, byte_lm
byte_lm.MAX_BYTES = 30_000
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_less_text(folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "-c", LESS_TEXT, str(EXAMPLES / name), *options)


def loss_file(folder: Path, text: str) -> str:
    path = folder / "loss.yaml"
    path.write_text(f"loss: {{{text}}}", encoding="utf-8")
    return str(path)


def test_training_has_the_same_losses_on_both_backends(tmp_path):
    curves = []
    for flag in ("torch:eager", "jax:xla"):
        out = tmp_path / f"{flag.partition(':')[0]}.json"
        done = on_less_text(tmp_path, "train_byte_lm.py", "--backend", flag, "--steps", "3", "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert "bits per byte" in done.stdout
        curves.append(json.loads(out.read_text()))
    assert [curve["kernel"] for curve in curves] == ["torch:eager", "jax:xla"]
    losses = [np.array([*curve["losses"], curve["valid_loss"]]) for curve in curves]
    assert losses[0].shape == (4,)
    # The first loss of an untrained byte model is near log 256.
    assert abs(losses[0][0] - np.log(256)) < 0.2
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_the_file_alone_selects_another_loss(tmp_path):
    path = loss_file(tmp_path, "name: MaskedCrossEntropy, ignore_index: -1")
    done = on_less_text(tmp_path, "train_byte_lm.py", "--loss", path, "--steps", "1", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (("--backend", "tensorflow"), "name: FusedLinearCrossEntropy", "torch, torch:auto, jax"),
        ((), "name: FusedLinearCrossEntropy, ignore_idx: 1", "Did you mean 'ignore_index'?"),
        ((), "name: [", "no valid YAML"),
        ((), "name: KDLoss", "names a KDLossConfig"),
        ((), "name: FusedLinearCrossEntropy, reduction: mean", "num_label_tokens"),
    ],
    ids=["unknown flag", "typo", "no YAML", "a loss with a teacher", "a reduction that is not summed"],
)
def test_a_user_error_is_a_message_without_traceback(tmp_path, monkeypatch, capsys, options, text, message):
    # In this process, which has imported torch; an uncaught error would not be a SystemExit.
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = str(EXAMPLES / "train_byte_lm.py")
    monkeypatch.setattr(sys, "argv", [script, "--steps", "1", "--loss", loss_file(tmp_path, text), *options])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(script, run_name="__main__")
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent differently")
def test_ctrl_c_exits_without_traceback_and_keeps_the_curve(tmp_path):
    # Tests that a shell starts in the background ignore SIGINT, and their children inherit that.
    code = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(EXAMPLES / "train_byte_lm.py")
    command = [sys.executable, "-c", code, script, "--steps", "100000", "--out", "curve.json"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step ")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == ""
    assert "stopped after" in stdout
    assert len(json.loads((tmp_path / "curve.json").read_text())["losses"]) >= 1


def test_demo_writes_its_page_and_prints_the_differences(tmp_path):
    done = on_less_text(tmp_path, "demo.py", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert "Agree: held-out loss" in done.stdout
    page = (tmp_path / "demo.html").read_text()
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", ""), "the page loads something from elsewhere"


def test_demo_fails_if_a_backend_is_wrong(tmp_path):
    # The torch loss on both flags; the second has the right value, but a gradient that is 1e-4 too large.
    broken = f"""
import runpy, sys
import torch, byte_lm, loss_core_bridge
byte_lm.MAX_BYTES = 30_000
build = loss_core_bridge.build_torch_loss
class Off(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
    def forward(self, hidden_states, **others):
        return self.loss(hidden_states=hidden_states * (1 + 1e-4) - hidden_states.detach() * 1e-4, **others)
loss_core_bridge.build_torch_loss = lambda config, backend: (
    Off(build(config, backend)) if backend == "torch:eager" else build(config, backend))
sys.argv = ["demo.py", "--steps", "1", "--backends", "torch", "torch:eager"]
runpy.run_path({str(EXAMPLES / "demo.py")!r}, run_name="__main__")
"""
    done = run(tmp_path, "-c", broken)
    assert done.returncode == 1, done.stderr
    assert "DISAGREE" in done.stdout


@pytest.mark.parametrize("library", ["jax", "torch", "matplotlib"])
def test_demo_without_a_library_says_what_to_install(tmp_path, library):
    without = (
        f"import runpy, sys; sys.modules[{library!r}] = None; sys.argv = ['demo.py', '--steps', '1']; "
        f"runpy.run_path({str(EXAMPLES / 'demo.py')!r}, run_name='__main__')"
    )
    done = run(tmp_path, "-c", without)
    assert done.returncode == 2
    assert "pip install 'loss-core[" in done.stderr
    assert "Traceback" not in done.stderr


def test_jax_step_learns_without_loading_torch(tmp_path):
    done = run(
        tmp_path,
        "-c",
        f"import runpy, sys; sys.modules['torch'] = None; sys.argv = ['jax_step.py', '--steps', '3']; "
        f"runpy.run_path({str(EXAMPLES / 'jax_step.py')!r}, run_name='__main__')",
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[3]) for line in done.stdout.splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "line"), [("custom_loss.py", "trained with --backend jax"), ("port_a_loss.py", "second_port: agrees")]
)
def test_script_prints_its_result(tmp_path, name, line):
    done = example(tmp_path, name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert line in done.stdout


# Runs a script without the libraries of the command line, which a machine with a GPU may lack.
WITHOUT_CLI = """
import os, runpy, sys
sys.modules |= dict.fromkeys(("typer", "rich", "yaml", "jinja2", "matplotlib", "safetensors"))
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])  # as in `python FILE`
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_gpu_report_runs_on_a_cpu_without_the_cli_extra(tmp_path):
    done = run(
        tmp_path, "-c", WITHOUT_CLI, str(EXAMPLES / "gpu_report.py"), "--device", "cpu", "--small", "--rounds", "1",
        "--only", "sanitizer", "jax-kd", "--out", "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sanitizer: not run: no GPU" in done.stdout
    found = json.loads((tmp_path / "results" / "bench-jax-kd.json").read_text())
    assert {row["implementation"] for row in found["rows"]} >= {"roofline", "jax:xla", "plain-jax"}
    assert "jax:xla" in (tmp_path / "results" / "report.md").read_text()


def test_the_gpu_report_lists_its_steps_and_rejects_others(tmp_path):
    done = example(tmp_path, "gpu_report.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "KDLossConfig 4096x128256" in done.stdout
    assert example(tmp_path, "gpu_report.py", "--only", "lunch").returncode == 2


def test_the_benchmark_pages_match_their_results(tmp_path):
    done = example(tmp_path, "benchmark_page.py", "--check")
    assert done.returncode == 0, f"run `make benchmarks`: {done.stdout}{done.stderr}"


def _tensor_parallel_expected(seed: int) -> dict[str, list[float]]:
    """Expected output of tensor_parallel.py, from the oracle: loss, and the norm of each gradient."""
    problem = runpy.run_path(str(EXAMPLES / "tensor_parallel.py"), run_name="tensor_parallel")["make_problem"]("", seed)
    logits = problem.hidden_BSH @ problem.weight_VH.T
    count = np.asarray(problem.num_label_tokens)
    shared = {"labels": problem.labels_BS, "num_label_tokens": count, "num_batch_labels": count}
    calls = {
        "FusedLinearCrossEntropy": (
            FusedLinearCEConfig(),
            {"hidden_states": problem.hidden_BSH, "lm_weight": problem.weight_VH},
        ),
        "MaskedCrossEntropy": (MaskedCrossEntropyConfig(), {"logits": logits}),
        "KDLoss": (KDLossConfig(temperature=2.0), {"student_logits": logits}),
    }
    expected = {}
    for name, (config, inputs) in calls.items():
        teacher = {"teacher_logits": problem.teacher_BSV} if name == "KDLoss" else {}
        found = oracle.evaluate(config, inputs | teacher | shared)
        expected[name] = [float(found.loss), *(float(np.linalg.norm(found.grads[of])) for of in inputs)]
    return expected


@pytest.mark.parametrize(
    ("backend", "processes"),
    [("torch:eager", 2), pytest.param("torch:eager", 4, marks=pytest.mark.slow), ("jax:xla", 1)],
)
def test_tensor_parallel_prints_the_values_of_the_unsharded_problem(tmp_path, backend, processes):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    command = (str(EXAMPLES / "tensor_parallel.py"), "--backend", backend, "--seed", "3")
    done = run(tmp_path, *(torchrun if processes > 1 else ()), *command)
    assert done.returncode == 0, done.stderr
    printed = {line.split()[0]: re.findall(r"\d+\.\d+", line) for line in done.stdout.splitlines()}
    expected = _tensor_parallel_expected(seed=3)
    assert list(printed) == list(expected)
    for name, numbers in expected.items():
        np.testing.assert_allclose(np.array(printed[name], float), numbers, atol=1e-5)


def test_tensor_parallel_without_torchrun_prints_how_to_start_it(tmp_path):
    done = example(tmp_path, "tensor_parallel.py", "--backend", "torch")
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2" in done.stderr
    assert "Traceback" not in done.stderr
