"""How many clips go together, and where a batch's arrays lie on the mesh."""

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rfl_jax import hosts
from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.sharding import BATCH, batch_shards, micro_batches, replicated

T = TypeVar("T")


def micro_batch(cfg: Config, mesh: Mesh) -> int:
    """Videos that are sampled together, on all devices."""
    return cfg.per_device_train_batch_size * batch_shards(mesh)


def samples_per_update(cfg: Config, mesh: Mesh) -> int:
    """Videos of one optimizer update, of all processes.

    Raises:
        UserError: `train_batch_size` is no multiple of them, or `nft.group` does not divide those that are sampled together.
    """
    micro = micro_batch(cfg, mesh)
    samples = micro * cfg.gradient_accumulation_steps
    if cfg.nft.group and micro % cfg.nft.group:
        raise UserError(
            f"config.nft.group: expected a divisor of {micro} = per_device_train_batch_size "
            f"{cfg.per_device_train_batch_size} x {batch_shards(mesh)} sample groups of the mesh, got {cfg.nft.group}"
        )
    if cfg.train_batch_size % samples:
        raise UserError(
            f"config.train_batch_size: {cfg.train_batch_size} is no multiple of {samples} = per_device_train_batch_size "
            f"{cfg.per_device_train_batch_size} x {batch_shards(mesh)} sample groups of the mesh x "
            f"gradient_accumulation_steps {cfg.gradient_accumulation_steps}"
        )
    return samples


def in_batches(items: Iterable[T], kinds: Iterable[Hashable], size: int) -> Iterator[list[T]]:
    """Items of one kind (clips of one size) in batches, kinds in the order of their first item; the last batch of a kind
    may not be full.
    """
    groups: dict[Hashable, list[T]] = {}
    for item, kind in zip(items, kinds, strict=True):
        groups.setdefault(kind, []).append(item)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def filled(items: Sequence[T], size: int) -> list[T]:
    """A batch that is not full, filled up with its last item."""
    return [items[min(i, len(items) - 1)] for i in range(size)]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run.

    Attributes:
        mesh: devices.
        names: a clip's arrays that a batch has.
        constants: arrays that are the same in every batch, by name.
        micro: videos of a micro-batch, on all devices.
        accumulation: micro-batches of an update.
    """

    mesh: Mesh
    names: tuple[str, ...]
    constants: Mapping[str, np.ndarray]
    micro: int
    accumulation: int

    @property
    def samples(self) -> int:
        """Videos of an update, of all processes."""
        return self.micro * self.accumulation

    def place(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """One micro-batch on the mesh, of arrays that every process has whole."""
        spread = NamedSharding(self.mesh, BATCH)
        placed = {name: hosts.place(x, spread) for name, x in arrays.items()}
        return placed | {name: hosts.place(x, replicated(self.mesh)) for name, x in self.constants.items()}

    def place_update(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch of an update, micro-batches first, of arrays that every process has whole."""
        spread, count = micro_batches(self.mesh), self.accumulation
        placed = {name: hosts.place(x.reshape(count, self.micro, *x.shape[1:]), spread) for name, x in arrays.items()}
        return placed | self._constants()

    def place_share(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch of an update, micro-batches first, of this process's share of its videos."""
        spread, count = micro_batches(self.mesh), self.accumulation

        def place(x: np.ndarray) -> jax.Array:
            mine = x.reshape(count, -1, *x.shape[1:])
            return jax.make_array_from_process_local_data(spread, mine, (count, self.micro, *x.shape[1:]))

        return {name: place(x) for name, x in arrays.items()} | self._constants()

    def _constants(self) -> dict[str, jax.Array]:
        whole = replicated(self.mesh)
        return {name: hosts.place(np.stack([x] * self.accumulation), whole) for name, x in self.constants.items()}
