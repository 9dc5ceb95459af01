"""Where pictures, scans and videos come from: files, folders, patterns, lists, tables and tar archives; and how they
are read ahead."""

import csv
import glob
import hashlib
import os
import sys
import tarfile
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cfcam_gpu import images, volumes
from cfcam_gpu.checks import did_you_mean
from cfcam_gpu.datasets.packages import parquet_package

Item = TypeVar("Item")
Result = TypeVar("Result")

LONGEST_SUFFIX = len("_100000-100000.nii.gz")
"""What may follow an image's name in a file's name."""

LISTED = {2: images.EXTENSIONS, 3: volumes.EXTENSIONS}
"""What a folder gives a network of images, and one of volumes."""

PATH_COLUMN = "path"
"""The column of a table that names the files, unless another is asked for."""


class Source(NamedTuple):
    """One image, scan or video to explain."""

    label: str
    """What messages and tables call it: its path; of an archive's member the archive's path and the member's name."""
    load: Callable
    """Returns the PIL image, or the `cfcam_gpu.volumes.Volume`."""
    stem: str
    """Name of what is written for it, without the extension."""
    target: int | None = None
    """The class to explain, where the input names one."""


class _Found(NamedTuple):
    """What an input names, before it has a name of its own."""

    label: str
    load: Callable
    """Called with ``n_axes`` and ``n_frames``."""
    stem: str
    target: Any = None


def find_sources(
    inputs: Sequence[str],
    lists: Sequence[str] = (),
    path_column: str = PATH_COLUMN,
    target_column: str | None = None,
    n_axes: int = 2,
    n_frames: int = volumes.FRAMES,
) -> list[Source]:
    """The images that the arguments name, with distinct names for what is written; for a network of volumes, the scans
    and videos.

    Args:
        inputs: each of them one of

            - a folder: its own files with an image's extension, or with a scan's or a video's, sorted;
            - a pattern such as ``"photos/**/*.jpg"``: its matches, sorted, each as what follows;
            - ``@FILE``: a text file with a path on each line; ``-`` is that of standard input;
            - a table, ``.csv`` or ``.parquet``, with the paths in ``path_column``;
            - an archive, ``.tar``, as WebDataset has them: each member with an image's extension;
            - anything else: a file, which is tried.

            A relative path in a list or a table is relative to the list's or the table's folder.
        lists: text files as by ``@FILE``.
        path_column: of tables.
        target_column: of tables, the column with the index of the class to explain of each picture; of archives, the
            extension of the member with the same key that holds it, such as "cls". Default: none.
        n_axes: 2, the default, for a network of images, and 3 for one of volumes.
        n_frames: how many frames of a video; default 16.

    Returns:
        List of `Source`. A file that arguments name twice is there once; what a list or a table names, as often as it
        does. Where two have the same stem, the later ones are numbered: cat, cat-2.

    Raises:
        ValueError: a folder has nothing that the network takes, a pattern matches no file, a list is empty, or a table
            lacks a column or is none.
        OSError: a folder, a list, a table or an archive cannot be read.
        ImportError: a Parquet file needs pyarrow.

    >>> [source.stem for source in find_sources(["photos", "@more.txt"])]
    ['cat', 'dog', 'cat-2']
    """
    return Inputs(inputs, lists, path_column, target_column).sources(n_axes, n_frames)


