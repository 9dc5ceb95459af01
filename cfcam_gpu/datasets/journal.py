"""What a run has done, so that a killed one goes on where it was.

The folder ``.cfcam`` in the run's own holds the journal, the lock, files that are being written, the maps that are to
go into one file, and the thumbnails of the gallery. A run that ends removes it.

The journal is a text file, one line of JSON for each of: the run's parameters; what was found of the model with the
first picture; a batch that is done, all its files written. A line counts when it is whole: what follows the last whole
line was being written when the run ended, and is done again.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cfcam_gpu.datasets import files

FOLDER = ".cfcam"


@dataclass(frozen=True)
class Record:
    """What became of one picture, as plain values.

    Attributes:
        index: its place among the inputs, from 0.
        path: what the input calls it; an archive's member is called ARCHIVE/MEMBER.
        name: the stem of the files that are written for it.
        target: the class that the input asks for; None where it asks for none.
        classes: the class indices that were explained, best first unless they were asked for. Of a model with one
            output the side that was explained, 1 for the positive and 0 for the negative.
        labels: their names.
        scores: their probabilities.
        border: of each map the share of its sum in the outer frame, `gallery.border_share`; None for a map of zeros. Of
            scans and videos nothing.
        files: names of the files written for it alone, in the run's folder.
        error: why it could not be explained or written; None where it was.
        at: (offset, shape) of its maps in the file in which they wait for being written into one with all others; else
            None.
    """

    index: int
    path: str
    name: str
    target: int | str | None = None
    classes: Sequence[int] = ()
    labels: Sequence[str] = ()
    scores: Sequence[float] = ()
    border: Sequence[float | None] = ()
    files: Sequence[str] = ()
    error: str | None = None
    at: Any = None

    def as_dict(self) -> dict[str, Any]:
        """The record for JSON, without what only the run itself needs."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        del values["at"]
        return values


class Journal:
    """The journal of the run in a folder, which nobody else can open before it is closed.

    Args:
        out: the run's folder; it is made.
        parameters: {name: plain value} of all that decides what is written.
        overwrite: forget an earlier run that has not ended.

    Attributes:
        done: {index: where in the journal its batch is}.
        n_explained: how many of them did not fail.
        found: what `set_found` was called with, in this or in the earlier run; None before.

    Raises:
        Locked: another run is writing there.
        ValueError: an earlier run there, which has not ended, had other parameters.
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, out: Path, parameters: Mapping[str, Any], overwrite: bool = False) -> None:
        self.out, self.folder = out, out / FOLDER
        self.path, self.spool = self.folder / "journal.jsonl", self.folder / "maps"
        self.parts, self._old = self.folder / "parts", out / f"{FOLDER}.old"
        self.thumbnails = self.folder / "thumbnails"
        self.done: dict[int, int] = {}
        self.n_explained = 0
        self.found: dict[str, Any] | None = None
        self._lock: IO[str] | None = None
        # Plain values, as they would come back from the file.
        parameters = json.loads(json.dumps(dict(parameters)))
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        try:
            self._lock = files.lock(self.folder / "lock", out)
            length, n_spooled = (0, 0) if overwrite else self._read(parameters)
            for left in (self.parts, self._old):
                shutil.rmtree(left, ignore_errors=True)
            if not length:
                shutil.rmtree(self.thumbnails, ignore_errors=True)
            self.parts.mkdir()
            self._file, self._spool = _cut(self.path, length), _cut(self.spool, n_spooled)
            if not length:
                self._append({"parameters": parameters})
                files.sync(self.folder)
                for folder in (out, *(each.parent for each in made)):
                    files.sync(folder)
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise

    def _read(self, parameters):
        """How much of the journal and of the spooled maps counts."""
        length = n_spooled = 0
        if not self.path.exists():
            return 0, 0
        with open(self.path, "rb") as file:
            for line in file:
                entry = _parsed(line)
                if entry is None or (not length and "parameters" not in entry):
                    break
                if not length:
                    earlier = entry["parameters"]
                elif "found" in entry:
                    self.found = entry["found"]
                else:
                    n_spooled = entry["spooled"]
                    self._count([Record(*record) for record in entry["batch"]], length)
                length += len(line)
        if not self.done:
            self.found = None
            return 0, 0
        compare(self.out, earlier, parameters)
        return length, n_spooled

    def _append(self, entry):
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def set_found(self, found: Mapping[str, Any]) -> None:
        """Keep what was found of the model; ValueError where an earlier run found something else."""
        plain = json.loads(json.dumps(dict(found)))
        if self.found is None:
            self.found = plain
            self._append({"found": plain})
        else:
            compare(self.out, self.found, plain)

    def spooled(self, content: bytes) -> int:
        """Keep maps until all are written; returns where they are."""
        offset = self._spool.tell()
        self._spool.write(content)
        return offset

    def add(self, records: Sequence[Record]) -> None:
        """The pictures of a batch are done, and all that was written for them is in place."""
        if any(record.files for record in records):
            files.sync(self.out)
        if self.thumbnails.exists():
            files.sync(self.thumbnails)
        if any(record.at for record in records):
            self._spool.flush()
            os.fsync(self._spool.fileno())
        where = self._file.tell()
        self._append({"batch": [list(vars(record).values()) for record in records], "spooled": self._spool.tell()})
        self._count(records, where)

    def _count(self, records, where):
        for record in records:
            self.done[record.index] = where
            self.n_explained += record.error is None

    def records(self) -> Iterator[Record]:
        """The pictures that are done, in the order of the inputs."""
        with open(self.path, "rb") as file:
            where, batch = None, {}
            for index in sorted(self.done):
                if self.done[index] != where:
                    where = self.done[index]
                    file.seek(where)
                    batch = {record[0]: Record(*record) for record in json.loads(file.readline())["batch"]}
                yield batch[index]

    def close(self, forget: bool) -> None:
        """Let go of the folder; with ``forget`` no journal is left."""
        self._file.close()
        self._spool.close()
        if forget:
            # Under another name: what is being removed is not to be taken for a run, nor a new run to be removed.
            os.replace(self.folder, self._old)
            shutil.rmtree(self._old, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()


def _cut(path, length):
    """The file, open for more at its end, without what follows the first ``length`` bytes."""
    file = open(path, "ab")
    file.truncate(length)
    file.seek(0, os.SEEK_END)
    return file


def _parsed(line):
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


SAID = {
    "inputs": "other images, or in another order",
    "weights": "a model with other weights",
    "class_names": "other class names",
    "preprocess": "another preprocess",
}
"""Parameters of which a hash is kept."""


def compare(out: Path, earlier: Mapping[str, Any], now: Mapping[str, Any], run: str = "an unfinished run") -> None:
    """ValueError where the parameters of the run that is called so, in the folder ``out``, differ from those of now."""
    for name in {**earlier, **now}:
        old, new = earlier.get(name), now.get(name)
        if old != new:
            difference = (
                f"had {SAID[name]}" if name in SAID else f"had {name} {_shown(old)}, this one has {_shown(new)}"
            )
            raise ValueError(
                f"{run} in {out} {difference}: repeat it as it was to finish it, or start anew with --overwrite"
            )


def _shown(value):
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items())
    return "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
