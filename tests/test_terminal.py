"""What the terminal shows: commands on one screen, the nearest name in a refusal, waits that tell themselves, the next command."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from rfl_jax import __main__ as listing
from rfl_jax import terminal
from rfl_jax.config import check_keys, config_file
from rfl_jax.errors import ArgumentParser, UserError, did_you_mean

ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_commands_fit_one_screen_and_are_all_there():
    command = [sys.executable, "-m", "rfl_jax"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") <= 24
    assert max(map(len, done.stdout.splitlines())) <= 80
    there = {f"rfl_jax.{file.stem}" for file in (ROOT / "rfl_jax").glob("[a-z]*.py") if "__main__" in file.read_text()}
    there |= {f"rfl_jax.{file.parent.name}" for file in (ROOT / "rfl_jax").glob("[a-z]*/__main__.py")}
    assert set(listing.COMMANDS) == there | {"convert"}
    assert all(f"python -m {name} " in done.stdout for name in listing.COMMANDS)
    refused = subprocess.run([*command, "trian"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == "rfl_jax: trian: no argument of this list, did you mean python -m rfl_jax.train?\n"


@pytest.mark.parametrize(
    ("name", "known", "end"),
    [
        ("lora_rnk", ["lora_rank", "seed"], ", did you mean lora_rank?"),
        ("num_frames", ["data.num_frames", "max_steps"], ", did you mean data.num_frames?"),
        ("reward.num_frames", ["data.num_frames", "reward"], ", did you mean data.num_frames?"),
        ("zzz", ["lora_rank"], ""),
    ],
)
def test_the_nearest_name_is_told(name, known, end):
    assert did_you_mean(name, known) == end


def test_every_command_names_the_next():
    # The settings' page goes into a file.
    for name in set(listing.COMMANDS) - {"rfl_jax.config"}:
        file = ROOT / name.replace(".", "/")
        text = (file / "__main__.py" if file.is_dir() else file.with_suffix(".py")).read_text()
        assert "tell_next(" in text, name


def parser():
    parser = ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lora").add_argument("--strength")
    commands.add_parser("export").add_argument("--workdir", required=True)
    return parser


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (lambda: check_keys(["lora_rnk", "seed", "data.frames"]), "config.lora_rnk: unknown setting, did you mean "
         "config.lora_rank?; config.data.frames: unknown setting, did you mean config.data.num_frames?"),
        (lambda: check_keys(["zzz"]), "config.zzz: unknown setting, --help lists all"),
        (lambda: config_file("minni:x"), "--config: minni: expected a config file, did you mean mini?"),
        (lambda: parser().parse_args(["lroa"]), "did you mean lora?"),
        (lambda: parser().parse_args(["lora", "--strenght=1"]), "--strenght: unknown flag, did you mean --strength?"),
        (lambda: parser().parse_args(["export", "--wrkdir", "x"]), "--wrkdir: unknown flag, did you mean --workdir?"),
    ],
)  # fmt: skip
def test_refusals_name_the_nearest(refuse, message):
    with pytest.raises(UserError) as refused:
        refuse()
    assert str(refused.value).endswith(message)


def test_shortened_flags_are_still_taken():
    assert parser().parse_args(["export", "--work", "x"]).workdir == "x"


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(stream, environment, coloured, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert terminal.styled("text", terminal.RED, stream) == ("\033[1;31mtext\033[0m" if coloured else "text")


WAIT = """
import time
from rfl_jax import terminal
terminal.LONG_S = 0.3
with terminal.waiting("read the weights"):
    time.sleep({seconds})
with terminal.waiting("not this process's", show=False):
    time.sleep({seconds})
terminal.tell_next("python -m rfl_jax.report x")
"""


@pytest.mark.parametrize(("seconds", "told"), [(0.9, "read the weights ...\nread the weights: 1 s\n"), (0, "")])
def test_a_long_wait_is_told_where_there_is_no_terminal(seconds, told):
    command = [sys.executable, "-c", WAIT.format(seconds=seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == told
    assert done.stdout == "next: python -m rfl_jax.report x\n"


def test_a_wait_counts_its_seconds_on_a_terminal():
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    command = [sys.executable, "-c", WAIT.format(seconds=2.3)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                part = os.read(mine, 4096)
            except OSError:  # the other end is closed
                break
            shown += part
        assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"read the weights \.\.\. 00:00.*read the weights \.\.\. 00:02", text, re.DOTALL)
    assert "\033[1mnext: python -m rfl_jax.report x\033[0m" in text
    assert "not this process's" not in text
