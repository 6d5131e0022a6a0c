"""A compilation in one thread has no effect on calls in another: the same results, errors and kernels."""

import threading

import pytest
import torch

from helpers.torch_calls import assert_same, cells, configs, inputs, run, usable_flags
from loss_core import MaskedCrossEntropyConfig
from loss_core.dispatch.flags import COMPILED_AT_FIRST_CALL
from loss_core.dispatch.observed import names, observing

# A first call that compiles would wait for the other thread.
FLAGS = [flag for flag in usable_flags() if flag not in COMPILED_AT_FIRST_CALL]


@pytest.fixture(scope="module")
def compiling():
    """Another thread compiles for as long as these tests run."""
    started, done = threading.Event(), threading.Event()

    def backend(graph, arguments):
        started.set()
        done.wait()
        return graph

    def compile_slowly():
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))

    thread = threading.Thread(target=compile_slowly)
    thread.start()
    assert started.wait(60)
    yield
    done.set()
    thread.join()


@cells(configs(("mean",)), FLAGS, interpreted=False)
def test_the_same_result_by_the_same_kernel(compiling, flag, config):
    with observing() as seen:
        got = run(config.build(backend=flag), inputs(config))
    small = "torch:eager" if hasattr(config, "chunk_len") else "torch:plain"
    assert names(seen) == (small if flag == "torch" else flag)
    assert torch.compiler.is_compiling()
    assert_same(got, run(config.build(backend=flag), inputs(config)), rtol=0, atol=0)


def test_the_same_errors(compiling):
    loss, logits = MaskedCrossEntropyConfig().build(backend="torch:eager"), torch.randn(2, 5, requires_grad=True)
    with pytest.raises(ValueError, match="7"):
        loss(logits, torch.tensor([1, 7]))
    with pytest.raises(RuntimeError, match="torch:plain"):
        torch.func.vmap(loss)(torch.randn(3, 2, 5), torch.ones(3, 2).long())
    (grad,) = torch.autograd.grad(loss(logits, torch.tensor([1, 4])), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="torch:plain"):
        torch.autograd.grad(grad.sum(), logits)


def test_in_place_and_inference_tensors(compiling):
    loss = MaskedCrossEntropyConfig(inplace_grad=True).build(backend="torch:eager")
    logits = torch.randn(2, 5, requires_grad=True)
    with torch.inference_mode():
        labels = torch.tensor([1, 4])
    loss(logits * 1.0, labels).backward()
    assert logits.grad is not None
