"""Code of the worker processes of `loss-core bench`: our losses and the baselines, on torch and on JAX.

loss_core.bench serves `loss_core_bench.worker.Worker` in separate processes and imports nothing from here.
"""
