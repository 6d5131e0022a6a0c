"""Everything that a GPU is needed for, in one command: check, compute-sanitizer, benchmark, and how far the goals are.

    python examples/gpu_session.py                               # under 8 minutes on an H100
    python examples/gpu_session.py --device cpu --small          # the same steps on a CPU, at small sizes
    python examples/gpu_session.py --dry-run                     # what would be done

Runs from a checkout without an install: `PYTHONPATH=.:backends`. Needs torch and Triton; the baselines that are
importable are measured beside. Every step has a time limit and writes its results into --out when it ends, so that
a session that is cut off leaves what was done by then. Exit code: 0; 1 when a check failed or a result was wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loss_core import FusedLinearCEConfig, KDLossConfig, LossConfig, MaskedCrossEntropyConfig
from loss_core.bench import bench
from loss_core.bench.report import BenchReport, BenchRow, best_baseline_of, best_flag_of, roofline_of
from loss_core.bench.tables import memory_text, time_text
from loss_core.bench.text import bench_text
from loss_core.check import check
from loss_core.check.report import Report
from loss_core.dispatch.flags import all_flags, flag_status

GIB = 2**30

_LOGITS, _FUSED, _KD = MaskedCrossEntropyConfig(reduction="mean"), FusedLinearCEConfig(reduction="mean"), KDLossConfig()
# The plain form and the best compiled one; the other variants of both are for a longer session.
_TORCH_BASELINES = ("compiled-torch", "torch-linear-ce", "cce", "liger", "te", "nemo")
_JAX_BASELINES = ("plain-jax", "optax", "jax-cce", "tokamax")


@dataclass(frozen=True)
class Step:
    """One benchmark of the session.

    Attributes:
        name: of the file with its results.
        config: the loss.
        shapes: each (T, V) or (T, V, H).
        seconds: time limit.
        framework: whose flags and baselines run.
        ignored: share of labels that are ignored.
        of_roofline: goal, as roofline / time; 0 where there is none.
        most_bytes: goal for the memory above the inputs, at the first shape; 0 where there is none.
    """

    name: str
    config: LossConfig
    shapes: tuple[tuple[int, ...], ...]
    seconds: float
    framework: str = "torch"
    ignored: float = 0.0
    of_roofline: float = 0.0
    most_bytes: int = 0


_LLAMA, _QWEN = (8192, 128_256, 4096), (8192, 151_936, 4096)

# The most important first: what is cut off is at the end.
STEPS = (
    Step("ce", _LOGITS, ((8192, 128_256), (8192, 32_000), (4096, 262_144)), 75, of_roofline=0.85),
    Step("fused", _FUSED, (_QWEN, _LLAMA, (16_384, 248_320, 2048)), 105, of_roofline=1 / 1.2, most_bytes=3 * GIB),
    Step("kd", _KD, ((4096, 128_256),), 35, of_roofline=0.80),
    Step("fused-half-ignored", _FUSED, (_QWEN,), 40, ignored=0.5),
    Step("ce-half-ignored", _LOGITS, ((8192, 128_256),), 25, ignored=0.5),
    Step("jax-ce", _LOGITS, ((8192, 128_256),), 20, framework="jax"),
    Step("jax-fused", _FUSED, (_LLAMA,), 25, framework="jax"),
    Step("jax-kd", _KD, ((4096, 128_256),), 20, framework="jax"),
)
_CHECK_SECONDS, _SANITIZER_SECONDS = 90.0, 45.0


def small(step: Step) -> Step:
    """The step at sizes for a CPU, where no goal applies."""
    shapes = tuple((t // 128, v // 64 + 1, *(h // 64 for h in rest)) for t, v, *rest in step.shapes)
    return replace(step, shapes=shapes, of_roofline=0.0, most_bytes=0)


def run_checks(flags: Sequence[str], device: str, deadline: float, quick: bool) -> Iterator[Report]:
    """Every loss, flag and dtype, one report after the other, until the time is used up."""
    only = ["basic", "strided", "mean"] if quick else None
    for dtype in ("bfloat16", "float32", "float16", "float64"):
        for loss in ("MaskedCrossEntropy", "FusedLinearCrossEntropy", "KDLoss", "TEParallelCrossEntropy"):
            if time.perf_counter() > deadline:
                print(f"check: {loss} {dtype} left out, the time is used up")
                continue
            report = check(loss, flags, dtypes=[dtype], only=only, device=device)
            print(report, flush=True)
            yield report


# One pass over every kernel: small, for each memory access is looked at.
_SANITIZED = """
import sys
from loss_core.check import check
for loss in ("MaskedCrossEntropy", "FusedLinearCrossEntropy", "KDLoss", "TEParallelCrossEntropy"):
    report = check(loss, ["torch:triton"], dtypes=["bfloat16"], only=["basic", "strided", "ragged"], device="cuda")
    print(report)
    if not report.passed:
        sys.exit(1)
"""


def run_sanitizer(device: str, out: Path) -> str:
    """compute-sanitizer over one pass of the Triton kernels; the outcome in words."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if device == "cpu" or tool is None:
        return "not run: " + ("no GPU" if device == "cpu" else "compute-sanitizer is not on PATH")
    # torch's caching allocator would hide an access beyond the end of a tensor.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck", "--error-exitcode", "99",
               sys.executable, "-c", _SANITIZED]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not finished within {_SANITIZER_SECONDS:.0f} s"
    (out / "sanitizer.txt").write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode == 0:
        return "no error found"
    return f"FAILED with exit code {done.returncode}: see {out / 'sanitizer.txt'}"


