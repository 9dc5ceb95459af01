"""How good is a class activation map? Measures of faithfulness, class sensitivity, stability and localisation.

Everything takes maps as tensors (B, H, W) and models as callables ``images -> logits (B, n_classes)``, so that the maps
of any library can be measured. All values are per image, (B,), on the maps' device; `bootstrap_ci` makes the mean and
its interval of them. A value that has no meaning, such as the similarity to a map of zeros, is NaN and never enters
a mean unseen: the results count such maps in ``zero``.

Models run in the mode they are in, without autograd, ``batch_size`` images at a time; nothing about them is changed.
Nothing here makes the host wait for the device, `mosaics` and `bootstrap_ci` apart. As elsewhere, NaN, infinity and
classes out of range are refused where that costs nothing: on the CPU.

>>> from cfcam_gpu import metrics
>>> curves = metrics.insertion_deletion(model, images, cam.maps(images))  # images (8, 3, 224, 224)
>>> curves.insertion.shape, metrics.bootstrap_ci(curves.insertion).mean
(torch.Size([8]), 0.61)
"""

from cfcam_gpu.metrics.checks import RANGE_SLACK
from cfcam_gpu.metrics.faithfulness import (
    BASELINES,
    BLUR_SIGMA_PIXELS,
    VARIANTS,
    InsertionDeletion,
    average_drop,
    blurred,
    increase_in_confidence,
    insertion_deletion,
    pixel_ranks,
)
from cfcam_gpu.metrics.localisation import Mosaics, PointingGame, energy_in_mask, mosaics, pointing_game
from cfcam_gpu.metrics.similarity import SSIM_RADIUS, ClassSensitivity, class_sensitivity, rank_correlation, ssim
from cfcam_gpu.metrics.stability import (
    Randomization,
    Stability,
    gradient_noise_stability,
    input_noise_stability,
    parameter_randomization,
)
from cfcam_gpu.metrics.statistics import Interval, bootstrap_ci

__all__ = [
    "BASELINES",
    "BLUR_SIGMA_PIXELS",
    "ClassSensitivity",
    "InsertionDeletion",
    "Interval",
    "Mosaics",
    "PointingGame",
    "RANGE_SLACK",
    "Randomization",
    "SSIM_RADIUS",
    "Stability",
    "VARIANTS",
    "average_drop",
    "blurred",
    "bootstrap_ci",
    "class_sensitivity",
    "energy_in_mask",
    "gradient_noise_stability",
    "increase_in_confidence",
    "input_noise_stability",
    "insertion_deletion",
    "mosaics",
    "parameter_randomization",
    "pixel_ranks",
    "pointing_game",
    "rank_correlation",
    "ssim",
]
