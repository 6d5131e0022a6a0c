"""Compile every Triton kernel for real GPUs, without one, and print what each takes. `make kernels` runs this.

    python tests/on_torch/kernels/gpu/kernel_table.py [--target sm_90 ...] [--vocab 128256 ...] [--dtype bfloat16 ...]

The real launch functions run on tensors without memory (device "meta"), and what they would launch is
recorded: sizes, constants and the specialisation that Triton's launcher makes of each argument. Each
distinct one is compiled with an explicit target. Exits with 1 on an error, on a register spill on an NVIDIA
target, or when the shared memory is more than the chip has.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loss_core.row_terms import Coefficients, Objective
from loss_core_torch.kernels import Into, Linear, PairCoefficients, Pairs, Rows, Wanted
from loss_core_torch.kernels.gpu import GpuKernels, sizes
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.kernels.gpu.sizes import LaunchParameters
from loss_core_torch.tracing import compute_dtype

# Target, and the shared memory that one program may have, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
VOCABS = (32000, 128256, 151936, 262144)
# No multiple of anything: unaligned rows take another specialisation.
RAGGED = 50257
DTYPES = ("float32", "bfloat16", "float16", "float64")
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Recorded:
    """One specialisation of one kernel.

    Attributes:
        kernel: the @triton.jit function.
        types: Triton's type of each argument, nested where the argument is; "constexpr" for constants.
        constants: value by path of the argument: its place, and where it is nested the places within.
        divisible: paths of the arguments that are known to be multiples of 16.
        size: how it is compiled; in how many parts a row is cut plays no role there.
        dtype: of the logits, for the table.
    """

    kernel: Any
    types: tuple[Any, ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    divisible: tuple[tuple[int, ...], ...]
    size: LaunchParameters
    dtype: str

    def value(self, name: str, otherwise: Any = None) -> Any:
        """The constant that an argument is."""
        place = [parameter.name for parameter in self.kernel.params].index(name)
        return dict(self.constants).get((place,), otherwise)

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Compiled:
    """What one specialisation takes on one target; `problem` is empty when all is well."""

    what: Recorded
    target: str
    warps: int
    registers: int
    spilled: int  # bytes of local memory per thread
    shared: int
    ttir: str
    problem: str


class _Specialisation:
    """As Triton's launcher specialises: 1 and None become constants, multiples of 16 are known as such."""

    def __init__(self) -> None:
        self.constants: list[tuple[tuple[int, ...], Any]] = []
        self.divisible: list[tuple[int, ...]] = []

    def type_of(self, path: tuple[int, ...], value: Any, annotation: str = "") -> Any:
        """Triton's type of an argument."""
        if isinstance(value, tuple):
            inner = [self.type_of((*path, place), x) for place, x in enumerate(value)]
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


def specialise(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], size: Any, dtype: str) -> Recorded:
    """One launch as Triton would compile it."""
    found, types = _Specialisation(), []
    values = [*args, *(None for _ in constants)]
    for place, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        if parameter.name in constants:
            types.append("constexpr")
            found.constants.append(((place,), constants[parameter.name]))
        else:
            types.append(found.type_of((place,), value, parameter.annotation_type))
    size = dataclasses.replace(size, split=1)
    return Recorded(kernel, tuple(types), tuple(found.constants), tuple(found.divisible), size, dtype)


def launches(vocab: int, dtype: str) -> list[Recorded]:
    """What the losses launch for many rows, for a few rows, and for a batched slice."""
    kind: torch.dtype = getattr(torch, dtype)
    found: list[Recorded] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, size: Any, **constants: Any) -> None:
        found.append(specialise(kernel, args, constants, size, dtype))

    # Operands as on a GPU, which the device here is not.
    kernels = GpuKernels(Launcher(start=record, operand_dtype=lambda dtype, _: dtype))
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
    return found


def _launch_all(kernels: GpuKernels, logits: torch.Tensor) -> None:
    num_tokens, vocab = logits.shape[:-1].numel(), logits.shape[-1]
    labels_T = torch.empty(num_tokens, dtype=torch.int64, device="meta")
    coef_T = torch.empty(num_tokens, dtype=compute_dtype(logits.dtype), device="meta")
    # Every option once with and once without.
    for keep_T, objective in ((None, Objective(vocab)), (labels_T != 0, Objective(vocab, 0.1))):
        rows, pairs = Rows(logits, labels_T, keep_T), Pairs(logits, logits, keep_T, 0.5)
        coefficients = Coefficients(coef_T, coef_T, coef_T if objective.needs_z_sum else None)
        terms = kernels.row_terms(rows, objective)
        kernels.row_grad(rows, terms, coefficients)
        kernels.row_grad(rows, terms, coefficients, Into(logits))
        _, grad = kernels.row_terms_and_grad(rows, coef_T, objective)
        kernels.row_grad(rows, terms, coefficients, Into(grad, coef_T.sum()))
        terms_of_pairs = kernels.pair_terms(pairs)
        for of_teacher in (False, True):
            kernels.pair_grad(pairs, terms_of_pairs, PairCoefficients(coef_T, coef_T, of_teacher))
        _, grad = kernels.pair_terms_and_grad(pairs, coef_T)
        kernels.pair_grad(pairs, terms_of_pairs, PairCoefficients(coef_T, coef_T, False), Into(grad, coef_T.sum()))


