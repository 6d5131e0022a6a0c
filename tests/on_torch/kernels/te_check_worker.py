"""The command line with TE's own sources on a CPU, for `check --implementation te`; run in a separate process.

Usage: TRITON_INTERPRET=1 PYTHONPATH=tests python tests/on_torch/kernels/te_check_worker.py check --implementation te …
"""

import torch

from loss_core.cli import main
from on_torch.kernels import te_on_cpu

if __name__ == "__main__":
    torch.set_num_threads(1)
    te_on_cpu.load()
    main()
