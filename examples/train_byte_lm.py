"""Train a small byte-level language model in PyTorch, with the loss computed by PyTorch or by JAX.

    python examples/train_byte_lm.py --backend torch
    python examples/train_byte_lm.py --backend jax

Four things here are about loss_core, each marked with its number; the rest is any training script:

1. the config is read from YAML and names no framework;
2. the flag builds it: `--backend jax` gives a torch module, too, which runs the JAX loss;
3. the loss gets hidden states and the head's weight, so that the logits never exist as a whole;
4. padding carries `ignore_index` as its label, and the sum is divided by the count of label tokens.

The text is that of Python's own standard library on this machine.
"""

# N = windows in all, B = windows of a batch, S = positions of a window, H = width, V = vocabulary (the 256 bytes)

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# PyTorch's and XLA's threads share the cores: those that wait must sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from loss_core import BackendUnavailable, FusedLinearCEConfig, LossConfig
from loss_core_bridge import build_torch_loss

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 256, 128, 128, 4, 2
BATCH, LEARNING_RATE, WARMUP_STEPS = 16, 6e-3, 20
MAX_BYTES = 2_000_000
START = 0  # begins each document: NUL occurs in no Python source
LOSS_FILE = Path(__file__).with_name("byte_lm.yaml")

# Called before each step with the step, the model, the inputs and the labels: how demo.py looks inside a run.
Probe = Callable[[int, "ByteLM", Tensor, Tensor], None]


@dataclass
class Curve:
    """What a run leaves behind.

    Attributes:
        backend: the flag that was given; kernel: the flag of the kernel that ran.
        config: the loss config, as a dict.
        losses: of each step's batch; valid_loss: of the held-out windows at the end. In nats per byte.
        seconds: of the whole run, compilation included.
    """

    backend: str
    kernel: str
    config: dict[str, Any]
    seed: int
    dtype: str
    losses: list[float] = field(default_factory=list)
    valid_loss: float = math.nan
    seconds: float = 0.0


def read_loss_config(path: Path) -> LossConfig:
    """(1) The config under `loss:` of a YAML file, validated; a typo is an error that names the closest field."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict) or "loss" not in recipe:
        raise ValueError(f"{path} must hold a mapping under the key 'loss'.")
    return LossConfig.from_dict(recipe["loss"])


def loss_arguments(model: ByteLM, config: LossConfig, inputs_BS: Tensor, labels_BS: Tensor) -> dict[str, Tensor]:
    """(3, 4) What the loss is called with: hidden states and weight for a fused loss, logits for the others."""
    hidden_BSH = model(inputs_BS)
    num_label_tokens = (labels_BS != config.ignore_index).sum()  # stays a tensor: no wait for a device
    arguments = {"labels": labels_BS, "num_label_tokens": num_label_tokens}
    if isinstance(config, FusedLinearCEConfig):
        return arguments | {"hidden_states": hidden_BSH, "lm_weight": model.lm_head.weight}
    return arguments | {"logits": model.lm_head(hidden_BSH)}


def train(
    config: LossConfig,
    backend: str,
    *,
    steps: int = 300,
    seed: int = 0,
    dtype: str = "float32",
    probe: Probe | None = None,
) -> Curve:
    """Train a fresh model; Ctrl-C ends it early, with what was trained so far."""
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
        print(f"\nstopped after {len(curve.losses)} of {steps} steps")
    curve.seconds = time.perf_counter() - start
    return curve


def progress(done: int, steps: int, loss: float, seconds: float) -> str:
    return f"step {done:4d}/{steps}  loss {loss:.4f} nats = {loss / math.log(2):.4f} bits per byte  {seconds:5.1f} s"


def read_windows(ignore_index: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs and labels, [N, S] each, of the training and of the held-out documents.

    A document is the text between two `def` or `class` lines of a standard library file. It is cut
    into windows, and the last one is padded: about a tenth of all labels are ignored ones.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    num_bytes = 0
    for number, path in enumerate(path for path in files if not skipped & set(path.parts)):
        text = (root / path).read_bytes()
        num_bytes += len(text)
        if num_bytes > MAX_BYTES:
            break
        # Whole files are held out, so that no function of theirs is seen in training.
        splits[number % 20 == 0].extend(re.split(rb"\n(?=[ \t]*(?:class|def|async def) )", text))
    if not (splits[0] and splits[1]):
        raise FileNotFoundError(f"There are no Python sources to train on in {root}.")
    return pack(splits[0], ignore_index), pack(splits[1][:400], ignore_index)


def pack(documents: list[bytes], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Windows of documents: the labels are the inputs, one byte further on; padding is ignored."""
    inputs, labels = [], []
    for document in documents:
        for at in range(0, len(document), CONTEXT):
            window = list(document[at : at + CONTEXT])
            padding = CONTEXT - len(window)
            before = document[at - 1] if at else START
            inputs.append([before, *window[:-1]] + [START] * padding)
            labels.append(window + [ignore_index] * padding)
    return torch.tensor(inputs), torch.tensor(labels)


class ByteLM(nn.Module):
    """A pre-norm transformer; `forward` stops before the head, whose product is part of the fused loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.position.weight, std=0.3)  # bytes first, places later
        nn.init.normal_(self.lm_head.weight, std=0.02)  # small logits: the first loss is that of guessing, log 256

    def forward(self, inputs_BS: Tensor) -> Tensor:
        """Hidden states [B, S, H] of bytes [B, S]."""
        hidden_BSH = self.embedding(inputs_BS) + self.position.weight[: inputs_BS.shape[1]]
        return self.norm(self.blocks(hidden_BSH))


class Block(nn.Module):
    """Causal self-attention and an MLP, each with RMSNorm before it and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        )

    def forward(self, x_BSH: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_BSH)).unflatten(-1, (3, HEADS, -1))  # [B, S, 3, heads, H / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSH = x_BSH + self.out(attended.transpose(1, 2).flatten(2))
        return x_BSH + self.mlp(self.mlp_norm(x_BSH))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", help="torch, torch:eager, jax, jax:xla, ... (default: torch)")
    parser.add_argument("--loss", type=Path, default=LOSS_FILE, help="YAML file with a mapping under 'loss:'")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    parser.add_argument("--out", type=Path, help="write the loss curve to this JSON file")
    args = parser.parse_args()
    try:
        config = read_loss_config(args.loss)
        curve = train(config, args.backend, steps=args.steps, seed=args.seed, dtype=args.dtype)
    except (BackendUnavailable, OSError, TypeError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if args.out:
        args.out.write_text(json.dumps(asdict(curve)), encoding="utf-8")
    return 0 if len(curve.losses) == args.steps else 130


if __name__ == "__main__":
    sys.exit(main())
