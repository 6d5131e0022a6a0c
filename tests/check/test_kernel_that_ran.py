"""Which kernel ran, and whether inputs were changed: observed, and a failure if it is not what was requested."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest

from loss_core import LossConfig, register_loss, unregister_loss
from loss_core.check import check
from loss_core.dispatch.flags import load_backend
from loss_core.dispatch.observed import names, observing, record
from loss_core.losses import LABELS, Argument, LossDef
from loss_core.losses.cross_entropy import over_logits, token_cross_entropy

torch = pytest.importorskip("torch")


def test_kernels_are_observed_once_each_in_order():
    record("torch:eager")
    with observing() as seen:
        record("torch:triton")
        record("torch:eager")
        record("torch:triton")
        with observing() as inner:
            record("torch:plain")
    record("torch:te")
    assert names(seen) == "torch:triton and torch:eager"
    assert names(inner) == "torch:plain"
    with observing() as nothing:
        pass
    assert names(nothing) == ""


def test_threads_observe_only_their_own_kernels():
    met = threading.Barrier(2)
    found = {}

    def work(flag):
        with observing() as seen:
            met.wait()
            record(flag)
            met.wait()
        found[flag] = names(seen)

    threads = [threading.Thread(target=work, args=(flag,)) for flag in ("torch:eager", "torch:triton")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"torch:eager": "torch:eager", "torch:triton": "torch:triton"}


@dataclass
class OwnConfig(LossConfig):
    ignore_index: int = -100


@pytest.fixture
def own(request):
    """A right loss that records the kernels of the test's parameter."""

    class Own(torch.nn.Module):
        def forward(self, logits, labels):
            for flag in request.param:
                record(flag)
            keep = labels != -100
            logits = torch.where(keep[..., None], logits, 0).double()
            log_p = logits.log_softmax(-1).gather(-1, torch.where(keep, labels, 0)[..., None])[..., 0]
            return torch.where(keep, -log_p, 0.0).sum().float()

    definition = LossDef("own", (Argument("logits", ("T", "V")), LABELS), over_logits(token_cross_entropy))
    register_loss("Own", OwnConfig, {"torch": lambda config: Own()}, definition=definition)
    yield
    unregister_loss("Own")


@pytest.mark.parametrize("own", [(), ("torch:eager",)], indirect=True, ids=["none", "eager"])
def test_the_kernel_that_was_asked_for_is_right(own):
    assert check("Own", ["torch:eager"], dtypes=["float32"], only=["basic"]).passed


@pytest.mark.parametrize("own", [("torch:triton",), ("torch:eager", "torch:triton")], indirect=True, ids=" and ".join)
def test_another_kernel_is_a_failure_that_names_both(own, request):
    report = check("Own", ["torch:eager"], dtypes=["float32"], only=["basic"])
    (failure,) = report.failures
    ran = " and ".join(request.node.callspec.params["own"])
    assert failure.problem == f"'torch:eager' was asked for, but {ran!r} ran"


@pytest.mark.parametrize("junk", [np.nan, np.inf, -0.0])
def test_a_kernel_that_overwrites_its_input_is_detected(junk):
    def overwrites(logits, labels):
        with torch.no_grad():
            logits.copy_(torch.where(labels[:, None] == -100, torch.zeros_like(logits), logits))
        return (logits * 1).sum()

    arrays = {"logits": np.array([[junk, junk], [1.0, 2.0]]), "labels": np.array([-100, 0])}
    found = load_backend("torch").evaluate(overwrites, arrays, dtype="float32", upstream=None, grad_of=("logits",))
    assert found.mutated == ("logits",)
