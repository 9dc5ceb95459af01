"""Checks of arguments at the public edge, and what their errors say."""

import importlib.util
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral

import torch

from cfcam_gpu.config import CFCAMConfig

GRID_AXES = (1, 2, 3)
"""How many axes a grid may have: of series, images, volumes."""


def needs(package: str, extra: str = "demo") -> str:
    """Text of an ImportError: the package, the extra that brings it, and the line that installs it."""
    return f'{package} is not installed; it comes with the "{extra}" extra: pip install "cfcam_gpu[{extra}]"'


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """'; did you mean ...?' with the closest choices, or nothing when none is close."""
    matches = get_close_matches(name, list(choices))
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def is_installed(package: str) -> bool:
    """Whether ``package`` can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def check_config(config: CFCAMConfig | None) -> CFCAMConfig:
    """``config``, or the default for None, which of volumes is another (`CFCAMConfig.of`)."""
    if config is None:
        config = CFCAMConfig()
        object.__setattr__(config, "_by_default", True)
        return config
    if not isinstance(config, CFCAMConfig):
        raise TypeError(f"config must be a CFCAMConfig, got {type(config).__name__}")
    return config


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that is not floating point."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_grid(name: str, tensor: torch.Tensor) -> None:
    """Refuse what is not a non-empty floating-point (B, C, h, w), or one of a volume or a series."""
    if tensor.ndim - 2 not in GRID_AXES:
        shapes = "(B, C, h, w), of volumes (B, C, d, h, w), of series (B, C, t)"
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name} (B, C, ...) must not be empty, got {tuple(tensor.shape)}")
    check_floating(name, tensor)


def check_guide(guide: torch.Tensor | None, activations: torch.Tensor) -> None:
    """Refuse a guide (B, Cg, hg, wg) that does not go with these activations (B, C, h, w); None is none."""
    if guide is None:
        return
    if not isinstance(guide, torch.Tensor):
        raise TypeError(f"guide must be a torch.Tensor, got {type(guide).__name__}")
    check_grid("guide", guide)
    expected, got = tuple(activations.shape[2:]), tuple(guide.shape[2:])
    if len(got) != len(expected):
        raise ValueError(f"guide must have a grid of as many axes as the activations' {expected}, got {got}")
    if guide.shape[0] != activations.shape[0]:
        raise ValueError(f"guide must have the activations' batch size {activations.shape[0]}, got {guide.shape[0]}")
    if guide.device != activations.device:
        raise ValueError(f"guide must be on the activations' device {activations.device}, got {guide.device}")
    if any(side < least for side, least in zip(got, expected)):
        raise ValueError(f"guide must have a grid of at least the activations' {expected}, got {got}")


def check_values(named_tensors: Mapping[str, torch.Tensor], check_finite: bool | None) -> None:
    """Refuse NaN and infinity where ``check_finite`` says so; None: on the CPU only."""
    for name, tensor in named_tensors.items():
        check = tensor.device.type == "cpu" if check_finite is None else check_finite
        # A sum is finite only if all its terms are, and takes a thirtieth of the time. Since it may also overflow, the
        # values are counted before they are refused.
        if check and not tensor.sum().isfinite():
            bad = tensor.numel() - int(tensor.isfinite().sum())
            if bad:
                raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values of {tensor.numel()}")


def check_output_size(output_size, activations):
    """``output_size`` as ints, (H, W) of images; of None, the size of the activations' grid."""
    if output_size is None:
        return tuple(activations.shape[2:])
    n_axes = activations.ndim - 2
    expected = {1: "(T,)", 2: "a pair (H, W)", 3: "(D, H, W)"}[n_axes]
    if not isinstance(output_size, (tuple, list, torch.Size)) or len(output_size) != n_axes:
        raise TypeError(f"output_size must be {expected}, got {output_size!r}")
    for side in output_size:
        if isinstance(side, bool) or not isinstance(side, (Integral, torch.SymInt)):
            raise TypeError(f"output_size must be {expected} of integers, got {output_size!r}")
        if side < 1:
            raise ValueError(f"output_size must be at least {(1,) * n_axes}, got {tuple(output_size)}")
    return tuple(side if isinstance(side, torch.SymInt) else int(side) for side in output_size)
