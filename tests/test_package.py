"""What is installed: a wheel that trains by itself, extras, and examples that start it elsewhere."""

import json
import math
import os
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement

from rfl_jax import __version__
from tests.documentation import ROOT, commands, ours
from tests.test_documentation import SHORT, read_arguments

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXAMPLES = ROOT / "examples"
# Those that start machines; the notebook and the reward of one's own have tests of their own.
STARTERS = sorted(file.name for file in EXAMPLES.glob("*.*") if file.suffix not in (".ipynb", ".py"))


def run(*arguments, folder, **environment):
    """As a user has it: one device, not the tests' eight; nothing of this checkout in reach."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # The build's own requirements are those of the tests: nothing is fetched.
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    built = run("-m", "pip", "wheel", *options, ROOT, folder=folder, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("rfl_jax-*.whl")
    return file


def test_the_wheel_holds_the_packages_with_the_configs_inside(wheel):
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    places = {"rfl_jax": "rfl_jax", "convert": "convert", "configs": "rfl_jax/configs"}
    want = {
        f"{place}/{file.relative_to(ROOT / folder)}"
        for folder, place in places.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert held == want


@pytest.mark.slow
def test_the_installed_wheel_trains_the_miniature(wheel, clip_folder, tmp_path):
    target, mini = tmp_path / "installed", ["-m", "rfl_jax.train", "--config=mini", "--workdir=run"]
    done = run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    clips = f"--config.file_name={clip_folder}/metadata.csv"
    done = run(*mini, *SHORT, clips, "--config.max_steps=1", folder=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert str(target) in json.loads((tmp_path / "run" / "config.json").read_text())["reward_model_path"]
    where = "import convert, rfl_jax, sys; print(convert.__file__, rfl_jax.__file__)"
    assert run("-c", where, folder=tmp_path, PYTHONPATH=str(target)).stdout.count(str(target)) == 2
    assert run("-c", "import configs", folder=tmp_path, PYTHONPATH=str(target)).returncode == 1
    refused = run("-m", "rfl_jax.train", "--config=minni", folder=tmp_path, PYTHONPATH=str(target))
    assert refused.returncode == 2
    assert refused.stderr == "train: --config: minni: expected a config file, did you mean mini?\n"


def test_the_tests_requirements_are_their_extras():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"tpu", "cuda", "gcs", "wandb", "torch", "test", "docs"}
    named = [r for extra in ("docs", "gcs", "tpu", "torch", "wandb") for r in extras[extra]] + extras["test"][1:]
    lines = (ROOT / "requirements-test.txt").read_text().splitlines()
    listed = [Requirement(line) for line in lines if line[:1] not in ("", "#", "-")]
    by_name = {Requirement(text).name: Requirement(text) for text in named}
    assert {r.name for r in listed} == set(by_name)
    for requirement in listed:
        # PyTorch is pinned for the build that this Python has.
        if requirement.name != "torch":
            assert requirement == by_name[requirement.name]


def test_the_licence_and_the_citation_are_the_packages():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"
    assert str(citation["version"]) == __version__
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def example(name):
    """The commands that an example starts on the machines."""
    text = (EXAMPLES / name).read_text()
    if name == "skypilot.yaml":
        task = yaml.safe_load(text)
        return [*commands(task["setup"]), *commands(task["run"])]
    if name == "jobset.yaml":
        (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        return [container["command"]]
    # What xpk would be given.
    variables = dict.fromkeys(("CLUSTER", "PROJECT", "ZONE", "IMAGE", "BUCKET"), "x")
    script = f"xpk() {{ printf '%s\\0' \"$@\"; }}\n{text}"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    (command,) = (word for word in done.stdout.split("\0") if word.startswith("--command="))
    return list(commands(command.removeprefix("--command=")))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("name", STARTERS)
def test_examples_start_a_training_that_its_flags_allow(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    (training,) = (found for words in example(name) if (found := ours(words)))
    module, arguments = training
    assert module == "rfl_jax.train"
    read_arguments(module, arguments, monkeypatch)
    paths = next(a.partition("=")[2] for a in arguments if a.startswith("--config.model_paths="))
    assert len(json.loads(paths)) == 4


def test_the_jobset_has_a_pod_for_each_host_and_the_mesh_all_chips():
    (job,) = yaml.safe_load((EXAMPLES / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    each = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == chips // each
    assert "--distributed" in container["command"]
    assert f"--config.mesh.context={chips}" in container["command"]
