"""The rule of faithfulness.md that chooses the default configuration, on rows of faithfulness.jsonl."""

from math import isnan
from typing import NamedTuple

NOT_WORSE = ("insertion_minus_deletion", "average_drop", "energy")
"""Measures in which a candidate must not be worse than Grad-CAM."""

LOWER_IS_BETTER = ("deletion", "average_drop")
"""Of all measures."""

CLASS_SENSITIVITY_LOSS = 0.05
"""How much of Grad-CAM's class sensitivity the default may lose."""

CLUSTERED_SHARE = 0.25
"""Smallest share of the channels that take part in the clustering."""

STABILITY = "gradient_noise_10"

TIE = 0.002
"""Of two candidates whose stability differs by no more, the default is the one with more energy in the right cell."""


class Conditions(NamedTuple):
    """Which conditions of the rule a candidate satisfies."""

    not_worse: bool
    """1: insertion minus deletion, average drop and energy."""
    class_sensitive: bool
    """2: at least Grad-CAM's minus `CLASS_SENSITIVITY_LOSS`."""
    clusters: bool
    """3: at least `CLUSTERED_SHARE` of the channels take part, in the mean over the photographs."""


def mean(row, measure):
    return row["measures"][measure][0]


def reaches_zero(row, measure):
    """Whether the paired 95 % interval of the difference from Grad-CAM does, from the worse side."""
    _, low, high = row["minus_grad_cam"][measure]
    return low <= 0 if measure in LOWER_IS_BETTER else high >= 0


def conditions(row, grad_cam):
    """The `Conditions` of a candidate's row, beside Grad-CAM's of the same photographs."""
    return Conditions(
        all(reaches_zero(row, measure) for measure in NOT_WORSE),
        _at_least(mean(row, "class_sensitivity"), mean(grad_cam, "class_sensitivity") - CLASS_SENSITIVITY_LOSS),
        _at_least(row["clustered_share"], CLUSTERED_SHARE),
    )


def pick(rows, grad_cam):
    """The name of the candidate that the rule picks; None where none satisfies it.

    Args:
        rows: {name: row} of all candidates.
        grad_cam: Grad-CAM's row on the same photographs.
    """
    stability = {name: mean(row, STABILITY) for name, row in rows.items() if all(conditions(row, grad_cam))}
    stability = {name: value for name, value in stability.items() if not isnan(value)}
    most = max(stability.values(), default=0)
    most_stable = [name for name, value in stability.items() if _at_least(value, most - TIE)]
    return max(most_stable, key=lambda name: mean(rows[name], "energy"), default=None)


def _at_least(value, bound):
    # Rows have five digits; the rounding of a difference must not decide about a value on the bound.
    return value >= bound - 1e-9
