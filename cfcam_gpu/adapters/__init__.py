"""Adapters to other CAM libraries."""


def accelerate(cam):
    """The same CAM object of another library, computed faster.

    Raises:
        NotImplementedError: always; the adapters are not in this release.
    """
    raise NotImplementedError(f"accelerate() is not in this release; got {type(cam).__name__}")
