"""The command that makes the table of plans: its rows can be typed, and it leaves the rest of the page alone."""

import json

import pytest

from benchmarks.plan_table import HEAD, ROWS, Row, as_line, compiled, replaced
from tests.documentation import ROOT
from tests.test_documentation import read_arguments

# How ml_collections opens a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

FITS = {"video": [81, 480, 480], "remat_policy": "full", "samples": 1, "fits": True, "peak": 9.66 * 2**30, "needed": None,
        "limit": 15.75 * 2**30, "executed_flops": 10_921.4e12, "step_time_s": 6.87}  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.file)
def test_every_row_is_a_command(row, monkeypatch):
    read_arguments("rfl_jax.plan", row.command(), monkeypatch)


def test_rows_have_files_of_their_own():
    assert len({row.file for row in ROWS}) == len(ROWS)


def test_a_line_tells_what_was_compiled():
    row = Row("wan2_2_i2v_a14b", (480, 480), "v5e-8", (1, 1, 8), "full")
    assert as_line(row, FITS) == (
        "| A14B I2V 480x480x81 | v5e-8 | 1 x 1 x 8 | full | 1 | 9.7 of 15.75 GiB | 10,921 TFLOP | 6.9 s |\n"
    )
    refused = as_line(row, FITS | {"fits": False, "peak": None, "needed": 20 * 2**30, "step_time_s": None})
    assert refused.endswith("| 20.0 of 15.75 GiB: does not fit | 10,921 TFLOP | - |\n")


def test_a_row_that_was_compiled_is_read(tmp_path):
    (tmp_path / ROWS[0].file).write_text(json.dumps(FITS))
    assert compiled(ROWS[0], tmp_path) == FITS


def test_only_the_table_is_replaced():
    page = (ROOT / "docs" / "plan.md").read_text()
    new = replaced(page, HEAD + "| one |\n")
    before, after = page.split(HEAD)
    assert new.startswith(before + HEAD + "| one |\n\n")
    assert new.endswith(after[after.index("\n\n") :])
    with pytest.raises(SystemExit, match="expected a file with a table of plans"):
        replaced("a page", HEAD)
