"""Compile every Triton kernel for real GPUs, without one, and print what each takes. `make kernels` runs this.

    python tests/kernel_table.py [--target sm_90 ...] [--vocab 128256 ...] [--dtype bfloat16 ...]

The real launch functions run on tensors without memory (device "meta"), and what they would launch is
recorded: sizes, constants and the specialisation that Triton's launcher makes of each argument. Each
distinct one is compiled with an explicit target. Exits with 1 on an error, on a register spill on an NVIDIA
target, or when the shared memory is more than the chip has.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import argparse
import contextlib
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
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loss_core_torch import triton_launch, triton_linear, triton_linear_parallel, triton_sizes
from loss_core_torch.triton_sizes import LaunchParameters
from loss_core_torch.values import compute_dtype

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
        types: Triton's type of each argument, "constexpr" for constants.
        constants: value by place of the argument.
        divisible: places of the arguments that are known to be multiples of 16.
        size: how it is compiled; in how many parts a row is cut plays no role there.
        dtype: of the logits, for the table.
    """

    kernel: Any
    types: tuple[str, ...]
    constants: tuple[tuple[int, Any], ...]
    divisible: tuple[int, ...]
    size: LaunchParameters
    dtype: str


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


def specialise(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], size: Any, dtype: str) -> Recorded:
    """As Triton's launcher does: 1 becomes a constant, multiples of 16 are known as such."""
    types, fixed, divisible = [], [], []
    values = [*args, *(None for _ in constants)]
    for place, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        if parameter.name in constants:
            types.append("constexpr")
            fixed.append((place, constants[parameter.name]))
        elif isinstance(value, torch.Tensor):
            types.append(_POINTERS[value.dtype])
            if value.storage_offset() * value.itemsize % 16 == 0:
                divisible.append(place)
        elif isinstance(value, float):
            types.append(parameter.annotation_type or "fp32")
        elif value == 1:
            types.append("constexpr")
            fixed.append((place, 1))
        else:
            types.append("i32" if -(2**31) <= value < 2**31 else "i64")
            if value % 16 == 0:
                divisible.append(place)
    return Recorded(kernel, tuple(types), tuple(fixed), tuple(divisible), dataclasses.replace(size, split=1), dtype)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]]:
    """Record launches in place of running them."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, size: Any, **constants: Any) -> None:
        seen.append((kernel, args, constants, size))

    with mock.patch.object(triton_launch, "_launch", record):
        yield seen


def launches(vocab: int, dtype: str) -> list[Recorded]:
    """What the losses launch for many rows, for a few rows, and for a batched slice."""
    kind: torch.dtype = getattr(torch, dtype)
    found = []
    with recording() as seen:
        for lead, sliced in (((8192,), False), ((4,), False), ((3, 5, 7), True)):
            whole = torch.empty(*lead[:-1], lead[-1] + sliced, vocab, dtype=kind, device="meta")
            logits = whole[..., : lead[-1], :]
            num_tokens = logits.numel() // vocab
            _launch_all(logits, num_tokens)
        if vocab == RAGGED:
            # As general as it gets: three leading dimensions, strided columns, strides beyond 32 bits.
            apart = torch.empty(2**36, dtype=kind, device="meta").as_strided(
                (3, 5, 7, vocab), (2**34, 2**31 + 1, 2**20 + 1, 3)
            )
            _launch_all(apart, 105)
        hidden = torch.empty(4096, 64, dtype=kind, device="meta")
        _launch_linear(hidden, torch.empty(vocab, 64, dtype=kind, device="meta"))
    for kernel, args, constants, size in seen:
        found.append(specialise(kernel, args, constants, size, dtype))
    return found


def _launch_all(logits: torch.Tensor, num_tokens: int) -> None:
    labels_T = torch.empty(num_tokens, dtype=torch.int64, device="meta")
    keep_T = torch.empty(num_tokens, dtype=torch.bool, device="meta")
    m_T, s_T, _ = triton_launch.cross_entropy_stats(logits, labels_T, 0)
    triton_launch.cross_entropy_grad(logits, labels_T, 0, keep_T, m_T, s_T, m_T)
    grad = triton_launch.cross_entropy_with_grad(logits, labels_T, keep_T, m_T)[-1]
    triton_launch.cross_entropy_overwrite(logits, labels_T, 0, keep_T, m_T, s_T, m_T)
    triton_launch.cross_entropy_rows(logits, labels_T, keep_T)
    triton_launch.cross_entropy_scale_grad(grad, logits, labels_T, keep_T, m_T, s_T, m_T, m_T.sum())
    state = triton_launch.distillation_stats(logits, logits, keep_T, 0.5, 0)
    for of_teacher in (False, True):
        triton_launch.distillation_grad(logits, logits, keep_T, 0.5, 0, list(state), m_T, m_T, of_teacher)


def _launch_linear(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """With gradients and without, with a softcap and without, over a whole vocabulary and over a part."""
    labels_T = torch.empty(len(hidden), dtype=torch.int64, device="meta")
    coef_T = torch.empty(len(hidden), dtype=compute_dtype(hidden.dtype), device="meta")
    keep_T = torch.empty(len(hidden), dtype=torch.bool, device="meta")
    # As on a GPU, which the device here is not.
    with mock.patch.object(triton_linear, "operand_dtype", lambda dtype, _: dtype):
        for softcap, want in ((0.0, [True, True]), (30.0, [True, True]), (0.0, [False, False])):
            args = (hidden, weight, labels_T, keep_T, coef_T, softcap, hidden.dtype, want, None, None)
            triton_linear.linear_cross_entropy(*args)
        for softcap in (0.0, 30.0):
            args, settings = (hidden, weight, labels_T, keep_T, 0), (softcap, hidden.dtype)
            stats = triton_linear_parallel.linear_cross_entropy_stats(*args, *settings, None, None, True)
            m_T, s_T, _, logits = stats
            triton_linear_parallel.linear_cross_entropy_grads(
                *args, m_T, s_T, coef_T, *settings, [True, True], None, None, logits
            )


def compile_one(what: Recorded, target: str) -> Compiled:
    """Compile one specialisation for one target."""
    gpu, room = TARGETS[target]
    names = [parameter.name for parameter in what.kernel.params]
    source = ASTSource(
        what.kernel,
        signature=dict(zip(names, what.types, strict=True)),
        constexprs={(place,): value for place, value in what.constants},
        attrs={(place,): [["tt.divisibility", 16]] for place in what.divisible},
    )
    warps = triton_sizes.warps_on(what.size, amd=gpu.backend == "hip")
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
    constants = {row.what.kernel.params[place].name: value for place, value in row.what.constants}
    block = constants.get("BLOCK_V", constants.get("BLOCK_PARTS"))
    flags = [
        name.lower() for name in ("OF_TEACHER", "UNLESS_ONE", "IN_PLACE", "SOFTCAP", "WITH_GRAD") if constants.get(name)
    ]
    flags += [] if "stride_v" in constants or "s_stride_v" in constants or "BLOCK_PARTS" in constants else ["strided"]
    flags += [] if "num_1" in constants or "s_num_1" in constants or "BLOCK_PARTS" in constants else ["batched"]
    name = row.what.kernel.fn.__name__.removesuffix("_kernel")
    return (
        f"{name:20} {row.target:7} {row.what.dtype:9} {block:6} {row.warps:5} {row.what.size.num_stages:6} "
        f"{row.registers:9} {row.spilled:7} {row.shared:7}  {' '.join(flags)} {row.problem}".rstrip()
    )


HEADER = "kernel               target  dtype      BLOCK warps stages registers spilled  shared"


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
