"""What is written of each picture and of a whole run, and in which formats."""

import csv
import io
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cfcam_gpu import images, volumes
from cfcam_gpu.checks import did_you_mean
from cfcam_gpu.datasets import files, gallery, scans
from cfcam_gpu.datasets.journal import Journal, Record
from cfcam_gpu.datasets.packages import parquet_package, zarr_package
from cfcam_gpu.methods import METHODS

PANEL_PIXELS = 448
"""Height of the photograph and of each overlay in a picture."""

FAINT_DIFFERENCE = 0.05
"""The colours of a difference reach as far as the largest one, but at least to this: equal maps would show their
rounding."""

ROWS_AT_ONCE = 64
"""Pictures in a row group of Parquet and in a shard of Zarr: what is in memory when they are written."""


class Format(NamedTuple):
    """A row of `FORMATS`."""

    write: str
    """What is written: the name in --write."""
    name: str
    """The format: the name in --WRITE-format."""
    files: str
    holds: str
    extra: str | None = None
    """What must be installed."""


FORMATS = (
    Format("overlay", "png", "NAME.png", "the photograph beside its overlays; lossless, compressed for speed", "demo"),
    Format("overlay", "webp", "NAME.webp", "the same with losses, in the smallest files", "demo"),
    Format("overlay", "jpeg", "NAME.jpg", "the same with losses, the fastest to write", "demo"),
    Format("maps", "npy", "NAME_maps.npy", "a picture's maps: float16 (K, H, W)"),
    Format("maps", "zarr", "maps.zarr", "all maps: the array `maps`, float16 (N, K, H, W), NaN where a picture failed",
           "datasets"),
    Format("maps", "parquet", "maps.parquet", "all maps: a row a picture, float16 as bytes, with `shape`", "datasets"),
    Format("scores", "csv", "scores.csv", "all classes and scores: a row a picture and class"),
    Format("scores", "parquet", "scores.parquet", "the same, typed", "datasets"),
)  # fmt: skip
"""All that a run can write. The first format of each kind is the default; overlays alone are written by default."""

KINDS = tuple(dict.fromkeys(each.write for each in FORMATS))
"""What --write takes."""

LOSSY = {"webp": ("WEBP", {"quality": 85, "method": 0}), "jpeg": ("JPEG", {"quality": 90})}
"""Options of Pillow's encoders."""


def formats_of(kind: str) -> dict[str, Format]:
    """{name: format} of what is called so in --write, the default first."""
    return {each.name: each for each in FORMATS if each.write == kind}


def table() -> str:
    """`FORMATS` as a table in Markdown."""
    lines = ["| `--write` | format | file | what is in it | needs |", "| --- | --- | --- | --- | --- |"]
    for each in FORMATS:
        default = " (default)" if each is next(iter(formats_of(each.write).values())) else ""
        option = f"`--{each.write}-format {each.name}`{default}"
        extra = f"extra `{each.extra}`" if each.extra else ""
        lines.append(f"| `{each.write}` | {option} | `{each.files}` | {each.holds} | {extra} |".replace("  |", " |"))
    return "\n".join(lines)


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """What is to be written, each once and in the order of `KINDS`; ValueError for what is not."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--write takes {', '.join(KINDS)}, got {kind!r}{did_you_mean(kind, KINDS)}")
    if not kinds:
        raise ValueError(f"--write takes one or more of {', '.join(KINDS)}, got none")
    return tuple(kind for kind in KINDS if kind in kinds)


def check_packages(options: Any) -> None:
    """ImportError where a format that is asked for needs a package that is not here."""
    for kind, name in (("maps", options.maps_format), ("scores", options.scores_format)):
        if kind in options.write and name in PACKAGES:
            PACKAGES[name]()


PACKAGES = {"parquet": parquet_package, "zarr": zarr_package}


class Explained(NamedTuple):
    """One picture's results, on the host."""

    classes: list[int]
    labels: list[str]
    keys: list[str]
    """The classes in files' names."""
    scores: list[float]
    maps: np.ndarray
    """float32 (K, H, W), of a scan or a video (K, D, H, W)."""


class Written(NamedTuple):
    """What was written for one picture."""

    files: list[str]
    """Their names."""
    to_keep: np.ndarray | None
    """Its maps as they go into the one file of all; None without such a file."""


