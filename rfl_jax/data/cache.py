"""Prepared clips as files: one npz a clip, one for each of its noises after the frozen prefix."""

import dataclasses
import io
import zipfile

import numpy as np
from etils import epath

from rfl_jax.data.metadata import Clip
from rfl_jax.files import write_whole

ClipArrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PreparedClip:
    """A clip in the cache.

    Attributes:
        clip: where it is listed.
        file: npz with ids, mask, context, y, pool, and judge_pool where a judge was given.
        prefix: for each of its noises an npz with the latents after the frozen prefix; empty where that is not cached.
    """

    clip: Clip
    file: epath.Path
    prefix: tuple[epath.Path, ...] = ()

    def load(self) -> ClipArrays:
        return read_arrays(self.file)

    def load_prefix(self, index: int) -> np.ndarray:
        """Latents [t, h, w, c] of one noise."""
        return read_arrays(self.prefix[index])["latents"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns; only a header is read."""
        frames, rows, columns, _ = read_shape(self.file, "y")
        return frames, rows, columns


def read_arrays(file: epath.Path) -> ClipArrays:
    """The content of an npz."""
    with np.load(io.BytesIO(file.read_bytes())) as content:
        return dict(content)


def read_shape(file: epath.Path, name: str) -> tuple[int, ...]:
    """The shape of one array of an npz."""
    with file.open("rb") as stream, zipfile.ZipFile(stream) as content, content.open(f"{name}.npy") as entry:
        np.lib.format.read_magic(entry)
        return np.lib.format.read_array_header_1_0(entry)[0]


def write_arrays(file: epath.Path, values: ClipArrays) -> None:
    """Writes an npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **values)
    write_whole(file, buffer.getvalue())
