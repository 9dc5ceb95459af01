"""Where committed rows live; what is in them, `cfcam_gpu.bench.rows` says."""

from pathlib import Path

from cfcam_gpu.bench import rows
from cfcam_gpu.bench.rows import about, latest, processor, read

RESULTS = Path(__file__).parent / "results"

__all__ = ["RESULTS", "about", "latest", "processor", "read", "write"]


def write(name, points, out=RESULTS):
    """Append rows to ``out/name.jsonl`` as they come; returns them."""
    return list(rows.append(out / f"{name}.jsonl", points))
