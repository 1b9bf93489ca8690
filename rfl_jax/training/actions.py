"""What is done about an alarm, in words."""

from collections.abc import Mapping
from typing import Any

LOWER, STOP = "lower", "stop"  # of `guard.on_alarm`


def told(entry: Mapping[str, Any]) -> str:
    """A validation's alarm, and what was done about it."""
    if not entry.get("action"):
        return entry["alarm"]
    back = f"{entry['alarm']}; back to the weights of step {entry['back_to']}"
    if entry["action"] == STOP:
        return f"{back}, and training ends"
    return f"{back}, learning rate x {entry['learning_rate_factor']:g}, KL x {entry['kl_factor']:g}"
