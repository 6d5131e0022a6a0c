"""The baselines on PyTorch, each behind a function that takes the forward arguments of our losses.

An adapter returns candidates (note, loss): more than one where the baseline has a size to choose, of which the runner
keeps the fastest. It raises BackendUnavailable where the baseline can't do what the config asks for.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from loss_core.bench.baselines import BASELINES
from loss_core.bench.job import Job
from loss_core.build import build_loss_module
from loss_core.config import MaskedCrossEntropyConfig
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.loss_config import LossConfig

Loss = Callable[..., Tensor]
Candidates = list[tuple[str, Loss]]


def candidates(name: str, config: LossConfig, job: Job) -> Candidates:
    """The losses that stand for a baseline.

    Raises:
        BackendUnavailable: not for this config, device or version.
    """
    BASELINES[name].check(config)
    return _ADAPTERS[name](config, job)


def _gathered(config: Any, job: Job) -> Candidates:
    """What everybody writes, on logits that every rank has whole."""
    over_logits = config
    if job.definition.products:
        over_logits = MaskedCrossEntropyConfig(
            ignore_index=config.ignore_index, reduction=config.reduction, logit_softcapping=config.logit_softcapping
        )
    whole = build_loss_module(over_logits, backend="torch:plain")
    return [("gathers the logits first", _over_ranks().over_gathered(job, whole))]


def _loss_parallel(config: Any, job: Job) -> Candidates:
    return [("", _over_ranks().over_dtensors(config, job))]


def _over_ranks() -> Any:
    # DTensor takes a while to import, which workers that hold the whole vocabulary need not wait for.
    return importlib.import_module("loss_core_bench.torch_parallel_baselines")


def _compiled(config: Any, job: Job) -> Candidates:
    torch._dynamo.reset()
    # fullgraph: a graph that breaks would be timed as something that it is not.
    return [("", torch.compile(build_loss_module(config, backend="torch:plain"), fullgraph=True, dynamic=False))]


def _linear_ce(config: Any, job: Job) -> Candidates:
    if not hasattr(F, "linear_cross_entropy"):
        raise BackendUnavailable(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has it.")
    options = torch.nn.LinearCrossEntropyOptions

    def with_options(chosen: Any) -> Loss:
        return lambda hidden_states, lm_weight, labels: F.linear_cross_entropy(
            hidden_states, lm_weight, labels, reduction=config.reduction, ignore_index=config.ignore_index,
            options=chosen,
        )  # fmt: skip

    chunks = [chunk for chunk in (256, 512, 1024, 2048, 4096) if chunk < 2 * job.shape[0]]
    found = [(f"chunk {chunk}", with_options(options(batch_chunk_size=chunk))) for chunk in chunks]
    return [("its own choice of chunk", with_options(options())), *found]


def _cce(impl: str) -> Callable[[Any, Job], Candidates]:
    def adapter(config: Any, job: Job) -> Candidates:
        if impl == "cce" and job.device == "cpu":
            raise BackendUnavailable("cut-cross-entropy's Triton kernels need a GPU.")
        if impl == "cce" and job.dtype not in ("bfloat16", "float16"):
            raise BackendUnavailable(f"cut-cross-entropy's Triton kernels take 16-bit inputs, not {job.dtype}.")
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        if impl == "torch_compile":
            torch._dynamo.reset()
        cap = config.logit_softcapping or None
        return [("", lambda hidden_states, lm_weight, labels: function(
            hidden_states, lm_weight, labels, ignore_index=config.ignore_index, softcap=cap,
            reduction=config.reduction, impl=impl,
        ))]  # fmt: skip

    return adapter


def _liger(config: Any, job: Job) -> Candidates:
    if job.device == "cpu":
        raise BackendUnavailable("Liger's Triton kernels need a GPU.")
    module = importlib.import_module("liger_kernel.transformers")
    softcap = config.logit_softcapping or None
    options = {"ignore_index": config.ignore_index, "reduction": config.reduction, "softcap": softcap}
    if not job.definition.products:
        loss = module.LigerCrossEntropyLoss(**options)
        # Later calls of a benchmark see what it wrote; its time does not depend on the values. The comparison with
        # float64 runs on inputs of its own.
        return [("writes the gradient over the logits", lambda logits, labels: loss(logits, labels))]
    fused = module.LigerFusedLinearCrossEntropyLoss(**options)
    return [("", lambda hidden_states, lm_weight, labels: fused(lm_weight, hidden_states, labels))]


def _te(config: Any, job: Job) -> Candidates:
    if job.device == "cpu":
        raise BackendUnavailable("Transformer Engine needs a CUDA device.")
    if job.dtype not in ("float32", "bfloat16"):
        raise BackendUnavailable(f"Transformer Engine takes float32 and bfloat16 logits, not {job.dtype}.")
    if config.ignore_index != -100:
        raise BackendUnavailable("asked with ignore_index -100 only, which all its versions take.")
    if len(set(job.sizes)) > 1:
        raise BackendUnavailable(
            f"Transformer Engine takes equal parts of the vocabulary, not {', '.join(map(str, job.sizes))}."
        )
    group = dist.group.WORLD if job.tp > 1 else None
    function = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        loss_T: Tensor = function(logits.unsqueeze(0), labels.unsqueeze(0), 0.0, False, group)[0]
        if config.reduction == "none":
            return loss_T
        return loss_T.sum() / (labels != -100).sum() if config.reduction == "mean" else loss_T.sum()

    return [("", loss)]


def _nemo(config: Any, job: Job) -> Candidates:
    if job.definition.name == "distillation":
        module = importlib.import_module("nemo_automodel.components.loss.kd_loss")
        loss = module.KDLoss(config.ignore_index, config.temperature, config.fp32_upcast)
        return [("", loss)]
    if not job.definition.products:
        if config.logit_softcapping:
            raise BackendUnavailable("NeMo's MaskedCrossEntropy has no logit_softcapping.")
        module = importlib.import_module("nemo_automodel.components.loss.masked_ce")
        masked = module.MaskedCrossEntropy(True, config.ignore_index, config.reduction)
        return [("", masked)]
    if job.device == "cpu":
        raise BackendUnavailable(
            "NeMo's FusedLinearCrossEntropy runs Triton kernels of cut-cross-entropy: needs a GPU."
        )
    if config.reduction == "mean":
        raise BackendUnavailable("the same kernels as cce, which is measured by itself.")
    module = importlib.import_module("nemo_automodel.components.loss.linear_ce")
    fused = module.FusedLinearCrossEntropy(config.ignore_index, config.logit_softcapping, config.reduction)
    return [("", fused)]


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
}
