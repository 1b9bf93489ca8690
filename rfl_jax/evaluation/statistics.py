"""Whether a difference between two sets of paired clips is more than chance.

scipy.stats is imported where it is called: half a second that the beginning of a training need not wait for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999


def interval(values: Sequence[float], seed: int = 0) -> list[float] | None:
    """Bootstrap interval (percentiles, 95 %) of the mean over clips; None of fewer than two."""
    if len(values) < 2:
        return None
    from scipy import stats

    found = stats.bootstrap(
        (np.asarray(values),), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def compare(base: Sequence[float], tuned: Sequence[float]) -> dict[str, Any]:
    """Means with intervals, and what training changed.

    Returns:
        "base", "tuned", "change": intervals of the means and of the mean change; "rose", "fell": in how many clips;
        "p": of the two-sided sign test, ties left out.
    """
    from scipy import stats

    change = np.asarray(tuned) - np.asarray(base)
    rose, fell = int(np.sum(change > 0)), int(np.sum(change < 0))
    return {
        "base": interval(base),
        "tuned": interval(tuned),
        "change": interval(change.tolist()),
        "rose": rose,
        "fell": fell,
        "p": float(stats.binomtest(rose, rose + fell).pvalue) if rose + fell else 1.0,
    }
