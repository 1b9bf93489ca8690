"""Reward Feedback Learning for Wan2.2 video diffusion on JAX/Flax."""

__version__ = "0.1.0"
