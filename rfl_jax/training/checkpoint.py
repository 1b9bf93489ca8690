"""Checkpoints of a run (Orbax): trainable weights, their average, optimizer, step, random key and the data iterator's
place.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rfl_jax.errors import UserError, ignore_late_ends, refuse_damage
from rfl_jax.files import absolute, array_handler, naming
from rfl_jax.runs import UNREADABLE
from rfl_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints in one folder; leaving the `with` block waits until all are written.

    Args:
        directory: folder; made when the first checkpoint is written.
        keep: how many of the latest to keep.
    """

    def __init__(self, directory: epath.Path, *, keep: int = 3) -> None:
        ignore_late_ends()
        self._directory = directory
        # Hosts meet while they write; where two folders are written at once, each has meetings of its own.
        meetings = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, multiprocessing_options=meetings)
        handlers = {"state": array_handler(), "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(absolute(directory), options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._manager.close()

    def latest(self) -> int | None:
        """The last step that was written whole."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Until all are written."""
        with naming(self._directory):
            self._manager.wait_until_finished()

    def forget_after(self, step: int) -> None:
        """Removes checkpoints of later steps."""
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(later)

    def save(self, step: int, state: TrainState, key: jax.Array, place: dict[str, Any], *, anew: bool = False) -> None:
        """Starts writing.

        Args:
            step: of the checkpoint. Where that is there nothing is written, unless `anew`.
            state, key: of the run.
            place: where the data is, as JSON.
            anew: the checkpoint of that step is replaced.
        """
        if step in self._manager.all_steps():
            if not anew:
                return
            self._manager.delete(step)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_items(state)),
            run=ocp.args.JsonSave({"key": jax.random.key_data(key).tolist(), **place}),
        )
        # It waits for the one before, whose fault it may be.
        with naming(self._directory):
            self._manager.save(step, args=items)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, np.ndarray, dict[str, Any]]:
        """State with the shapes and shardings of `like`, the random key's data, and the place that it was saved with.

        An average that the checkpoint has not begins at its weights, one that `like` has not is left out. A factor that it
        has not, and what holds a term, are those of `like`: earlier releases saved none.

        Raises:
            UserError: the checkpoint does not fit the configuration.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _items(like))
        # Compared before anything is read: a read that fails leaves others running behind it.
        with refuse_damage(f"{self._directory}/{step}: {UNREADABLE}"):
            tree = self._manager.item_metadata(step)["state"].tree
            both = tree.keys() & abstract.keys()
            optional = {"average", "factors", "held"} - both
            abstract = {name: part for name, part in abstract.items() if name not in optional}
            tree = {name: part for name, part in tree.items() if name not in optional}
            for part in {"factors", "held"} & both:
                known = sorted(tree[part].keys() & abstract[part].keys())
                for parts in (tree, abstract):
                    named = parts.pop(part)
                    if known:
                        parts[part] = {name: named[name] for name in known}
            found = _shapes(tree)
        expected = _shapes(abstract)
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise UserError(
                    f"{self._directory}/{step}: does not fit this configuration ({name}: found "
                    f"{found.get(name, 'none')}, expected {expected.get(name, 'none')})"
                )
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                abstract, ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
            ),
            run=ocp.args.JsonRestore(),
        )
        with refuse_damage(f"{self._directory}/{step}: {UNREADABLE}"):
            values = self._manager.restore(step, args=items)
            key = np.array(values["run"]["key"], np.uint32)
            if key.shape != np.shape(jax.random.key_data(jax.random.key(0))):
                raise ValueError(f"a random key of shape {key.shape}")
        named = {part: getattr(like, part) | values["state"].get(part, {}) for part in ("factors", "held")}
        state = TrainState(**{"average": {}} | values["state"] | named)
        if like.average and not state.average:
            places = jax.tree.map(lambda x: x.sharding, like.average)
            copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=places)
            state = dataclasses.replace(state, average=copy(state.params))
        return state, key, values["run"]


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state by name; an average or what holds terms is not among them where there is none."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if name not in ("average", "held") or part}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every array by its dotted name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def iterator_state(iterator: Any) -> dict[str, Any]:
    """A Grain iterator's place as JSON."""
    return json.loads(json.dumps(iterator.get_state()))