class Artist:
    """Draws the pictures.

    Args:
        options: a `running.Options`.
        versus: whether the first two classes are compared.
    """

    def __init__(self, options: Any, versus: bool = False) -> None:
        self.options, self.versus = options, versus

    @property
    def draws(self) -> bool:
        """Whether the photographs are needed."""
        return "overlay" in self.options.write or self.options.html

    def panel(self, seen: Any) -> Any:
        """The photograph as the picture shows it."""
        return scans.at_height(seen, PANEL_PIXELS)

    def difference(self, maps: np.ndarray) -> np.ndarray | None:
        """The first map minus the second, where they are compared."""
        return maps[0] - maps[1] if self.versus and len(maps) > 1 else None

    def picture(self, name: str, panel: Any, maps: np.ndarray, captions: Sequence[str], said: str) -> tuple[str, bytes]:
        """What is drawn beside its maps, as a file: its name and content.

        Args:
            maps: (K, h, w), of a scan or a video (K, d, h, w).
            name, panel, captions, said: as of `Writer.write`.
        """
        options, difference = self.options, self.difference(maps)
        method = "" if options.method == "cfcam" else f", {METHODS[options.method].name}"
        captions = [name + method, *captions]
        if difference is not None:
            captions.append(f"{said} \u00b1{np.abs(difference).max():.2f}")
            difference = drawn_difference(difference)
        if isinstance(panel, scans.Seen) and panel.volume.is_video:
            return f"{name}.webp", panel.animation(maps, difference, captions, options.colormap)
        if isinstance(panel, scans.Seen):
            picture = panel.slices(maps, difference, captions, options.colormap)
        else:
            picture = images.side_by_side(scans.panels(panel, maps, difference, options.colormap), captions)
        return picture_name(options, name), encoded(picture, options.overlay_format)


def drawn_difference(difference: np.ndarray) -> np.ndarray:
    """A difference of two maps as it is drawn: its largest value 1, or less where it is faint.

    Maps of classes that are confused differ little: as it is, their difference would hardly show.
    """
    return difference / max(np.abs(difference).max(), FAINT_DIFFERENCE)


