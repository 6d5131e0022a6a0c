"""What runs inside the worker processes of `loss-core bench`: ours and the baselines, on torch and on JAX.

loss_core.bench starts `python -m loss_core_bench.worker`, one per implementation, and imports nothing from here.
"""
