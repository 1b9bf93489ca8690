"""Prepared clips as files: one npz a clip, one for each of its noises after the frozen prefix, one for guards that ask for it, one
for each term of the reward, one of its people where all of them count.
"""

import contextlib
import dataclasses
import io
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from rfl_jax.data.metadata import Clip
from rfl_jax.errors import refuse_damage
from rfl_jax.files import write_whole
from rfl_jax.networks.terms import term_arrays
from rfl_jax.rewards import motion, people

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

    def load(self, names: Collection[str] = ()) -> ClipArrays:
        """Its arrays, those of these names among them; raises as `read_arrays` does."""
        return read_arrays(self.file, names)

    def load_real(self, names: Sequence[str]) -> ClipArrays:
        """These arrays for guards, see `ClipEncoder.encode_real`; raises as `read_arrays` does."""
        return read_arrays(self.real_file(names), names) if names else {}

    def real_file(self, names: Sequence[str]) -> epath.Path:
        """The npz of these arrays. It is beside the clip's own, which stays what it is whatever guards ask for."""
        return self.file.parent / f"{self.file.stem}.{'_'.join(names)}.{motion.VERSION}.npz"

    def load_terms(self, terms: Mapping[str, str]) -> ClipArrays:
        """What was prepared for terms of the reward, as batches name it; raises as `read_arrays` does.

        Args:
            terms: names, and what their files are known by.
        """
        found = ((term_arrays(name), read_arrays(self.term_file(key), ())) for name, key in terms.items())
        return {f"{prefix}{name}": x for prefix, arrays in found for name, x in arrays.items()}

    def term_file(self, key: str) -> epath.Path:
        """The npz of a term, beside the clip's own."""
        return self.file.parent / f"{self.file.stem}.{key}.npz"

    def load_people(self, names: Sequence[str]) -> ClipArrays:
        """These arrays of its people, see `ClipEncoder.encode_people`; raises as `read_arrays` does."""
        if not names:
            return {}
        found = read_arrays(self.people_file, names)
        return {name: found[name] for name in names}

    @property
    def people_file(self) -> epath.Path:
        """The npz of its people, beside the clip's own."""
        return self.file.parent / f"{self.file.stem}.people{people.VERSION}.npz"

    def load_prefix(self, index: int) -> np.ndarray:
        """Latents [t, h, w, c] of one noise."""
        return read_arrays(self.prefix[index], ("latents",))["latents"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns; only a header is read."""
        frames, rows, columns, _ = read_shape(self.file, "y")
        return frames, rows, columns


def read_arrays(file: epath.Path, names: Collection[str]) -> ClipArrays:
    """The content of an npz, whose checksums are compared.

    Args:
        file: to be read.
        names: of arrays that have to be in it.

    Raises:
        UserError: it is damaged, or lacks one of them.
    """
    with _whole(file), zipfile.ZipFile(io.BytesIO(file.read_bytes())) as content:
        # An entry's checksum is compared at its end, which the reader of an array may not come to.
        entries = {entry.removesuffix(".npy"): content.read(entry) for entry in content.namelist()}
        if missing := sorted(set(names) - entries.keys()):
            raise ValueError(f"without {', '.join(missing)}")
        return {name: np.load(io.BytesIO(data), allow_pickle=False) for name, data in entries.items()}


def read_shape(file: epath.Path, name: str) -> tuple[int, ...]:
    """The shape of one array of an npz; raises as `read_arrays` does."""
    with (
        _whole(file),
        file.open("rb") as stream,
        zipfile.ZipFile(stream) as content,
        content.open(f"{name}.npy") as entry,
    ):
        np.lib.format.read_magic(entry)
        return np.lib.format.read_array_header_1_0(entry)[0]


@contextlib.contextmanager
def _whole(file: epath.Path) -> Iterator[None]:
    """Turns whatever a damaged npz raises into `UserError`."""
    with refuse_damage(f"{file}: expected a prepared clip as it was written; without it, it is prepared anew"):
        yield


def write_arrays(file: epath.Path, values: ClipArrays) -> None:
    """Writes an npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **values)
    write_whole(file, buffer.getvalue())