class Writer(Artist):
    """Writes what a run is asked for. `write` may be called in several threads at once; the rest by one at a time.

    Args:
        options: a `running.Options`.
        journal: the run's.
        inputs: real paths of the inputs, as far as they may lie in the run's folder.
    """

    def __init__(self, options: Any, journal: Journal, inputs: Collection[str] = ()) -> None:
        super().__init__(options)
        self.journal, self.out, self.inputs = journal, options.out, inputs
        if options.html:
            journal.thumbnails.mkdir(exist_ok=True)
        self._in_one_file = "maps" in options.write and options.maps_format != "npy"
        self._shape: tuple[int, ...] | None = None
        first = next((record for record in journal.records() if record.at), None)
        if first is not None:
            self._shape = tuple(first.at[1])

    def write(self, name: str, panel: Any, found: Explained, captions: Sequence[str], said: str) -> Written:
        """Write the files of one picture, scan or video.

        Args:
            name: the stem of their names.
            panel: the photograph, as `panel` returns it, or None where nothing is drawn; or a `scans.Seen`.
            found: what is to be written.
            captions: of the maps.
            said: caption of the panel that compares the first two, where there is one.
        """
        options, written = self.options, []
        scan = panel if isinstance(panel, scans.Seen) else None
        maps = found.maps if scan is None else scan.in_depth(found.maps)
        difference = self.difference(maps)
        if "overlay" in options.write:
            written.append(self._write(*self.picture(name, panel, maps, captions, said)))
        nifti = None if scan is None or options.write == ("scores",) else scan.volume.nifti
        if scan is not None and (nifti is not None or options.raw or "maps" in options.write):
            maps = np.stack([scan.placed(heat) for heat in maps])
            difference = None if difference is None else scan.placed(difference)
        named = dict(zip(found.keys, maps))
        if difference is not None:
            named[f"{found.keys[0]}-{found.keys[1]}"] = difference
        if nifti is not None:
            for key, values in named.items():
                written.append(self._write(f"{name}_{key}.nii.gz", volumes.encoded_nifti(values, nifti)))
        if "maps" in options.write and options.maps_format == "npy":
            written.append(self._write(f"{name}_maps.npy", _npy(maps.astype(np.float16))))
        if options.raw:
            for key, values in named.items():
                written.append(self._write(f"{name}_{key}.npy", _npy(values)))
        return Written(written, maps.astype("<f2") if self._in_one_file else None)

    def write_thumbnails(self, index: int, panel: Any, maps: np.ndarray) -> None:
        """Keep the thumbnails of a picture for the gallery, where there is to be one."""
        if self.options.html:
            for name, content in gallery.thumbnails(index, panel, maps, self.options.colormap).items():
                files.write_file(self.journal.thumbnails / name, content, self.journal.parts)

    def _write(self, name, content):
        path = self.out / name
        if self.inputs and os.path.realpath(path) in self.inputs:
            raise ValueError(f"{path} would overwrite an input: choose another --out")
        files.write_file(path, content, self.journal.parts)
        return name

    def keep(self, maps: np.ndarray) -> Any:
        """Keep a `Written.to_keep` for the one file; returns what the record is to hold.

        Raises:
            ValueError: the maps have another shape than those before, and the file is a Zarr array.
        """
        if self._shape is None:
            self._shape = maps.shape
        if self.options.maps_format == "zarr" and maps.shape != self._shape:
            raise ValueError(
                f"an array of Zarr holds maps of one shape, {self._shape} of the first picture, got {maps.shape}: take"
                " --maps-format parquet or npy"
            )
        return self.journal.spooled(maps.tobytes()), list(maps.shape)

    def finish(self, n_sources: int, lost: Sequence[Record]) -> list[str]:
        """Write the files of the whole run, those of an earlier part of it included; returns their names.

        Args:
            n_sources: how many pictures there are.
            lost: the records of those that could not be read, which are not in the journal.
        """
        options, jobs = self.options, []
        if "scores" in options.write:
            write = {"csv": _scores_as_csv, "parquet": _scores_as_parquet}[options.scores_format]
            jobs.append(("scores", options.scores_format, write, _merged(self.journal.records(), lost)))
        if self._in_one_file:
            write = {"zarr": self._maps_as_zarr, "parquet": self._maps_as_parquet}[options.maps_format]
            jobs.append(("maps", options.maps_format, write, n_sources))
        names = [formats_of(kind)[name].files for kind, name, *_ in jobs]
        for name, (*_, write, what) in zip(names, jobs):
            part = self.journal.parts / name
            write(part, what)
            for each in (part, *part.rglob("*")):
                files.sync(each)
            files.replace(part, self.out / name)
        if options.html:
            names.append(self._gallery(names, lost))
        if names:
            files.sync(self.out)
        return names

    def _gallery(self, names, lost):
        options, found = self.options, self.journal.found or {}
        method = "CF-CAM" if options.method == "cfcam" else METHODS[options.method].name
        run = {"model": options.model, "method": method, "files": names}
        run["layer"] = ", ".join(found.get("layer") or ())
        part = self.journal.parts / gallery.FOLDER
        gallery.build(part, _merged(self.journal.records(), lost), run, lambda record: self.journal.thumbnails)
        files.replace(part, self.out / gallery.FOLDER)
        return f"{gallery.FOLDER}/{gallery.PAGE}"

    def _maps(self) -> Iterator[list[tuple[Record, np.ndarray]]]:
        """All maps in the order of the inputs, as many at once as are held in memory."""
        chunk: list[tuple[Record, np.ndarray]] = []
        with open(self.journal.spool, "rb") as file:
            for record in self.journal.records():
                if record.at is None:
                    continue
                offset, shape = record.at
                file.seek(offset)
                maps = np.frombuffer(file.read(2 * int(np.prod(shape))), "<f2").reshape(shape)
                if chunk and record.index // ROWS_AT_ONCE != chunk[0][0].index // ROWS_AT_ONCE:
                    yield chunk
                    chunk = []
                chunk.append((record, maps))
        if chunk:
            yield chunk

    def _maps_as_zarr(self, path, n_sources):
        zarr = zarr_package()
        shape = self._shape or (0, 0, 0)
        group = zarr.open_group(path, mode="w")
        chunk = tuple(max(1, side) for side in shape)
        array = group.create_array(
            "maps",
            shape=(n_sources, *shape),
            chunks=(1, *chunk),
            shards=(ROWS_AT_ONCE, *chunk),
            dtype="float16",
            fill_value=np.float16("nan"),
            dimension_names=("picture", "class", *"zyx"[-len(shape) + 1 :]),
        )
        for rows in self._maps():
            first = rows[0][0].index // ROWS_AT_ONCE * ROWS_AT_ONCE
            block = np.full((min(ROWS_AT_ONCE, n_sources - first), *shape), np.nan, np.float16)
            for record, maps in rows:
                block[record.index - first] = maps
            array[first : first + len(block)] = block

    def _maps_as_parquet(self, path, n_sources):
        pq = parquet_package()
        import pyarrow as pa

        schema = pa.schema(
            {
                "index": pa.int64(),
                "path": pa.string(),
                "classes": pa.list_(pa.int64()),
                "scores": pa.list_(pa.float32()),
                "shape": pa.list_(pa.int32()),
                "maps": pa.binary(),
            },
            metadata={"maps": "little-endian float16 in C order, of the given shape (class, y, x) or (class, z, y, x)"},
        )
        with pq.ParquetWriter(path, schema, compression="zstd") as file:
            for rows in self._maps():
                columns = zip(*((r.index, as_text(r.path), r.classes, r.scores, m.shape, m.tobytes()) for r, m in rows))
                arrays = [pa.array(column, field.type) for column, field in zip(map(list, columns), schema)]
                file.write_batch(pa.record_batch(arrays, schema=schema))


