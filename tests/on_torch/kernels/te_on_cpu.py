"""Transformer Engine's own Python and Triton sources on a CPU, under Triton's interpreter.

`import transformer_engine.pytorch` needs a compiled library and a GPU. Its cross entropy needs neither: it is three
files of the pure-Python wheel. `load` creates empty modules for the packages above them and imports these files
unchanged. What differs from TE: the empty packages, `transformer_engine.pytorch.jit` (only `no_torch_dynamo` is used),
and that TE's validation accepts CPU tensors as CUDA tensors. What differs from Triton: a float32 stored as bfloat16 is
rounded to nearest, as on a GPU; the interpreter truncates it.

Use it in a separate process started with TRITON_INTERPRET=1: the modules serve nothing else.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import torch

from helpers import interpreter

# Folder of an unpacked wheel of another version, to test instead of the installed one.
SOURCES = "LOSS_CORE_TE_SOURCES"


class _ClaimsCuda(torch.Tensor):
    is_cuda = property(lambda self: True)


def load():
    """Make `torch:te` usable in this process; return TE's module `transformer_engine.pytorch.cross_entropy`."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "start the process with TRITON_INTERPRET=1"
    module = enter()
    _disable_cuda_check(module)
    _round_to_bfloat16()
    interpreter.patch_once()
    return module


def enter():
    """Import TE's cross entropy unchanged; enough to compile its kernels."""
    assert "transformer_engine" not in sys.modules
    if SOURCES in os.environ:
        sys.path.insert(0, os.environ[SOURCES])
    wheel = importlib.metadata.distribution("transformer_engine")
    folder = Path(str(wheel.locate_file("transformer_engine")))
    packages = ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton")
    for name in packages:
        _enter(f"transformer_engine{name}").__path__ = [str(folder.joinpath(*name.split(".")))]
    _enter("transformer_engine.pytorch.jit").no_torch_dynamo = lambda: lambda function: function
    module = importlib.import_module("transformer_engine.pytorch.cross_entropy")
    assert Path(module.__file__).is_relative_to(folder)
    return module


def _enter(name):
    # With a spec, so that `importlib.util.find_spec` finds it.
    module = sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, None, is_package=True))
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _disable_cuda_check(module):
    """Disable no other check of TE. Versions before 2.19 have none."""
    validate = getattr(module, "_validate_inputs", None)
    if validate is not None:
        module._validate_inputs = lambda inp, *rest: validate(inp.detach().as_subclass(_ClaimsCuda), *rest)


def _round_to_bfloat16():
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return plain(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).reshape(src.data.shape)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
        nearest = np.where(np.isnan(src.data), (bits >> 16) | 0x40, nearest)
        return TensorHandle(nearest.astype(np.uint16), dst_type.scalar)

    InterpreterBuilder.cast_impl = cast_impl
