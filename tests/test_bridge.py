"""The bridge against direct calls in either framework."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import loss_core
from loss_core_bridge import build_jax_loss, build_torch_loss, jax_loss_as_torch, torch_loss_as_jax
from loss_core_bridge import residuals as residuals_module
from loss_core_bridge.tensors import to_jax, to_torch

TRACES: list[str] = []


@dataclasses.dataclass(frozen=True)
class JaxCE:
    """Stand-in for a JAX loss. Its residuals are the logits and the lse, not the exponentials."""

    reduction: str = "sum"
    ignore_index: int = -100

    @property
    def kernel_choice(self):
        return loss_core.KernelChoice("jax:xla", "stand-in")

    def __call__(self, logits, labels, mask=None, num_label_tokens=None, loss_weights=None):
        TRACES.append("loss")
        keep = labels != self.ignore_index
        if mask is not None:
            keep = keep & (mask != 0)
        rows = _rows(logits.reshape(-1, logits.shape[-1]), jnp.where(keep, labels, 0).reshape(-1))
        # Compared before any cast: JAX's gather would wrap an int64 index to int32.
        valid = (labels >= 0) & (labels < logits.shape[-1])
        rows = jnp.where(keep, jnp.where(valid, rows.reshape(labels.shape), jnp.nan), 0)
        if loss_weights is not None:
            rows = rows * loss_weights.astype(rows.dtype)
        if self.reduction == "none":
            return rows
        total = rows.sum()
        if self.reduction == "mean":
            return total / jnp.maximum(keep.sum(), 1)
        return total if num_label_tokens is None else total / num_label_tokens


@jax.custom_vjp
def _rows(logits_TV, labels):
    return _rows_forward(logits_TV, labels)[0]


def _wide(logits):
    return logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)


def _rows_forward(logits_TV, labels):
    z = _wide(logits_TV)
    lse = jax.nn.logsumexp(z, axis=-1)
    return lse - jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0], (logits_TV, labels, lse)


def _rows_backward(saved, g):
    logits_TV, labels, lse = saved
    p = jnp.exp(_wide(logits_TV) - lse[:, None])
    onehot = jnp.arange(p.shape[1]) == labels[:, None]
    return ((p - onehot) * g[:, None]).astype(logits_TV.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


class TorchCE(torch.nn.Module):
    """Stand-in for a torch loss."""

    def __init__(self, reduction="sum", ignore_index=-100):
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, logits, labels, mask=None, num_label_tokens=None, loss_weights=None):
        labels = labels.long()
        if mask is not None:
            labels = torch.where(mask.bool(), labels, self.ignore_index)
        z = logits if logits.dtype == torch.float64 else logits.float()
        rows = F.cross_entropy(
            z.reshape(-1, z.shape[-1]), labels.reshape(-1), ignore_index=self.ignore_index, reduction="none"
        ).reshape(labels.shape)
        if loss_weights is not None:
            rows = rows * loss_weights
        if self.reduction == "none":
            return rows
        total = rows.sum()
        if self.reduction == "mean":
            return total / (labels != self.ignore_index).sum().clamp(min=1)
        return total if num_label_tokens is None else total / num_label_tokens


def case(dtype=torch.float32, shape=(3, 5), V=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, V, generator=generator).to(dtype)
    labels = torch.randint(0, V, shape, generator=generator)
    labels.view(-1)[1] = -100
    return logits, labels


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def run_torch(loss, logits, labels, upstream=None, **others):
    leaf = logits.detach().clone().requires_grad_()
    result = loss(leaf, labels, **others)
    result.backward(torch.ones_like(result) if upstream is None else upstream)
    return result.detach(), leaf.grad


# --- a JAX loss in torch -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_jax_in_torch_equals_torch(dtype, reduction):
    logits, labels = case(dtype)
    upstream = torch.linspace(0.5, 2.0, labels.numel()).reshape(labels.shape) if reduction == "none" else None
    upstream = None if upstream is None else upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)
    loss, grad = run_torch(jax_loss_as_torch(JaxCE(reduction)), logits, labels, upstream)
    want_loss, want_grad = run_torch(TorchCE(reduction), logits, labels, upstream)
    assert loss.dtype == want_loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    torch.testing.assert_close(loss, want_loss, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_every_floating_input_gets_its_gradient_and_others_none():
    logits, labels = case()
    weights = torch.rand(labels.shape, requires_grad=True)
    logits.requires_grad_()
    mask = torch.ones(labels.shape, dtype=torch.bool)
    mask[0, 0] = False
    loss = jax_loss_as_torch(JaxCE())
    loss(logits, labels=labels, mask=mask, num_label_tokens=7, loss_weights=weights).backward()
    got = logits.grad, weights.grad
    logits.grad = weights.grad = None
    TorchCE()(logits, labels, mask, 7, weights).backward()
    torch.testing.assert_close(got, (logits.grad, weights.grad))

    logits.grad = weights.grad = None
    loss(logits.detach(), labels, loss_weights=weights).backward()
    assert logits.grad is None
    assert weights.grad is not None


def test_inputs_are_not_modified():
    logits, labels = case()
    before = logits.clone(), labels.clone()
    versions = logits._version, labels._version
    logits.requires_grad_()
    jax_loss_as_torch(JaxCE())(logits, labels, mask=labels > 3).backward()
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
    assert (logits._version, labels._version) == versions


def test_layouts():
    base = torch.randn(4, 9, 37)
    views = {
        "slice": base[:, :-1],
        "transposed": torch.randn(8, 4, 37).transpose(0, 1),
        "step": base[:, ::2],
        "expanded": torch.randn(1, 8, 37).expand(4, 8, 37),
        "unaligned": base[1:, :8],
        "unaligned contiguous": torch.randn(3 * 5 * 37 + 1)[1:].view(3, 5, 37),
    }
    for name, view in views.items():
        labels = torch.randint(0, 37, view.shape[:-1])
        for strided in (labels, labels.t().contiguous().t()):
            leaf = view.detach().requires_grad_()
            jax_loss_as_torch(JaxCE())(leaf, strided).backward()
            _, want = run_torch(TorchCE(), view, labels)
            torch.testing.assert_close(leaf.grad, want, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int32]
)
def test_contiguous_tensors_cross_without_a_copy(dtype):
    tensor = torch.ones(8, 16).to(dtype)
    with jax.enable_x64(dtype == torch.float64):
        array = to_jax("x", tensor, x64=dtype == torch.float64)
        assert array.unsafe_buffer_pointer() == tensor.data_ptr()
        back = to_torch(array)
    assert back.data_ptr() == tensor.data_ptr()
    assert back.dtype == dtype


@pytest.fixture
def residual_sizes(monkeypatch):
    """Sizes of the residuals of a JAX loss in torch."""
    sizes = []
    real = residuals_module.value_and_residuals

    def spy(*args):
        result = real(*args)
        sizes.extend(array.size for array in result[1])
        return result

    monkeypatch.setattr(residuals_module, "value_and_residuals", spy)
    return sizes


def test_logits_are_not_saved_twice(residual_sizes):
    """jit copies a residual that is an input; only row-sized arrays may be saved for the backward."""
    logits, labels = case(torch.bfloat16, V=501)
    run_torch(jax_loss_as_torch(JaxCE()), logits, labels)
    assert residual_sizes
    assert max(residual_sizes) <= labels.numel()


def test_in_place_change_before_backward_is_detected():
    logits, labels = case()
    logits.requires_grad_()
    loss = jax_loss_as_torch(JaxCE())(logits, labels)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_change_of_an_input_that_backward_does_not_read_is_allowed():
    weights = torch.ones(3, requires_grad=True)

    def linear(x, w):
        return (x * jnp.float32(2) + w * jnp.float32(3)).sum()

    x = torch.ones(3)
    loss = jax_loss_as_torch(linear)(x, weights)
    x.zero_()
    loss.backward()
    assert weights.grad.tolist() == [3, 3, 3]


def test_backward_twice():
    logits, labels = case()
    logits.requires_grad_()
    loss = jax_loss_as_torch(JaxCE())(logits, labels)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


def test_upstream_scales_the_gradient_and_results_share_no_memory():
    x = torch.randn(64, requires_grad=True)
    y = torch.randn(64, requires_grad=True)
    upstream = torch.randn(64)
    result = jax_loss_as_torch(lambda x, y: x + y)(x, y)
    result.backward(upstream)
    assert torch.equal(x.grad, upstream)
    assert torch.equal(y.grad, upstream)
    # Gradients that shared memory with each other or with the upstream would be changed by clipping.
    assert len({x.grad.data_ptr(), y.grad.data_ptr(), upstream.data_ptr(), x.data_ptr()}) == 4
    assert jax_loss_as_torch(lambda x: x)(x.detach()).data_ptr() != x.data_ptr()


def test_no_residuals_without_a_gradient(monkeypatch):
    def never(*_):
        raise AssertionError("vjp was made")

    monkeypatch.setattr(residuals_module, "value_and_residuals", never)
    logits, labels = case()
    loss = jax_loss_as_torch(JaxCE())
    assert not loss(logits, labels).requires_grad
    with torch.no_grad():
        assert not loss(logits.clone().requires_grad_(), labels).requires_grad
    with torch.inference_mode():
        loss(logits, labels)
    with pytest.raises(AssertionError, match="vjp was made"):
        loss(logits.requires_grad_(), labels)


def test_second_derivative_is_an_error():
    logits, labels = case()
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(jax_loss_as_torch(JaxCE())(logits, labels), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"jax\.hessian.*torch backend"):
        grad.square().sum().backward()
    # create_graph for another term of the loss is allowed.
    other = torch.randn(3, requires_grad=True)
    total = jax_loss_as_torch(JaxCE())(logits, labels) + other.pow(3).sum()
    (of_other,) = torch.autograd.grad(total, other, create_graph=True)
    of_other.sum().backward()


def test_no_recompilation_for_another_value_of_a_number():
    loss = jax_loss_as_torch(JaxCE(ignore_index=-7))
    logits, labels = case()
    logits.requires_grad_()
    labels = labels.clamp(min=0)
    loss(logits, labels, num_label_tokens=3).backward()
    TRACES.clear()
    results = [loss(logits, labels, num_label_tokens=n) for n in (4, torch.tensor(5), (labels >= 0).sum(), np.int64(7))]
    results[0].backward()
    assert not TRACES
    assert results[0].item() * 4 == pytest.approx(results[1].item() * 5, rel=1e-6)
    # Equal losses share compiled programs.
    jax_loss_as_torch(JaxCE(ignore_index=-7))(logits, labels, num_label_tokens=9).backward()
    assert not TRACES


def test_labels_beyond_int32():
    logits, labels = case()
    loss = jax_loss_as_torch(JaxCE())
    labels[1, 2] = 2**32 + 1  # would be 1, a valid label, if it were truncated
    with pytest.raises(ValueError, match=r"labels\[1, 2\] is 4294967297"):
        loss(logits, labels)
    with pytest.raises(ValueError, match="num_label_tokens is 8589934592"):
        loss(logits, case()[1], num_label_tokens=2**33)
    # In 64-bit mode the label is not truncated, and is not a class.
    assert loss(logits.double(), labels).isnan()

    labels = case()[1]
    labels[0, 0] = 2**40
    ignoring = jax_loss_as_torch(JaxCE(ignore_index=2**40))(logits, labels.clamp(min=0))
    torch.testing.assert_close(ignoring, TorchCE(ignore_index=2**40)(logits, labels.clamp(min=0)))


def test_float64_is_not_lowered_and_64_bit_mode_is_reset():
    logits, labels = case(torch.float64)
    loss, grad = run_torch(jax_loss_as_torch(JaxCE()), logits, labels)
    want, _ = run_torch(TorchCE(), logits, labels)
    assert loss.dtype == grad.dtype == torch.float64
    assert abs(loss - want) < 1e-12
    assert jnp.ones(1).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_width(dtype):
    logits, labels = case()
    labels = labels.clamp(min=0).to(dtype)
    torch.testing.assert_close(jax_loss_as_torch(JaxCE())(logits, labels), TorchCE()(logits, labels))


def test_empty_batch():
    logits = torch.randn(0, 5, 37, requires_grad=True)
    jax_loss_as_torch(JaxCE())(logits, torch.zeros(0, 5, dtype=torch.int64)).backward()
    assert logits.grad.shape == (0, 5, 37)


def test_unsupported_tensors_are_rejected():
    from torch._subclasses.fake_tensor import FakeTensorMode

    logits, labels = case()
    loss = jax_loss_as_torch(JaxCE())
    with pytest.raises(TypeError, match="logits is a meta tensor"):
        loss(logits.to("meta"), labels)
    with FakeTensorMode(), pytest.raises(TypeError, match="FakeTensor"):
        loss(torch.randn(3, 5, 37), labels)
    with pytest.raises(TypeError, match="sparse"):
        loss(logits.to_sparse(), labels)
    with pytest.raises(TypeError, match="complex64"):
        loss(logits.to(torch.complex64), labels)
    with pytest.raises(TypeError, match="ndarray"):
        loss(logits, labels.numpy())
    with pytest.raises(TypeError, match=r"jax\.Array"):
        loss(logits, jnp.zeros(3))
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.func.grad(lambda z: loss(z, labels))(logits)
    with pytest.raises(TypeError, match="labels"):
        loss(logits)
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'lables'"):
        loss(logits, labels, lables=labels)
    with pytest.raises(TypeError, match="one floating array"):
        jax_loss_as_torch(lambda x: (x, x))(logits.requires_grad_())
    with pytest.raises(TypeError, match="not hashable"):
        jax_loss_as_torch(dataclasses.make_dataclass("Unhashable", ["a"], namespace={"__call__": lambda s, x: x})(1))
    with pytest.raises(TypeError, match="by position only"):
        jax_loss_as_torch(lambda x, /: x)


def test_dtensor_is_rejected(tmp_path):
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        logits, labels = case()
        with pytest.raises(TypeError, match=r"DTensor.*full_tensor"):
            jax_loss_as_torch(JaxCE())(distribute_tensor(logits, init_device_mesh("cpu", (1,))), labels)
    finally:
        dist.destroy_process_group()


def test_module_exposes_the_loss():
    module = jax_loss_as_torch(JaxCE("mean"))
    assert isinstance(module, torch.nn.Module)
    assert not module.state_dict()
    assert not list(module.parameters())
    assert (module.reduction, module.ignore_index) == ("mean", -100)
    assert module.kernel_choice.flag == "jax:xla"
    assert "reduction='mean'" in repr(module)
    for signature in (inspect.signature(module), inspect.signature(module.forward)):
        assert list(signature.parameters) == ["logits", "labels", "mask", "num_label_tokens", "loss_weights"]
    with pytest.raises(AttributeError, match="build a new loss"):
        module.reduction = "sum"
    with pytest.raises(AttributeError, match="nothing_such"):
        module.nothing_such  # noqa: B018
    logits, labels = case()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.eval().to("cpu")):
        assert torch.equal(twin(logits, labels), module(logits, labels))
        assert twin.reduction == "mean"


def test_autocast_casts_the_operands_of_the_product():
    def fused(hidden_states, lm_weight):
        assert hidden_states.dtype == lm_weight.dtype == jnp.bfloat16
        return (hidden_states @ lm_weight.T).astype(jnp.float32).sum()

    hidden = torch.randn(4, 8).bfloat16()
    weight = torch.randn(6, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = jax_loss_as_torch(fused)(hidden, weight)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    logits, labels = case()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(jax_loss_as_torch(JaxCE())(logits, labels), jax_loss_as_torch(JaxCE())(logits, labels))


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    logits, labels = case()
    loss = jax_loss_as_torch(JaxCE())
    _, want = run_torch(loss, logits, labels)
    _, grad = run_torch(lambda z, y: checkpoint(lambda z: loss(z * 1, y), z, use_reentrant=False), logits, labels)
    assert torch.equal(grad, want)


def test_torch_compile_breaks_the_graph_around_the_call():
    loss = jax_loss_as_torch(JaxCE())
    logits, labels = case()
    compiled = torch.compile(lambda z: loss(z * 2, labels) * 3, backend="eager")
    leaf = logits.clone().requires_grad_()
    compiled(leaf).backward()
    _, want = run_torch(lambda z, y: loss(z * 2, y) * 3, logits, labels)
    assert torch.equal(leaf.grad, want)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        torch.compile(lambda z: loss(z, labels), backend="eager", fullgraph=True)(logits)


def test_residuals_are_freed_with_the_graph():
    import gc

    logits, _ = case(shape=(64,), V=1000)
    loss = jax_loss_as_torch(lambda logits: jnp.exp(logits).sum())
    leaf = logits.requires_grad_()
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    result = loss(leaf)
    assert sum(array.nbytes for array in jax.live_arrays()) - before <= 64 * 1000 * 4 + 64
    result.backward()
    leaf.grad = None
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) - before <= 64  # `result` itself is still held


# --- a torch loss in JAX -------------------------------------------------------------------------

JAX_TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.mark.parametrize("dtype", JAX_TOLERANCE)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_torch_in_jax_equals_jax(dtype, jit):
    logits, labels = case()
    x, y = jnp.asarray(logits.numpy()).astype(dtype), jnp.asarray(labels.numpy())
    wrap = jax.jit if jit else (lambda f: f)
    for reduction in ("sum", "mean"):
        loss, grad = wrap(jax.value_and_grad(torch_loss_as_jax(TorchCE(reduction))))(x, y)
        want, want_grad = jax.value_and_grad(JaxCE(reduction))(x, y)
        assert loss.dtype == want.dtype
        assert grad.dtype == x.dtype
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        tolerance = JAX_TOLERANCE[dtype]
        np.testing.assert_allclose(grad.astype("float32"), want_grad.astype("float32"), rtol=tolerance, atol=tolerance)
    weights = jnp.linspace(0.5, 2.0, 15).reshape(3, 5)
    f = torch_loss_as_jax(TorchCE("none"))
    got = wrap(jax.grad(lambda x: (f(x, labels=y) * weights).sum()))(x)
    want = jax.grad(lambda x: (JaxCE("none")(x, y) * weights).sum())(x)
    np.testing.assert_allclose(got.astype("float32"), want.astype("float32"), rtol=tolerance, atol=tolerance)


def test_torch_in_jax_float64():
    logits, labels = case(torch.float64)
    with jax.enable_x64(True):
        x, y = jnp.asarray(logits.numpy()), jnp.asarray(labels.numpy())
        loss, grad = jax.jit(jax.value_and_grad(torch_loss_as_jax(TorchCE())))(x, y)
        assert loss.dtype == grad.dtype == jnp.float64
        np.testing.assert_allclose(grad, jax.grad(JaxCE())(x, y), rtol=0, atol=1e-14)


def test_torch_in_jax_every_floating_input():
    logits, labels = case()
    x, y, n = jnp.asarray(logits.numpy()), jnp.asarray(labels.numpy()), jnp.float32(7)
    weights = jnp.linspace(0.5, 2.0, 15).reshape(3, 5)

    def both(f, x, weights, n):
        return f(x, y, None, n, loss_weights=weights)

    got = jax.jit(jax.grad(functools.partial(both, torch_loss_as_jax(TorchCE())), argnums=(0, 1, 2)))(x, weights, n)
    want = jax.grad(functools.partial(both, JaxCE()), argnums=(0, 1, 2))(x, weights, n)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    _, of_labels = jax.grad(torch_loss_as_jax(TorchCE()), argnums=(0, 1), allow_int=True)(x, y)
    assert of_labels.dtype == jax.dtypes.float0


def test_torch_in_jax_computes_only_the_needed_gradients():
    seen = []

    class Spy(TorchCE):
        def forward(self, logits, labels, loss_weights=None):
            if torch.is_grad_enabled():
                seen.append((logits.requires_grad, loss_weights.requires_grad))
            return super().forward(logits, labels, loss_weights=loss_weights)

    logits, labels = case()
    jax.grad(torch_loss_as_jax(Spy()))(jnp.asarray(logits.numpy()), labels.numpy().astype("int32"), jnp.ones((3, 5)))
    assert seen == [(True, False)]


def test_torch_in_jax_vmap():
    logits, labels = case()
    x, y = jnp.asarray(logits.numpy()), jnp.asarray(labels.numpy())
    f = torch_loss_as_jax(TorchCE())
    np.testing.assert_allclose(jax.vmap(f)(x, y), jax.vmap(JaxCE())(x, y), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(f, (0, None))(x, y[0]), jax.vmap(JaxCE(), (0, None))(x, y[0]), rtol=1e-5)
    got = jax.jit(jax.vmap(jax.grad(f)))(x, y)
    np.testing.assert_allclose(got, jax.vmap(jax.grad(JaxCE()))(x, y), rtol=1e-5, atol=1e-6)


def test_torch_in_jax_repeated_with_megabytes():
    x = jax.random.normal(jax.random.key(0), (512, 2048))
    y = jnp.zeros(512, jnp.int32)
    f = torch_loss_as_jax(TorchCE("mean"))
    step = jax.jit(lambda x: x - jax.grad(lambda x: f(x * 2, y))(x))
    for _ in range(10):
        x = step(x)
    assert jnp.isfinite(x).all()


ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, torch
from loss_core_bridge import torch_loss_as_jax
class Sum(torch.nn.Module):
    def forward(self, x): return x.square().sum()
step = jax.jit(jax.grad(torch_loss_as_jax(Sum())))
x = jnp.ones((1024, 1024))
for _ in range(5):
    x = step(x) * 0.5
print(float(x.sum()))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform can't restrict a process to one core")
def test_torch_in_jax_on_one_core():
    """With jax.pure_callback this deadlocks: the callback waits for the thread that it runs on."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_CORE],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.strip() == "1048576.0", done.stderr


