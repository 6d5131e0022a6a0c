"""Settings that must be there before torch is imported."""

import os

# torch and JAX share the cores, and so do the test processes: idle OpenMP threads must sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
