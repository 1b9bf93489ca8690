"""The notebook: what it tells people to type is parsed, and its miniature runs from cell to cell."""

import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests import COMPILER
from tests.documentation import ROOT, commands, ours
from tests.test_documentation import SHORT, read_arguments

# How ml_collections opens a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(ROOT / "examples" / "kaggle_tpu.ipynb", as_version=4)


def code(notebook, *tags):
    """Code cells with one of these tags, or those with none."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        cell for cell in cells if {*tags} & {*cell.metadata.get("tags", ())} or not (tags or cell.metadata.get("tags"))
    ]


def test_it_is_whole_and_has_no_outputs(notebook):
    nbformat.validate(notebook)
    assert not any(cell.outputs for cell in code(notebook, "parameters", "machine", "weights") + code(notebook))


def test_its_commands_are_parsed(notebook, folder, monkeypatch):
    names = {}
    for cell in code(notebook, "parameters", "weights"):
        # Values that later cells put into their commands.
        lines = [line for line in cell.source.splitlines() if not line.startswith(("!", "%", "show("))]
        exec("\n".join(lines), names)
    typed = "\n".join(line for cell in notebook.cells for line in cell.source.splitlines() if line.startswith("!"))
    filled = re.sub(r"\{([^}]+)\}", lambda value: str(eval(value[1], names)), typed.replace("!", ""))
    found = [known for known in map(ours, commands(filled)) if known]
    assert {module for module, _ in found} == {
        "rfl_jax.train", "rfl_jax.report", "rfl_jax.plan", "convert", "rfl_jax.prepare", "rfl_jax.export"
    }  # fmt: skip
    for module, arguments in found:
        read_arguments(module, arguments, monkeypatch)


@pytest.mark.slow
def test_its_miniature_runs(notebook, folder, clip_folder, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", COMPILER)
    more = " ".join(
        [*SHORT, "--config.max_steps=1", "--config.eval_every=0", f"--config.file_name={clip_folder}/metadata.csv"]
    )
    (parameters,) = code(notebook, "parameters")
    cells = [
        nbformat.v4.new_code_cell(f"{parameters.source}\npython, chips = {sys.executable!r}, 1\nmore = {more!r}"),
        *code(notebook),
    ]
    short = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    NotebookClient(short, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    assert (folder / "runs" / "mini" / "evaluation.json").exists()
    assert "next: " in "".join(output.text for output in cells[1].outputs)
    (page,) = cells[-1].outputs
    assert "<iframe srcdoc=" in page.data["text/html"]
    assert "FaceSim" in page.data["text/html"]
