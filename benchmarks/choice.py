"""The rule of faithfulness.md that chooses the default configuration, on rows of faithfulness.jsonl."""

from math import isnan

STABILITY = "gradient_noise_10"

NOT_WORSE = ("insertion_minus_deletion", "average_drop", STABILITY, "class_sensitivity", "energy")
"""Measures in which a candidate must not be worse than Grad-CAM."""

LOWER_IS_BETTER = (
    *("deletion", "average_drop"),
    *("pixel_flipping", "selectivity", "infidelity", "max_sensitivity"),
)
"""Of all measures."""

DECIDES, CLOSE = "insertion_minus_deletion", 0.005
"""Of the candidates that are not worse anywhere, those whose mean of this is within so much of the largest."""

THEN = "average_drop"
"""And of those the one with the lowest mean of this is the default."""


def mean(row, measure):
    return row["measures"][measure][0]


def reaches_zero(row, measure):
    """Whether the paired 95 % interval of the difference from Grad-CAM does, from the worse side."""
    _, low, high = row["minus_grad_cam"][measure]
    return low <= 0 if measure in LOWER_IS_BETTER else high >= 0


def holds(row):
    """Whether a candidate is not worse than Grad-CAM in any measure of the rule."""
    return all(reaches_zero(row, measure) for measure in NOT_WORSE)


def pick(rows):
    """The name of the candidate that the rule picks, of {name: row}; None where none is not worse."""
    found = {name: mean(row, DECIDES) for name, row in rows.items() if holds(row)}
    found = {name: value for name, value in found.items() if not isnan(value)}
    close = [name for name, value in found.items() if value >= max(found.values()) - CLOSE]
    return min(close, key=lambda name: mean(rows[name], THEN), default=None)
