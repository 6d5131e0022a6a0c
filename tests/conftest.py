"""Settings that must be there before torch and JAX are imported."""

import os
import tempfile

# torch and JAX share the cores, and so do the test processes: idle OpenMP threads must sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What `loss-core bench --tune` has kept on this machine must not choose kernels here: there is no such folder.
os.environ["LOSS_CORE_CACHE"] = os.path.join(tempfile.gettempdir(), f"loss-core-no-choices-{os.getpid()}")

# Compiling is most of what tests of JAX cost, and many of them compile the same: the processes of pytest-xdist and the
# programs that tests start share a folder, which the session's first process makes and removes. LLVM does not optimise
# here, and a program is one module for it: what XLA makes of a program stays the same, and `make check` runs it as
# users do. (XLA's older emitters would halve the time once more, but are not what users run.)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="loss-core-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1")

# Programs that tests start in processes of their own: importing one here would set its environment for every test.
collect_ignore_glob = ["*_worker.py"]
# Imports what `make mutants` alone installs.
collect_ignore = ["mutants.py"]