def test_torch_in_jax_shapes_without_data():
    class ReadsValues(torch.nn.Module):
        def forward(self, logits, labels):
            if labels.max() >= logits.shape[-1]:  # fails on meta tensors
                raise ValueError("label out of range")
            return F.cross_entropy(logits, labels.long())

    f = torch_loss_as_jax(ReadsValues())
    shapes = jax.eval_shape(f, jax.ShapeDtypeStruct((4, 9), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32))
    assert shapes.shape == ()
    assert shapes.dtype == jnp.float32
    with pytest.raises(ValueError, match="label out of range"):
        f(jnp.ones((4, 9)), jnp.full(4, 9))
    with pytest.raises(jax.errors.JaxRuntimeError, match="label out of range"):
        jax.block_until_ready(jax.jit(f)(jnp.ones((4, 9)), jnp.full(4, 9)))
    with pytest.raises(ValueError, match="batch_size"):  # torch's own error, at trace time
        jax.jit(f)(jnp.ones((4, 9)), jnp.zeros(5, jnp.int32))


def test_torch_in_jax_rejects():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        torch_loss_as_jax(lambda x: x)
    with pytest.raises(ValueError, match="trainable parameters \\(weight, bias\\)"):
        torch_loss_as_jax(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="inside its own callback"):
        torch_loss_as_jax(torch.nn.Sequential(jax_loss_as_torch(JaxCE())))
    f = torch_loss_as_jax(TorchCE())
    logits, labels = case()
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        f(logits, jnp.zeros(3))
    wide = labels.numpy().copy()
    wide[0, 0] = 2**32 + 1
    with pytest.raises(ValueError, match="labels has values from -100 to 4294967297"):
        f(jnp.asarray(logits.numpy()), wide)

    class Detached(torch.nn.Module):
        def forward(self, x):
            return x.detach().sum()

    with pytest.raises(RuntimeError, match="not connected to x"):
        jax.grad(torch_loss_as_jax(Detached()))(jnp.ones(3))


