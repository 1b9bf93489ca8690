"""Tests; what they all need before jax is imported."""

from importlib.metadata import version

# Of programs for CPUs: code that is written in a sixth of the time and takes more than twice as long to run. What XLA makes of a
# program before that stays the same but for the way in which neighbouring operations share a loop.
COMPILER = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1):  # later ones end at a flag that they no longer have
    COMPILER += " --xla_cpu_use_fusion_emitters=false"
