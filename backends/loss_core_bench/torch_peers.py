"""The peers on PyTorch, each behind a function that takes the forward arguments of our losses.

An adapter returns candidates (note, loss): more than one where the peer has a size to choose, of which the runner
keeps the fastest. It raises Unusable where the peer can't do what the config asks for.
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

from loss_core.bench_job import Job, kind_of
from loss_core.config import KDLossConfig, LossConfig
from loss_core_bench.runner import Unusable

Loss = Callable[..., Tensor]
Candidates = list[tuple[str, Loss]]


def candidates(name: str, config: LossConfig, job: Job) -> Candidates:
    """The losses that stand for a peer.

    Raises:
        Unusable: not for this config, device or version.
    """
    return _ADAPTERS[name](config, job)


def _plain(config: Any, upcast: bool) -> Loss:
    """What everybody writes."""
    kind = kind_of(config)
    if kind == "kd":
        return lambda student_logits, teacher_logits, labels: _plain_kd(
            config, _as(student_logits, upcast), _as(teacher_logits, upcast), labels
        )
    over_logits = _plain_over_logits(config, upcast)
    if kind == "logits":
        return over_logits
    return lambda hidden_states, lm_weight, labels: over_logits(F.linear(hidden_states, lm_weight), labels)


def _plain_over_logits(config: Any, upcast: bool) -> Loss:
    cap = getattr(config, "logit_softcapping", 0.0)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        logits_TV = _as(logits, upcast)
        if cap:
            logits_TV = cap * torch.tanh(logits_TV / cap)
        return F.cross_entropy(logits_TV, labels, ignore_index=config.ignore_index, reduction=config.reduction)

    return loss


def _as(x: Tensor, upcast: bool) -> Tensor:
    return x.float() if upcast else x


def _plain_kd(config: KDLossConfig, student_TV: Tensor, teacher_TV: Tensor, labels_T: Tensor) -> Tensor:
    temp = config.temperature
    log_p_TV = F.log_softmax(student_TV / temp, -1)
    kl_T = F.kl_div(log_p_TV, F.softmax(teacher_TV / temp, -1), reduction="none").sum(-1)
    keep_T = labels_T != config.ignore_index
    return torch.where(keep_T, kl_T, 0.0).sum() * temp**2 / keep_T.sum()


def _plain_torch(config: Any, job: Job) -> Candidates:
    return _plain_candidates(config, job, upcast=False)


def _plain_upcast(config: Any, job: Job) -> Candidates:
    return _plain_candidates(config, job, upcast=True)


def _plain_candidates(config: Any, job: Job, upcast: bool) -> Candidates:
    if job.tp == 1:
        return [("", _plain(config, upcast))]
    over_logits = _plain_over_logits(config, upcast) if kind_of(config) == "fused" else _plain(config, upcast)
    return [("gathers the logits first", _parallel_peers().over_gathered(config, job, over_logits))]


def _loss_parallel(config: Any, job: Job) -> Candidates:
    return [("", _parallel_peers().over_dtensors(config, job))]


def _parallel_peers() -> Any:
    # DTensor takes a while to import, which workers that hold the whole vocabulary need not wait for.
    return importlib.import_module("loss_core_bench.torch_parallel_peers")


def _compiled(config: Any, job: Job) -> Candidates:
    return [("", _compile(_plain(config, upcast=False)))]


def _compiled_upcast(config: Any, job: Job) -> Candidates:
    return [("", _compile(_plain(config, upcast=True)))]


def _compile(loss: Loss) -> Loss:
    torch._dynamo.reset()
    # fullgraph: a graph that breaks would be timed as something that it is not.
    compiled: Loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return compiled


def _linear_ce(config: Any, job: Job) -> Candidates:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unusable(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has it.")
    _refuse_softcap(config, "F.linear_cross_entropy")
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
            raise Unusable("cut-cross-entropy's Triton kernels need a GPU.")
        if impl == "cce" and job.dtype not in ("bfloat16", "float16"):
            raise Unusable(f"cut-cross-entropy's Triton kernels take 16-bit inputs, not {job.dtype}.")
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
        raise Unusable("Liger's Triton kernels need a GPU.")
    module = importlib.import_module("liger_kernel.transformers")
    options = {"ignore_index": config.ignore_index, "reduction": config.reduction}
    if kind_of(config) == "logits":
        loss = module.LigerCrossEntropyLoss(**options)
        # Later calls of a benchmark see what it wrote; its time does not depend on the values. The comparison with
        # float64 runs on inputs of its own.
        return [("writes the gradient over the logits", loss)]
    fused = module.LigerFusedLinearCrossEntropyLoss(softcap=config.logit_softcapping or None, **options)
    return [("", lambda hidden_states, lm_weight, labels: fused(lm_weight, hidden_states, labels))]


def _te(config: Any, job: Job) -> Candidates:
    if job.device == "cpu":
        raise Unusable("Transformer Engine needs a CUDA device.")
    if job.dtype not in ("float32", "bfloat16"):
        raise Unusable(f"Transformer Engine takes float32 and bfloat16 logits, not {job.dtype}.")
    if config.ignore_index != -100:
        raise Unusable("asked with ignore_index -100 only, which all its versions take.")
    if len(set(job.sizes)) > 1:
        raise Unusable(f"Transformer Engine takes equal parts of the vocabulary, not {', '.join(map(str, job.sizes))}.")
    group = dist.group.WORLD if job.tp > 1 else None
    function = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        loss_T: Tensor = function(logits.unsqueeze(0), labels.unsqueeze(0), 0.0, False, group)[0]
        if config.reduction == "none":
            return loss_T
        return loss_T.sum() / (labels != -100).sum() if config.reduction == "mean" else loss_T.sum()

    return [("", loss)]


def _nemo(config: Any, job: Job) -> Candidates:
    kind = kind_of(config)
    if kind == "kd":
        module = importlib.import_module("nemo_automodel.components.loss.kd_loss")
        loss = module.KDLoss(config.ignore_index, config.temperature, config.fp32_upcast)
        return [("", loss)]
    if kind == "logits":
        module = importlib.import_module("nemo_automodel.components.loss.masked_ce")
        masked = module.MaskedCrossEntropy(True, config.ignore_index, config.reduction)
        return [("", masked)]
    if job.device == "cpu":
        raise Unusable("NeMo's FusedLinearCrossEntropy runs cut-cross-entropy's Triton kernels, which need a GPU.")
    if config.reduction == "mean":
        raise Unusable("the same kernels as cce, which is measured by itself.")
    module = importlib.import_module("nemo_automodel.components.loss.linear_ce")
    fused = module.FusedLinearCrossEntropy(config.ignore_index, config.logit_softcapping, config.reduction)
    return [("", fused)]


def _refuse_softcap(config: Any, who: str) -> None:
    if config.logit_softcapping:
        raise Unusable(f"{who} has no softcap.")


_ADAPTERS: dict[str, Callable[[Any, Job], Candidates]] = {
    "plain-torch": _plain_torch,
    "plain-torch-upcast": _plain_upcast,
    "torch-loss-parallel": _loss_parallel,
    "compiled-torch": _compiled,
    "compiled-torch-upcast": _compiled_upcast,
    "torch-linear-ce": _linear_ce,
    "cce": _cce("cce"),
    "cce-compile": _cce("torch_compile"),
    "liger": _liger,
    "te": _te,
    "nemo": _nemo,
}