def test_torch_in_jax_can_not_modify_jax_memory():
    class Writes(torch.nn.Module):
        def forward(self, logits, labels):
            labels.zero_()
            return logits.sum()

    x, y = jnp.ones((2, 3)), jnp.ones(2, jnp.int32)
    f = torch_loss_as_jax(Writes())
    f(x, y)
    jax.jit(jax.grad(f))(x, y)
    assert (y == 1).all()


def test_torch_in_jax_is_a_static_hashable_callable():
    module = TorchCE("mean")
    f = torch_loss_as_jax(module)
    assert f == torch_loss_as_jax(module)
    assert hash(f) == hash(torch_loss_as_jax(module))
    assert f != torch_loss_as_jax(TorchCE("mean"))
    assert jax.tree.leaves(f) == []
    assert f.reduction == "mean"
    assert list(inspect.signature(f).parameters)[:2] == ["logits", "labels"]
    logits, labels = case()
    jax.jit(lambda loss, x, y: loss(x, y))(f, jnp.asarray(logits.numpy()), jnp.asarray(labels.numpy()))


def test_a_round_trip_returns_the_original_loss():
    loss, module = JaxCE(), TorchCE()
    assert torch_loss_as_jax(jax_loss_as_torch(loss)) is loss
    assert jax_loss_as_torch(torch_loss_as_jax(module)) is module


