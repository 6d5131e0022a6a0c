"""Everything that needs a GPU, in one command: check, compute-sanitizer, kernels, benchmarks, and the goals.

    python examples/gpu_report.py                               # under 8 minutes on an H100
    python examples/gpu_report.py --device cpu --small          # the same steps on a CPU, at small sizes
    python examples/gpu_report.py --dry-run                     # print the steps

Runs from a checkout without an install: `PYTHONPATH=.:backends`. Needs torch and Triton; the baselines that are
importable are measured as well, and those whose wheels are in --wheels. Every step has a time limit and writes its
results into --out when it ends, JSON and report.md, so that an interrupted session keeps them.
Exit code: 0; 1 if a check failed or a result was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_kernels import GIB, SANITIZER_SECONDS, run_kernels, run_sanitizer

from loss_core import (
    LOSS_CONFIG_REGISTRY,
    FusedLinearCEConfig,
    FusedLinearKDConfig,
    FusedLinearLogProbsConfig,
    KDLossConfig,
    LossConfig,
    MaskedCrossEntropyConfig,
)
from loss_core.bench import bench
from loss_core.bench.report import BenchReport, BenchRow, best_baseline_of, best_flag_of, roofline_of
from loss_core.bench.tables import memory_text, time_text
from loss_core.bench.text import bench_text, markdown
from loss_core.check import check
from loss_core.check.report import Report
from loss_core.dispatch.flags import flag_status

_LOGITS, _FUSED, _KD = MaskedCrossEntropyConfig(reduction="mean"), FusedLinearCEConfig(reduction="mean"), KDLossConfig()
_TORCH_BASELINES = ("compiled-torch", "torch-linear-ce", "cce", "liger", "te", "nemo", "quack")
_JAX_BASELINES = ("plain-jax", "optax", "jax-cce", "tokamax")


@dataclass(frozen=True)
class Step:
    """One benchmark of the session.

    Attributes:
        name: part of the name of the result file.
        config: the loss.
        shapes: each (T, V) or (T, V, H).
        seconds: time limit.
        flags: to measure.
        framework: its baselines are measured as well.
        ignored: share of labels that are ignored.
        of_roofline: goal, as roofline / time; 0: none.
        max_bytes: goal for the peak memory above the inputs, at the first shape; 0: none.
    """

    name: str
    config: LossConfig
    shapes: tuple[tuple[int, ...], ...]
    seconds: float
    flags: tuple[str, ...] = ("torch:triton",)
    framework: str = "torch"
    ignored: float = 0.0
    of_roofline: float = 0.0
    max_bytes: int = 0


_LLAMA, _QWEN = (8192, 128_256, 4096), (8192, 151_936, 4096)

_JAX = {"framework": "jax", "flags": ("jax:xla",)}
# The most important first, as an interrupted session lacks the last. torch:eager and torch:compile take four to twenty
# times as long (8192x128256, cross entropy, on an H200).
STEPS = (
    Step("fused", _FUSED, (_QWEN, _LLAMA), 110, of_roofline=1 / 1.15, max_bytes=3 * GIB),
    Step("ce", _LOGITS, ((8192, 128_256), (8192, 32_000)), 60, of_roofline=0.85),
    Step("kd", _KD, ((4096, 128_256), (8192, 32_000)), 45, of_roofline=0.80),
    Step("log-probs", FusedLinearLogProbsConfig(entropy=True), ((4096, 131_072, 4096),), 40, max_bytes=2_400_000_000),
    Step("fused-kd", FusedLinearKDConfig(), ((4096, 128_256, 4096),), 40),
    Step("fused-half-ignored", _FUSED, (_LLAMA,), 40, ignored=0.5),
    Step("fused-gemma", _FUSED, ((16_384, 248_320, 2048),), 60),
    Step("jax-ce", _LOGITS, ((8192, 128_256),), 25, **_JAX),
    Step("jax-kd", _KD, ((4096, 128_256),), 25, **_JAX),
)
_CHECK_SECONDS, _KERNELS_SECONDS = 120.0, 30.0
# Rows that several programs share: their shape and cases.
_LONG_ROWS, _LONG_ROW_CASES = (6, 70_001), ["basic", "minus-inf", "huge-logits", "smoothing", "metrics", "ruled-out"]
# Ordered by compile time, the longest last.
_CHECKED = ("torch:triton", "torch:plain", "torch:eager", "torch:compile")


def small(step: Step) -> Step:
    """The step at sizes for a CPU, without goals."""
    shapes = tuple((t // 128, v // 64 + 1, *(h // 64 for h in rest)) for t, v, *rest in step.shapes)
    return replace(step, shapes=shapes, of_roofline=0.0, max_bytes=0)


class _DeadlineError(Exception):
    """Raised between two cases of a check, after its deadline."""


def run_checks(device: str, deadline: float, quick: bool) -> Iterator[Report]:
    """Reports of every flag, dtype and loss, until the deadline."""
    only = ["basic", "strided", "mean"] if quick else None
    if device != "cpu":
        for dtype in ("bfloat16", "float32"):
            losses = ["MaskedCrossEntropy", "KDLoss"]
            report = check(
                losses, ["torch:triton"], dtypes=[dtype], shape=_LONG_ROWS, only=_LONG_ROW_CASES, device=device
            )
            print(report, flush=True)
            yield report

    def check_time(*_: object) -> None:
        if time.perf_counter() > deadline:
            raise _DeadlineError

    for flag in _CHECKED:
        if not flag_status(flag).usable:
            continue
        for dtype in ("bfloat16", "float32", "float16", "float64"):
            for loss in LOSS_CONFIG_REGISTRY:
                try:
                    report = check(loss, [flag], dtypes=[dtype], only=only, device=device, progress=check_time)
                except _DeadlineError:
                    print(f"check: the time is used up at {flag} {dtype} {loss}")
                    return
                if report.rows:  # empty if the flag does not have this loss
                    print(report, flush=True)
                    yield report


def add_wheels(folder: Path, out: Path) -> None:
    """Make pure Python wheels importable, in this process and in those of the benchmark."""
    for wheel in sorted(folder.glob("*-none-any.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(out / "site")
    if (out / "site").is_dir():
        sys.path.append(str(out / "site"))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(out / "site"))))


def run_step(
    step: Step, device: str, rounds: int, seconds: float, save: Callable[[str, BenchReport], None]
) -> BenchReport:
    """Run one benchmark; its report is saved after every call."""
    report = bench(
        step.config,
        [flag for flag in step.flags if flag_status(flag).usable],
        shapes=step.shapes,
        dtypes=["bfloat16"],
        device=device,
        ignored=step.ignored,
        baselines=_TORCH_BASELINES if step.framework == "torch" else _JAX_BASELINES,
        rounds=rounds,
        timeout=seconds,
        time_limit=seconds,
        save=lambda report: save(step.name, report),
    )
    print(bench_text(report), flush=True)
    return report


def against_goal(step: Step, group: Sequence[BenchRow]) -> str:
    """Line of the summary: time, memory, goals and the best baseline of a call."""
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
    if step.max_bytes and ours.peak is not None and group[0].shape == step.shapes[0]:
        goal = memory_text(step.max_bytes)
        parts.append(f"(goal {goal}: {'met' if ours.peak <= step.max_bytes else 'NOT met'})")
    if baseline is not None and baseline.seconds:
        parts.append(
            f"{ours.seconds / baseline.seconds:.2f} of {baseline.implementation}'s {time_text(baseline.seconds)}"
        )
    return "  ".join(parts)


def plan(steps: Sequence[Step]) -> str:
    """The steps and their time limits."""
    lines = [f"{'check':19}{_CHECK_SECONDS:4.0f} s", f"{'kernels':19}{_KERNELS_SECONDS:4.0f} s"]
    for step in steps:
        sizes = ", ".join("x".join(map(str, shape)) for shape in step.shapes)
        lines.append(f"{step.name:19}{step.seconds:4.0f} s  {type(step.config).__name__} {sizes}")
    lines.append(f"{'sanitizer':19}{SANITIZER_SECONDS:4.0f} s")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="such as cuda (default) or cpu")
    parser.add_argument("--small", action="store_true", help="small sizes and a short check, to try the script")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and leave")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="folder with wheels of baselines")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="check, kernels, sanitizer, or names of benchmarks")
    parser.add_argument("--rounds", type=int, default=7, help="of each benchmark (default 7)")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no step is begun (default 7.5)")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder for the results")
    options = parser.parse_args(argv)
    steps = [small(step) if options.small else step for step in STEPS]
    names = ["check", "kernels", *(step.name for step in steps), "sanitizer"]
    wanted = options.only or names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only {unknown[0]}: choose among {', '.join(names)}")
    if options.dry_run:
        print(plan(steps))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    add_wheels(options.wheels, options.out)
    start = time.perf_counter()
    failed = False
    summary: list[str] = []
    pages: list[str] = []

    if "check" in wanted:
        reports = []
        for report in run_checks(options.device, start + _CHECK_SECONDS, options.small):
            reports.append(report.to_dict())
            (options.out / "check.json").write_text(json.dumps(reports, indent=1) + "\n", "utf-8")
        passed = sum(report["passed"] for report in reports)
        failed |= passed < len(reports)
        summary.append(f"check: {passed} of {len(reports)} passed")
    if "kernels" in wanted and options.device != "cpu":
        summary += run_kernels(options.out)
        print("\n".join(summary), flush=True)

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
        except ImportError as error:  # a framework is missing: the other steps still run
            summary.append(f"{step.name:19}not run: {error}")
            continue
        summary += [against_goal(step, group) for group in report.groups()]
        pages += [f"## {step.name}", "", markdown(report)]
        failed |= any(row.wrong or row.error for row in report.rows if row.kind == "flag")
        write_page(options.out, summary, pages)
    if "sanitizer" in wanted:
        outcome = run_sanitizer(options.device, options.out)
        failed |= "FAILED" in outcome
        summary.append(f"sanitizer: {outcome}")
    summary.insert(0, f"after {time.perf_counter() - start:.0f} s")
    write_page(options.out, summary, pages)
    print("", *summary, sep="\n")
    return 1 if failed else 0


def write_page(out: Path, summary: Sequence[str], pages: Sequence[str]) -> None:
    """Write report.md from the results so far."""
    text = "\n".join(["# GPU report", "", "```text", *summary, "```", "", *pages])
    (out / "report.md").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        sys.exit(130)
