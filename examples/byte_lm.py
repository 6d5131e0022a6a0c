"""Model and data of train_byte_lm.py: a small transformer over bytes, and Python's own standard library as text."""

# N = windows in all, B = windows of a batch, S = positions of a window, H = width, D = width of a head

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 256, 128, 128, 4, 2
MAX_BYTES = 2_000_000
NUL = b"\0"  # begins each document and pads its last window; no Python source contains it


class ByteLM(nn.Module):
    """A pre-norm transformer; `forward` returns hidden states: the product with the head is part of the fused loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # small logits: the first loss is that of guessing, log 256

    def forward(self, inputs_BS: Tensor) -> Tensor:
        """Hidden states [B, S, H] of bytes [B, S]."""
        hidden_BSH: Tensor = self.norm(self.blocks(self.embedding(inputs_BS)))
        return hidden_BSH


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
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x_BSH = x_BSH + self.out(attended.transpose(1, 2).flatten(2))
        mixed_BSH: Tensor = x_BSH + self.mlp(self.mlp_norm(x_BSH))
        return mixed_BSH


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of [..., S, D] (Su et al. 2021, arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def read_windows(ignore_index: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs and labels, [N, S] each, of the training and of the held-out documents.

    A document is the text between two `def` or `class` lines of a standard library file. It is cut
    into windows, and the last one is padded: about a tenth of all labels are ignored.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(path.relative_to(root) for path in (*root.glob("*.py"), *root.glob("*/*.py")))
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    num_bytes = 0
    for number, path in enumerate(path for path in files if not skipped & set(path.parts)):
        text = (root / path).read_bytes()
        num_bytes += len(text)
        if num_bytes > MAX_BYTES:
            break
        # Complete files are held out, so that none of their functions is in the training set.
        splits[number % 20 == 0].extend(re.split(rb"\n(?=[ \t]*(?:class|def|async def) )", text))
    if not (splits[0] and splits[1]):
        raise FileNotFoundError(f"There are no Python sources to train on in {root}.")
    return pack(splits[0], ignore_index), pack(splits[1][:100], ignore_index)


def pack(documents: list[bytes], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels, [N, S] each: the labels are the next bytes; padding is ignored."""
    inputs, labels = bytearray(), bytearray()
    for document in documents:
        shifted = NUL + document
        for start in range(0, len(document), CONTEXT):
            labels += document[start : start + CONTEXT].ljust(CONTEXT, NUL)
            inputs += shifted[start : min(start + CONTEXT, len(document))].ljust(CONTEXT, NUL)
    inputs_NS, labels_NS = (torch.frombuffer(x, dtype=torch.uint8).view(-1, CONTEXT).long() for x in (inputs, labels))
    return inputs_NS, labels_NS.masked_fill(labels_NS == NUL[0], ignore_index)
