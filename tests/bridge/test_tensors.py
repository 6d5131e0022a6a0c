"""Tensors as JAX arrays: layouts, dtypes, and tensors that are rejected."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import torch

from helpers.stand_ins import JaxCE, TorchCE, case, run_torch
from loss_core_bridge import jax_loss_as_torch
from loss_core_bridge.tensors import to_jax, to_torch


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_width(dtype):
    logits, labels = case()
    labels = labels.clamp(min=0).to(dtype)
    torch.testing.assert_close(jax_loss_as_torch(JaxCE())(logits, labels), TorchCE()(logits, labels))


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