def picture_name(options: Any, name: str) -> str:
    """Name of a picture's file."""
    return formats_of("overlay")[options.overlay_format].files.replace("NAME", name)


def encoded(picture: Any, name: str) -> bytes:
    """A picture in mode "RGB" as the bytes of a file, in the format of `FORMATS` that is called so."""
    if name == "png":
        return _png(np.asarray(picture))
    # Not into the file: for a full disk, Pillow's encoders raise an error that does not say so.
    content = io.BytesIO()
    kind, options = LOSSY[name]
    picture.save(content, format=kind, **options)
    return content.getvalue()


def _png(pixels):
    """(H, W, 3) uint8 as a PNG file: every row as its difference from the one above. Pillow's fastest, which looks for
    the best difference of each row, takes twice as long as zlib here and saves a twentieth."""
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = 2  # the filter "up"
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    compressed = _deflated(filtered)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in ((b"IHDR", header), (b"IDAT", compressed), (b"IEND", b"")):
        parts += (
            struct.pack(">I", len(content)),
            kind,
            content,
            struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))),
        )
    return b"".join(parts)


def _deflated(values):
    """As zlib has it, in the least time for photographs: by ISA-L, a fifth of zlib's, or by zlib with runs alone."""
    try:
        from isal import isal_zlib
    except ImportError:
        compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        return compressor.compress(values) + compressor.flush()
    return isal_zlib.compress(values, 1)


def _npy(values):
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def _merged(records, lost):
    """Both kinds of records in the order of the inputs; both are in order."""
    lost = iter(sorted(lost, key=lambda record: record.index))
    waiting = next(lost, None)
    for record in records:
        while waiting is not None and waiting.index < record.index:
            yield waiting
            waiting = next(lost, None)
        yield record
    if waiting is not None:
        yield waiting
        yield from lost


COLUMNS = ("index", "path", "rank", "class", "label", "score", "error")
"""Of the table of scores. A picture that failed has one row, with the error alone."""


def _rows(records):
    for record in records:
        if record.error is not None:
            yield record.index, as_text(record.path), None, None, None, None, record.error
        for rank, found in enumerate(zip(record.classes, record.labels, record.scores), 1):
            yield record.index, as_text(record.path), rank, *found, None


def as_text(path: str) -> str:
    """A path as text; bytes that are no characters are escaped."""
    return path.encode("utf-8", "backslashreplace").decode()


def _scores_as_csv(path, records):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_rows(records))


def _scores_as_parquet(path, records):
    pq = parquet_package()
    import pyarrow as pa

    types = (pa.int64(), pa.string(), pa.int32(), pa.int64(), pa.string(), pa.float32(), pa.string())
    schema = pa.schema(list(zip(COLUMNS, types)))
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        rows = []

        def flush():
            arrays = [pa.array(list(column), kind) for column, kind in zip(zip(*rows), types)]
            file.write_batch(pa.record_batch(arrays, schema=schema))
            rows.clear()

        for row in _rows(records):
            rows.append(row)
            if len(rows) >= 10_000:
                flush()
        if rows:
            flush()
