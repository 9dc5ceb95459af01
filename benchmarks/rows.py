"""Rows of results: where they were measured, and one JSON line per point."""

import datetime
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
"""Where committed rows live."""


def about(*packages):
    """Device, versions, commit and date, for every row of a run."""
    on_gpu = torch.cuda.is_available()
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    versions = {}
    for package in ("torch", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{processor()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **versions,
        "commit": subprocess.run(command, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def processor():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(name, rows, out=RESULTS):
    """Append rows to ``out/name.jsonl`` as they come; returns them."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with open(out / f"{name}.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            written.append(row)
    return written
