"""What is measured on a GPU runs small on a CPU: finite numbers, attention that agrees, failures of one line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_ours
from benchmarks.gpu import BOUND, Results, affordable, ask, estimate, out_of_memory
from benchmarks.gpu_ours import filled, of_weights
from benchmarks.gpu_parts import PARTS, Job, records

ROOT = Path(__file__).parents[1]
CASES = {"attention": 4, "layer": 4, "step_a14b": 1, "vae": 2, "step_5b": 1}


def run(out, *arguments):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", f"--out={out}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def rows(out):
    """Our records by part and case, and the table's rows."""
    listed = json.loads((out / "gpu.json").read_text())["rows"]
    table = [line for line in (out / "gpu.md").read_text().splitlines() if line.startswith("| ")]
    return {(row["part"], row["ours"]["case"]): row["ours"] for row in listed}, table[2:]


def check(record):
    """Whether all its numbers are some."""
    assert "failed" not in record, record["failed"]
    assert len(record["seconds"]) >= 3
    numbers = [*record["seconds"], record["first_s"], record["flops"]]
    numbers += [record[name] for name in ("error", "loss") if name in record]
    assert all(math.isfinite(x) for x in numbers)
    assert min(numbers) > 0 or record["loss"] == min(numbers)
    assert record["first_s"] > min(record["seconds"])


def test_attention_agrees_and_a_kernel_that_is_not_there_is_a_line(tmp_path):
    # On a CPU there is no cuDNN.
    done = run(tmp_path, "--parts=attention,vae", "--attention=cudnn")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "Traceback" in (tmp_path / "gpu.log").read_text()
    found, table = rows(tmp_path)
    assert done.stdout == (tmp_path / "gpu.md").read_text()
    assert len(table) == len(found) == 2 + 2 * 2 + CASES["vae"]
    assert all(row.split(" | ")[8] == "no GPU" for row in table)
    failed = {case: record["failed"] for (_, case), record in found.items() if "failed" in record}
    assert list(failed) == ["320 tokens, 2 heads, forward", "320 tokens, 2 heads, forward and backward"]
    assert all("\n" not in why and why[:40] in "".join(table) for why in failed.values())
    others = [record for record in found.values() if "failed" not in record]
    for record in others:
        check(record)
    # Of XLA's kernel and of ours in the interpreter; in bfloat16, so there are some.
    errors = {record["kernel"]: record["error"] for record in others if "error" in record}
    assert list(errors) == ["xla", "flash_interpret"]
    assert all(1e-4 < error <= BOUND for error in errors.values())


