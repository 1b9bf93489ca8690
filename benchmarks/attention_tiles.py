"""Cycles of the attention kernels by tile size, read from the TPU compiler's own schedule: no TPU is needed.

    python -m benchmarks.attention_tiles --topology=v5p-8 --heads=10 --tokens=18900 --tiles=1024x1024x512,512x512x512

libtpu writes the instruction bundles it has scheduled for each kernel. A bundle takes a cycle where nothing waits, so the sum
over a kernel's grid is a lower bound of its time, and a fair way to compare tiles. One core's grid is counted: chips with two
cores work on two heads at once, which the schedule shows as half the iterations.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from rfl_jax.chips import CHIPS

CLOCK_HZ = {"v5e": CHIPS["TPU v5 lite"].clock, "v5p": CHIPS["TPU v5"].clock, "v6e": CHIPS["TPU v6 lite"].clock}
# A guarded part of so few bundles starts a copy, and is run in every iteration.
SHORT = 120


def cycles(listing: str, inner: int) -> float:
    """Cycles of a kernel, from the text of its final bundles.

    Args:
        listing: of one bundle a line, with the depth of loops as `>` and branches to regions.
        inner: iterations of the grid's innermost axis, of which one in so many begins or ends a tile.

    Raises:
        ValueError: no loop over a grid is found.
    """
    bundles: list[tuple[int, str, int, str]] = []
    for line in listing.splitlines():
        if found := re.match(r"\s*0x([0-9a-f]+)\s+(LH|LB|LE|PB|PF)?\s*:\s*(>*)(.*)", line):
            bundles.append((int(found[1], 16), found[2] or "", len(found[3]), found[4]))
        elif bundles:
            bundles[-1] = (*bundles[-1][:3], bundles[-1][3] + line)
    begin = next((address for address, kind, _, _ in bundles if kind == "LB"), None)
    exits = [found[1] for *_, text in bundles if (found := re.search(r"%s\w+, (\d+) /\* loop exit test", text))]
    if begin is None or not exits:
        raise ValueError("no loop over a grid")
    end = max(address for address, _, depth, _ in bundles if depth)
    regions: dict[str, int] = {}
    for address, _, _, text in bundles:
        for name in re.findall(r"Start(?:/End empty)? region (\d+)", text):
            regions.setdefault(name, address)
    # Parts of the body that a branch can leave out, without those that hold others.
    parts = [
        (address, target)
        for address, _, _, text in bundles
        for name in re.findall(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)", text)
        if begin <= address < (target := regions.get(name, 0)) <= end
    ]
    leaves = [p for p in parts if not any(q != p and p[0] <= q[0] and q[1] <= p[1] for q in parts)]
    sizes = sorted(target - address for address, target in leaves)
    body = end - begin + 1
    # The largest is the work on a tile; it may also stand outside any branch.
    seldom = sizes[:-1] if sizes and sizes[-1] > body / 3 else sizes
    rare = sum(size for size in seldom if size > SHORT)
    return int(exits[-1]) * (body - rare * (1 - 1 / inner))


def compile_kernels(topology: str, heads: int, tokens: int, keys: int, tiles: tuple[int, int, int]) -> None:
    """Compiles attention of bfloat16 heads 128 wide over `keys` keys, forward and backward, for one chip."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from rfl_jax.chips import devices_of
    from rfl_jax.models.flash import Tiles, flash_attention

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, back = jax.vjp(lambda q, k, v: flash_attention(q, k, v, tiles=Tiles(*tiles)), q, k, v)
        return out, back(g)

    device = SingleDeviceSharding(devices_of(topology)[0])
    q, k = (jax.ShapeDtypeStruct((heads, n, 128), jnp.bfloat16, sharding=device) for n in (tokens, keys))
    jax.jit(both).lower(q, k, k, q).compile()


def measure(topology: str, heads: int, tokens: int, keys: int, tiles: tuple[int, int, int]) -> dict[str, float]:
    """Cycles of "forward" and "backward". In a process of its own: libtpu reads where to write its schedule once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.attention_tiles", f"--topology={topology}", f"--heads={heads}"]
        command += [f"--tokens={tokens}", f"--keys={keys}", f"--tiles={'x'.join(map(str, tiles))}", "--compile-only"]
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        ended = subprocess.run(command, env=os.environ | {"LIBTPU_INIT_ARGS": flags}, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{'x'.join(map(str, tiles))}: {ended.stderr.strip().splitlines()[-1]}")
        found = {}
        for kind, length, tile in (("forward", keys, tiles[1]), ("backward", tokens, tiles[0])):
            files = [f for f in Path(folder).glob(f"*flash_{kind}*final_bundles.txt") if "analysis" not in f.name]
            found[kind] = cycles(files[0].read_text(), -(-length // tile))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="attention_tiles", description=str(__doc__).split("\n")[0])
    parser.add_argument("--topology", default="v5p-8", help="a slice of v5e, v5p or v6e")
    parser.add_argument("--heads", type=int, default=10, help="a chip's")
    parser.add_argument("--tokens", type=int, default=18900)
    parser.add_argument("--keys", type=int, help="as many as tokens, if not given")
    parser.add_argument("--tiles", default="1024x1024x512,1024x1024x1024,512x1024x512,1024x2048x512,512x512x512")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    candidates, keys = [], args.keys or args.tokens
    for text in args.tiles.split(","):
        if not re.fullmatch(r"\d+x\d+x\d+", text) or any(int(size) % 128 for size in text.split("x")):
            parser.error(f"--tiles: {text}: expected QUERIESxKEYSxCHUNK, multiples of 128")
        candidates.append(tuple(map(int, text.split("x"))))
    clock = CLOCK_HZ.get(args.topology[:3])
    if clock is None:
        parser.error(f"--topology: {args.topology}: expected a slice of {', '.join(CLOCK_HZ)}")
    if args.compile_only:
        compile_kernels(args.topology, args.heads, args.tokens, keys, candidates[0])
        return
    sizes = f"{args.heads} heads of {args.tokens} tokens and {keys} keys"
    print(f"{sizes} on one chip of {args.topology}, milliseconds at least")
    print(f"{'queries x keys x chunk':24s}{'forward':>10s}{'backward':>10s}")
    for tiles in tqdm(candidates, desc="compiling", disable=None):
        found = measure(args.topology, args.heads, args.tokens, keys, tiles)
        times = "".join(f"{found[kind] / clock * 1e3:10.2f}" for kind in ("forward", "backward"))
        tqdm.write(f"{'x'.join(map(str, tiles)):24s}{times}")


if __name__ == "__main__":
    main()
