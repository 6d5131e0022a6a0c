"""The baselines on PyTorch, each as a function of the forward arguments of our losses.

An adapter returns candidates (note, loss): several if the baseline has a tunable size, of which the runner keeps the
fastest. It raises BackendUnavailable if the baseline does not support the config or the job.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loss_core import MaskedCrossEntropyConfig
from loss_core.baselines import BASELINES
from loss_core.bench.measure.job import Job
from loss_core.build import build_loss_module
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.loss_config import LossConfig
from loss_core_baselines import build, cut_cross_entropy, reduced, te, torch_own

Loss = Callable[..., Tensor]
Candidates = list[tuple[str, Loss]]


def candidates(name: str, config: LossConfig, job: Job) -> Candidates:
    """The loss functions of a baseline.

    Raises:
        BackendUnavailable: if the baseline does not support the config, device or version.
    """
    BASELINES[name].check(config)
    return _ADAPTERS[name](config, job)


def _gathered(config: Any, job: Job) -> Candidates:
    """The plain loss, on logits that every rank gathers."""
    over_logits = config
    if job.definition.products:
        over_logits = MaskedCrossEntropyConfig(
            ignore_index=config.ignore_index, reduction=config.reduction, logit_softcapping=config.logit_softcapping
        )
    loss = build_loss_module(over_logits, backend="torch:plain")
    return [("gathers the logits first", _parallel_baselines().on_gathered_logits(job, loss))]


def _loss_parallel(config: Any, job: Job) -> Candidates:
    return [("", _parallel_baselines().on_dtensors(config, job))]


def _parallel_baselines() -> Any:
    # Imported on use: DTensor is slow to import, and workers with the full vocabulary do not need it.
    return importlib.import_module("loss_core_bench.torch_parallel_baselines")


def _compiled(config: Any, job: Job) -> Candidates:
    torch._dynamo.reset()
    # fullgraph: with a graph break the time would not be that of a compiled loss.
    return [("", torch.compile(build_loss_module(config, backend="torch:plain"), fullgraph=True, dynamic=False))]


def _linear_ce(config: Any, job: Job) -> Candidates:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return [("", torch_own.linear_cross_entropy(config))]
    options = torch.nn.LinearCrossEntropyOptions
    chunks = [chunk for chunk in (256, 512, 1024, 2048, 4096) if chunk < 2 * job.shape[0]]
    chunked = [
        (f"chunk {chunk}", torch_own.linear_cross_entropy(config, options(batch_chunk_size=chunk))) for chunk in chunks
    ]
    return [("its own choice of chunk", torch_own.linear_cross_entropy(config)), *chunked]


def _cce(impl: str) -> Callable[[Any, Job], Candidates]:
    def adapter(config: Any, job: Job) -> Candidates:
        if impl == "cce" and job.device == "cpu":
            raise BackendUnavailable("cut-cross-entropy's Triton kernels need a GPU.")
        if impl == "cce" and job.dtype not in ("bfloat16", "float16"):
            raise BackendUnavailable(f"cut-cross-entropy's Triton kernels take 16-bit inputs, not {job.dtype}.")
        if impl == "torch_compile":
            torch._dynamo.reset()
        return [("", cut_cross_entropy.linear_cross_entropy(impl)(config))]

    return adapter


def _liger(config: Any, job: Job) -> Candidates:
    if job.device == "cpu":
        raise BackendUnavailable("Liger's Triton kernels need a GPU.")
    # It overwrites the inputs of later calls, but its time does not depend on the values. The comparison with float64
    # uses separate inputs.
    return [("" if job.definition.products else "writes the gradient over the logits", build("liger", config))]


def _te(config: Any, job: Job) -> Candidates:
    if job.device == "cpu":
        raise BackendUnavailable("Transformer Engine needs a CUDA device.")
    if job.dtype not in ("float32", "bfloat16"):
        raise BackendUnavailable(f"Transformer Engine takes float32 and bfloat16 logits, not {job.dtype}.")
    if config.ignore_index != -100:
        raise BackendUnavailable(
            "Transformer Engine is measured with ignore_index -100 only, which all its versions accept."
        )
    if len(set(job.sizes)) > 1:
        raise BackendUnavailable(
            f"Transformer Engine takes equal parts of the vocabulary, not {', '.join(map(str, job.sizes))}."
        )
    # Its own mean has the shape (1,).
    group = dist.group.WORLD if job.tp > 1 else None
    per_token = te.cross_entropy(replace(config, reduction="none", tp_group=group))
    return [("", lambda logits, labels: reduced(per_token(logits, labels), labels, config))]


def _nemo(config: Any, job: Job) -> Candidates:
    if job.definition.products and job.device == "cpu":
        raise BackendUnavailable(
            "NeMo's FusedLinearCrossEntropy runs Triton kernels of cut-cross-entropy: needs a GPU."
        )
    if job.definition.products and config.reduction == "mean":
        raise BackendUnavailable("the same kernels as cce, which is measured by itself.")
    return [("", build("nemo", config))]


def _quack(config: Any, job: Job) -> Candidates:
    if job.device == "cpu":
        raise BackendUnavailable("QuACK's CuTe kernels need a Hopper or Blackwell GPU.")
    return [("", build("quack", config))]


_ADAPTERS: dict[str, Callable[[Any, Job], Candidates]] = {
    "plain-torch": _gathered,
    "torch-loss-parallel": _loss_parallel,
    "compiled-torch": _compiled,
    "torch-linear-ce": _linear_ce,
    "cce": _cce("cce"),
    "cce-compile": _cce("torch_compile"),
    "liger": _liger,
    "te": _te,
    "nemo": _nemo,
    "quack": _quack,
}
