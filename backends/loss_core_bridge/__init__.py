"""The bridge between the frameworks: a JAX loss inside torch, a torch loss inside JAX.

A torch training script can compute its loss in JAX and still train the same torch model:

    loss_fn = build_torch_loss(MaskedCrossEntropyConfig(reduction="mean"), backend=args.backend)
    loss_fn(logits, labels).backward()

| function | result | how |
|---|---|---|
| `build_torch_loss(config, backend)` | `torch.nn.Module` | native, or a JAX loss wrapped |
| `build_jax_loss(config, backend)` | JAX callable | native, or a torch loss wrapped |
| `jax_loss_as_torch(loss)` | `torch.nn.Module` | DLPack, no copy where layouts allow |
| `torch_loss_as_jax(module)` | JAX callable | a host callback, with copies |

Importing this package imports neither framework, so that a script with `--backend torch` runs where JAX is not
installed; the functions import them when called.
"""

from loss_core_bridge.build import build_jax_loss, build_torch_loss, jax_loss_as_torch, torch_loss_as_jax

__all__ = ["build_jax_loss", "build_torch_loss", "jax_loss_as_torch", "torch_loss_as_jax"]
