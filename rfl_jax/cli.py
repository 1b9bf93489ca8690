"""What the commands share: `--config`, `--workdir`, `--help`, and refusal in one line."""

import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from rfl_jax import hosts
from rfl_jax.chips import answer_libtpu
from rfl_jax.config import Config, check_keys, config_file, default_text, grouped, parse
from rfl_jax.errors import UserError, did_you_mean, failure, first_line, is_full, refuse_in_one_line
from rfl_jax.files import aside
from rfl_jax.memory import keep_freed_memory
from rfl_jax.programs import keep_compiled_programs
from rfl_jax.supervisor import supervise
from rfl_jax.terminal import BOLD, styled

HELP = {"-h", "--h", "-help", "--help"}
WIDTH = 100
# How long a host that refuses its inputs waits for the others, which mostly refuse theirs.
ALONE_S = 10
# What stands for a flag's value, by its type.
VALUES = {"string": "TEXT", "int": "NUMBER", "float": "NUMBER", "config object": "FILE[:ARG]"}


def define_config() -> flags.FlagHolder:
    """The `--config=FILE[:ARG]` flag with `--config.key=value` overrides."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, or the name of one in configs/, for example mini.", lock_config=True
    )


def define_distributed() -> flags.FlagHolder:
    """The `--distributed` flag of commands that run on several hosts."""
    return flags.DEFINE_boolean("distributed", False, "Run on several hosts: the same command on each.")


def load_config(holder: flags.FlagHolder) -> Config:
    """The validated configuration of the command line."""
    if holder.value is None:
        raise UserError("--config: expected a config file, or the name of one, for example mini")
    try:
        return parse(holder.value)
    except OSError as error:  # a file that could not be read is only told when its values are asked for
        raise UserError(f"--config: expected a config file ({' '.join(str(error).split())})") from None


def open_workdir(path: str | None) -> epath.Path:
    """The workdir, made if it is not there.

    Raises:
        UserError: none given, or not writable.
    """
    if not path:
        raise UserError("--workdir: expected a folder")
    workdir = epath.Path(path)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = aside(workdir / "writable")
        probe.write_text("")
        probe.unlink()
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        if is_full(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--workdir: {path}: not writable ({reason})") from None
    return workdir


def _with_files(argv: list[str]) -> list[str]:
    """The command line with the file of a config that is named alone."""
    found = list(argv)
    for i, word in enumerate(argv):
        if word.startswith(("--config=", "-config=")):
            flag, _, name = word.partition("=")
            found[i] = f"{flag}={config_file(name)}"
        elif word in ("--config", "-config") and i + 1 < len(argv):
            found[i + 1] = config_file(argv[i + 1])
    return found


def _help(command: str, about: str) -> Iterator[str]:
    """Lines that tell what a command does, its flags, and the settings of `--config` where it has that flag."""
    for paragraph in about.strip().split("\n\n"):
        # Lines to copy stay lines.
        lines = paragraph.splitlines() if paragraph.startswith("python -m") else [paragraph]
        yield "\n".join(map(_wrapped, lines)) + "\n"
    yield styled(f"Flags of python -m rfl_jax.{command}:", BOLD, sys.stdout)
    modules = flags.FLAGS.flags_by_module_dict()
    for flag in (*modules.get(sys.argv[0], ()), *modules.get(__name__, ())):
        value = VALUES.get(flag.flag_type())
        yield f"  --{flag.name}={value}" if value else f"  --[no]{flag.name}"
        default = "" if flag.default in (None, "", False) else f" Default: {flag.default}."
        yield _wrapped(f"{flag.help}{default}", 6)
    if "config" not in flags.FLAGS:
        return
    yield styled("\nSettings, as --config.NAME=VALUE; NAME=DEFAULT (expected):", BOLD, sys.stdout)
    for title, meaning, group in grouped():
        yield "\n" + styled(_wrapped(f"{title}: {meaning}"), BOLD, sys.stdout)
        for item in group:
            yield _wrapped(f"{item.key}={default_text(item)} ({item.expected})", 2)
            yield _wrapped(item.meaning, 6)


def _wrapped(text: str, indent: int = 0) -> str:
    space = " " * indent
    return textwrap.fill(
        text, WIDTH, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )


def _host_lost(line: str) -> str:
    return (
        f"another host of this run stopped, or the connection to it ({line[:160]}); "
        "the same command on all hosts goes on from the last checkpoint"
    )


def _reason(error: Exception, distributed: bool) -> str:
    """What ended a command though it made no mistake and its inputs were good, if that is not said elsewhere."""
    line = first_line(error)[:160]
    if isinstance(error, jax.errors.JaxRuntimeError):
        if "compile option" in line or "While setting option" in line:
            raise UserError(f"config.compiler_options: {line}") from None
        if "RESOURCE_EXHAUSTED" in line:
            return f"out of memory ({line}); python -m rfl_jax.plan says what takes it, and what would fit"
        # What a collective says when its other end is gone depends on the transport; these are no such thing.
        if distributed and not line.startswith(("INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND")):
            return _host_lost(line)
        return ""
    # Where a collective is only being started its failure is a ValueError.
    if distributed and isinstance(error, ValueError) and "Gloo" in line:
        return _host_lost(line)
    # It may be this host's alone.
    return failure(error) if distributed else ""


def _not_in_a_table(argv: Sequence[str], error: Exception) -> str:
    """The line on a flag that changes a row of a table, or a setting of one, which the config file does not name; empty if no flag is
    the reason.
    """
    # ml_collections quotes the name, and may guess another one in a second line.
    missing = str(error.args[0] if error.args else "").split("\n")[0].strip("\"'")
    for word in argv:
        found = re.match(r"--?config\.([\w.]+)(?:=|$)", word)
        if found and missing in found[1].split("."):
            return f"config.{found[1]}: expected what the config file names, as flags change only that: {missing!r} is not in it"
    return ""


def run(main: Callable[[], None], command: str) -> None:
    """Runs a command; bad flags and bad inputs end in one line and exit status 2, `--help` in its text and status 0."""
    if not HELP.isdisjoint(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads may stop before the end
        print("\n".join(_help(command, str(sys.modules[main.__module__].__doc__))))
        return

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            if "config" in flags.FLAGS:
                check_keys(found[1] for word in argv if (found := re.match(r"--?config\.([\w.]+)(?:=|$)", word)))
            rest = flags.FLAGS(_with_files(argv))
        except UserError:
            raise
        except flags.UnrecognizedFlagError as error:
            flag = f"--{error.flagname}"
            raise UserError(
                f"{flag}: unknown flag{did_you_mean(flag, (f'--{name}' for name in flags.FLAGS))}"
            ) from None
        # A config file is a program: whatever it raises is its author's to read, in one line.
        except Exception as error:
            raise UserError(_not_in_a_table(argv, error) or first_line(error)) from None
        if len(rest) > 1:
            raise UserError(f"{rest[1]}: unexpected argument, expected --flag=value")
        return rest

    def guarded(_: list[str]) -> None:
        distributed = "distributed" in flags.FLAGS and flags.FLAGS.distributed
        if distributed:
            if ended := supervise():
                status, lost = ended
                if lost:
                    print(f"{command}: {_host_lost(lost)}", file=sys.stderr, flush=True)
                sys.exit(status)
            hosts.join()
        try:
            main()
        except UserError:
            if distributed:
                # Where the others found nothing to refuse, an orderly end would wait for them.
                end = threading.Timer(ALONE_S, os._exit, (2,))
                end.daemon = True
                end.start()
            raise
        except Exception as error:
            reason = _reason(error, distributed)
            if not reason:
                raise
        else:
            return
        print(f"{command}: {reason}", file=sys.stderr, flush=True)
        if not distributed:
            sys.exit(1)
        # Without the others an orderly end would wait for them.
        os._exit(1)

    answer_libtpu()
    keep_compiled_programs()
    keep_freed_memory()
    # What Orbax warns of is for its developers; what a user must know is raised.
    logging.set_verbosity(logging.FATAL)
    with refuse_in_one_line(command):
        app.run(guarded, flags_parser=parse_flags)
