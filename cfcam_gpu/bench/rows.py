"""Rows of results: where they were measured, and one JSON line per point."""

import datetime
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def about(*packages, device=None):
    """Device, versions, commit and date, for every row of a run.

    Args:
        packages: distributions whose versions are recorded beside torch's, where they are installed.
        device: what the run is on; default: a GPU where there is one.
    """
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    versions = {}
    for package in ("torch", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device_type": "cuda" if on_gpu else "cpu",
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{processor()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def processor():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit():
    """The checkout's commit; "" for an installed package, which may well lie in somebody else's repository."""
    if not (ROOT / "kernels").is_dir():
        return ""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def append(path, rows):
    """Append rows to a file of JSON lines as they come; yields them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            yield row


def read(path):
    """The rows of a file, oldest first; of a missing file, none."""
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line]


def latest(rows, *fields):
    """The last row of each point: {the row's values of ``fields``: row}, in the order of first appearance."""
    return {tuple(_hashable(row.get(field)) for field in fields): row for row in rows}


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value