class Inputs:
    """What arguments name, looked up before it is known which network is to take it.

    Args:
        As of `find_sources`.

    Raises:
        As `find_sources`; of a folder, where no network would take anything of it.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        lists: Sequence[str] = (),
        path_column: str = PATH_COLUMN,
        target_column: str | None = None,
    ) -> None:
        self._named: list[_Folder | list[Path | _Found]] = [
            _expanded(text, path_column, target_column) for text in inputs
        ]
        self._listed = [found for text in lists for found in _of_list(text)]

    def sources(self, n_axes: int = 2, n_frames: int = volumes.FRAMES) -> list[Source]:
        """What `find_sources` returns, and ValueError as there."""
        files: dict[str, Path | _Found] = {}
        for named in self._named:
            for found in named.listed(n_axes) if isinstance(named, _Folder) else named:
                # Files that are named by themselves count once, by whatever name.
                key = os.path.realpath(found) if isinstance(found, Path) else f"\0{len(files)}"
                files.setdefault(key, found)
        every = [_file(found) if isinstance(found, Path) else found for found in (*files.values(), *self._listed)]
        return _with_names(every, n_axes, n_frames)


class _Folder(NamedTuple):
    """A folder, and its files that some network takes."""

    name: str
    files: list[Path]

    def listed(self, n_axes):
        found = [file for file in self.files if volumes.extension(file) in LISTED[n_axes]]
        if not found:
            what = "image" if n_axes == 2 else "volume or video"
            raise ValueError(f"no {what} in folder {self.name} (looked for {' '.join(LISTED[n_axes])})")
        return found


def _with_names(every, n_axes, n_frames):
    sources: list[Source] = []
    taken: set[str] = set()
    latest: dict[str, int] = {}
    for found in every:
        same = _same_name(found.stem)
        stem, number = found.stem, latest.get(same, 1)
        while _same_name(stem) in taken:
            number += 1
            stem = f"{found.stem}-{number}"
        latest[same] = number
        taken.add(_same_name(stem))
        sources.append(Source(found.label, partial(found.load, n_axes, n_frames), stem, found.target))
    return sources


def _expanded(text, path_column, target_column):
    # Of os.path, because Path's methods raise for a name that is too long.
    if text == "-" or (text.startswith("@") and not os.path.exists(text)):
        return _of_list(text if text == "-" else text[1:])
    if os.path.isdir(text):
        extensions = dict.fromkeys(each for listed in LISTED.values() for each in listed)
        found = [file for file in sorted(Path(text).iterdir()) if volumes.extension(file) in extensions]
        found = [file for file in found if os.path.isfile(file)]
        if not found:
            raise ValueError(f"no image in folder {text} (looked for {' '.join(extensions)})")
        return _Folder(text, found)
    if glob.has_magic(text) and not os.path.exists(text):
        names = [name for name in sorted(glob.glob(text, recursive=True)) if os.path.isfile(name)]
        if not names:
            raise ValueError(f"no file matches {text}")
    else:
        names = [text]
    found = []
    for name in names:
        kind = os.path.splitext(name)[1].lower()
        if kind in TABLES:
            found += _of_table(name, TABLES[kind], path_column, target_column)
        elif kind == ".tar":
            found += _of_archive(name, target_column)
        else:
            found.append(Path(name))
    return found


def _file(path, target=None):
    return _Found(str(path), partial(volumes.read, path), volumes.stem(path), target)


def _of_list(name):
    """The files that a text file names, one on each line; or between null characters, as ``find -print0`` has them."""
    if name == "-":
        content, folder = sys.stdin.buffer.read(), Path()
    else:
        content, folder = Path(name).read_bytes(), Path(name).parent
    content = content.removeprefix(b"\xef\xbb\xbf")
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    found = [_file(folder / os.fsdecode(line)) for line in lines if line.strip()]
    if not found:
        raise ValueError(f"no path in {'standard input' if name == '-' else name}")
    return found


def _of_table(name, rows, path_column, target_column):
    folder = Path(name).parent
    found = []
    for path, target in rows(name, path_column, target_column):
        if path is None or not str(path).strip():
            raise ValueError(f"{name}: row {len(found) + 1} has no path in column {path_column!r}")
        found.append(_file(folder / str(path), None if target_column is None else _target(target)))
    if not found:
        raise ValueError(f"no row in {name}")
    return found


def _rows_of_csv(name, path_column, target_column):
    with open(name, encoding="utf-8-sig", newline="") as file:
        try:
            rows = csv.DictReader(file)
            _check_columns(name, rows.fieldnames or [], path_column, target_column)
            for row in rows:
                yield row[path_column], target_column and row[target_column]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: expected a CSV table in UTF-8: {error}") from error


def _rows_of_parquet(name, path_column, target_column):
    pq = parquet_package()
    from pyarrow import ArrowInvalid

    try:
        with pq.ParquetFile(name) as table:
            _check_columns(name, table.schema_arrow.names, path_column, target_column)
            columns = [path_column, *([target_column] if target_column else [])]
            for batch in table.iter_batches(columns=columns):
                parts = [batch.column(column).to_pylist() for column in columns]
                yield from zip(parts[0], parts[-1])
    except ArrowInvalid as error:
        raise ValueError(f"{name}: expected a Parquet table: {error}") from error


TABLES = {".csv": _rows_of_csv, ".parquet": _rows_of_parquet}


def _check_columns(name, columns, path_column, target_column):
    for column, option in ((path_column, "path"), (target_column, "target")):
        if column is not None and column not in columns:
            there = ", ".join(map(str, columns)) or "none"
            raise ValueError(
                f"{name} has no column {column!r} (it has {there}{did_you_mean(column, columns)}); name the {option}s'"
                f" column with --{option}-column"
            )


def _target(value):
    """The class index of a row, or what is there instead, which is refused when the picture's turn comes."""
    text = str("" if value is None else value).strip()
    return int(text) if text.isascii() and text.isdigit() else text


