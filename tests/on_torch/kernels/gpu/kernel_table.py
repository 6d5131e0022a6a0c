"""Compile every Triton kernel for GPU targets, without a GPU, and print its resources. `make kernels` runs this.

    python tests/on_torch/kernels/gpu/kernel_table.py [--target sm_90 ...] [--vocab 128256 ...] [--dtype bfloat16 ...]

The host code runs on tensors without memory (device "meta"), and its launches are recorded: sizes, constants and
Triton's specialisation of each argument. Each distinct one is compiled for an explicit target. For NVIDIA's chips the
loops are read in the machine code: instructions and those of the special function unit per logit, exchanges between
threads, width of accesses; and for sm_90 the time predicted from them, as a share of a copy's (`predicted`).
--json FILE writes the table to a file.

Exits with 1 on an error, on a register spill on an NVIDIA target, or if a kernel needs too much shared memory.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loss_core.row_terms import Coefficients, CrossEntropy, Sums
from loss_core_torch.kernels import (
    BothWanted,
    HeadOperands,
    Linear,
    LinearPairs,
    PairCoefficients,
    Pairs,
    Rows,
    Wanted,
    linear_pairs,
    linear_rows,
)
from loss_core_torch.kernels.gpu import GpuKernels, sizes
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.kernels.gpu.sizes import LaunchParameters
from loss_core_torch.tracing import compute_dtype

sys.path.append(str(Path(__file__).resolve().parents[3]))
from on_torch.kernels.gpu import machine_code
from on_torch.kernels.gpu.machine_code import Loop
from on_torch.kernels.gpu.predicted import CHIPS, Plan, share_of_copy

# Target, and the most shared memory of a program, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
VOCABS = (32000, 128256, 151936, 262144)
# Unaligned rows, which are another specialisation.
RAGGED = 50257
DTYPES = ("float32", "bfloat16", "float16", "float64")
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_ITEM_BYTES = {pointer: dtype.itemsize for dtype, pointer in _POINTERS.items()}


@dataclass(frozen=True)
class Recorded:
    """One specialisation of one kernel.

    Attributes:
        kernel: the @triton.jit function.
        types: Triton's type of each argument, nested for tuples; "constexpr" for constants.
        constants: values by path of the argument: its index, and for tuples the indices within.
        divisible: paths of the arguments that are known to be multiples of 16.
        size: sizes it is compiled with.
        dtype: dtype of the logits, for the table.
        vocab: columns.
    """

    kernel: Any
    types: tuple[Any, ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    divisible: tuple[tuple[int, ...], ...]
    size: LaunchParameters
    dtype: str
    vocab: int

    @property
    def plan(self) -> Plan | None:
        """Bytes that the kernel moves per logit; None for the elementwise kernel."""
        read = [x for name, x in self.pointers.items() if name in ("logits_ptr", "student_ptr", "teacher_ptr")]
        if not read:
            return None
        stored = self.pointers.get("grad_ptr", 0)
        return Plan(sum(read) + stored, sum(read) if self.name in ("row_kernel", "pair_kernel") else 0)

    @property
    def block(self) -> int:
        """Columns of a block."""
        return int(self.value("BLOCK_V" if "BLOCK_V" in [x.name for x in self.kernel.params] else "BLOCK"))

    @property
    def pointers(self) -> dict[str, int]:
        """Bytes per element of each pointer."""
        names = [parameter.name for parameter in self.kernel.params]
        pairs = zip(names, self.types, strict=True)
        return {name: _ITEM_BYTES[kind] for name, kind in pairs if kind in _ITEM_BYTES}

    def value(self, name: str, otherwise: Any = None) -> Any:
        """The value of a constant argument."""
        index = [parameter.name for parameter in self.kernel.params].index(name)
        return dict(self.constants).get((index,), otherwise)

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Compiled:
    """Resources of one specialisation on one target; `problem` is empty if there is none."""

    what: Recorded
    target: str
    warps: int
    registers: int
    spilled: int  # bytes of local memory per thread
    shared: int
    ttir: str
    problem: str
    cubin: bytes = field(default=b"", repr=False)  # empty if the target is not NVIDIA's, or it did not compile

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Loops of the machine code, read on demand: disassembling takes as long as compiling."""
        return machine_code.loops(self.cubin) if self.cubin else []

    @property
    def logits_per_iteration(self) -> int:
        """Logits per thread in one iteration of a loop."""
        return max(self.what.block // (32 * self.what.size.num_warps), 1)

    @property
    def main_loops(self) -> list[Loop]:
        """Loops that read; the others write the zeros of ignored rows."""
        return [loop for loop in self.loops if loop.load_bits]

    @property
    def per_logit(self) -> list[float]:
        """Instructions per logit of each loop that reads."""
        return [loop.count / self.logits_per_iteration for loop in self.main_loops]

    def predicted(self, chip: str, vocab: int) -> float:
        """Predicted share of a copy's rate; 0 if the loops are unknown."""
        if not self.per_logit or self.what.plan is None:
            return 0.0
        threads = 32 * self.what.size.num_warps
        columns = self.what.size.piece_v or vocab
        return share_of_copy(CHIPS[chip], self.what.plan, columns, self.registers, threads, sum(self.per_logit))


class _Specialisation:
    """Triton's specialisation of a launch: 1 and None are constants, multiples of 16 are known as such."""

    def __init__(self) -> None:
        self.constants: list[tuple[tuple[int, ...], Any]] = []
        self.divisible: list[tuple[int, ...]] = []

    def type_of(self, path: tuple[int, ...], value: Any, annotation: str = "") -> Any:
        """Triton's type of an argument."""
        if isinstance(value, tuple):
            inner = [self.type_of((*path, index), x) for index, x in enumerate(value)]
            return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.itemsize % 16 == 0:
                self.divisible.append(path)
            return _POINTERS[value.dtype]
        if isinstance(value, float):
            return annotation or "fp32"
        if value is None or value == 1:
            self.constants.append((path, value))
            return "constexpr"
        if value % 16 == 0:
            self.divisible.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"


def specialise(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], size: Any, dtype: str, vocab: int
) -> Recorded:
    """One launch as Triton would compile it."""
    found, types = _Specialisation(), []
    values = [*args, *(None for _ in constants)]
    for index, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        if parameter.name in constants:
            types.append("constexpr")
            found.constants.append(((index,), constants[parameter.name]))
        else:
            types.append(found.type_of((index,), value, parameter.annotation_type))
    return Recorded(kernel, tuple(types), tuple(found.constants), tuple(found.divisible), size, dtype, vocab)


