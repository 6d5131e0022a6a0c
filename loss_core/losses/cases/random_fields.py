"""How config fields are drawn for random cases; the same for every loss that has the field."""

from __future__ import annotations

from loss_core.field_checks import DIVERGENCES, METRICS, REDUCTIONS
from loss_core.losses.definition import RandomFields

# A value listed twice is drawn twice as often.
RANDOM_FIELDS: RandomFields = {
    "ignore_index": lambda rng: int(rng.choice([-100, -1, 0, 2])),
    "reduction": lambda rng: str(rng.choice(REDUCTIONS)),
    "temperature": lambda rng: float(rng.choice([0.5, 1.0, 2.0, 4.0])),
    "divergence": lambda rng: str(rng.choice(DIVERGENCES)),
    "beta": lambda rng: float(rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])),
    "chunk_size": lambda rng: int(rng.choice([0, 1, 3])),
    "fp32_upcast": lambda rng: bool(rng.random() < 0.7),
    "label_smoothing": lambda rng: float(rng.choice([0.0, 0.0, 0.1, 0.9])),
    "logit_softcapping": lambda rng: float(rng.choice([0.0, 0.0, 3.0, 30.0])),
    "z_loss": lambda rng: float(rng.choice([0.0, 0.0, 1e-3, 0.5])),
    "metrics": lambda rng: tuple(name for name in METRICS if rng.random() < 0.2),
    "chunk_len": lambda rng: int(rng.choice([1, 3, 64, 512])),
    "entropy": lambda rng: bool(rng.random() < 0.7),
    "tail": lambda rng: bool(rng.random() < 0.7),
}
