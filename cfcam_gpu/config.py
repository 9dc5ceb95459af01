"""The configuration of CF-CAM: every number of the procedure, in one frozen dataclass."""

from dataclasses import dataclass
from numbers import Real

DESCRIPTORS = ("raw", "unit")
BOUNDARIES = ("constant", "reflect", "nearest")
WEIGHTINGS = ("signed", "softmax")
NORMALIZATIONS = ("minmax", "max")

EPS_FLOOR = 1e-5
"""Smallest neighbourhood radius: eps = max(percentile of the distances, EPS_FLOOR)."""

SMALLEST_MIN_SAMPLES = 2
"""Smallest DBSCAN min_samples, the point itself included."""

FLAT_RANGE = 1e-6
"""A map is flat when max - min <= FLAT_RANGE * max: stretching it would show rounding, not attention."""

GRAD_CAM_EPSILON = 1e-7
"""pytorch-grad-cam scales a map to (x - min) / (GRAD_CAM_EPSILON + max(x - min))."""

MAX_SIGMA_CELLS = 1024.0
"""Largest sigma: a filter far wider than any grid only wastes memory."""

MAX_AFFINITY_POWER = 16.0
"""Largest affinity_power: it multiplies the rounding of the cosine, and beyond it hardly a cell is alike to another."""


@dataclass(frozen=True)
class CFCAMConfig:
    """Every choice of the CF-CAM procedure; immutable and hashable.

    Args:
        dominant_percentile: channels whose L2 norm reaches this percentile of all norms (NumPy's linear
            rule) keep their own gradient and skip clustering; in [0, 100], 100 means that none is dominant.
            Published: 75.
        descriptor: "raw" clusters the flattened activation, as the authors do; "unit" divides it by its
            L2 norm first: shape, not size.
        eps_percentile: DBSCAN's radius is this percentile of all pairwise distances; in [0, 100].
        min_samples_fraction: DBSCAN's min_samples is max(2, int(fraction * clustered channels)); in [0, 1].
        sigma: standard deviation of the Gaussian filter in grid cells; in (0, 1024]. The paper's second
            version names a Gaussian without giving sigma or the boundary, and the authors' code has a
            data-dependent "bilateral" convolution instead, so both values are choices made here.
        boundary: what the filter sees outside the grid: "constant" (zeros), "reflect" or "nearest", as in
            ``scipy.ndimage.gaussian_filter``. With "reflect" the filter changes no pooled weight.
        weighting: "signed" uses the pooled gradients as they are (Grad-CAM's convention); "softmax" takes
            a softmax over the kept channels, as published. Pooled gradients are so small that the softmax
            is nearly uniform: such maps hardly depend on the class.
        normalize: "minmax" maps to [0, 1]; "max" divides by the maximum, as published.
        affinity_power: averages the weighted sum of the channels over the cells with alike features before the
            ReLU: cell q counts for cell p with max(0, cos(a_p, a_q))^affinity_power, a_p being p's activations in
            all channels; in [0, 16], 0 for no averaging. The data-dependent filter of this package, not published.
            Lower is smoother, more stable, and less sensitive to the class.
            Time and memory traffic grow with the square of the grid's cells.

    Raises:
        TypeError: a number is not a real number, or a choice is not a string.
        ValueError: a value is outside its range or not among the choices.

    Source: arXiv 2504.00060; jerryp-hfut/CF-CAM@c227652.

    >>> CFCAMConfig(sigma=2.0).sigma
    2.0
    """

    dominant_percentile: float = 50.0
    descriptor: str = "raw"
    eps_percentile: float = 25.0
    min_samples_fraction: float = 0.05
    sigma: float = 1.0
    boundary: str = "constant"
    weighting: str = "signed"
    normalize: str = "minmax"
    affinity_power: float = 3.0

    def __post_init__(self):
        for name, low, high in (
            ("dominant_percentile", 0.0, 100.0),
            ("eps_percentile", 0.0, 100.0),
            ("min_samples_fraction", 0.0, 1.0),
            ("sigma", 0.0, MAX_SIGMA_CELLS),
            ("affinity_power", 0.0, MAX_AFFINITY_POWER),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
        if self.sigma <= 0:
            raise ValueError(f"sigma must be above 0, got {self.sigma}")
        for name, choices in (
            ("descriptor", DESCRIPTORS),
            ("boundary", BOUNDARIES),
            ("weighting", WEIGHTINGS),
            ("normalize", NORMALIZATIONS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {type(value).__name__}")
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")

    @classmethod
    def paper(cls):
        """The published procedure: softmax weights, division by the maximum, no average over alike cells."""
        return cls(75.0, "raw", 25.0, 0.05, 1.0, "constant", weighting="softmax", normalize="max", affinity_power=0.0)

    @classmethod
    def stable(cls):
        """The stable end of the trade-off: maps that change less under noise, and less with the class.

        A wider average over alike cells than the default's. What it gains and loses is in
        benchmarks/faithfulness.md, as "dominant 50, raw, 25th percentile, affinity 2".
        """
        return cls(affinity_power=2.0)

    def min_samples(self, n_clustered):
        """DBSCAN's min_samples for ``n_clustered`` channels, the point itself included."""
        return max(SMALLEST_MIN_SAMPLES, int(self.min_samples_fraction * n_clustered))
