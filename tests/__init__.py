"""Tests; what they all need before jax is imported."""

# Of programs for CPUs: code that is written in less than half the time and takes half as long again to run. What XLA makes of a
# program before that stays the same.
COMPILER = "--xla_backend_optimization_level=0"
