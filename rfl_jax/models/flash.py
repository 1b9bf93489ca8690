"""Flash attention for TPUs (arXiv 2205.14135, 2307.08691) in Pallas: no mask but for padded keys, forward and backward.

Scores are held as [keys, queries]: maxima and sums over keys then run along sublanes, which is plain arithmetic, and the
statistics of queries are rows that broadcast. Exponentials are of base two, whose factor is in the queries' scale. The backward
pass visits every tile once; the queries' gradient of a whole head is added up in fast memory meanwhile. Heads are independent
of each other, so chips with two cores work on two at once.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from rfl_jax.remat import ATTENTION_OUTPUT, checkpoint_name

LOG2_E = math.log2(math.e)
LANES = 128  # of the vector unit: tiles and heads' widths are multiples
# Stands for minus infinity, of which differences would not be numbers.
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)

Rows = Float[Array, "h n d"]  # queries, or what becomes of them
Keys = Float[Array, "h s d"]  # and values
Statistics = Float[Array, "h 1 n"]


class Tiles(NamedTuple):
    """How the work is cut.

    Attributes:
        queries: a tile's.
        keys: a tile's.
        chunk: keys that are worked on at once; divides a tile's.
    """

    queries: int
    keys: int
    chunk: int


class _Cut(NamedTuple):
    """What the kernels are compiled for: their tiles, the number of real keys, and whether they are interpreted."""

    tiles: Tiles
    length: int
    interpret: bool


def flash_attention(q: Rows, k: Keys, v: Keys, *, tiles: Tiles, interpret: bool = False) -> Rows:
    """Softmax attention of each head, scaled by d**-0.5; products in the inputs' type, sums and softmax in float32.

    Args:
        q: queries of `h` heads.
        k, v: keys and values.
        tiles: multiples of 128; tokens and widths are padded to them here.
        interpret: run without a TPU, for tests.
    """
    n, s, d = q.shape[1], k.shape[1], q.shape[-1]
    queries, keys = (min(tile, -(-tokens // LANES) * LANES) for tile, tokens in ((tiles.queries, n), (tiles.keys, s)))
    tiles = Tiles(queries, keys, math.gcd(tiles.chunk, keys))

    def padded(x: Array, tile: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, -d % LANES)))

    q = q * jnp.asarray(d**-0.5 * LOG2_E, q.dtype)
    out: Any = _attend(padded(q, queries), padded(k, keys), padded(v, keys), _Cut(tiles, s, interpret))
    return out[:, :n, :d]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: Rows, k: Keys, v: Keys, cut: _Cut) -> Rows:
    return _forward(q, k, v, cut)[0]


def _attend_forward(q: Rows, k: Keys, v: Keys, cut: _Cut) -> tuple[Rows, tuple[Rows, Keys, Keys, Rows, Statistics]]:
    # Named here and not by the caller: a policy that saves both never runs this kernel a second time.
    out, lse = (checkpoint_name(x, ATTENTION_OUTPUT) for x in _forward(q, k, v, cut))
    return out, (q, k, v, out, lse)


def _attend_backward(cut: _Cut, kept: tuple[Rows, Keys, Keys, Rows, Statistics], g: Rows) -> tuple[Rows, Keys, Keys]:
    q, k, v, out, lse = kept
    delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1)[:, None]
    return _backward(q, k, v, g, lse, delta, cut)


_attend.defvjp(_attend_forward, _attend_backward)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _real(scores: Float[Array, "a b"], first: Any, length: int, axis: int) -> Float[Array, "a b"]:
    """The scores with those of padded keys, which begin at `length`, at their lowest; keys are along `axis`."""
    key = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    return jnp.where(key < length, scores, LOWEST)


def _in_chunks(turn: Any, tile: Any, cut: _Cut) -> None:
    """`turn(start, padded)` for each chunk of keys of a tile; only the last tile's may have padded ones."""
    tiles = -(-cut.length // cut.tiles.keys)

    def run(*, last: bool) -> None:
        for start in range(0, cut.tiles.keys, cut.tiles.chunk):
            end = (tiles - 1) * cut.tiles.keys + start + cut.tiles.chunk
            turn(start, last and end > cut.length)

    if cut.length % cut.tiles.keys == 0:
        run(last=False)
    else:
        pl.when(tile < tiles - 1)(functools.partial(run, last=False))
        pl.when(tile == tiles - 1)(functools.partial(run, last=True))


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    top_ref: Any,
    sum_ref: Any,
    acc_ref: Any,
    *,
    cut: _Cut,
) -> None:
    tile = pl.program_id(2)

    @pl.when(tile == 0)
    def _begin() -> None:
        top_ref[...] = jnp.full_like(top_ref, LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def turn(start: int, padded: bool) -> None:
        chunk = pl.ds(start, cut.tiles.chunk)
        scores = _dot(q_ref[...], k_ref[chunk], (1, 1))
        if padded:
            scores = _real(scores, tile * cut.tiles.keys + start, cut.length, axis=1)
        # Statistics are held once a lane, so that they need no broadcast.
        before = top_ref[...]
        top = jnp.maximum(before, jnp.max(scores, 1, keepdims=True))
        p = jnp.exp2(scores - jnp.tile(top, (1, cut.tiles.chunk // LANES)))
        fade = jnp.exp2(before - top)
        top_ref[...] = top
        sum_ref[...] = sum_ref[...] * fade + jnp.sum(p, 1, keepdims=True)
        faded = acc_ref[...] * jnp.tile(fade, (1, acc_ref.shape[1] // LANES))
        acc_ref[...] = faded + _dot(p.astype(v_ref.dtype), v_ref[chunk], (1, 0))

    _in_chunks(turn, tile, cut)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _end() -> None:
        total = jnp.tile(sum_ref[...], (1, acc_ref.shape[1] // LANES))
        out_ref[...] = (acc_ref[...] / total).astype(out_ref.dtype)
        lse_ref[...] = (top_ref[...] + jnp.log2(sum_ref[...])).T[:1]


def _forward(q: Rows, k: Keys, v: Keys, cut: _Cut) -> tuple[Rows, Statistics]:
    (h, n, d), (queries, keys, _) = q.shape, cut.tiles
    of_queries = pl.BlockSpec((None, queries, d), lambda h, i, j: (h, i, 0))
    of_keys = pl.BlockSpec((None, keys, d), lambda h, i, j: (h, j, 0))
    row = pl.BlockSpec((None, 1, queries), lambda h, i, j: (h, 0, i))
    return pl.pallas_call(
        functools.partial(_forward_kernel, cut=cut),
        out_shape=(jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((h, 1, n), jnp.float32)),
        grid=(h, n // queries, k.shape[1] // keys),
        in_specs=[of_queries, of_keys, of_keys],
        out_specs=(of_queries, row),
        scratch_shapes=[*[pltpu.VMEM((queries, LANES), jnp.float32)] * 2, pltpu.VMEM((queries, d), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=cut.interpret,
        name="flash_forward",
    )(q, k, v)


def _backward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, lse_ref: Any, delta_ref: Any,
    dq_ref: Any, dk_ref: Any, dv_ref: Any, dq_acc: Any, dk_acc: Any, dv_acc: Any, *, cut: _Cut, scale: float,
) -> None:  # fmt: skip
    tile, part = pl.program_id(1), pl.program_id(2)
    columns = pl.ds(pl.multiple_of(part * cut.tiles.queries, LANES), cut.tiles.queries)

    @pl.when(tile == 0)
    def _begin_queries() -> None:
        dq_acc[:, columns] = jnp.zeros((dq_acc.shape[0], cut.tiles.queries), jnp.float32)

    @pl.when(part == 0)
    def _begin_keys() -> None:
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    def turn(start: int, padded: bool) -> None:
        chunk = pl.ds(start, cut.tiles.chunk)
        q, k, g = q_ref[...], k_ref[chunk], g_ref[...]
        scores = _dot(k, q, (1, 1))
        if padded:
            scores = _real(scores, tile * cut.tiles.keys + start, cut.length, axis=0)
        p = jnp.exp2(scores - lse_ref[...])
        dv_acc[chunk] += _dot(p.astype(g.dtype), g, (1, 0))
        ds = (p * (_dot(v_ref[chunk], g, (1, 1)) - delta_ref[...])).astype(q.dtype)
        dk_acc[chunk] += _dot(ds, q, (1, 0))
        dq_acc[:, columns] += _dot(k, ds, (0, 0))

    _in_chunks(turn, tile, cut)

    @pl.when(part == pl.num_programs(2) - 1)
    def _end_keys() -> None:
        dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _end_queries() -> None:
        dq_ref[...] = (dq_acc[:, columns] * scale).T.astype(dq_ref.dtype)


def _backward(
    q: Rows, k: Keys, v: Keys, g: Rows, lse: Statistics, delta: Statistics, cut: _Cut
) -> tuple[Rows, Keys, Keys]:
    """Gradients; q's is of the scaled queries, as `_attend` got them."""
    (h, n, d), (queries, keys, _) = q.shape, cut.tiles
    last = k.shape[1] // keys - 1
    of_queries = pl.BlockSpec((None, queries, d), lambda h, j, i: (h, i, 0))
    of_keys = pl.BlockSpec((None, keys, d), lambda h, j, i: (h, j, 0))
    row = pl.BlockSpec((None, 1, queries), lambda h, j, i: (h, 0, i))
    # Written in the last round only; before it the first block waits for its values.
    at_last = pl.BlockSpec((None, queries, d), lambda h, j, i: (h, jnp.where(j == last, i, 0), 0))
    return pl.pallas_call(
        functools.partial(_backward_kernel, cut=cut, scale=1 / LOG2_E),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
        grid=(h, last + 1, n // queries),
        in_specs=[of_queries, of_keys, of_keys, of_queries, row, row],
        out_specs=(at_last, of_keys, of_keys),
        scratch_shapes=[pltpu.VMEM((d, n), jnp.float32), *[pltpu.VMEM((keys, d), jnp.float32)] * 2],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_fast_memory(n, d, cut.tiles)
        ),
        interpret=cut.interpret,
        name="flash_backward",
    )(q, k, v, g, lse, delta)


def _fast_memory(n: int, d: int, tiles: Tiles) -> int:
    """Bytes of VMEM that the backward kernel may take: the queries' gradient of a head, and room for tiles."""
    scores = 4 * tiles.chunk * tiles.queries
    return 4 * n * d + 6 * scores + 2**23
