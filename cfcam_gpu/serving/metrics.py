"""What a server counts, for Prometheus."""

from collections.abc import Callable
from typing import Any

from cfcam_gpu.checks import needs

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The numbers of one application, in a registry of its own.

    Args:
        in_work, waiting: tell how many requests are in work, and how many pictures wait for the network.
    """

    def __init__(self, in_work: Callable[[], float], waiting: Callable[[], float]) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ImportError(needs("prometheus_client", "serve")) from error
        self._prometheus, self.registry = prometheus, prometheus.CollectorRegistry()

        def made(kind: Any, name: str, about: str, *args: Any, **options: Any) -> Any:
            return kind(f"cfcam_{name}", about, *args, registry=self.registry, **options)

        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        self.requests = made(counter, "requests", "Answers by path and status.", ["path", "status"])
        self.seconds = made(histogram, "request_seconds", "From head to answer.", ["path"], buckets=SECONDS)
        self.left = made(counter, "clients_left", "Clients that left before their answer.")
        self.left_out = made(counter, "pictures_left_out", "Pictures of such clients that never met the network.")
        self.batches = made(histogram, "batch_pictures", "Pictures in a pass of the network.", buckets=BATCHES)
        self.passes = made(histogram, "pass_seconds", "A pass, by what it makes.", ["makes"], buckets=SECONDS)
        made(gauge, "requests_in_work", "Requests being read, waiting or explained.").set_function(in_work)
        made(gauge, "pictures_waiting", "Decoded pictures that wait for the network.").set_function(waiting)
        prometheus.ProcessCollector(registry=self.registry)

    def text(self) -> tuple[bytes, str]:
        """All of them in Prometheus' text format, and its media type."""
        return self._prometheus.generate_latest(self.registry), self._prometheus.CONTENT_TYPE_LATEST
