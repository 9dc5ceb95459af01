"""Constants of the kernels: the labels of `cfcam_gpu.labels`, and the largest numbers."""

import triton.language as tl

from cfcam_gpu import config, labels

DOMINANT = tl.constexpr(labels.DOMINANT)
NOISE = tl.constexpr(labels.NOISE)

AS_THE_MEAN = tl.constexpr(config.AS_THE_MEAN)

LARGEST_INT32 = tl.constexpr(0x7FFFFFFF)

LARGEST_FLOAT32_BITS = tl.constexpr(0x7F7FFFFF)
"""The bits of the largest float32."""
