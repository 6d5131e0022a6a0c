"""Losses from a config and a flag: which framework's loss is built, and that both train the same model."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import loss_core
from helpers.stand_ins import TOLERANCE, JaxCE, TorchCE, case
from loss_core_bridge import build_jax_loss, build_torch_loss, jax_loss_as_torch, torch_loss_as_jax


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


def test_same_training_by_flag_with_the_library():
    assert_same_training(loss_core.MaskedCrossEntropyConfig(reduction="mean"))


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


def test_a_round_trip_returns_the_original_loss():
    loss, module = JaxCE(), TorchCE()
    assert torch_loss_as_jax(jax_loss_as_torch(loss)) is loss
    assert jax_loss_as_torch(torch_loss_as_jax(module)) is module


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
