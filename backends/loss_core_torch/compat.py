"""Private and version-dependent APIs of PyTorch: one function each, with the version in which it was seen."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed import distributed_c10d
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")


def all_gather(out: Tensor, part: Tensor, group: Any) -> None:
    """Write the parts of all ranks, which have the same shape, into `out`, in rank order."""
    # Renamed in torch 2.13, which warns about the old name.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(out, part, group=group)


def reduce_scatter(out: Tensor, parts: Tensor, group: Any) -> None:
    """Write the sum over the ranks of this rank's part into `out`; `parts` holds one part per rank, in rank order."""
    # Renamed in torch 2.13, which warns about the old name.
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    collective(out, parts, group=group)


def group_store(group: Any) -> Any:
    """The key-value store over which the ranks of a group met; its timeout is that of init_process_group."""
    # A method of the group in torch 2.13.
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return distributed_c10d._get_process_group_store(group)


def has_peers(group: Any) -> bool:
    """Whether other processes take part in a group. False in dry runs, where one process stands for all ranks.

    Dry runs use the "fake" backend, as does LocalTensorMode. Seen in torch 2.13.
    """
    return "fake" not in dist.get_backend(group)


def is_strided_shard(placement: Any) -> bool:
    """Whether FSDP shards a tensor dimension here that another mesh dimension shards as well.

    A private class. Seen in torch 2.10, 2.13.
    """
    return type(placement).__name__ == "_StridedShard"


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: torch.compile breaks its graph around calls of the function, and does not trace it.

    As torch.compiler.disable, which imports the compiler when it decorates. `_disable_dynamo` imports it at the first
    call: 800 modules and a second or two in each process that compiles nothing. Seen in torch 2.10, 2.13.
    """
    disabled = _disable_dynamo(function)

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        # Nothing is compiled before the compiler is imported; Dynamo evaluates the first condition without a guard.
        may_compile = torch.compiler.is_dynamo_compiling() or "torch._dynamo" in sys.modules
        return disabled(*args, **kwargs) if may_compile else function(*args, **kwargs)

    return outside


def on_each_rank(function: Callable[..., R], *args: Any) -> R:
    """Call a function whose shapes may differ among ranks; under LocalTensorMode once for each simulated rank.

    Seen in torch 2.13.

    Args:
        function: of this rank's tensors alone, without collectives or side effects.
    """
    local: Any = sys.modules.get("torch.distributed._local_tensor")
    if local is None or local.enabled_local_tensor_mode() is None:
        return function(*args)
    specs = []

    def flat(*args: Any) -> tuple[Any, ...]:
        # The mode merges the results of the ranks, but does not support NamedTuples.
        leaves, spec = pytree.tree_flatten(function(*args))
        specs.append(spec)
        return tuple(leaves)

    leaves = local.maybe_run_for_local_tensor(flat)(*args)
    result: R = pytree.tree_unflatten(leaves, specs[0])
    return result


# Whether a torch.func transform is active; Dynamo guards on it. Seen in torch 2.10, 2.13.
in_functorch_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active

# A tensor with a shape but no values. Seen in torch 2.10, 2.13.
FakeTensor = torch._subclasses.FakeTensor


def functorch_transforms() -> tuple[str, ...]:
    """Names of the active torch.func transforms, such as "Vmap"; not for traced calls. Seen in torch 2.10, 2.13."""
    if not in_functorch_transform():
        return ()
    stack: Any = torch._C._functorch.get_interpreter_stack()
    return tuple(interpreter.key().name for interpreter in stack or ())


@contextmanager
def outside_of_functorch() -> Iterator[None]:
    """Context without torch.func transforms, for tensors that none of them has wrapped. Seen in torch 2.10, 2.13."""
    if not in_functorch_transform():
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


@contextmanager
def outside_of_dispatch_modes() -> Iterator[None]:
    """Context without TorchDispatchModes (FlopCounterMode, a memory tracker), under which Dynamo skips frames.

    Seen in torch 2.13.
    """
    if not torch._C._len_torch_dispatch_stack():
        yield
        return
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


@contextmanager
def outside_of_fx() -> Iterator[None]:
    """Context in which compiled functions may be called while torch.fx traces a graph around it.

    For the body of a custom operator, which torch.fx does not trace. Seen in torch 2.10, 2.13.
    """
    tracer: Any = torch.fx._symbolic_trace
    if not tracer._is_fx_tracing_flag:
        yield
        return
    tracer._is_fx_tracing_flag = False
    try:
        yield
    finally:
        tracer._is_fx_tracing_flag = True


def without_wrappers(value: Any) -> Any:
    """The tensor inside the wrappers of torch.func gradients; any other value as it is. Seen in torch 2.10, 2.13."""
    while isinstance(value, Tensor) and is_functorch_wrapped(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def is_batched(x: Tensor) -> bool:
    """Whether x is a batched tensor of vmap; not for traced calls. Seen in torch 2.10, 2.13."""
    return bool(torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x))


def is_functorch_wrapped(x: Tensor) -> bool:
    """Whether x is wrapped by a torch.func transform. Seen in torch 2.10, 2.13."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


# The active mode of a key of `MODES` (fake tensors, make_fx), or None. Seen in torch 2.10, 2.13.
dispatch_mode: Callable[[Any], Any] = torch._C._get_dispatch_mode
MODES: tuple[Any, ...] = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def guards_on_arguments(entries: Sequence[Any]) -> list[bool]:
    """For torch.compile's option guard_filter_fn: keep the guards on arguments and their sizes alone.

    The others compile a function again for each state of the process (precision switches, determinism, default device),
    and fail at the ninth (config.recompile_limit). The attributes of an entry are from torch 2.10 to 2.13.
    """
    return [entry.guard_type == "SHAPE_ENV" or bool(entry.name and not entry.is_global) for entry in entries]


def onednn_operator() -> Any:
    """oneDNN's linear layer, which TorchInductor's graphs call, or None. Seen in torch 2.10, 2.13."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def onednn_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b by oneDNN, for matrices in float32 on a CPU. Seen in torch 2.10, 2.13."""
    # A linear layer without bias, which takes its weight as [N, K]; fast where that is dense in either order.
    product: Tensor = onednn_operator()(a_MK, b_KN.t(), None, "none", [], "")
    return product


@cache
def onednn_is_faster(processor: str | None = None, capability: str | None = None) -> bool:
    """Whether oneDNN is faster than MKL, PyTorch's choice, for float32 products: on AMD processors with AVX-512.

    Args:
        processor: text that names its vendor; None: this machine's.
        capability: as returned by `torch.backends.cpu.get_cpu_capability`; None: this machine's.
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and (capability or torch.backends.cpu.get_cpu_capability()) == "AVX512"
        and "AuthenticAMD" in (_processor() if processor is None else processor)
        and onednn_operator() is not None
    )


def _processor() -> str:
    """Text that names the processor's vendor: the start of /proc/cpuinfo, elsewhere Python's `platform.processor`."""
    listed = Path("/proc/cpuinfo")
    return listed.read_text()[:200] if listed.is_file() else platform.processor()


@contextmanager
def without_values() -> Iterator[list[str]]:
    """Context in which new tensors are fake; an operation that reads a value ends it, and the yielded list names it.

    FakeTensorMode and its exceptions are private modules. Seen in torch 2.10, 2.13.
    """
    from torch._subclasses import fake_tensor

    reads: list[str] = []
    try:
        with fake_tensor.FakeTensorMode():
            yield reads
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
        reads.append(str(error.func))
