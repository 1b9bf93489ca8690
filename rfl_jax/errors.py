"""The exceptions that reach the user as a line of text instead of a traceback."""

import argparse
import contextlib
import difflib
import errno
import functools
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn


class UserError(Exception):
    """A bad input. The message names the file, row or key and what was expected."""


class RunError(Exception):
    """What ended a command though its inputs were good. The message says what, and how to go on."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


MENDED = "what was written before is whole, and the same command goes on once that is mended"
# What a disk, a quota, a permission or the way to a bucket refuses.
STORAGE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ENOTCONN, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET),
)
# Libraries of which every failure is one of the way to a bucket, and what tensorstore calls such failures.
NETWORK = ("aiohttp", "gcsfs", "google.api_core", "google.auth", "google.cloud", "requests", "urllib3")
STATUS = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|RESOURCE_EXHAUSTED): ")
OS_CODE = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)|\[Errno (\d+)\]")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def is_passing(error: BaseException) -> bool:
    """Whether it may be over in a moment: the way to a bucket failed, or the bucket is overrun."""
    code = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(code, int):
        return code in (408, 429) or code >= 500
    if not getattr(error, "retryable", True):  # of Google's credentials
        return False
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(NETWORK)


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota has no room left."""
    return any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in causes(error))


def storage_fault(error: BaseException) -> str:
    """What a disk or a bucket refused, with the file it happened to; empty if the error is of another kind."""
    for one in causes(error):
        text = str(one)
        if isinstance(one, OSError) and one.errno in STORAGE:
            return f"{one.filename}: {one.strerror}" if one.filename else str(one.strerror)
        if isinstance(one, OSError) and text.startswith("Forbidden"):  # what gcsfs makes of a bucket's 403
            return first_line(one)[:200]
        # Tensorstore's errors are texts.
        file = re.search(r"[\"']((?:/|gs://|https?://)[^\"']+)[\"']", text)
        code = OS_CODE.search(text)
        if code and (number := int(code[code.lastindex or 0])) in STORAGE:
            return f"{file[1]}: {os.strerror(number)}" if file else os.strerror(number)
        if type(one).__module__.startswith(NETWORK) or (STATUS.match(text) and "://" in text):
            return f"the network failed ({first_line(one)[:200]})"
    return ""


@contextlib.contextmanager
def refuse_damage(expected: str) -> Iterator[None]:
    """Turns whatever a library raises that reads a damaged file into a `UserError` of this beginning. What a disk or a bucket
    refuses remains what it is, and so does what this program refuses itself.
    """
    ignore_late_ends()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if storage_fault(error) or type(error).__name__ == "JaxRuntimeError":  # of the devices
            raise
        raise UserError(f"{expected} ({first_line(error)[:200]})") from None


@functools.cache
def ignore_late_ends() -> None:
    """Keeps reads and writes that go on behind one that failed from telling, one by one, that nobody waits for them any more."""
    told = sys.unraisablehook

    def tell(ignored: Any) -> None:
        closed = isinstance(ignored.exc_value, RuntimeError) and str(ignored.exc_value) == "Event loop is closed"
        if not (closed or inspect.iscoroutine(ignored.object)):
            told(ignored)

    sys.unraisablehook = tell


def failure(error: BaseException) -> str:
    """What ended a command whose inputs were good, in one line; empty if it is a mistake of the program."""
    fault = storage_fault(error)
    line = f"{fault}; {MENDED}" if fault else str(error) if isinstance(error, RunError) else ""
    return " ".join(line.split())


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a refusal that names the nearest of what is known; empty if nothing is near."""
    names = list(known)
    # A group may be missing, or one too many: then the last part decides.
    lasts = {one.rpartition(".")[2]: one for one in names}
    near = difflib.get_close_matches(name, names, 1)
    near = near or [lasts[last] for last in difflib.get_close_matches(name.rpartition(".")[2], lasts, 1)]
    return f", did you mean {prefix}{near[0]}?" if near else ""


class ArgumentParser(argparse.ArgumentParser):
    """Refuses arguments by `UserError`, with the nearest of those that it takes."""

    has_commands = False

    def add_subparsers(self, **options: Any) -> Any:
        self.has_commands = True
        return super().add_subparsers(**options)

    # The overloads that are declared for it are one function.
    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        # What belongs to a command is its own parser's to judge.
        words = () if self.has_commands else sys.argv[1:] if args is None else args
        options = re.findall(r"--\w[\w-]*", self.format_help())
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag[2:] and not any(option.startswith(flag) for option in options):
                self.error(f"{flag}: unknown flag{did_you_mean(flag, options)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        chosen = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = did_you_mean(chosen[1], re.findall(r"[\w.-]+", chosen[2])) if chosen else ""
        raise UserError(message + near)


@contextlib.contextmanager
def refuse_in_one_line(command: str) -> Iterator[None]:
    """Turns `UserError` into one line on stderr and exit status 2, `RunError` and what a disk or a bucket refuses into
    status 1, Ctrl-C into 130.
    """
    try:
        yield
    except UserError as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not (line := failure(error)):
            raise
        print(f"{command}: {line}", file=sys.stderr)
        sys.exit(1)