class _Member(NamedTuple):
    """Where the bytes of an archive's member lie."""

    archive: str
    name: str
    offset: int
    size: int

    def read(self):
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def load(self, n_axes, n_frames):
        path = f"{self.archive}/{self.name}"
        content = self.read()
        if len(content) < self.size:
            raise ValueError(f"{path}: the archive is cut short")
        return images.read_image(path, content)


def _of_archive(name, target_column):
    """The images of a tar archive, in its order. Members whose names are alike up to the first dot belong together."""
    members = {}
    try:
        with tarfile.open(name, "r:") as archive:
            for each in archive:
                if each.isfile():
                    folder, _, base = each.name.rpartition("/")
                    key, _, extension = base.partition(".")
                    members.setdefault((folder, key), {})[extension.lower()] = _Member(
                        name, each.name, each.offset_data, each.size
                    )
    except tarfile.TarError as error:
        raise ValueError(f"{name}: expected a tar archive that is not compressed: {error}") from error
    found = []
    for parts in members.values():
        target = None
        if target_column is not None:
            member = parts.get(target_column.lower().removeprefix("."))
            target = "" if member is None else _target(member.read().decode("utf-8", "replace"))
        pictures = {kind: each for kind, each in parts.items() if f".{kind.rpartition('.')[2]}" in images.EXTENSIONS}
        for kind, member in pictures.items():
            base = member.name.rpartition("/")[2]
            stem = base[: -len(kind) - 1] if len(pictures) == 1 else base.rpartition(".")[0]
            found.append(_Found(f"{name}/{member.name}", member.load, stem or "image", target))
    if not found:
        raise ValueError(f"no image in {name} (looked for {' '.join(images.EXTENSIONS)})")
    return found


def _same_name(stem):
    """Equal for names that a file system may take for one: they differ in case, or in how accents are composed."""
    return unicodedata.normalize("NFC", stem).casefold()


def shorten(sources: Sequence[Source], folder: Path) -> list[Source]:
    """The sources with names that fit in the folder: of one that is too long the beginning and a hash of it all."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        longest = os.pathconf(there, "PC_NAME_MAX") - LONGEST_SUFFIX
    except (AttributeError, OSError, ValueError):  # not on Windows
        longest = 255 - LONGEST_SUFFIX
    return [source._replace(stem=_shortened(source.stem, longest)) for source in sources]


def _shortened(stem, longest):
    name = os.fsencode(stem)
    if len(name) <= longest:
        return stem
    tail = f"-{hashlib.sha256(name).hexdigest()[:12]}"
    return name[: longest - len(tail)].decode("utf-8", "ignore") + tail


def ahead(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], n: int) -> Iterator[Result]:
    """``map(function, items)`` in a pool, in order and at most ``n`` ahead of what has been asked for."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def grouped(
    items: Iterable[Item], key: Callable[[Item], Any], size: int, most_waiting: int
) -> Iterator[tuple[Item, ...]]:
    """Groups of ``size`` items of one key, in the order in which they fill; what is left at the end is smaller.

    With more than ``most_waiting`` items waiting, the group that waits for the longest is given as it is. What is given
    after the first groups depends on the other items alone: without those groups' items, the rest is the same.
    """
    groups: dict[Any, list[Item]] = {}
    n_waiting = 0
    for item in items:
        group = groups.setdefault(key(item), [])
        group.append(item)
        n_waiting += 1
        full = key(item) if len(group) == size else next(iter(groups)) if n_waiting > most_waiting else None
        if full is not None:
            given = tuple(groups.pop(full))
            n_waiting -= len(given)
            yield given
    for group in groups.values():
        yield tuple(group)
