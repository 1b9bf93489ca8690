"""Several hosts in one run: the same command on each of them, process 0 writes what all share.

A host is a process. Its rank, and the address of process 0, come from the slice it runs on (TPU, Slurm, Kubernetes:
whatever `jax.distributed.initialize` finds by itself), or from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID.
"""

import itertools
import json
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from rfl_jax.errors import UserError, first_line
from rfl_jax.sharding import replicated

# A host that has not been heard of for so long is given up, and with it the run.
HEARTBEAT_S = 30
# How long a host is waited for that lives: one may have clips to prepare for hours, and another none.
PATIENCE_S = 24 * 3600
_meetings = itertools.count()


def join() -> None:
    """Joins the run's other hosts; to be called before any device is asked for.

    Raises:
        UserError: their addresses are not to be found, or they do not answer.
    """
    settings: dict[str, Any] = {}
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        try:
            settings = {
                "coordinator_address": os.environ["JAX_COORDINATOR_ADDRESS"],
                "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
                "process_id": int(os.environ["JAX_PROCESS_ID"]),
            }
        except (KeyError, ValueError) as error:
            raise UserError(
                "--distributed: JAX_COORDINATOR_ADDRESS is set, expected whole numbers in JAX_NUM_PROCESSES and "
                f"JAX_PROCESS_ID as well ({error})"
            ) from None
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=HEARTBEAT_S)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed: the other hosts cannot be joined ({first_line(error)})") from None


def is_writer() -> bool:
    """Whether this process writes what all share."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until all hosts are here, which all have to call in the same order.

    They meet at the coordinator and not in a collective: Gloo, by which CPUs talk, gives up after half a minute. To be
    called before a collective that hosts reach at different times.
    """
    count = jax.process_count()
    if count > 1:
        meeting = f"{name} {next(_meetings)}"
        ocp.multihost.sync_global_processes(meeting, timeout=PATIENCE_S, processes=set(range(count)))


def any_host(flag: bool) -> bool:
    """Whether it is so on any host."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def exchange(mine: Any) -> list[Any]:
    """What every process has to tell, in their order; a JSON value, whose keys are texts. All hosts call it together."""
    data = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(data.tobytes())]
    wait("exchange")
    sizes = multihost_utils.process_allgather(np.array(data.size, np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


class Compiled:
    """A jitted function that keeps the programs it became. Hosts compile for different times, and begin together.

    Args:
        jitted: to be called as it would be.
    """

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted
        self._programs: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        key = structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        if key not in self._programs:
            self._programs[key] = self._jitted.lower(*args).compile()
            wait("compiled")
        return self._programs[key](*args)

    def texts(self) -> list[str]:
        """Of the programs, as XLA prints them."""
        return [program.as_text() for program in self._programs.values()]


def together(jitted: Any) -> Any:
    """A jitted function that all hosts call; on several as `Compiled`."""
    return jitted if jax.process_count() == 1 else Compiled(jitted)


def place(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array on the mesh: one that every host holds whole, of which each hands over its own pieces, or one that lies
    on a mesh already.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x if x.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def random_key(data: int | np.ndarray, mesh: Mesh) -> jax.Array:
    """A key on all devices of the mesh, of a seed or of what `jax.random.key_data` gave."""
    make = jax.random.key if isinstance(data, int) else jax.random.wrap_key_data
    return jax.jit(make, out_shardings=replicated(mesh))(data)


def share_of(sharding: NamedSharding, groups: int) -> tuple[int, int]:
    """Which part of a batch this process feeds: its number, and the number of different parts.

    Hosts whose devices lie in the same group of samples (the context axis spans them) feed the same part.

    Args:
        sharding: of a batch's first axis.
        groups: into which the batch is split.
    """
    indices = sharding.addressable_devices_indices_map((groups,)).values()
    mine = sorted({index[0].indices(groups)[0] for index in indices if index is not None})
    return mine[0] // len(mine), groups // len(mine)