def run_step(
    step: Step, device: str, rounds: int, seconds: float, save: Callable[[str, BenchReport], None]
) -> BenchReport:
    """One benchmark; its report is saved as it grows."""
    flags = [flag for flag in all_flags() if flag.startswith(f"{step.framework}:") and flag_status(flag).usable]
    report = bench(
        step.config,
        flags,
        shapes=step.shapes,
        dtypes=["bfloat16"],
        device=device,
        ignored=step.ignored,
        peers=_TORCH_BASELINES if step.framework == "torch" else _JAX_BASELINES,
        rounds=rounds,
        timeout=seconds,
        time_limit=seconds,
        save=lambda report: save(step.name, report),
    )
    print(bench_text(report), flush=True)
    return report


def against_goal(step: Step, group: Sequence[BenchRow]) -> str:
    """One line of the summary."""
    head = f"{step.name:19}{'x'.join(map(str, group[0].shape)):19}"
    ours, baseline, roofline = (
        best_flag_of(group, step.framework),
        best_baseline_of(group, step.framework),
        roofline_of(group),
    )
    if ours is None or not ours.seconds or not roofline:
        return f"{head}no result"
    share = roofline / ours.seconds
    parts = [f"{head}{ours.implementation:13} {time_text(ours.seconds):>8}", f"{share:4.0%} of the roofline"]
    if step.of_roofline:
        parts.append(f"(goal {step.of_roofline:.0%}: {'met' if share >= step.of_roofline else 'NOT met'})")
    if ours.peak is not None:
        parts.append(memory_text(ours.peak))
    if step.most_bytes and ours.peak is not None and group[0].shape == step.shapes[0]:
        goal = memory_text(step.most_bytes)
        parts.append(f"(goal {goal}: {'met' if ours.peak <= step.most_bytes else 'NOT met'})")
    if baseline is not None and baseline.seconds:
        parts.append(
            f"{ours.seconds / baseline.seconds:.2f} of {baseline.implementation}'s {time_text(baseline.seconds)}"
        )
    return "  ".join(parts)


def plan(steps: Sequence[Step]) -> str:
    """The steps and their time limits."""
    lines = [f"{'check':19}{_CHECK_SECONDS:4.0f} s", f"{'sanitizer':19}{_SANITIZER_SECONDS:4.0f} s"]
    for step in steps:
        sizes = ", ".join("x".join(map(str, shape)) for shape in step.shapes)
        lines.append(f"{step.name:19}{step.seconds:4.0f} s  {type(step.config).__name__} {sizes}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="such as cuda (default) or cpu")
    parser.add_argument("--small", action="store_true", help="small sizes and a short check, to try the script")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and leave")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="check, sanitizer, or names of benchmarks")
    parser.add_argument("--rounds", type=int, default=7, help="of each benchmark (default 7)")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no step is begun (default 7.5)")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder for the results")
    options = parser.parse_args(argv)
    steps = [small(step) if options.small else step for step in STEPS]
    names = ["check", "sanitizer", *(step.name for step in steps)]
    wanted = options.only or names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only {unknown[0]}: choose among {', '.join(names)}")
    if options.dry_run:
        print(plan(steps))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    failed = False
    summary: list[str] = []

    if "check" in wanted:
        flags = [flag for flag in all_flags() if flag.startswith("torch:") and flag_status(flag).usable]
        reports = []
        for report in run_checks(flags, options.device, start + _CHECK_SECONDS, options.small):
            reports.append(report.to_dict())
            (options.out / "check.json").write_text(json.dumps(reports, indent=1) + "\n", "utf-8")
        passed = sum(report["passed"] for report in reports)
        failed |= passed < len(reports)
        summary.append(f"check: {passed} of {len(reports)} passed ({', '.join(flags)})")
    if "sanitizer" in wanted:
        outcome = run_sanitizer(options.device, options.out)
        failed |= "FAILED" in outcome
        summary.append(f"sanitizer: {outcome}")
        print(summary[-1], flush=True)

    def save(name: str, report: BenchReport) -> None:
        (options.out / f"bench-{name}.json").write_text(report.to_json() + "\n", "utf-8")

    for step in steps:
        if step.name not in wanted:
            continue
        seconds = min(step.seconds, start + 60 * options.minutes - time.perf_counter())
        if seconds < 10:
            summary.append(f"{step.name:19}left out: the time is used up")
            continue
        try:
            report = run_step(step, options.device, options.rounds, seconds, save)
        except ImportError as error:  # a framework that is not here: the other steps go on
            summary.append(f"{step.name:19}not run: {error}")
            continue
        summary += [against_goal(step, group) for group in report.groups()]
        failed |= any(row.wrong or row.error for row in report.rows if row.kind == "flag")
    text = "\n".join([f"summary after {time.perf_counter() - start:.0f} s", *summary])
    (options.out / "summary.txt").write_text(text + "\n", "utf-8")
    print(f"\n{text}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        sys.exit(130)
