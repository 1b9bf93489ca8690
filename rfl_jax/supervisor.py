"""A command of several hosts under the eyes of a second process of the same host.

When hosts lose each other JAX aborts the process, with what its developers want to know of it. The command runs in a child of
the process that was started, and that one makes a line and an exit status of such an end.
"""

import ctypes
import faulthandler
import os
import re
import signal
import subprocess
import sys
from typing import Any

# Set for the child: its parent, and the descriptor of the stderr that both share.
SUPERVISED = "RFL_JAX_SUPERVISED"
# How a message of a library in C begins; what follows without belongs to it.
BEGINS = re.compile(rb"[IWEF]\d{4} \d\d:")
# Those that tell that the hosts lost each other, and what they give as the reason.
LOST = re.compile(rb"coordination.?service|JAX distributed service", re.IGNORECASE)
REASON = re.compile(rb"[A-Z_]{5,}: [^\n]*")
DIE_WITH_PARENT = 1  # of Linux' prctl


def supervise() -> tuple[int, str] | None:
    """Runs this process's command again in a child, to which SIGINT and SIGTERM are handed on.

    Returns:
        None in the child, which goes on; else how it ended: its exit status, and the reason that a library gave for the
        hosts having lost each other, where that aborted it.
    """
    if SUPERVISED in os.environ:
        _go_on_as_child(*map(int, os.environ.pop(SUPERVISED).split()))
        return None
    stderr = os.dup(2)
    process = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {SUPERVISED: f"{os.getpid()} {stderr}"},
        stderr=subprocess.PIPE,
        pass_fds=[stderr],
        process_group=0,  # a terminal's Ctrl-C comes once, by way of its parent
    )

    def hand_on(number: int, frame: Any) -> None:
        del frame
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    assert process.stderr is not None
    held, holding = b"", False
    for line in process.stderr:
        if BEGINS.match(line):
            holding = bool(LOST.search(line))
        if holding:
            held += line
        else:
            os.write(stderr, line)
    status = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status >= 0:
        return status, ""
    if status == -signal.SIGABRT and held:
        reason = REASON.search(held)
        return 1, reason[0].decode(errors="replace") if reason else "it does not answer"
    os.write(stderr, held)
    return 128 - status, ""


def _go_on_as_child(parent: int, stderr: int) -> None:
    """Has libraries in C write to the parent and Python where the parent writes, and this process end with the parent."""
    sys.stderr = os.fdopen(stderr, "w", buffering=1, errors="backslashreplace")
    faulthandler.enable(2)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)
