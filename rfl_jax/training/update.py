"""One optimizer update on the mesh: the frozen prefix where it is not cached, then the step."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from rfl_jax.networks.parts import Frozen
from rfl_jax.sampling.prefix import prefix_arguments
from rfl_jax.sampling.sampler import Batch, Sampler
from rfl_jax.training.state import TrainState
from rfl_jax.training.step import Metrics


@dataclasses.dataclass(frozen=True)
class Update:
    """The compiled programs of an update.

    Attributes:
        mesh: devices.
        step: the jitted step.
        prefix: the jitted program before it; None without steps of its own.
        sampler: denoising steps of the prefix.
    """

    mesh: Mesh
    step: Any
    prefix: Any
    sampler: Sampler

    def __call__(self, state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        """The state after one update, and its metrics. `state` is donated."""
        batch = self.start(frozen, batch, key)
        with jax.set_mesh(self.mesh):
            return self.step(state, frozen, batch, key)

    def start(self, frozen: Frozen, batch: Batch, key: jax.Array) -> Batch:
        """The batch with the latents that the step starts from, where they are not in the cache."""
        if self.prefix is None:
            return batch
        with jax.set_mesh(self.mesh):
            return {**batch, "prefix": self.prefix(*prefix_arguments(self.sampler, frozen, batch), key)}
