"""How the layers of the video autoencoders see time.

* `WholeClip`: all frames at once; the past of the first frame is zeros.
* `Chunk`: one latent frame (four video frames) at a time, with the last frames of each convolution's input carried
  from chunk to chunk. All chunks run the same program, so a clip is one `lax.scan`: the first chunk has a single real frame, in
  last place, behind three junk frames that every convolution sees as zeros; the caller drops them from a decoded clip.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

Video = Float[Array, "b t h w c"]
Retimed = Float[Array, "b t2 h w c2"]  # with other frames


@runtime_checkable
class Clock(Protocol):
    """How a layer sees time."""

    def with_past(self, x: Video, frames: int) -> Float[Array, "b t+{frames} h w c"]:
        """`x` behind the `frames` frames that came before it."""
        ...

    def halve(self, x: Video, convolve: Callable[[Video], Retimed]) -> Retimed:
        """Temporal downsampling: the clip's first frame passes, later ones go through `convolve` with stride 2."""
        ...

    def double(self, x: Video, convolve: Callable[[Video], Retimed]) -> Retimed:
        """Temporal upsampling: the clip's first frame passes, each later one becomes two by `convolve`."""
        ...

    def in_groups(self, x: Video, frames: int) -> Retimed:
        """Frames that fill groups of `frames`, zeros before the clip's first."""
        ...

    def keep_first(self, x: Video, factor: int) -> Retimed:
        """Drops what a `factor`-fold duplication put before the clip's first frame."""
        ...


def _interleave(x: Video) -> Float[Array, "b 2*t h w c//2"]:
    return rearrange(x, "b t h w (two c) -> b (t two) h w c", two=2)


class WholeClip:
    """All frames at once."""

    def with_past(self, x: Video, frames: int) -> Float[Array, "b t+{frames} h w c"]:
        return jnp.pad(x, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))

    def halve(self, x: Video, convolve: Callable[[Video], Retimed]) -> Retimed:
        return jnp.concatenate([x[:, :1], convolve(x)], 1) if x.shape[1] > 1 else x

    def double(self, x: Video, convolve: Callable[[Video], Retimed]) -> Retimed:
        if x.shape[1] == 1:
            return x
        later = convolve(self.with_past(x[:, 1:], 2))
        return jnp.concatenate([x[:, :1], _interleave(later)], 1)

    def in_groups(self, x: Video, frames: int) -> Retimed:
        return jnp.pad(x, ((0, 0), (-x.shape[1] % frames, 0), (0, 0), (0, 0), (0, 0)))

    def keep_first(self, x: Video, factor: int) -> Retimed:
        return x[:, factor - 1 :]


class Chunk:
    """One step of the scan.

    Args:
        first: whether this is the clip's first chunk (a traced bool).
        caches: the past of each convolution in the order of use; None starts with zeros.
    """

    def __init__(self, first: Bool[Array, ""], caches: Sequence[Float[Array, "b ..."]] | None) -> None:
        self._first = first
        self._past = iter(caches) if caches is not None else None
        self.caches: list[Array] = []

    def _real(self, x: Video) -> Video:
        junk = jnp.arange(x.shape[1]) < x.shape[1] - 1
        return jnp.where((self._first & junk)[None, :, None, None, None], 0, x)

    def with_past(self, x: Video, frames: int) -> Float[Array, "b t+{frames} h w c"]:
        return self._behind(self._real(x), frames)

    def _behind(self, x: Video, frames: int) -> Float[Array, "b t+{frames} h w c"]:
        past = next(self._past) if self._past else jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
        joined = jnp.concatenate([past, x], 1)
        self.caches.append(joined[:, -frames:])
        return joined

    def halve(self, x: Video, convolve: Callable[[Video], Retimed]) -> Retimed:
        return jnp.where(self._first, x[:, 1::2], convolve(self.with_past(x, 1)))

    def double(self, x: Video, convolve: Callable[[Video], Retimed]) -> Retimed:
        # The convolution must not see the clip's first frame, now or later: the reference starts it after that.
        later = convolve(self._behind(jnp.where(self._first, 0, x), 2))
        # Chosen before the interleave: after it, a space-sharded clip would be gathered.
        return _interleave(jnp.where(self._first, jnp.concatenate([x, x], -1), later))

    def in_groups(self, x: Video, frames: int) -> Retimed:
        return self._real(x)

    def keep_first(self, x: Video, factor: int) -> Retimed:
        return x  # the junk stays in front