def _launch_linear(kernels: GpuKernels, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """In one visit and in two, with a softcap and without."""
    labels_T = torch.empty(len(hidden), dtype=torch.int64, device="meta")
    coef_T = torch.empty(len(hidden), dtype=compute_dtype(hidden.dtype), device="meta")
    for softcap, objective in (
        (0.0, Objective(len(weight))),
        (30.0, Objective(len(weight))),
        (30.0, Objective(len(weight), 0.1)),
    ):
        linear = Linear(hidden, weight, labels_T, 0, softcap, hidden.dtype, objective)
        kernels.linear_terms_and_grads(linear, coef_T, Wanted(True, True))
        terms, logits = kernels.linear_terms(linear, True)
        kernels.linear_grads(linear, terms, coef_T, Wanted(True, True), logits)


def compile_one(what: Recorded, target: str) -> Compiled:
    """Compile one specialisation for one target."""
    gpu, room = TARGETS[target]
    names = [parameter.name for parameter in what.kernel.params]
    source = ASTSource(
        what.kernel,
        signature=dict(zip(names, what.types, strict=True)),
        constexprs=dict(what.constants),
        attrs={path: [["tt.divisibility", 16]] for path in what.divisible},
    )
    warps = sizes.warps_on(what.size, amd=gpu.backend == "hip")
    try:
        made = triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": what.size.num_stages})
        registers, spilled = _resources(made.asm, gpu)
    except Exception as error:  # a kernel that does not compile is a row of the table
        return Compiled(what, target, warps, 0, 0, 0, "", f"{type(error).__name__}: {str(error)[-500:]}")
    shared = made.metadata.shared
    problems = []
    if spilled and gpu.backend == "cuda":
        problems.append(f"spills {spilled} bytes")
    if shared > room:
        problems.append(f"shared memory {shared} > {room}")
    return Compiled(what, target, warps, registers, spilled, shared, str(made.asm["ttir"]), ", ".join(problems))


def _resources(asm: Any, gpu: GPUTarget) -> tuple[int, int]:
    """Registers, and bytes of local memory, of a thread."""
    if gpu.backend == "hip":
        text = asm["amdgcn"]
        return _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    # STACK as well: what ptxas spills lies on the stack of the thread.
    return _number(r"REG:(\d+)", report), _number(r"STACK:(\d+)", report) + _number(r"LOCAL:(\d+)", report)


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
    names = [parameter.name for parameter in what.kernel.params]
    block = next(what.value(name) for name in ("BLOCK_V", "BLOCK_PARTS") if name in names)
    flags = [name.lower() for name in ("OF_TEACHER", "SOFTCAP") if name in names and what.value(name)]
    # Arguments that may be None, where they are not.
    optional = {"keep_ptr": "keep", "z_sum_ptr": "z_sum", "uniform_ptr": "uniform", "unless_one_ptr": "unless_one"}
    flags += [flag for name, flag in optional.items() if name in names and what.value(name, 0) is not None]
    for place, kind in enumerate(what.types):
        if names[place].endswith("layout") and (kind.sizes or kind.stride_v != "constexpr"):
            flags.append(f"{names[place]}:{len(kind.strides)}{'' if kind.stride_v == 'constexpr' else '+strided'}")
    return (
        f"{what.name.removesuffix('_kernel'):10} {row.target:7} {what.dtype:9} {block:6} {row.warps:5} "
        f"{what.size.num_stages:6} {row.registers:9} {row.spilled:7} {row.shared:7}  {' '.join(flags)} {row.problem}"
    ).rstrip()


HEADER = "kernel     target  dtype      BLOCK warps stages registers spilled  shared"


def main() -> int:
    """Print the table; 1 if there is a problem in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--vocab", action="append", type=int)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
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
    rows, bad = 0, 0
    for row in compile_all(what, options.target or TARGETS):
        print(line(row), flush=True)
        rows, bad = rows + 1, bad + bool(row.problem)
    seconds = time.perf_counter() - start
    print(f"{rows} kernels compiled, {bad} with a problem, {seconds:.0f} s, triton {triton.__version__}")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
