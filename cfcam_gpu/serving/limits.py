"""What a server takes at most, and how it fills its batches."""

import math
from dataclasses import dataclass, field, fields

from cfcam_gpu.datasets.running import cores

MOST_WORKERS = 4
"""Threads that decode and encode, unless more are asked for; each may hold a picture of the most pixels."""


def _limit(default, unit, about, least: float = 1):
    return field(default=default, metadata={"unit": unit, "about": about, "least": least})


@dataclass(frozen=True)
class Limits:
    """The limits of a server; `cfcam serve` has an option for each.

    Attributes:
        max_bytes: of a request's body; more is answered with 413.
        max_pixels: of a picture, by its file's head, before it is decoded; more is answered with 422.
        max_queue: requests that are being read, wait or are being explained; further ones are answered with 503.
        batch_size: pictures in a pass of the network, at most.
        batch_wait_ms: how long the first picture of a batch waits for others.
        body_timeout_s: how long a body may take to arrive; after that 408.
        workers: threads that decode pictures and encode answers.

    Raises:
        TypeError: a limit is no number, or no integer where it counts something.
        ValueError: it is below its least value, 1, of `batch_wait_ms` 0, of `body_timeout_s` 0.001; or not finite.
    """

    max_bytes: int = _limit(10 * 2**20, "BYTES", "largest body; more: 413")
    max_pixels: int = _limit(50_000_000, "N", "largest picture, by its file's head; more: 422")
    max_queue: int = _limit(128, "N", "requests in work or waiting; more: 503")
    batch_size: int = _limit(32, "N", "most pictures in a pass of the network")
    batch_wait_ms: float = _limit(10.0, "MS", "how long the first picture of a batch waits for others", least=0)
    body_timeout_s: float = _limit(30.0, "S", "how long a body may take to arrive; longer: 408", least=0.001)
    workers: int = _limit(min(MOST_WORKERS, cores()), "N", "threads that decode pictures and encode answers")

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least, whole = getattr(self, each.name), each.metadata["least"], each.type in (int, "int")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                expected = "an integer" if whole else "a number"
                raise TypeError(f"{each.name} must be {expected}, got {type(value).__name__}")
            if not least <= value < math.inf:
                raise ValueError(f"{each.name} must be at least {least} and finite, got {value}")
