"""A jitted JAX training step with the config file that train_byte_lm.py reads. Loads no torch.

    python examples/jax_step.py
    python examples/jax_step.py --backend jax:xla --steps 500

The built loss is a function of arrays, which `jax.jit` and `jax.grad` accept directly. With torch
installed a torch flag works as well: JAX then calls the torch loss on the host. The model predicts
a byte of Python's argparse module from the 8 bytes before it.
"""

# N = windows in all, B = batch, C = context, E = embedding, H = hidden, V = vocabulary (the 256 bytes)

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import loss_of

from loss_core import FusedLinearCEConfig, LossConfig
from loss_core_bridge import build_jax_loss

BATCH, CONTEXT, EMBEDDING, HIDDEN, VOCAB = 512, 8, 16, 128, 256
LEARNING_RATE, MOMENTUM = 0.1, 0.9

Params = dict[str, jax.Array]


def init(key: jax.Array) -> Params:
    keys = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(keys[0], (VOCAB, EMBEDDING)),
        "hidden": jax.random.normal(keys[1], (CONTEXT * EMBEDDING, HIDDEN)) / math.sqrt(CONTEXT * EMBEDDING),
        "lm_head": 0.02 * jax.random.normal(keys[2], (VOCAB, HIDDEN)),
    }


def hidden_states(params: Params, bytes_BC: jax.Array) -> jax.Array:
    embedded = params["embedding"][bytes_BC].reshape(bytes_BC.shape[0], -1)
    return jax.nn.gelu(embedded @ params["hidden"])


def read_config(path: Path) -> FusedLinearCEConfig:
    config = LossConfig.from_dict(loss_of(path))
    if not isinstance(config, FusedLinearCEConfig):
        raise TypeError(f"This script calls its loss with hidden states, got a {type(config).__name__}.")
    return config


def make_step(config: FusedLinearCEConfig, backend: str) -> Any:
    """A jitted (params, velocity, bytes_BC, labels_B) -> (params, velocity, loss)."""
    loss_fn: Callable[..., jax.Array] = build_jax_loss(config, backend=backend)

    def objective(params: Params, bytes_BC: jax.Array, labels_B: jax.Array) -> jax.Array:
        return loss_fn(
            hidden_states=hidden_states(params, bytes_BC),
            labels=labels_B,
            lm_weight=params["lm_head"],
            num_label_tokens=(labels_B != config.ignore_index).sum(),
        )

    @jax.jit
    def step(params: Params, velocity: Params, bytes_BC: jax.Array, labels_B: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(objective)(params, bytes_BC, labels_B)
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - LEARNING_RATE * v, params, velocity)
        return params, velocity, loss

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="jax", help="jax, jax:xla, ... (default: jax)")
    parser.add_argument("--loss", type=Path, default=Path(__file__).with_name("byte_lm.yaml"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    try:
        step = make_step(read_config(args.loss), args.backend)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.exit(2, f"{error}\n")

    text = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8).astype(np.int32)
    windows_NC = np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)
    rng = np.random.default_rng(0)
    params = init(jax.random.key(0))
    velocity = jax.tree.map(jnp.zeros_like, params)
    for number in range(1, args.steps + 1):
        batch = windows_NC[rng.integers(0, len(windows_NC), BATCH)]
        params, velocity, loss = step(params, velocity, batch[:, :-1], batch[:, -1])
        if number % 50 == 0 or number in (1, args.steps):
            print(f"step {number:4d}  loss {loss:.4f} nats = {loss / math.log(2):.4f} bits per byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
