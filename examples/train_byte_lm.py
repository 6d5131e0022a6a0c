"""Train a small byte-level language model in PyTorch, with the loss computed by PyTorch or by JAX.

    python examples/train_byte_lm.py --backend torch
    python examples/train_byte_lm.py --backend jax

Four parts are specific to loss_core, each marked with its number; the rest is any training script,
with its model and data in byte_lm.py, and recipe.py to read the file:

1. the config is read from YAML and names no framework;
2. the flag selects the backend: `--backend jax` also builds a torch module, which runs the JAX loss;
3. the loss takes hidden states and the head's weight, so that the full logits are never materialized;
4. padding has the label `ignore_index`, and the sum is divided by the count of label tokens.
"""

# N = windows in all, B = windows of a batch, S = positions of a window, H = width

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# PyTorch's and XLA's threads share the cores: idle threads must sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from byte_lm import ByteLM, read_windows
from recipe import loss_of
from torch import Tensor, nn

from loss_core import BackendUnavailable, FusedLinearCEConfig, LossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core_bridge import build_torch_loss

BATCH, LEARNING_RATE, WARMUP_STEPS, MAX_GRAD_NORM = 16, 3e-3, 20, 1.0
LOSS_FILE = Path(__file__).with_name("byte_lm.yaml")

CrossEntropyConfig = FusedLinearCEConfig | MaskedCrossEntropyConfig | TEParallelCEConfig
# Called before each step with the step, the model, the inputs and the labels; demo.py compares gradients with it.
Probe = Callable[[int, ByteLM, Tensor, Tensor], None]


@dataclass
class Curve:
    """Results of a training run.

    Attributes:
        backend: the flag; kernel: the flag of the kernel that ran.
        config: the loss config, as a dict.
        losses: of each step's batch; valid_loss: of the held-out windows at the end. In nats per byte.
        seconds: of the run, compilation included.
        interrupted: whether Ctrl-C ended it.
    """

    backend: str
    kernel: str
    config: dict[str, Any]
    seed: int
    dtype: str
    losses: list[float] = field(default_factory=list)
    valid_loss: float = math.nan
    seconds: float = 0.0
    interrupted: bool = False


def read_loss_config(path: Path) -> CrossEntropyConfig:
    """(1) The config under `loss:` of a YAML file, validated; a typo is an error that names the closest field."""
    config = LossConfig.from_dict(loss_of(path))
    if not isinstance(config, CrossEntropyConfig):
        raise TypeError(f"{path} names a {type(config).__name__}, but this script trains with a cross entropy.")
    return config


def loss_arguments(
    model: ByteLM, config: CrossEntropyConfig, inputs_BS: Tensor, labels_BS: Tensor
) -> dict[str, Tensor]:
    """(3, 4) Arguments of the loss: hidden states and weight for a fused loss, logits for the others."""
    hidden_BSH = model(inputs_BS)
    num_label_tokens = (labels_BS != config.ignore_index).sum()  # a tensor: no device sync
    arguments = {"labels": labels_BS, "num_label_tokens": num_label_tokens}
    if isinstance(config, FusedLinearCEConfig):
        return arguments | {"hidden_states": hidden_BSH, "lm_weight": model.lm_head.weight}
    return arguments | {"logits": model.lm_head(hidden_BSH)}


def train(
    config: CrossEntropyConfig,
    backend: str,
    *,
    steps: int = 300,
    seed: int = 0,
    dtype: str = "float32",
    probe: Probe | None = None,
) -> Curve:
    """Train a new model; Ctrl-C ends the run early and keeps the results so far."""
    loss_fn = build_torch_loss(config, backend=backend)  # (2)
    kernel = getattr(getattr(loss_fn, "kernel_choice", None), "flag", backend)
    curve = Curve(backend, kernel, config.to_dict(), seed, dtype)
    start = time.perf_counter()

    torch.manual_seed(seed)
    model = ByteLM()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    (train_inputs_NS, train_labels_NS), (valid_inputs_NS, valid_labels_NS) = read_windows(config.ignore_index)
    order = torch.Generator().manual_seed(seed)
    autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")

    try:
        for step in range(steps):
            rows_B = torch.randint(len(train_inputs_NS), (BATCH,), generator=order)
            inputs_BS, labels_BS = train_inputs_NS[rows_B], train_labels_NS[rows_B]
            if probe:
                probe(step, model, inputs_BS, labels_BS)
            with autocast:
                loss = loss_fn(**loss_arguments(model, config, inputs_BS, labels_BS))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            curve.losses.append(loss.item())
            if step % 25 == 0 or step == steps - 1:
                print(progress(step + 1, steps, curve.losses[-1], time.perf_counter() - start), flush=True)
        with torch.no_grad(), autocast:
            valid = loss_fn(**loss_arguments(model, config, valid_inputs_NS, valid_labels_NS))
        curve.valid_loss = valid.item()
        print(f"held-out: {curve.valid_loss:.4f} nats = {curve.valid_loss / math.log(2):.4f} bits per byte")
    except KeyboardInterrupt:
        curve.interrupted = True
        print(f"\nstopped after {len(curve.losses)} of {steps} steps")
    curve.seconds = time.perf_counter() - start
    return curve


def progress(done: int, steps: int, loss: float, seconds: float) -> str:
    return f"step {done:4d}/{steps}  loss {loss:.4f} nats = {loss / math.log(2):.4f} bits per byte  {seconds:5.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", help="torch, torch:eager, jax, jax:xla, ... (default: torch)")
    parser.add_argument("--loss", type=Path, default=LOSS_FILE, help="YAML file with a mapping under 'loss:'")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    parser.add_argument("--out", type=Path, help="write the loss curve to this JSON file")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    try:
        config = read_loss_config(args.loss)
        curve = train(config, args.backend, steps=args.steps, seed=args.seed, dtype=args.dtype)
    except (BackendUnavailable, OSError, TypeError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:  # before the first step: nothing was trained
        return 130
    if args.out:
        args.out.write_text(json.dumps(asdict(curve)), encoding="utf-8")
    return 130 if curve.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
