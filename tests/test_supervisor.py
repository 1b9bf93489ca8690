"""What a library's abort becomes when hosts lose each other, and what everything else remains."""

import os
import signal
import subprocess
import sys
import time

import pytest

HEAD = "W1127 15:05:07.213515   14822 "
LINES = {
    "lost": HEAD + "coordination_service.cc:1549] Use error polling: UNAVAILABLE: unhealthy:\n1\nRPC: /PollForError\n"
    "F1127 15:05:07.213515 1 client.h:80] Terminating process because the JAX distributed service detected fatal errors.\n",
    # Of a host that slept meanwhile.
    "woken": "E"
    + HEAD[1:]
    + "preemption_sync_manager.cc:159] Failed: [type.googleapis.com/tensorflow.CoordinationServiceError='']\n",
    "crash": HEAD + "cpu.cc:1] something else\n",
}
SCRIPT = """
import os, signal, sys, time
from rfl_jax.supervisor import supervise

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
ended = supervise()
if ended:
    print("ended", *ended, file=sys.stderr)
    sys.exit(ended[0])
how, text = sys.argv[1:]
os.write(2, text.encode())
print("from Python", file=sys.stderr)
if how == "abort":
    os.abort()
if how == "wait":
    try:
        print(os.getpid(), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
sys.exit(int(how))
"""


def start(*arguments):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], text=True, **pipes)


@pytest.mark.parametrize("how", ["0", "1", "2", "abort"])
@pytest.mark.parametrize("said", LINES)
def test_only_an_abort_of_lost_hosts_becomes_a_line(how, said):
    process = start(how, LINES[said])
    told = process.communicate()[1].splitlines()
    assert "from Python" in told
    lost = how == "abort" and said != "crash"
    status = 1 if lost else 128 + signal.SIGABRT if how == "abort" else int(how)
    assert process.returncode == status
    reason = {"lost": "UNAVAILABLE: unhealthy:", "woken": "it does not answer"}[said] if lost else ""
    assert told[-1].rstrip() == f"ended {status} {reason}".rstrip()
    if said != "crash":
        assert len(told) == 2
    else:
        assert any("something else" in line for line in told)
        # Where it crashed for another reason the interpreter's own report is told.
        assert any("Fatal Python error" in line for line in told) == (how == "abort")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signals_reach_the_child(number):
    process = start("wait", "")
    child = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")
