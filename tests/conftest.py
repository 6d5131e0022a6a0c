"""Settings that must be there before torch is imported."""

import os
import tempfile

# torch and JAX share the cores, and so do the test processes: idle OpenMP threads must sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What `loss-core bench --tune` has kept on this machine must not choose kernels here: there is no such folder.
os.environ["LOSS_CORE_CACHE"] = os.path.join(tempfile.gettempdir(), f"loss-core-no-choices-{os.getpid()}")

# Programs that tests start in processes of their own: importing one here would set its environment for every test.
collect_ignore_glob = ["*_worker.py"]
