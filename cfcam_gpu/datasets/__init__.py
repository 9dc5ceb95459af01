"""Data sets: many pictures from anywhere, explained and written at the speed of the network, and resumed when killed.

`cfcam explain` is `explain` on what `find_sources` finds; what it is told to write is in `FORMATS`, and a `Record` is
what is known of a picture in the end. On a cluster, `cfcam_gpu.datasets.ray_data` does the same.

>>> sources = find_sources(["photos/"])
>>> explain(Options(out=Path("out"), write=["maps", "scores"]), sources).explained
200
"""

from cfcam_gpu.datasets.gallery import write_gallery
from cfcam_gpu.datasets.journal import Record
from cfcam_gpu.datasets.reading import Inputs, Source, find_sources
from cfcam_gpu.datasets.running import Options, Refused, Report, Summary, explain
from cfcam_gpu.datasets.writing import FORMATS, Format

__all__ = [
    "FORMATS",
    "Format",
    "Inputs",
    "Options",
    "Record",
    "Refused",
    "Report",
    "Source",
    "Summary",
    "explain",
    "find_sources",
    "write_gallery",
]
