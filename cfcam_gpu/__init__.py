"""CF-CAM, Cluster Filter Class Activation Mapping: where a network looked, from one forward pass."""

import sys
from importlib.util import spec_from_file_location
from pathlib import Path

__version__ = "0.2.0"


class _KernelsBeside:
    """Finds `cfcam_gpu.kernels` in a checkout, where kernels/ lies beside this package and not inside it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        beside = Path(__file__).parent.parent / "kernels" / "__init__.py"
        return spec_from_file_location(name, beside) if name == f"{__name__}.kernels" and beside.is_file() else None


if not (Path(__file__).parent / "kernels").is_dir():
    sys.meta_path.insert(0, _KernelsBeside)  # before another checkout's, which may be installed as editable

from cfcam_gpu.adapters import accelerate
from cfcam_gpu.cam import CFCAM
from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.explainer import Explanation
from cfcam_gpu.exported import load
from cfcam_gpu.exporting import export
from cfcam_gpu.pipeline import CFCAMResult, cf_cam, cluster_channels

__all__ = [
    "CFCAM",
    "CFCAMConfig",
    "CFCAMResult",
    "Explanation",
    "accelerate",
    "cf_cam",
    "cluster_channels",
    "export",
    "load",
]