def launches(vocab: int, dtype: str) -> list[Recorded]:
    """Launches of the losses for many rows, for a few rows, and for a batched slice."""
    kind: torch.dtype = getattr(torch, dtype)
    found: list[Recorded] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, size: Any, **constants: Any) -> None:
        found.append(specialise(kernel, args, constants, size, dtype, vocab))

    # operand_dtype as on a GPU.
    kernels = GpuKernels(Launcher(launch=record, operand_dtype=lambda dtype, _: dtype))
    for lead, sliced in (((8192,), False), ((4,), False), ((3, 5, 7), True)):
        whole = torch.empty(*lead[:-1], lead[-1] + sliced, vocab, dtype=kind, device="meta")
        _launch_all(kernels, whole[..., : lead[-1], :])
    if vocab == RAGGED:
        # As general as it gets: leading dimensions that do not merge, strided columns, strides beyond 32 bits.
        apart = torch.empty(2**36, dtype=kind, device="meta").as_strided(
            (3, 5, 7, vocab), (2**34, 2**31 + 1, 2**20 + 1, 3)
        )
        _launch_all(kernels, apart)
    hidden, weight = (torch.empty(n, 64, dtype=kind, device="meta") for n in (4096, vocab))
    _launch_linear(kernels, hidden, weight)
    _launch_linear_pairs(kernels, hidden, weight)
    return found


def _launch_all(kernels: GpuKernels, logits: torch.Tensor) -> None:
    num_tokens, vocab = logits.shape[:-1].numel(), logits.shape[-1]
    labels_T = torch.empty(num_tokens, dtype=torch.int64, device="meta")
    coef_T = torch.empty(num_tokens, dtype=compute_dtype(logits.dtype), device="meta")
    # Every option once with and once without.
    for keep_T, objective in ((None, CrossEntropy(vocab)), (labels_T != 0, CrossEntropy(vocab, 0.1))):
        rows, pairs = Rows(logits, labels_T, keep_T), Pairs(logits, logits, keep_T, 0.5)
        coefficients = Coefficients(coef_T, coef_T, coef_T if objective.sums.z_sum else None)
        terms = kernels.row_terms(rows, objective.sums)
        kernels.row_grad(rows, terms, coefficients)
        kernels.row_grad(rows, terms, coefficients, out=logits)
        _, grad, _ = kernels.row_terms_and_grad(rows, coef_T, objective)
        kernels.row_grad(rows, terms, coefficients._replace(factor=coef_T.sum()), grad)
        terms_of_pairs = kernels.pair_terms(pairs)
        for of_teacher in (False, True):
            kernels.pair_grad(pairs, terms_of_pairs, PairCoefficients(coef_T, coef_T, of_teacher))
            kernels.pair_grad(pairs, terms_of_pairs, PairCoefficients(coef_T, coef_T, of_teacher, 0.5))
        kernels.pair_mixture(pairs, terms_of_pairs, 0.5)
        _, grad = kernels.pair_terms_and_grad(pairs, coef_T)
        kernels.pair_grad(pairs, terms_of_pairs, PairCoefficients(coef_T, coef_T, False, factor=coef_T.sum()), grad)
    # Entropies, without and with every option.
    for rows in (Rows(logits, labels_T, None), Rows(logits, labels_T, labels_T != 0, 0, 30.0, coef_T)):
        terms = kernels.row_terms(rows, Sums(e=True))
        kernels.row_grad(rows, terms, Coefficients(coef_T, coef_T, slope=coef_T))
        # 60 targets per row, which m and s exclude.
        rows = rows._replace(labels_T=torch.empty(num_tokens, 60, dtype=torch.int64, device="meta"))
        terms = kernels.row_terms(rows, Sums())
        kernels.row_grad(rows, terms, Coefficients(coef_T, terms.t))


