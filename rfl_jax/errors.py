"""The exceptions that reach the user as a line of text instead of a traceback."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn


class UserError(Exception):
    """A bad input. The message names the file, row or key and what was expected."""


class RunError(Exception):
    """What ended a command though its inputs were good. The message says what, and how to go on."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class ArgumentParser(argparse.ArgumentParser):
    """Refuses arguments by `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@contextlib.contextmanager
def refuse_in_one_line(command: str) -> Iterator[None]:
    """Turns `UserError` into one line on stderr and exit status 2, `RunError` into status 1, Ctrl-C into 130."""
    try:
        yield
    except UserError as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        sys.exit(130)