# --- from a config and a flag --------------------------------------------------------------------


@dataclasses.dataclass
class OwnConfig(loss_core.LossConfig):
    reduction: str = "mean"


@pytest.fixture
def registered_loss():
    builders = {"torch": lambda config: TorchCE(config.reduction), "jax": lambda config: JaxCE(config.reduction)}
    loss_core.register_loss("OwnLoss", OwnConfig, builders)
    yield OwnConfig()
    loss_core.unregister_loss("OwnLoss")


def train(loss_fn, steps=5):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 37))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        torch.manual_seed(step)
        hidden, labels = torch.randn(2, 6, 8), torch.randint(0, 37, (2, 6))
        optimizer.zero_grad()
        loss_fn(logits=model(hidden), labels=labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def assert_same_training(config):
    trained = {flag: train(build_torch_loss(config, backend=flag)) for flag in ("torch", "jax")}
    torch.testing.assert_close(trained["jax"], trained["torch"], rtol=1e-4, atol=1e-5)
    fresh = train(lambda logits, labels: logits.sum() * 0)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(fresh, trained["jax"], strict=True))


def test_same_training_by_flag(registered_loss):
    assert_same_training(registered_loss)


def test_flags_of_a_registered_loss(registered_loss):
    assert isinstance(build_torch_loss(registered_loss), TorchCE)
    assert isinstance(build_torch_loss("OwnLoss", backend="torch:eager", reduction="sum"), TorchCE)
    assert build_torch_loss("OwnLoss", backend="jax", reduction="sum").jax_loss == JaxCE("sum")
    assert build_jax_loss(registered_loss) == JaxCE("mean") == build_jax_loss(registered_loss, "jax:xla")
    assert isinstance(build_jax_loss(registered_loss, "torch").module, TorchCE)
    with pytest.raises(ValueError, match="Unknown backend flag 'jaxx'"):
        build_torch_loss(registered_loss, backend="jaxx")


