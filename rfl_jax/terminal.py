"""What people see: colours where they are wanted, a line while something long cannot say how far it is, the next command."""

import contextlib
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

LONG_S = 10  # what takes longer is worth a line where there is no terminal
BOLD, RED = "1", "1;31"


def styled(text: str, style: str, stream: Any) -> str:
    """The text in a style (`BOLD`, `RED`) where the stream is a terminal that wants colours: NO_COLOR is unset or empty, and
    TERM is not dumb.
    """
    wanted = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{style}m{text}\033[0m" if wanted else text


def command_line(module: str, arguments: Sequence[str]) -> str:
    """A command to copy."""
    return " ".join(["python -m", module, *map(shlex.quote, arguments)])


def chosen_flags(arguments: Sequence[str], wanted: Callable[[str], bool]) -> list[str]:
    """The flags whose names are wanted, with their values, written as --name=value or --name value."""
    kept, taken = [], False
    for word in arguments:
        if word.startswith("-"):
            taken = wanted(word.lstrip("-").partition("=")[0])
        if taken:
            kept.append(word)
    return kept


def tell_next(command: str) -> None:
    """Prints the command that comes next."""
    print(styled(f"next: {command}", BOLD, sys.stdout))


@contextlib.contextmanager
def waiting(what: str, *, show: bool = True) -> Iterator[None]:
    """Tells on stderr what is waited for: on a terminal at once, with its seconds counted; elsewhere when it takes long. What
    took long is told with its time.

    Args:
        what: in a few words.
        show: whether this process is the one to tell.
    """
    begin, done = time.monotonic(), threading.Event()
    form = what + " ... {elapsed}"
    with tqdm(bar_format=form, leave=False, disable=None if show else True, file=sys.stderr) as bar:

        def count() -> None:
            if bar.disable and not done.wait(LONG_S) and show:
                print(f"{what} ...", file=sys.stderr, flush=True)
            while not bar.disable and not done.wait(1):
                bar.refresh()

        counter = threading.Thread(target=count, daemon=True)
        counter.start()
        try:
            yield
        finally:
            done.set()
            counter.join()
    seconds = time.monotonic() - begin
    if show and seconds >= LONG_S:
        with tqdm.external_write_mode(file=sys.stderr):
            print(f"{what}: {seconds:.0f} s", file=sys.stderr, flush=True)
