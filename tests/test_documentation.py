"""What README and pages tell people to type is run on the miniature, or parsed by the command's own flags and settings."""

import argparse
import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from absl import flags

from rfl_jax import cli, plan, sample
from rfl_jax.__main__ import COMMANDS
from rfl_jax.config import parse
from rfl_jax.data.videos import first_frame
from tests import COMPILER
from tests.documentation import PAGES, ROOT, blocks, commands, ours

# How ml_collections opens a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

BASH = blocks("bash")
EVERY = {" ".join(words): words for block in BASH for words in commands(block.text)}
THEIRS = (
    "python3",
    "pip",
    "git",
    "cd",
    "gcloud",
    "kubectl",
    "sky",
    "bash",
    "ruff",
    "lint-imports",
    "pyright",
    "mkdocs",
)
# What makes the miniature shorter.
SHORT = (
    *("--config.max_steps=2", "--config.train_batch_size=2", "--config.per_device_train_batch_size=2"),
    *("--config.eval_every=1", "--config.eval.num_samples=2", "--config.eval.validation_samples=2"),
)


class ParsedError(BaseException):
    """In place of what a command does once its arguments are read."""


def read_arguments(module, arguments, monkeypatch):
    """Runs a command up to where it has read its arguments; its settings are checked as well."""
    known = set(flags.FLAGS)

    def stop(*_, **__):
        raise ParsedError

    def read_flags(_, flags_parser):
        flags_parser(sys.argv)
        if getattr(flags.FLAGS, "config", None) is not None:
            parse(flags.FLAGS.config)
        raise ParsedError

    # Other tests have imported it, as nobody does who types the command.
    package = hasattr(sys.modules.get(module), "__path__")
    monkeypatch.delitem(sys.modules, f"{module}.__main__" if package else module, raising=False)
    read = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *args: (read(*args), stop()))
    monkeypatch.setattr(cli.app, "run", read_flags)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        with contextlib.suppress(ParsedError):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            pytest.fail("read no arguments")
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)


@pytest.mark.parametrize("command", EVERY)
def test_commands_are_parsed(command, folder, monkeypatch):
    words = EVERY[command]
    if found := ours(words):
        read_arguments(*found, monkeypatch)
    else:
        assert words[0].rpartition("/")[2] in THEIRS or words[1:3] == ["-m", "pytest"], "a program that no test knows"
        for name in (word for word in words if word.startswith(("examples/", "requirements"))):
            assert (ROOT / name).is_file()


def test_parsing_refuses_what_the_commands_refuse(folder, monkeypatch, capsys):
    for module, argument, message in (
        ("rfl_jax.train", "--config.lora_rnk=1", "lora_rnk"),
        ("rfl_jax.train", "--config.lora_rank=0", "config.lora_rank: expected a whole number of at least 1"),
        ("rfl_jax.sample", "--promt=x", "promt"),
        ("convert", "inspct", "inspct"),
    ):
        config = [] if module == "convert" else ["--config=configs/wan2_2_i2v_a14b.py"]
        with pytest.raises((SystemExit, Exception)) as refused:
            read_arguments(module, [*config, argument], monkeypatch)
        assert message in str(refused.value) + capsys.readouterr().err


def test_the_next_commands_are_parsed(folder, monkeypatch):
    """Those that a command makes of its own arguments, with the names that are the user's to replace."""
    config = ["--config=configs/mini.py", "--config.seed", "3"]
    sampled = [*config, "--prompt=A person nods.", "--out=a.mp4", "--seed", "5", "--steps=4"]
    lora = "--lora=dit2=lora.safetensors"
    given = {"step": "", "raw": False, "seed": 6}
    asked = [*config, "--topology", "v5p-8", "--search"]
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    for told, expected in (
        (sample.next_command(sampled, lora="", **given), f"rfl_jax.train {' '.join(config)} --workdir=DIR"),
        (
            sample.next_command([*sampled, lora], lora="dit2=lora.safetensors", **given),
            f"rfl_jax.sample {' '.join(config)} '--prompt=A person nods.' --steps=4 {lora} --seed=6 --out=NEXT.mp4",
        ),
        (
            sample.next_command(["--csv=rows.csv", "--out=b", *config, lora], lora="dit2=lora.safetensors", **given),
            f"rfl_jax.sample --csv=rows.csv {' '.join(config)} {lora} --seed=6 --out=NEXT",
        ),
        (
            sample.next_command(["--lora=run", "--raw"], lora="run", step="best", raw=True, seed=1),
            "rfl_jax.export --workdir run --step best --raw --dst lora.safetensors",
        ),
        (plan.next_command(asked, None), f"rfl_jax.plan {' '.join(config)} --search --topology=LARGER"),
        (
            plan.next_command(asked, {"remat_policy": "full"}),
            f"rfl_jax.train {' '.join(config)} --config.remat_policy=full --workdir=DIR",
        ),
    ):
        assert told == f"python -m {expected}"
        _, _, module, *arguments = shlex.split(told)
        read_arguments(module, arguments, monkeypatch)


@pytest.mark.slow
def test_commands_run_in_the_order_of_the_pages(folder, clip_folder):
    first_frame(clip_folder / "clip_000.mp4").save("face.png")
    (folder / "rows.csv").write_text("prompt,image,seed\nA person nods.,face.png,3\nA person smiles.,face.png,4\n")
    # As a user has it: one device, not the tests' eight.
    environment = os.environ | {"XLA_FLAGS": COMPILER}
    done = set()
    for block in blocks("bash", "python"):
        if block.why:
            continue
        lines = [ours(words) for words in commands(block.text)] if block.language == "bash" else [("-c", [block.text])]
        for module, arguments in filter(None, lines):
            if (module, *arguments) in done:
                continue
            done.add((module, *arguments))
            mini = "--config=configs/mini.py" in arguments and module != "rfl_jax.sample"
            shorter = [*SHORT, f"--config.file_name={clip_folder}/metadata.csv"] if mini else []
            command = [module, *arguments] if module == "-c" else ["-m", module, *arguments, *shorter]
            result = subprocess.run(
                [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600, check=False
            )
            assert result.returncode == 0, (block.page.name, command, result.stderr)
            # What is there to be read by programs has no such line.
            if module in COMMANDS and module != "rfl_jax.config" and "--json" not in arguments:
                assert result.stdout.splitlines()[-1].startswith("next: python -m "), command
    for name in (
        "report.html",
        "video.mp4",
        "out/comfyui.safetensors",
        "out/adapter/adapter_config.json",
        "videos/0002.mp4",
    ):
        assert (folder / name).stat().st_size > 0
    assert len(done) > 10


@pytest.mark.parametrize("block", [block for block in blocks("python") if block.why], ids=lambda block: block.page.name)
def test_code_is_parsed(block):
    compile(block.text, block.page.name, "exec")


def test_the_readme_is_short_and_leads_to_files_that_are_there():
    text = PAGES[0].read_text()
    assert text.count("\n") <= 90
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / link).exists(), link