def test_factories_and_overrides_accept_no_flag():
    assert isinstance(build_torch_loss(TorchCE, reduction="none"), TorchCE)
    assert isinstance(build_jax_loss(TorchCE).module, TorchCE)
    assert build_jax_loss(JaxCE, reduction="none") == JaxCE("none")
    with pytest.raises(ValueError, match="one framework"):
        build_torch_loss(TorchCE, backend="jax")
    with pytest.raises(TypeError, match="jax_loss_as_torch"):
        build_torch_loss(JaxCE)

    @dataclasses.dataclass
    class Overrides(loss_core.LossConfig):
        def build(self):
            return TorchCE()

    assert isinstance(build_torch_loss(Overrides()), TorchCE)
    with pytest.raises(ValueError, match="takes no backend"):
        build_torch_loss(Overrides(), backend="jax")


def test_importing_the_bridge_loads_no_framework():
    code = "import sys, loss_core_bridge; print(sorted({'torch', 'jax'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "[]", done.stderr


WITHOUT = """
import dataclasses, sys
sys.modules[{missing!r}] = None  # makes an import of the module raise ImportError
import loss_core
from loss_core_bridge import build_jax_loss, build_torch_loss

@dataclasses.dataclass
class Own(loss_core.LossConfig):
    pass

def torch_loss(config):
    import torch
    return torch.nn.L1Loss()

loss_core.register_loss("Own", Own, {{"torch": torch_loss, "jax": lambda config: abs}})
print({call})
"""


