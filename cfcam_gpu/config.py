"""The configuration of CF-CAM: every number of the procedure, in one frozen dataclass."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

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
"""Above this, cosine rounding dominates and hardly any cells count as similar."""

MAX_AFFINITY_STEPS = 16
"""Largest affinity_steps: each is a pass over all pairs of cells within the window."""

WINDOW_SIGMAS = 3.0
"""Cells farther apart than this many affinity_sigma, in y or in x, do not count for each other: exp(-4.5) is 1 %."""

MAX_GUIDE_POWER = 2.0
"""Largest guide_power: the map would be the guide's few strongest cells, whatever the class."""

AS_THE_MEAN = 2.0**-18
"""A feature that differs from the cells' mean by no more than this share of it is the mean but for rounding."""

WITHOUT_FEATURES = 1e-30
"""The least square of the features' length: a guide that is 0 everywhere leaves the map as it was."""

MAX_MARGIN_TEMPERATURE = 100.0
"""Largest margin_temperature: the softmax over the other classes is uniform long before."""


@dataclass(frozen=True)
class CFCAMConfig:
    """Every choice of the CF-CAM procedure; immutable and hashable.

    Args:
        dominant_percentile: channels whose L2 norm reaches this percentile of all norms (NumPy's linear
            rule) keep their own gradient and skip clustering; in [0, 100], 100 means that none is dominant.
            Published: 75. The default leaves a quarter to cluster: mean weights cost more the more channels have them.
        descriptor: "raw" clusters the flattened activation, as the authors do; "unit" divides it by its
            L2 norm first: shape, not size.
        eps_percentile: DBSCAN's radius is this percentile of all pairwise distances; in [0, 100].
        min_samples_fraction: DBSCAN's min_samples is max(2, int(fraction * clustered channels)); in [0, 1].
        sigma: standard deviation of the Gaussian filter in grid cells; in (0, 1024], or a tuple of one such number for
            each axis of the grid, (y, x) or in volumes (z, y, x). The paper's second
            version names a Gaussian without giving sigma or the boundary, and the authors' code has a
            data-dependent "bilateral" convolution instead, so both values are choices made here.
        boundary: what the filter sees outside the grid: "constant" (zeros), "reflect" or "nearest", as in
            ``scipy.ndimage.gaussian_filter``. With "reflect" the filter changes no pooled weight.
        weighting: "signed" uses the pooled gradients as they are (Grad-CAM's convention); "softmax" takes
            a softmax over the kept channels, as published. Pooled gradients are so small that the softmax
            is nearly uniform: such maps hardly depend on the class.
        normalize: "minmax" maps to [0, 1]; "max" divides by the maximum, as published.
        affinity_power: p, the power of the likeness in the average over alike cells. The signed sum S of the
            channels is resized to the grid of a guide, the features f of an earlier layer (without one: of the
            activations themselves), and there becomes M_p = sum_q k_pq S_q / sum_q k_pq with
            k_pq = max(0, cos(f_p, f_q))^p exp(-|x_p - x_q|^2 / (2 affinity_sigma^2)); in [0, 16], 0 for no average.
            The data-dependent filter of this package, not published. Lower is smoother, more stable, and less
            sensitive to the class.
        affinity_sigma: the average's reach, in cells of the *target* layer's grid, whatever the guide's; in
            (0, inf], inf for all cells alike. Cells more than 3 affinity_sigma apart, in y or in x, do not count.
            Without it (inf), time and memory traffic grow with the square of the grid's cells.
        affinity_steps: how many times the average is applied, each time to its own result; an integer in [0, 16],
            0 for no average.
        affinity_centring: the share of the features' mean over the guide's cells that is taken off them to give f, in
            [0, 1]. With 1, what all cells have in common makes none of them alike; with 0, f are the features
            themselves.
        affinity_range: how far S_p and S_q may differ, each time the average is applied: k_pq is multiplied by
            exp(-((S_p - S_q) / (affinity_range E))^2 / 2), E the mean of |S| over the cells of the target layer, each
            counted as in the averages: the range kernel of a bilateral filter. What speaks for the class is not
            averaged with what does not, where the guide does not tell them apart; in (0, inf], inf for no such factor.
        guide_power: the averaged sum is multiplied by |f_p|^guide_power, the length of f at each cell of the guide:
            where an earlier layer sees little of its own, little can have spoken for the class; in [0, 2], 0 for no
            such factor. Not published, and without the average it has no effect.
        margin_temperature: used by `CFCAM` alone, which chooses the score to differentiate; `cf_cam` is given
            gradients and ignores it. Above 0: the margin z_c - T logsumexp(z_k / T) over the other classes k, with
            T = margin_temperature times the standard deviation of those logits, held constant. 0: the
            class's logit z_c, as published. In [0, 100].
        frozen_norms: used by `CFCAM` alone, like ``margin_temperature``. True: the gradient takes the statistics of
            normalisation layers behind the target layer as constants (the LN rule of Ali et al., ICML 2022). False: the
            plain gradient, as published, which is blind to the direction of features that are normalised after
            pooling, as in ConvNeXt and Swin. Without such layers there is no difference.

    Raises:
        TypeError: a number is not a real number, affinity_steps not an integer, frozen_norms not a bool, or a choice
            not a string.
        ValueError: a value is outside its range or not among the choices.

    Source: arXiv 2504.00060; jerryp-hfut/CF-CAM@c227652.

    >>> CFCAMConfig(sigma=2.0).sigma
    2.0
    """

    dominant_percentile: float = 25.0
    descriptor: str = "raw"
    eps_percentile: float = 25.0
    min_samples_fraction: float = 0.05
    sigma: float | tuple[float, ...] = 1.0
    boundary: str = "constant"
    weighting: str = "signed"
    normalize: str = "minmax"
    affinity_power: float = 1.0
    affinity_sigma: float = 2.0
    affinity_steps: int = 2
    margin_temperature: float = 1.35
    guide_power: float = 0.5
    frozen_norms: bool = True
    affinity_centring: float = 0.6
    affinity_range: float = 1.75

    def __post_init__(self) -> None:
        if isinstance(self.sigma, (tuple, list)):
            object.__setattr__(self, "sigma", tuple(self.sigma))  # hashable: constants are cached by it
        for name, low, high in (
            ("dominant_percentile", 0.0, 100.0),
            ("eps_percentile", 0.0, 100.0),
            ("min_samples_fraction", 0.0, 1.0),
            ("sigma", 0.0, MAX_SIGMA_CELLS),
            ("affinity_power", 0.0, MAX_AFFINITY_POWER),
            ("affinity_sigma", 0.0, math.inf),
            ("affinity_steps", 0, MAX_AFFINITY_STEPS),
            ("margin_temperature", 0.0, MAX_MARGIN_TEMPERATURE),
            ("guide_power", 0.0, MAX_GUIDE_POWER),
            ("affinity_centring", 0.0, 1.0),
            ("affinity_range", 0.0, math.inf),
        ):
            value: Any = getattr(self, name)
            kind: Any
            kind, described = (Integral, "an integer") if name == "affinity_steps" else (Real, "a real number")
            for each in value if name == "sigma" and isinstance(value, tuple) else (value,):
                if isinstance(each, bool) or not isinstance(each, kind):
                    raise TypeError(f"{name} must be {described}, got {type(each).__name__}")
                if not low <= each <= high:  # also refuses NaN
                    raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {each}")
                if name in ("sigma", "affinity_sigma", "affinity_range") and each <= 0:
                    raise ValueError(f"{name} must be above 0, got {each}")
        if not isinstance(self.frozen_norms, bool):
            raise TypeError(f"frozen_norms must be a bool, got {type(self.frozen_norms).__name__}")
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
    def paper(cls) -> "CFCAMConfig":
        """The published procedure: the logit and its gradient, softmax weights, division by the maximum; no average."""
        fixed = (75.0, "raw", 25.0, 0.05, 1.0, "constant", "softmax", "max")
        return cls(*fixed, affinity_power=0.0, margin_temperature=0.0, frozen_norms=False)

    @classmethod
    def stable(cls) -> "CFCAMConfig":
        """The stable end of the trade-off: maps that change less under noise, and less with the class.

        The average is taken once more and has no range, and the score spreads over more of the other classes. What it
        gains and loses is in the pages on faithfulness, as "CF-CAM, stable".
        """
        return cls(affinity_power=1.5, affinity_steps=3, margin_temperature=1.5, affinity_range=math.inf)

    @classmethod
    def volumes(cls) -> "CFCAMConfig":
        """The default for volumes (B, C, d, h, w): no average over alike cells.

        Within the average's reach most of a volume is not the object, and on generated volumes with known masks it
        costs half of the energy in them; see the pages on faithfulness.
        """
        return cls(affinity_power=0.0)

    def of(self, n_axes: int) -> "CFCAMConfig":
        """What counts on a grid of so many axes: itself, or of volumes `volumes` where nobody chose it."""
        return CFCAMConfig.volumes() if n_axes == 3 and "_by_default" in self.__dict__ else self

    def averages_of(self, images: Any) -> bool:
        """Whether there is an average where these images, (B, C, ...) of any kind of array, are explained."""
        return self.of(images.ndim - 2).averages

    def sigmas(self, n_axes: int) -> tuple[float, ...]:
        """``sigma`` of each axis of a grid that has so many."""
        sigmas = self.sigma if isinstance(self.sigma, tuple) else (self.sigma,) * n_axes
        if len(sigmas) != n_axes:
            raise ValueError(f"sigma must be one number, or one for each of {n_axes} axes, got {len(sigmas)}")
        return sigmas

    @property
    def averages(self) -> bool:
        """Whether there is an average over alike cells."""
        return self.affinity_power > 0 and self.affinity_steps > 0

    def min_samples(self, n_clustered: int) -> int:
        """DBSCAN's min_samples for ``n_clustered`` channels, the point itself included."""
        return max(SMALLEST_MIN_SAMPLES, int(self.min_samples_fraction * n_clustered))
