"""The table of plans in docs/plan.md: every row compiled for a TPU slice that need not be there.

    python -m benchmarks.plan_table --dir=DIR [--only=v5e-8] [--page=docs/plan.md]

Each row is one `python -m rfl_jax.plan`, whose JSON object is kept in DIR: the same command goes on where it was stopped, and
DIR is of one revision and one libtpu. A row of A14B takes minutes. `--page` puts the rows where the page's table is.
"""

import argparse
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rfl_jax.chips import GIB, answer_libtpu
from rfl_jax.files import write_whole

HEAD = (
    "| model, clip | slice | data x fsdp x context | remat | samples | peak a chip | executed | an update takes at least |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


class Row(NamedTuple):
    """One plan: a config file, height x width of its 81 frames, a slice, sizes of the mesh's axes and the remat policy."""

    config: str
    pixels: tuple[int, int]
    topology: str
    mesh: tuple[int, int, int]
    policy: str

    @property
    def samples(self) -> int:
        """One for each group of chips that holds whole samples."""
        return self.mesh[0] * self.mesh[1]

    @property
    def file(self) -> str:
        height, width = self.pixels
        return f"{self.config}-{height}x{width}-{self.topology}.json"

    def command(self) -> list[str]:
        """The row's flags of `python -m rfl_jax.plan`."""
        axes = zip(("data", "fsdp", "context"), self.mesh, strict=True)
        return [
            f"--config=configs/{self.config}.py",
            f"--topology={self.topology}",
            *(f"--config.mesh.{axis}={size}" for axis, size in axes),
            f"--config.remat_policy={self.policy}",
            f"--config.data.height={self.pixels[0]}",
            f"--config.data.width={self.pixels[1]}",
            f"--config.train_batch_size={self.samples}",
            "--config.per_device_train_batch_size=1",
            "--json",
        ]


A14B, TI2V_5B, GUIDED_5B = "wan2_2_i2v_a14b", "wan2_2_ti2v_5b", "wan2_2_ti2v_5b_reward"
MODELS = {A14B: "A14B I2V", TI2V_5B: "TI2V-5B distilled", GUIDED_5B: "TI2V-5B, 20 guided steps"}
ROWS = (
    Row(A14B, (480, 480), "v5e-8", (1, 1, 8), "full"),
    Row(A14B, (480, 480), "v5e-16", (1, 1, 16), "save_attention"),
    Row(A14B, (480, 480), "v5p-8", (1, 1, 4), "save_attention"),
    Row(A14B, (480, 480), "v6e-8", (1, 1, 8), "save_attention"),
    Row(A14B, (480, 480), "v6e-16", (1, 2, 8), "save_attention"),
    Row(A14B, (480, 480), "v6e-64", (1, 8, 8), "save_attention"),
    Row(A14B, (480, 832), "v5e-16", (1, 1, 16), "full"),
    Row(A14B, (480, 832), "v5p-8", (1, 1, 4), "save_attention"),
    Row(A14B, (480, 832), "v6e-8", (1, 1, 8), "full"),
    Row(A14B, (480, 832), "v6e-64", (1, 8, 8), "save_attention"),
    Row(A14B, (720, 1280), "v5e-16", (1, 1, 16), "nested"),
    Row(A14B, (720, 1280), "v5p-8", (1, 1, 4), "full"),
    Row(A14B, (720, 1280), "v6e-8", (1, 1, 8), "nested"),
    Row(A14B, (720, 1280), "v6e-64", (1, 1, 64), "save_attention"),
    Row(TI2V_5B, (480, 480), "v5e-8", (1, 1, 8), "save_attention"),
    Row(TI2V_5B, (480, 480), "v5e-16", (1, 2, 8), "save_attention"),
    Row(TI2V_5B, (480, 480), "v5p-8", (1, 1, 4), "save_attention"),
    Row(TI2V_5B, (480, 480), "v6e-8", (1, 1, 8), "save_attention"),
    Row(TI2V_5B, (480, 480), "v6e-64", (1, 8, 8), "save_attention"),
    Row(GUIDED_5B, (480, 480), "v5e-8", (1, 1, 8), "full"),
    Row(GUIDED_5B, (480, 480), "v6e-1", (1, 1, 1), "full"),
    Row(GUIDED_5B, (480, 480), "v6e-8", (1, 1, 8), "save_attention"),
)


def as_line(row: Row, report: dict[str, Any]) -> str:
    """A row of the table. What does not fit has no time."""
    frames, height, width = report["video"]
    peak = report["peak"] if report["peak"] is not None else report["needed"]
    cells = (
        f"{MODELS[row.config]} {height}x{width}x{frames}",
        row.topology,
        " x ".join(map(str, row.mesh)),
        report["remat_policy"],
        str(report["samples"]),
        f"{peak / GIB:.1f} of {report['limit'] / GIB:.4g} GiB" + ("" if report["fits"] else ": does not fit"),
        f"{report['executed_flops'] / 1e12:,.0f} TFLOP",
        f"{report['step_time_s']:.1f} s" if report["fits"] else "-",
    )
    return f"| {' | '.join(cells)} |\n"


def compiled(row: Row, folder: Path) -> dict[str, Any]:
    """The row's report: the folder's, or a new one.

    Raises:
        SystemExit: plan did not end with a report; its own last line says why.
    """
    kept = folder / row.file
    if not kept.exists():
        print(f"{row.file}: compiling", file=sys.stderr, flush=True)
        ended = subprocess.run([sys.executable, "-m", "rfl_jax.plan", *row.command()], capture_output=True, text=True)
        if ended.returncode not in (0, 1):
            raise SystemExit(f"{row.file}: {(ended.stderr.strip() or 'plan ended early').splitlines()[-1]}")
        report = json.loads(ended.stdout) | {"libtpu": version("libtpu")}
        write_whole(kept, json.dumps(report))
    return json.loads(kept.read_text())


def replaced(page: str, table: str) -> str:
    """The page with another table of plans.

    Raises:
        SystemExit: the page has no such table.
    """
    found = re.search(re.escape(HEAD) + r"(\|.*\n)+", page)
    if found is None:
        raise SystemExit(
            "--page: expected a file with a table of plans, under the head that benchmarks/plan_table.py has"
        )
    return page[: found.start()] + table + page[found.end() :]


def main() -> None:
    parser = argparse.ArgumentParser(prog="plan_table", description=str(__doc__).split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="folder of the rows' reports")
    parser.add_argument("--only", default="", help="slices whose rows are compiled, with commas; empty: all")
    parser.add_argument("--page", type=Path, help="page whose table is replaced; printed if not given")
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    wanted = [row for row in ROWS if not given.only or row.topology in given.only.split(",")]
    table = HEAD + "".join(as_line(row, compiled(row, given.dir)) for row in wanted)
    if given.page is None:
        print(table, end="")
    else:
        write_whole(given.page, replaced(given.page.read_text(), table))


if __name__ == "__main__":
    answer_libtpu()
    main()