@pytest.mark.slow
def test_all_parts_run_small(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    found, table = rows(tmp_path)
    assert [part for part, _ in found] == [part for part in PARTS for _ in range(CASES[part])]
    assert len(table) == len(found)
    for (part, _), record in found.items():
        check(record)
        if part.startswith("step"):
            assert {"grad_steps", "vae", "reward", "optimizer"} <= record["phases"].keys()
            assert sum(record["phases"].values()) == pytest.approx(np.median(record["seconds"]))


def test_a_process_that_takes_too_long_is_ended_and_said_so(tmp_path):
    found = list(ask("ours", Job("step_a14b", small=True, layers=2), 1.0, tmp_path))
    assert found == [{"case": "", "failed": "ended by its limit of 1 s"}]
    assert list(ask("ours", Job("nothing"), 60.0, tmp_path)) == [{"case": "", "failed": "KeyError: 'nothing'"}]


def test_time_decides_how_many_layers_are_tried_and_memory_leads_to_fewer():
    whole = PARTS["step_a14b"].layers
    assert affordable("step_a14b", "ours", 600, 1) == list(whole)
    # Half of the time is another process's.
    share = estimate("step_a14b", "ours", whole[1])
    assert affordable("step_a14b", "ours", 2 * share, 2) == list(whole[1:])
    # The fewest may take more than their share, but not more than there is.
    fewest = estimate("step_a14b", "ours", whole[-1])
    assert affordable("step_a14b", "ours", fewest, 9) == [whole[-1]]
    assert affordable("step_a14b", "ours", fewest - 1, 1) == []
    for text in ("RESOURCE_EXHAUSTED: Out of memory while trying", "OutOfMemoryError: CUDA out of memory. Tried"):
        assert out_of_memory({"failed": text})
    assert not out_of_memory({"failed": "ValueError: expected"})
    assert not out_of_memory({"seconds": [1.0]})


def test_fewer_layers_are_compared_as_measured_and_scaled_only_by_what_is_known(tmp_path):
    whole = PARTS["step_a14b"].layers[0]
    results = Results(tmp_path, {side: {"device": "a GPU", "versions": "some"} for side in ("ours", "torch")})

    def cells(ours, torch):
        results.rows.clear()
        for side, (layers, seconds, *rest) in {"ours": ours, "torch": torch}.items():
            record = {"case": "", "first_s": 9.0, "seconds": [seconds], **({"rest_s": rest[0]} if rest else {})}
            results.add("step_a14b", side, {**record, **({"layers": layers} if layers < whole else {})})
        row = results.page().splitlines()[-1].split(" | ")
        return row[9], row[-1]

    ratio, notes = cells((10, 10.0, 2.0), (10, 15.0))
    assert ratio == "1.50"
    assert notes == "10 layers, by which 40 take 34 s; PyTorch: 10 layers, by which 40 take at most 60 s |"
    assert cells((20, 18.0, 2.0), (10, 15.0))[0] == ""
    assert cells((20, 18.0, 2.0), (10, 16.0, 4.0))[0] == "1.53"  # 52 of 34
    assert cells((40, 34.0), (40, 51.0))[0] == "1.50"


def test_weights_are_random_and_of_their_own_types(monkeypatch):
    tree = {
        "kernel": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16),
        "q": {"kernel": jax.ShapeDtypeStruct((2, 100, 10), jnp.int8)},
        "scale": jax.ShapeDtypeStruct((7,), jnp.float32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    found = filled(tree, of_weights)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert float(jnp.std(found["kernel"].astype(jnp.float32))) == pytest.approx(64**-0.5, rel=0.1)
    assert np.std(found["q"]["kernel"]) == pytest.approx(128 / 3**0.5, rel=0.1)
    assert (found["scale"] == 1).all()
    assert found["step"] == 0
    # Of a large stack one layer is drawn.
    monkeypatch.setattr(gpu_ours, "LARGE", 1000)
    stack = filled({"kernel": jax.ShapeDtypeStruct((3, 20, 21), jnp.bfloat16)}, of_weights)["kernel"]
    assert (stack == stack[:1]).all()
    assert len(np.unique(stack)) > 100


@pytest.mark.parametrize("part", [pytest.param(x, marks=[pytest.mark.slow] * (x != "layer")) for x in CASES])
def test_pytorchs_side_measures_what_ours_is_compared_with(part, request):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    # Threads wait for each other longer than they work.
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    job = Job(part, small=True, layers=min(2, *PARTS[part].layers))
    cases = {}
    for record in records("torch", job):
        cases.setdefault(record["case"], {}).update(record)
    assert len(cases) == {"layer": 2, "attention": 2}.get(part, CASES[part])
    for record in cases.values():
        assert "failed" not in record, record["failed"]
        assert all(math.isfinite(x) and x > 0 for x in (record["first_s"], *record["seconds"]))
        assert math.isfinite(record.get("loss", 0.0))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--parts=attention,vea", "--parts: vea: expected of attention,layer,step_a14b,vae,step_5b, did you mean vae?"),
        ("--minutes=0", "--minutes: 0: expected more than 0"),
        ("--minutes=x", "argument --minutes: invalid float value: 'x'"),
    ],
)
def test_refusals(tmp_path, argument, expected):
    done = run(tmp_path, argument)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"gpu: {expected}\n")


def test_where_jax_finds_no_device_one_line_says_so(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "nowhere"}
    command = [sys.executable, "-m", "benchmarks.gpu", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "gpu: JAX finds no device (RuntimeError: Unable to initialize backend 'nowhere'" in done.stderr
