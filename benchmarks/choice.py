"""The rule of faithfulness.md that chooses the default and the stable configuration, on rows of faithfulness.jsonl."""

from math import isnan
from typing import NamedTuple

NOT_WORSE = ("insertion_minus_deletion", "average_drop", "energy")
"""Measures in which a candidate must not be worse than Grad-CAM."""

LOWER_IS_BETTER = ("deletion", "average_drop")
"""Of all measures."""

CLASS_SENSITIVITY_LOSS = 0.05
"""How much of Grad-CAM's class sensitivity the default may lose."""

STABLE_CLASS_SENSITIVITY = 0.5
"""Share of Grad-CAM's class sensitivity that the stable configuration keeps."""

SMALLEST_PERCENTILE = 25.0
"""Of the norms, above which channels are dominant: so many hundredths of the channels are clustered."""

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
    """3: at least a quarter of the channels."""
    half_class_sensitive: bool
    """What the stable configuration must satisfy instead of 2."""

    @property
    def default(self):
        return self.not_worse and self.class_sensitive and self.clusters

    @property
    def stable(self):
        return self.not_worse and self.half_class_sensitive and self.clusters


def mean(row, measure):
    return row["measures"][measure][0]


def reaches_zero(row, measure):
    """Whether the paired 95 % interval of the difference from Grad-CAM does, from the worse side."""
    _, low, high = row["minus_grad_cam"][measure]
    return low <= 0 if measure in LOWER_IS_BETTER else high >= 0


def conditions(row, grad_cam, dominant_percentile):
    """The `Conditions` of a candidate's row, beside Grad-CAM's of the same photographs."""
    sensitivity, full = mean(row, "class_sensitivity"), mean(grad_cam, "class_sensitivity")
    return Conditions(
        all(reaches_zero(row, measure) for measure in NOT_WORSE),
        _at_least(sensitivity, full - CLASS_SENSITIVITY_LOSS),
        dominant_percentile >= SMALLEST_PERCENTILE,
        _at_least(sensitivity, STABLE_CLASS_SENSITIVITY * full),
    )


def pick(rows, grad_cam, dominant_percentiles):
    """(default, stable): the names of the candidates that the rule picks; None where none satisfies it.

    Args:
        rows: {name: row} of all candidates.
        grad_cam: Grad-CAM's row on the same photographs.
        dominant_percentiles: {name: ``dominant_percentile``}.
    """
    of = {name: conditions(row, grad_cam, dominant_percentiles[name]) for name, row in rows.items()}
    stability = {name: mean(row, STABILITY) for name, row in rows.items() if not isnan(mean(row, STABILITY))}
    default = [name for name in stability if of[name].default]
    if default:
        most = max(stability[name] for name in default)
        default = [name for name in default if _at_least(stability[name], most - TIE)]
    stable = [name for name in stability if of[name].stable]
    return (
        max(default, key=lambda name: mean(rows[name], "energy"), default=None),
        max(stable, key=stability.get, default=None),
    )


def _at_least(value, bound):
    # Rows have five digits; the rounding of a difference must not decide about a value on the bound.
    return value >= bound - 1e-9
