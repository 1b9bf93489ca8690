"""Every command tells what it takes."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rfl_jax.config import Config
from rfl_jax.errors import first_line
from rfl_jax.miniature.world import ASSETS, VAE_FILE
from rfl_jax.settings import settings
from tests import COMPILER

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "train": ["--workdir=TEXT", "Folder of the run: config", "--[no]distributed"],
    "prepare": ["--workdir=TEXT"],
    "sample": ["--prompt=TEXT", "Default: 16.", "python -m rfl_jax.sample --config=FILE [--lora=RUN_OR_FILE] --csv="],
    "evaluate": ["--workdir=TEXT", "--data=TEXT", "--export=TEXT", "vbench-i2v or opens2v"],
    "plan": ["--topology=TEXT", "--[no]search", "Exit status 0"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_commands_flags_and_the_settings(command):
    option = "-h" if command == "plan" else "--help"
    # A backend that cannot be opened: help asks for no device.
    environment = os.environ | {"JAX_PLATFORMS": "none"}
    arguments = [sys.executable, "-m", f"rfl_jax.{command}", "--workdir=/nowhere", option]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for text in COMMANDS[command]:
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    words = " ".join(done.stdout.split())
    for item in settings(Config):
        assert (f" {item.key}=" in words and item.expected in words and item.meaning in words) == (
            command != "evaluate"
        )


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu (pip install libtpu)")
def test_without_a_tpu_libtpu_is_silent(tmp_path):
    # As a user has it: jax looks for every platform.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS" and not k.startswith("TPU_")}
    # Where another process has left its lock, libtpu would fail before it complains.
    environment |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    refused = run("-m", "rfl_jax.plan", "--config=configs/mini.py", "--topology=nonsense")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("plan: --topology: nonsense: expected local")
    asked = "print(jax.devices()[0].platform)"
    done = run("-c", f"import jax; from rfl_jax import cli; cli.run(lambda: {asked}, 'train')")
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == ""
    # Not because there would be nothing to silence.
    if done.stdout == "cpu\n":
        assert "TPU" in run("-c", f"import jax; {asked}").stderr
    source = ASSETS / "vae" / VAE_FILE
    done = run("-m", "convert", "vae", "--src", str(source), "--dst", str(tmp_path / "vae"))
    assert (done.returncode, done.stderr) == (0, "")


def test_an_errors_first_line_is_its_types_name_where_it_says_nothing():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("flag", ["config.reward.terms.motion.every", "config.reward.terms.light.weight"])
def test_a_flag_that_changes_what_a_table_has_not_is_named(flag, tmp_path):
    command = [
        sys.executable,
        "-m",
        "rfl_jax.train",
        "--config=configs/wan2_2_ti2v_5b.py",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = subprocess.run([*command, f"--{flag}=2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    missing = "every" if flag.endswith("every") else "light"
    expected = (
        f"train: {flag}: expected what the config file names, as flags change only that: {missing!r} is not in it\n"
    )
    assert done.stderr == expected
    assert not (tmp_path / "run").exists()


def test_an_option_that_the_compiler_does_not_know_is_a_bad_input(tmp_path, clip_folder):
    arguments = [
        "--config=configs/mini.py",
        f"--config.file_name={clip_folder / 'metadata.csv'}",
        "--config.eval.file_name=",
    ]
    arguments += [f"--workdir={tmp_path}", "--config.eval_every=0", "--config.compiler_options=foo=1"]
    environment = os.environ | {"XLA_FLAGS": COMPILER}
    done = subprocess.run(
        [sys.executable, "-m", "rfl_jax.train", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "train: config.compiler_options: INVALID_ARGUMENT: No such compile option: 'foo'" in done.stderr
    assert "Traceback" not in done.stderr
