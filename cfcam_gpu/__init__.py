"""CF-CAM, Cluster Filter Class Activation Mapping: where a network looked, from one forward pass."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout that is not installed, kernels/ lies beside this package and not inside it.
if (Path(__file__).parent.parent / "kernels").is_dir() and not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from cfcam_gpu.adapters import accelerate
from cfcam_gpu.cam import CFCAM
from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.pipeline import CFCAMResult, cf_cam, cluster_channels

__all__ = ["CFCAM", "CFCAMConfig", "CFCAMResult", "accelerate", "cf_cam", "cluster_channels"]
