"""The packages of the extras "datasets" and "ray", imported where they are used."""

from typing import Any

from cfcam_gpu.checks import needs


def parquet_package() -> Any:
    """The module ``pyarrow.parquet``; ImportError with the extra that brings it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Parquet: {needs('pyarrow', 'datasets')}") from error
    return pyarrow.parquet


def zarr_package() -> Any:
    """The module ``zarr``; ImportError with the extra that brings it."""
    try:
        import zarr
    except ImportError as error:
        raise ImportError(f"Zarr: {needs('zarr', 'datasets')}") from error
    return zarr


def arrow_package() -> Any:
    """The module ``pyarrow``, for Ray; ImportError with the extra that brings it."""
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"Ray: {needs('pyarrow', 'ray')}") from error
    return pyarrow


def ray_package() -> Any:
    """The module ``ray`` with ``ray.data``; ImportError with the extra that brings both."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"Ray: {needs('ray', 'ray')}") from error
    return ray