def _launch_linear(kernels: GpuKernels, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """In one pass over the logits and in two, with and without a softcap."""
    labels_T = torch.empty(len(hidden), dtype=torch.int64, device="meta")
    coef_T = torch.empty(len(hidden), dtype=compute_dtype(hidden.dtype), device="meta")
    for softcap, objective in (
        (0.0, CrossEntropy(len(weight))),
        (30.0, CrossEntropy(len(weight))),
        (30.0, CrossEntropy(len(weight), 0.1)),
    ):
        linear = Linear(HeadOperands(hidden, weight, hidden.dtype), labels_T, softcap=softcap)
        linear_rows.terms_and_grads(kernels, linear, coef_T, objective, Wanted(True, True))
        terms, logits = linear_rows.terms(kernels, linear, objective.sums, True)
        coefficients = Coefficients(coef_T, coef_T, coef_T if objective.sums.z_sum else None)
        linear_rows.grads(kernels, linear, terms, coefficients, Wanted(True, True), logits)
    kernels.scaled(torch.empty(weight.shape, dtype=coef_T.dtype, device="meta"), coef_T.sum(), weight.dtype)


def _launch_linear_pairs(kernels: GpuKernels, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Gradients in place of the logits, and in separate memory in the dtype of the products."""
    coef_T = torch.empty(len(hidden), dtype=compute_dtype(hidden.dtype), device="meta")
    head = HeadOperands(hidden, weight, hidden.dtype)
    linear = LinearPairs(head, head, None, 0.5)
    for beta in (0.0, 0.5):
        for of_teacher in (False, True):
            want = BothWanted(Wanted(True, True), Wanted(of_teacher, of_teacher))
            linear_pairs.loss_and_grads(kernels, linear, coef_T, beta, want)


def compile_one(what: Recorded, target: str) -> Compiled:
    """Compile one specialisation for one target."""
    gpu, max_shared = TARGETS[target]
    names = [parameter.name for parameter in what.kernel.params]
    source = ASTSource(
        what.kernel,
        signature=dict(zip(names, what.types, strict=True)),
        constexprs=dict(what.constants),
        attrs={path: [["tt.divisibility", 16]] for path in what.divisible},
    )
    warps = sizes.warps_on(what.size, amd=gpu.backend == "hip")
    try:
        options = {"num_warps": warps, "num_stages": what.size.num_stages, "enable_fp_fusion": True}
        made = triton.compile(source, target=gpu, options=options)
        if gpu.backend == "cuda":
            cubin = made.asm["cubin"]
            registers, spilled = machine_code.resources(cubin)
        else:
            text, cubin = made.asm["amdgcn"], b""
            registers = _number(r"\.vgpr_count:\s*(\d+)", text)
            spilled = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    except Exception as error:  # a kernel that does not compile is a row of the table
        return Compiled(what, target, warps, 0, 0, 0, "", f"{type(error).__name__}: {str(error)[-500:]}")
    shared = made.metadata.shared
    problems = []
    if spilled and gpu.backend == "cuda":
        problems.append(f"spills {spilled} bytes")
    if shared > max_shared:
        problems.append(f"shared memory {shared} > {max_shared}")
    return Compiled(what, target, warps, registers, spilled, shared, str(made.asm["ttir"]), ", ".join(problems), cubin)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the compiler's report: {text[:300]!r}")
    return int(found[1])


def compile_all(what: Iterable[Recorded], targets: Iterable[str]) -> Iterator[Compiled]:
    """Compile each distinct specialisation for each target."""
    distinct = list(dict.fromkeys(what))
    for target in targets:
        for one in distinct:
            yield compile_one(one, target)


def line(row: Compiled) -> str:
    """One line of the table."""
    what = row.what
    loops = row.main_loops
    counts = "+".join(f"{count:.1f}" for count in row.per_logit)
    special = sum(loop.special for loop in loops) / row.logits_per_iteration
    bits = "/".join(str(min(widths)) for widths in zip_widths(loops))
    plan = f"{what.plan.once}+{what.plan.again}" if what.plan else ""
    predicted = " ".join(f"{row.predicted(chip, what.vocab):4.0%}" for chip in CHIPS) if row.target == "sm_90" else ""
    return (
        f"{what.name.removesuffix('_kernel'):10} {row.target:7} {what.dtype:9} {what.vocab:6} {what.block:6} "
        f"{row.warps:5} {row.registers:9} {row.spilled:7} {row.shared:6} {counts:>11} {special:7.1f} "
        f"{sum(loop.exchanges for loop in loops):9} {bits:>7} {plan:>5} {predicted:>9}  {' '.join(flags_of(what))} "
        f"{row.problem}"
    ).rstrip()


def zip_widths(loops: list[Loop]) -> list[tuple[int, ...]]:
    """Widths of all loads, and of all stores if there are any."""
    loads = tuple(bits for loop in loops for bits in loop.load_bits)
    stores = tuple(bits for loop in loops for bits in loop.store_bits)
    return [widths for widths in (loads, stores) if widths]


def flags_of(what: Recorded) -> list[str]:
    """What distinguishes this specialisation."""
    names = [parameter.name for parameter in what.kernel.params]
    switches = ("OF_TEACHER", "MIXTURE", "SOFTCAP", "EXCLUDE_TARGETS", "PREFILLED")
    flags = [name.lower() for name in switches if name in names and what.value(name)]
    # Optional arguments that are not None.
    optional = {"keep_ptr": "keep", "z_sum_ptr": "z_sum", "uniform_ptr": "uniform", "e_ptr": "entropy",
                "slope_ptr": "entropy", "inv_temp_ptr": "temperature"}  # fmt: skip
    flags += [flag for name, flag in optional.items() if name in names and what.value(name, 0) is not None]
    if "W" in names and what.value("W") == 1:
        flags.append("unaligned")
    for name, kind in zip(names, what.types, strict=True):
        if name.endswith("layout") and (kind.sizes or kind.stride_v != "constexpr"):
            flags.append(f"{name}:{len(kind.strides)}{'' if kind.stride_v == 'constexpr' else '+strided'}")
    if "grad_ptr" in what.pointers and "logits_ptr" in what.pointers:
        read, stored = what.pointers["logits_ptr"], what.pointers["grad_ptr"]
        flags += [f"to {8 * stored} bits"] if read != stored else []
    return flags


def record(row: Compiled) -> dict[str, Any]:
    """One row of the JSON."""
    return {
        "kernel": row.what.name,
        "target": row.target,
        "dtype": row.what.dtype,
        "vocab": row.what.vocab,
        "flags": flags_of(row.what),
        "block": row.what.block,
        "warps": row.warps,
        "registers": row.registers,
        "spilled": row.spilled,
        "shared": row.shared,
        "loops": [
            {
                "instructions_per_logit": loop.count / row.logits_per_iteration,
                "special_per_logit": loop.special / row.logits_per_iteration,
                "exchanges": loop.exchanges,
                "load_bits": sorted(set(loop.load_bits)),
                "store_bits": sorted(set(loop.store_bits)),
            }
            for loop in row.main_loops
        ],
        "bytes_per_logit": [row.what.plan.once, row.what.plan.again] if row.what.plan else None,
        "predicted_share_of_copy": {chip: round(row.predicted(chip, row.what.vocab), 3) for chip in CHIPS}
        if row.target == "sm_90"
        else None,
        "problem": row.problem,
    }


HEADER = (
    "kernel     target  dtype      vocab  BLOCK warps registers spilled shared per logit   special exchanges    bits "
    f"bytes {' '.join(CHIPS)}"
)


def main() -> int:
    """Print the table; 1 if there is a problem in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--vocab", action="append", type=int)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing is compiled then.")
    start = time.perf_counter()
    what = [
        one
        for dtype in options.dtype or DTYPES
        for vocab in options.vocab or (*VOCABS, RAGGED)
        for one in launches(vocab, dtype)
    ]
    print(HEADER)
    rows = []
    for row in compile_all(what, options.target or TARGETS):
        print(line(row), flush=True)
        rows.append(row)
    bad = sum(bool(row.problem) for row in rows)
    if options.json:
        table = {"triton": triton.__version__, "rows": [record(row) for row in rows]}
        options.json.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    seconds = time.perf_counter() - start
    print(f"{len(rows)} kernels compiled, {bad} with a problem, {seconds:.0f} s, triton {triton.__version__}")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
