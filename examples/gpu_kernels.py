"""The Triton kernels alone: their times on a GPU, and compute-sanitizer over one pass of them.

Used by gpu_report.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

GIB = 2**30
SANITIZER_SECONDS = 45.0

# One pass over every kernel at small sizes, since every memory access is checked.
_SANITIZED = """
import sys
from loss_core.check import check
for loss in ("MaskedCrossEntropy", "FusedLinearCrossEntropy", "KDLoss", "FusedLinearLogProbs"):
    report = check(loss, ["torch:triton"], dtypes=["bfloat16"], only=["basic", "strided", "ragged"], device="cuda")
    print(report)
    if not report.passed:
        sys.exit(1)
for loss in ("MaskedCrossEntropy", "KDLoss"):  # rows that several programs share
    report = check(loss, ["torch:triton"], dtypes=["bfloat16"], only=["basic"], shape=(3, 40_001), device="cuda")
    print(report)
    if not report.passed:
        sys.exit(1)
"""


def run_sanitizer(device: str, out: Path) -> str:
    """Run compute-sanitizer over one pass of the Triton kernels; return the outcome as text."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if device == "cpu" or tool is None:
        return "not run: " + ("no GPU" if device == "cpu" else "compute-sanitizer is not on PATH")
    # torch's caching allocator would hide an access beyond the end of a tensor.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck", "--error-exitcode", "99",
               sys.executable, "-c", _SANITIZED]  # fmt: skip
    # In a separate process group, to kill both: the tool starts the program as a child process.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            text, _ = process.communicate(timeout=SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"not finished within {SANITIZER_SECONDS:.0f} s"
    (out / "sanitizer.txt").write_text(text, "utf-8")
    if process.returncode == 0:
        return "no error found"
    return f"FAILED with exit code {process.returncode}: see {out / 'sanitizer.txt'}"


# (kernel, T, V, dtype) that are timed alone.
_ALONE = (
    ("row", 8192, 32_000, "bfloat16"), ("row", 8192, 50_257, "bfloat16"), ("row", 8192, 128_256, "bfloat16"),
    ("row", 8192, 151_936, "bfloat16"), ("row", 4096, 262_144, "bfloat16"), ("row", 2048, 128_256, "float32"),
    ("row", 8192, 32_000, "float32"), ("row_terms", 8192, 128_256, "bfloat16"),
    ("pair", 8192, 32_000, "bfloat16"), ("pair", 4096, 128_256, "bfloat16"),
)  # fmt: skip


def time_alone(kernel: str, tokens: int, vocab: int, dtype: str) -> tuple[float, int]:
    """Median seconds of one kernel on the device, and the bytes that it must read and write."""
    import torch
    from triton.testing import do_bench

    from loss_core.row_terms import CrossEntropy
    from loss_core_torch.kernels import Pairs, Rows
    from loss_core_torch.kernels.gpu import KERNELS

    logits, other = (torch.randn(tokens, vocab, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
    coef_T = torch.full((tokens,), 1 / tokens, device="cuda")
    rows, pairs = Rows(logits, torch.arange(tokens, device="cuda") % vocab, None), Pairs(logits, other, None, 0.5)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "row": (lambda: KERNELS.row_terms_and_grad(rows, coef_T, CrossEntropy(vocab)), 2),
        "row_terms": (lambda: KERNELS.row_terms(rows, CrossEntropy(vocab).sums), 1),
        "pair": (lambda: KERNELS.pair_terms_and_grad(pairs, coef_T), 3),
    }
    call, num_matrices = calls[kernel]
    return do_bench(call, warmup=15, rep=60, return_mode="median") / 1e3, num_matrices * logits.nbytes


def run_kernels(out: Path) -> list[str]:
    """Time of the Triton kernels alone, as a share of a copy's that moves the bytes that must be moved."""
    import torch
    import triton
    from triton.testing import do_bench

    whole = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    rate = 2 * whole.numel() / do_bench(whole.clone, return_mode="median") * 1e3
    del whole
    found, lines = [], [f"copy {rate / 1e12:.2f} TB/s"]
    for kernel, tokens, vocab, dtype in _ALONE:
        seconds, moved = time_alone(kernel, tokens, vocab, dtype)
        share = moved / rate / seconds
        found.append({"kernel": kernel, "shape": [tokens, vocab], "dtype": dtype, "seconds": seconds, "of_copy": share})
        lines.append(f"{kernel:10} {tokens}x{vocab} {dtype:9} {seconds * 1e3:7.3f} ms  {share:4.0%} of a copy")
    table = {
        "device": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "copy_bytes_per_second": rate,
        "rows": found,
    }
    (out / "kernels.json").write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    # The benchmarks run in other processes, which would find the cached memory occupied.
    torch.cuda.empty_cache()
    return lines
