"""Train one model twice, with the loss on PyTorch and on JAX by the flag alone, and compare the runs.

    python examples/demo.py            # about a minute; writes demo.html

Three runs of train_byte_lm.py with one seed: on the first backend, on the second, and a control. At
several steps of the first run both backends compute the gradients at the same parameters and batch,
which are compared with each other and with float64.

The gradients are the proof; the curves are an illustration. Training in float32 is chaotic: a difference
in the last bit of one gradient grows from step to step, through Adam's division by small numbers
above all, so the curves of two correct backends diverge. The control shows by how much: it is the
first backend again, with each initial parameter replaced by the next float32. At the same parameters
nothing accumulates, and every element must be within the allowance that
`loss_core.losses.bounds.rounding` derives from the rounding of each operation.

Exit code: 0; 1 if an element exceeds its allowance or a loss is not finite; 2 if a backend is not
usable here; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loss_core.dtypes import float_format
from loss_core.losses import allowances, error_ratio, oracle

if TYPE_CHECKING:
    from byte_lm import ByteLM
    from torch import Tensor, nn
    from train_byte_lm import CrossEntropyConfig, Curve

NUM_PROBES = 13
ALL_PARAMETERS = "all parameters"
U = float_format("float32").u  # unit roundoff, half the distance from 1 to the next float32


@dataclass(frozen=True)
class GradientGap:
    """Differences between the gradients of two backends at one step, in 2-norms relative to the gradient.

    Attributes:
        between: between the backends, for each floating argument of the loss and for all parameters.
        allowed: bound on `between` from rounding, for the loss's arguments.
        allowed_loss: bound on the difference of the losses, in nats.
        from_float64: of each backend from the float64 oracle, over the loss's arguments together.
        error_ratio: largest error / allowance over the elements of loss and gradients, of either backend
            against float64; above 1 rounding does not explain it.
    """

    step: int
    between: dict[str, float]
    allowed: dict[str, float]
    allowed_loss: float
    from_float64: dict[str, float]
    error_ratio: float


@dataclass
class GradientProbe:
    """A probe of `train` that compares the gradients of two losses every few steps."""

    config: CrossEntropyConfig
    losses: Mapping[str, nn.Module]
    steps: int
    gaps: list[GradientGap] = field(default_factory=list)
    seconds: float = 0.0

    def __call__(self, step: int, model: ByteLM, inputs_BS: Tensor, labels_BS: Tensor) -> None:
        """Compare at NUM_PROBES steps, including the first and the last. Changes neither model nor batch."""
        if step not in np.linspace(0, self.steps - 1, NUM_PROBES).round():
            return
        start = time.perf_counter()
        self.gaps.append(self._compare(step, model, inputs_BS, labels_BS))
        self.seconds += time.perf_counter() - start

    def _compare(self, step: int, model: ByteLM, inputs_BS: Tensor, labels_BS: Tensor) -> GradientGap:
        import torch
        from train_byte_lm import loss_arguments

        # One graph of the model for both losses: what differs afterwards comes from the losses.
        arguments = loss_arguments(model, self.config, inputs_BS, labels_BS)
        names = [name for name, value in arguments.items() if value.is_floating_point()]
        targets = [*(arguments[name] for name in names), *model.parameters()]
        results: list[dict[str, np.ndarray]] = []
        for loss_fn in self.losses.values():
            loss = loss_fn(**arguments)
            grads = torch.autograd.grad(loss, targets, retain_graph=True)
            values = [grad.double().numpy() for grad in grads]
            of_parameters = np.concatenate([value.reshape(-1) for value in values[len(names) :]])
            of_arguments = dict(zip(names, values, strict=False))
            results.append({"loss": loss.detach().double().numpy(), **of_arguments, ALL_PARAMETERS: of_parameters})

        arrays = {name: value.detach().numpy() for name, value in arguments.items()}
        arrays |= {name: arrays[name].astype(np.float64) for name in names}
        exact = oracle.evaluate(self.config, arrays)
        expected = {"loss": exact.loss, **exact.grads}
        allowed = allowances(self.config, arrays, exact, "float32")
        ratios = [
            error_ratio(result[name], expected[name], allowed[name], "float32").max()
            for result in results
            for name in expected
        ]
        first, second = results
        return GradientGap(
            step=step,
            between={name: relative(first[name] - second[name], first[name]) for name in (*names, ALL_PARAMETERS)},
            # Each backend may be off by its own allowance.
            allowed={name: relative(2 * allowed[name], first[name]) for name in names},
            allowed_loss=2 * float(allowed["loss"]),
            from_float64={
                flag: relative(
                    np.concatenate([(result[name] - expected[name]).reshape(-1) for name in names]),
                    np.concatenate([expected[name].reshape(-1) for name in names]),
                )
                for flag, result in zip(self.losses, results, strict=True)
            },
            error_ratio=float(max(ratios)),
        )


def relative(difference: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))


def nudge(step: int, model: ByteLM, inputs_BS: Tensor, labels_BS: Tensor) -> None:
    """The probe of the control: before the first step, each parameter becomes the next larger float32."""
    import torch

    if step == 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.tensor(math.inf)))


@dataclass(frozen=True)
class Result:
    """The three runs and the gradients."""

    first: Curve
    second: Curve
    control: Curve
    gaps: list[GradientGap]

    @property
    def worst(self) -> GradientGap:
        """The step with the largest difference between the gradients of the two backends."""
        return max(self.gaps, key=lambda gap: max(gap.between.values()))

    @property
    def error_ratio(self) -> float:
        """Largest error / allowance over all steps."""
        return max(gap.error_ratio for gap in self.gaps)

    @property
    def loss_gap(self) -> float:
        """Difference of the held-out losses of the two backends."""
        return abs(self.first.valid_loss - self.second.valid_loss)

    @property
    def control_gap(self) -> float:
        """The same for the control."""
        return abs(self.first.valid_loss - self.control.valid_loss)

    @property
    def agree(self) -> bool:
        """Whether rounding explains every difference at the same parameters, and all losses are finite."""
        finite = np.isfinite([*self.first.losses, *self.second.losses]).all()
        return bool(finite) and all(gap.error_ratio <= 1.0 for gap in self.gaps)  # a NaN fails as well

    def line(self) -> str:
        """One-line summary of the differences."""
        first, second = self.first, self.second
        gap = max(self.worst.between.values())
        return (
            f"{'Agree' if self.agree else 'DISAGREE'}: held-out loss {first.valid_loss:.6f} on {first.kernel} and "
            f"{second.valid_loss:.6f} on {second.kernel} nats per byte, {self.loss_gap:.1e} apart (control "
            f"{self.control_gap:.1e}); largest relative gradient difference {gap:.1e} = {gap / U:.1f} u at step "
            f"{self.worst.step + 1}; worst element at {self.error_ratio:.0%} of its allowance."
        )


def run(config: CrossEntropyConfig, flags: tuple[str, str], steps: int, seed: int) -> Result | None:
    """The three runs; None if one of them was interrupted."""
    from train_byte_lm import train

    from loss_core_bridge import build_torch_loss

    # Both are built before the first step, so that a missing library is reported at once.
    probe = GradientProbe(config, {flag: build_torch_loss(config, backend=flag) for flag in flags}, steps)
    curves: list[Curve] = []
    for flag, title, hook in (
        (flags[0], f"loss on {flags[0]}, gradients of both compared on the way", probe),
        (flags[1], f"loss on {flags[1]}", None),
        (flags[0], f"control: {flags[0]} again, each initial parameter moved to the next float32", nudge),
    ):
        print(f"\n{title}", flush=True)
        curve = train(config, flag, steps=steps, seed=seed, probe=hook)
        if curve.interrupted:
            return None
        curves.append(curve)
    first, second, control = curves
    first.seconds -= probe.seconds
    return Result(first, second, control, probe.gaps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs=2, default=("torch", "jax"), metavar="FLAG", help="default: torch jax")
    parser.add_argument("--loss", type=Path, help="YAML file with a mapping under 'loss:' (default: byte_lm.yaml)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo.html"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    try:
        from demo_page import write_page
        from train_byte_lm import LOSS_FILE, read_loss_config

        config = read_loss_config(args.loss or LOSS_FILE)
        result = run(config, tuple(args.backends), args.steps, args.seed)
        if result is None:
            return 130
        write_page(args.out, result, args.steps)
    except ModuleNotFoundError as error:
        parser.exit(2, f"{error}. The demo needs both frameworks: pip install 'loss-core[torch,jax,cli]'\n")
    except (ImportError, OSError, TypeError, ValueError) as error:  # BackendUnavailable is an ImportError
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        return 130
    print(f"\n{result.line()}\n{args.out} has the curves and the gradients.")
    return 0 if result.agree else 1


if __name__ == "__main__":
    sys.exit(main())
