"""How long collectives take over the links that a slice really has."""

import math
from collections.abc import Sequence
from typing import Any

from rfl_jax.chips import Chip

Place = tuple[int, ...]


class Links:
    """The chips of a slice on their grid, each linked to its neighbours along every axis.

    An axis of one chip has no link. On one of two each chip has one link, and so has the last chip of a longer one, unless its
    ends are joined: a collective is as slow as that chip.

    Args:
        places: coordinates of the devices, in the order of the mesh.
        chip: the devices'.
    """

    def __init__(self, places: Sequence[Place], chip: Chip) -> None:
        self._places = places
        self._chip = chip
        self._extents = _extents(places)

    @classmethod
    def of(cls, devices: Sequence[Any], chip: Chip) -> "Links":
        """The links of devices as jax describes them."""
        return cls([tuple(device.coords) for device in devices], chip)

    def axes(self, group: Sequence[int] | None) -> list[tuple[int, int]]:
        """Length, and links of the chip that has the fewest, of each axis along which a group lies.

        Args:
            group: devices by their place in the mesh; None: all of them.
        """
        places = self._places if group is None else [self._places[device] for device in group]
        found = []
        for length, whole in zip(_extents(places), self._extents, strict=True):
            if length > 1:
                joined = length == whole and length > 2 and length % self._chip.ring == 0
                found.append((length, 2 if joined else 1))
        return found

    def seconds(self, kind: str, size: int, group: Sequence[int] | None) -> float:
        """Time of one collective that uses every link of its group and nothing else does; 0 within a chip.

        A gather, or its opposite, brings each chip what the others have; a reduction over all does both. In an all-to-all each
        half of the longest axis sends the other what that needs over the links between them.

        Args:
            kind: of `COLLECTIVES`.
            size: bytes of its result on one device.
            group: devices by their place in the mesh; None: all of them.
        """
        axes = self.axes(group)
        if not axes:
            return 0.0
        link = self._chip.interconnect / self._chip.links
        if kind == "collective-permute":
            return size / link
        if kind == "all-to-all":
            return size * max(length // 2 * (length - length // 2) / length / links for length, links in axes) / link
        devices = math.prod(length for length, _ in axes)
        share = (devices - 1) / devices * {"all-gather": 1, "all-reduce": 2, "reduce-scatter": devices}[kind]
        return size * share / (link * sum(links for _, links in axes))


def _extents(places: Sequence[Place]) -> list[int]:
    return [len(set(along)) for along in zip(*places, strict=True)]