@pytest.mark.parametrize(
    ("missing", "call", "outcome"),
    [
        ("jax", "build_torch_loss(Own(), 'torch')", "L1Loss()"),
        ("torch", "build_jax_loss(Own(), 'jax')", "<built-in function abs>"),
        ("jax", "build_torch_loss(Own(), 'jax')", "BackendUnavailable: the bridge needs both frameworks"),
        ("torch", "build_jax_loss(Own(), 'torch')", "None in sys.modules"),
    ],
)
def test_one_framework_is_enough_for_its_own_flags(missing, call, outcome):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = WITHOUT.format(missing=missing, call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert outcome in (done.stdout + done.stderr)


# --- the losses of this library ------------------------------------------------------------------

CONFIGS = [
    loss_core.MaskedCrossEntropyConfig(reduction="mean"),
    loss_core.TEParallelCEConfig(reduction="mean"),
    loss_core.FusedLinearCEConfig(reduction="mean", logit_softcapping=5.0),
    loss_core.KDLossConfig(temperature=2.0),
]


def library_case(config, dtype):
    logits, labels = case(dtype)
    if isinstance(config, loss_core.KDLossConfig):
        return {"student_logits": logits, "teacher_logits": case(dtype, seed=1)[0], "labels": labels}
    if isinstance(config, loss_core.FusedLinearCEConfig):
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(29, 37, generator=generator).to(dtype)
        return {"hidden_states": logits, "lm_weight": weight, "labels": labels % 29}
    return {"logits": logits, "labels": labels}


def gradients(loss, arguments):
    leaves = {
        name: value.detach().clone().requires_grad_(value.is_floating_point()) for name, value in arguments.items()
    }
    result = loss(**leaves)
    (2 * result).sum().backward()
    return result.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_library_losses_by_flag(config, dtype):
    arguments = library_case(config, dtype)
    loss, grads = gradients(build_torch_loss(config, backend="jax"), arguments)
    want, want_grads = gradients(build_torch_loss(config, backend="torch:eager"), arguments)
    assert loss.dtype == want.dtype
    assert grads.keys() == want_grads.keys()
    assert len(grads) >= 1
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, want_grads[name], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_library_losses_in_jax_by_flag(config):
    arguments = {name: jnp.asarray(value.numpy()) for name, value in library_case(config, torch.float32).items()}
    names = [name for name, value in arguments.items() if value.dtype == jnp.float32]
    labels = arguments["labels"]

    def run(flag):
        loss = build_jax_loss(config, backend=flag)
        return jax.jit(jax.value_and_grad(lambda floats: loss(**floats, labels=labels)))(
            {n: arguments[n] for n in names}
        )

    (loss, grads), (want, want_grads) = run("torch:eager"), run("jax")
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for name in names:
        np.testing.assert_allclose(grads[name], want_grads[name], rtol=1e-4, atol=1e-6)


def test_a_label_that_is_not_a_class_is_rejected_through_the_bridge():
    for config in CONFIGS:
        arguments = library_case(config, torch.float32)
        arguments["labels"].view(-1)[1] = 10**6
        loss = build_torch_loss(config, backend="jax")
        if isinstance(config, loss_core.KDLossConfig):
            # Its labels only say which tokens are ignored.
            assert loss(**arguments).isfinite()
            continue
        with pytest.raises(ValueError, match="1000000"):
            loss(**arguments)


def test_same_training_by_flag_with_the_library():
    assert_same_training(loss_core.MaskedCrossEntropyConfig(reduction="mean"))


def test_library_loss_saves_no_second_copy_of_the_logits(residual_sizes):
    logits, labels = case(V=501)
    run_torch(build_torch_loss(loss_core.MaskedCrossEntropyConfig(), backend="jax"), logits, labels)
    assert sum(residual_sizes) < logits.numel()
