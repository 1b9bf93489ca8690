"""Stopping without loss, asked for by Ctrl-C or SIGTERM on any host."""

import signal
from types import FrameType

from rfl_jax.hosts import any_host


class Stop:
    """Between `with` and its end a signal does not interrupt: the running step ends. A second one stops at once."""

    def __init__(self) -> None:
        self._asked = False
        # Agreed on by all hosts, at the end of a step.
        self.agreed = False

    def __enter__(self) -> "Stop":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def agree(self) -> bool:
        """Whether any host was asked to stop; all hosts call it together."""
        self.agreed = any_host(self._asked)
        return self.agreed

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
