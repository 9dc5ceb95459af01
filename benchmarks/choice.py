"""The rule of faithfulness.md that chooses the default configuration, on rows of faithfulness.jsonl."""

STABILITY = "gradient_noise_10"

NOT_WORSE = ("insertion_minus_deletion", "average_drop", STABILITY, "class_sensitivity", "energy")
"""Measures in which a candidate must not be worse than Grad-CAM."""

LOWER_IS_BETTER = (
    *("deletion", "average_drop"),
    *("pixel_flipping", "selectivity", "infidelity", "max_sensitivity"),
)
"""Of all measures."""

ASKED = {"insertion_minus_deletion": 0.025, STABILITY: 0.02, "class_sensitivity": 0.15, "energy": 0.05}
"""The gain over Grad-CAM that is asked of the default."""

CLOSE = 0.9
"""Of the candidates that are not worse anywhere, those whose smallest gain, in units of what is asked, is at least this
share of the best."""

RANDOM = "random, another for each class"
"""A control on the drawn pictures: what class sensitivity maps have that know nothing."""

THEN = "average_drop"
"""And of those the one with the lowest mean of this is the default."""


def mean(row, measure):
    return row["measures"][measure][0]


def reaches_zero(row, measure):
    """Whether the paired 95 % interval of the difference from Grad-CAM does, from the worse side."""
    _, low, high = row["minus_grad_cam"][measure]
    return low <= 0 if measure in LOWER_IS_BETTER else high >= 0


def lost_on(family, random):
    """The measures in which a candidate is worse than Grad-CAM on networks of one family.

    Mean over the networks, whose intervals are taken as independent. Class sensitivity counts up to that of random
    maps: what Grad-CAM has above it is noise, not the class.

    Args:
        family: the candidate's rows of shapes.jsonl, one a network.
        random: those of `RANDOM`.
    """
    lost = []
    for measure in NOT_WORSE:
        differences = [row["minus_grad_cam"][measure] for row in family]
        gain = sum(each[0] for each in differences) / len(family)
        width = sum(((high - low) / 2) ** 2 for _, low, high in differences) ** 0.5 / len(family)
        if random and measure == "class_sensitivity" and _grad_cam(family, measure) >= _mean(random, measure):
            continue
        if (gain > width) if measure in LOWER_IS_BETTER else (gain < -width):
            lost.append(measure)
    return lost


def _mean(rows, measure):
    return sum(mean(row, measure) for row in rows) / len(rows)


def _grad_cam(rows, measure):
    """Grad-CAM's mean, from the rows of another method."""
    return _mean(rows, measure) - sum(row["minus_grad_cam"][measure][0] for row in rows) / len(rows)


def holds(row):
    """Whether a candidate is not worse than Grad-CAM in any measure of the rule."""
    return all(reaches_zero(row, measure) for measure in NOT_WORSE)


def smallest_gain(row):
    """The smallest of a candidate's mean gains over Grad-CAM, each in units of what is asked."""
    return min(row["minus_grad_cam"][measure][0] / asked for measure, asked in ASKED.items())


def pick(rows):
    """The name of the candidate that the rule picks, of {name: row}; None where none gains in all that is asked."""
    found = {name: smallest_gain(row) for name, row in rows.items() if holds(row)}
    found = {name: gain for name, gain in found.items() if gain > 0}  # not NaN either
    close = [name for name, gain in found.items() if gain >= CLOSE * max(found.values())]
    return min(close, key=lambda name: mean(rows[name], THEN), default=None)
