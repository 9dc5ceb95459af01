"""The packages of the extra "datasets", imported where they are used."""

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
