"""Accelerators: what a chip can do, and the topologies that may be planned for by their names."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rfl_jax.errors import UserError, first_line

GB, GIB = 1e9, 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax counts it (a TensorCore where a chip shows two).

    Attributes:
        flops: peak bf16 matrix FLOP/s.
        memory: bytes of HBM that a program may use.
        bandwidth: of HBM, bytes/s.
        interconnect: bytes/s to all neighbours together.
        links: to how many neighbours.
        ring: an axis of the slice whose length is a multiple of it has its ends joined.
        clock: cycles/s; None where it is not known.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    links: int
    ring: int
    clock: float | None


# cloud.google.com/tpu/docs: system architecture of v5e, v5p, v6e, TPU7x. Interconnect figures there are bits/s a chip.
# Memory: what the compiler itself allows a program (its out-of-memory message names it). Rings:
# jax-ml.github.io/scaling-book/tpus. Clock: peak FLOP/s over those of the matrix units a cycle, as the compiler reckons with
# them: four of 128x128 on v5e, eight on v5p, four of 256x256 on v6e.
CHIPS = {
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 819 * GB, 200 * GB, 4, 16, 1.5e9),
    "TPU v5": Chip(459e12, 95.74 * GIB, 2765 * GB, 600 * GB, 6, 4, 1.75e9),
    "TPU v6 lite": Chip(918e12, 31.25 * GIB, 1640 * GB, 448 * GB, 4, 16, 1.75e9),
    "TPU7x": Chip(1153.5e12, 94.75 * GIB, 3690 * GB, 600 * GB, 6, 4, None),
}

# Peak bf16 matrix throughput in FLOP/s by the beginning of a device's kind: what can be planned for, its other names, and
# (vendors' data sheets) what cannot.
PEAK_FLOPS = {
    **{kind: chip.flops for kind, chip in CHIPS.items()},
    "TPU v4": 275e12,
    "TPU v5e": CHIPS["TPU v5 lite"].flops,
    "TPU v6e": CHIPS["TPU v6 lite"].flops,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}

_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SOLID = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
# The accelerator types one orders: v5p is counted in cores, two a chip, the others in chips.
ACCELERATOR_TYPES = {
    **{f"{name}-{chips}": f"v5e:{shape}" for chips, shape in _FLAT.items() for name in ("v5e", "v5litepod")},
    **{f"v6e-{chips}": f"v6e:{shape}" for chips, shape in _FLAT.items()},
    **{f"v5p-{2 * chips}": f"v5p:{shape}" for chips, shape in _SOLID.items()},
    **{f"{name}-{chips}": f"tpu7x:{shape}" for chips, shape in _SOLID.items() for name in ("tpu7x", "v7x")},
}

# How programs are compiled for a platform. TPUs: weights of layers are gathered while others are computed with, in steps beside
# matrix products, and not before them, where the chip can. Gathers are fused with products on v5e alone, which does so by itself:
# elsewhere `..._fuse_all_gather` may give wrong results by word of libtpu 0.0.50, which refuses it.
COMPILER_OPTIONS = {
    "tpu": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
}


def compiler_options(mesh: Mesh | None = None, more: Sequence[str] = ()) -> dict[str, str]:
    """Options of XLA for programs on the devices of a mesh, by default this machine's: their platform's own, and NAME=VALUE over
    them.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return {**COMPILER_OPTIONS.get(platform, {}), **dict(pair.split("=", 1) for pair in more)}


# What libtpu asks of a machine; where it finds no answer it complains, or waits for a metadata server.
_LIBTPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def answer_libtpu() -> None:
    """Gives libtpu what it asks of a machine without a TPU, which it would complain of on stderr in five lines; to be
    called before any device is asked for. A machine with a TPU answers by itself.
    """
    # On a host of TPUs, jax has named its platforms when it was imported.
    if not jax.config.values["jax_platforms"] and not has_tpu_device():
        _set_libtpu()


def has_tpu_device() -> bool:
    """Whether there is a device file as TPUs have it: /dev/accel0, or in newer kernels /dev/vfio/0."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _set_libtpu() -> None:
    for key, value in _LIBTPU_SETTINGS.items():
        os.environ.setdefault(key, value)


def devices_of(name: str) -> Sequence[Any]:
    """Devices of a topology (`v5p:2x2x1`), of an accelerator type (`v5p-8`), or of this machine (`local`).

    Raises:
        UserError: libtpu does not know the topology, or is not installed.
    """
    if name == "local":
        return jax.devices()
    if re.match(r"v[234][-:]", name):
        raise UserError(
            f"--topology: {name}: expected v5e, v5p, v6e or tpu7x; libtpu describes older chips core by core"
        )
    topology = ACCELERATOR_TYPES.get(name, name).replace("v7x:", "tpu7x:")
    # The topology's devices are not this machine's, which may have none.
    jax.config.update("jax_platforms", "cpu")
    _set_libtpu()
    # Imported late: it reads the settings above.
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu raises whatever its C++ side says
        line = first_line(error)[:160]
        if "libtpu" in line.lower() and "found" in line.lower():
            raise UserError("--topology: TPU plans need libtpu: pip install libtpu") from None
        raise UserError(
            f"--topology: {name}: expected local, an accelerator type such as v5p-8, or a topology such as "
            f"v5p:2x2x1 ({line})"
        ) from None


def peak_flops() -> float | None:
    """Peak of all this run's devices together; None where it is not known (a CPU)."""
    kind = jax.devices()[0].device_kind
    peak = next((v for k, v in sorted(PEAK_FLOPS.items(), reverse=True) if kind.startswith(k)), None)
    return None if peak is None else peak * jax.device_count()


def chip_of(device: Any) -> Chip | None:
    """What the device can do; None where it is not known."""
    return CHIPS.get(device.device_kind)
