"""A page to look through the pictures of a run, ``OUT/gallery/gallery.html``, which needs neither network nor server.

The records lie beside it as scripts, because a page that is opened as a file may load scripts but not fetch data; and
so do the thumbnails, of each picture one and of each map one, so that the page can fade the map over the picture.

>>> write_gallery("out")  # anew, from the records of a run with --html
PosixPath('out/gallery/gallery.html')
"""

import html
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from cfcam_gpu import images
from cfcam_gpu.datasets import files
from cfcam_gpu.datasets.journal import Record

FOLDER, PAGE = "gallery", "gallery.html"
THUMBNAILS, RECORDS = "thumbnails", "records"
"""Folders beside the page."""

PICTURE_PIXELS = 320
"""Longer side of a picture's thumbnail."""

MAP_PIXELS = 128
"""Longer side of a map's: maps are smooth, and the browser enlarges them smoothly."""

LEVELS = 64
"""Heats that a map's thumbnail tells apart. All 256 would make the files twice as large."""

RECORDS_A_FILE = 2000
SAID = ("model", "method", "layer", "files")
"""What a page says of the run: ``files`` are the names of those that are not one picture's."""

FRAME = 0.1
"""Width of the frame that is the border, as a share of each side."""

GENERATOR = '<meta name="generator" content="cfcam_gpu">'
"""By which a folder is known to be a gallery, and may be replaced."""

CALL = "cfcamRecords("
"""Before the records in each script."""


def border_share(heatmap: np.ndarray) -> float | None:
    """The share of a map's sum that lies in the outer frame, a tenth of each side wide.

    The frame has 36 % of the area: so much is the share of a constant map. A high one hints at a network that looks at
    the surroundings, or at a map that is an artefact of padding.

    Args:
        heatmap: (H, W), 0 or more.

    Returns:
        In [0, 1]; None for a map that is zero everywhere or not finite.

    >>> border_share(np.ones((10, 10)))
    0.36
    """
    rows, columns = (max(1, round(FRAME * side)) for side in heatmap.shape)
    total = float(heatmap.sum(dtype=np.float64))
    if not 0 < total < np.inf:
        return None
    inner = float(heatmap[rows:-rows, columns:-columns].sum(dtype=np.float64))
    return min(1.0, max(0.0, 1 - inner / total))


def thumbnails(index: int, panel: Any, maps: Iterable[np.ndarray], colormap: str) -> dict[str, bytes]:
    """{file name: content} of a picture's thumbnails.

    The maps' are as opaque as they are hot, so that a map at the opacity a over the picture is
    `cfcam_gpu.images.overlay` with ``alpha=a``.

    Args:
        index: the picture's, of which the names are made: file names of the user's could clash.
        panel: PIL image: the photograph as the network saw it.
        maps: each (H, W) in [0, 1].
        colormap: name of a matplotlib colour map.
    """
    from PIL import Image

    maps = list(maps)
    picture_name, *map_names = _names(index, len(maps))
    small = panel.convert("RGB").resize(_fitted(panel.size, PICTURE_PIXELS), Image.Resampling.LANCZOS)
    contents = {picture_name: _encoded(small, "JPEG", quality=80)}
    heats = np.arange(LEVELS) / (LEVELS - 1)
    palette = np.rint(255 * images.get_colormap(colormap)(heats)[:, :3]).astype(np.uint8).tobytes()
    opacities = np.rint(255 * heats).astype(np.uint8).tobytes()
    for name, heat in zip(map_names, maps):
        # Of the panel's proportions, not of the map's, which is for inputs that were squeezed into a square.
        size = _fitted(panel.size, MAP_PIXELS)
        resized = Image.fromarray(np.asarray(heat, np.float32)).resize(size, Image.Resampling.BILINEAR)
        levels = np.rint(np.asarray(resized).clip(0, 1) * (LEVELS - 1)).astype(np.uint8)
        small = Image.fromarray(levels)
        small.putpalette(palette)
        contents[name] = _encoded(small, "PNG", transparency=opacities, compress_level=3)
    return contents


def _names(index, n_maps):
    return [f"{index:06}.jpg", *(f"{index:06}_{rank}.png" for rank in range(n_maps))]


def _fitted(size, longest):
    scale = longest / max(size)
    return tuple(max(1, round(scale * side)) for side in size)


def _encoded(picture, kind, **options):
    content = io.BytesIO()
    picture.save(content, format=kind, **options)
    return content.getvalue()


def check_place(out: Path) -> None:
    """ValueError where the gallery would replace something that is none."""
    place = out / FOLDER
    if not os.path.lexists(place):
        return
    if place.is_dir() and not place.is_symlink():
        if not any(place.iterdir()) or _is_gallery(place):
            return
    raise ValueError(f"the gallery would replace {place}, which is none: move it away, or take another folder")


def _is_gallery(folder):
    try:
        with open(folder / PAGE, encoding="utf-8") as file:
            return GENERATOR in file.read(1000)
    except (OSError, UnicodeDecodeError):
        return False


def build(made: Path, records: Iterable[Record], run: Mapping[str, Any], thumbnails_of: Any) -> None:
    """Make the folder ``made``, which is not there: the page, its records and its thumbnails.

    Args:
        made: it is to be renamed when it is complete.
        records: of all pictures, failed ones included, in the order in which they are shown.
        run: what the page says of the run: those of `SAID` that are known.
        thumbnails_of: a function of a record: the folder with its thumbnails, or None where it has none.
    """
    for folder in (made, made / RECORDS, made / THUMBNAILS):
        folder.mkdir()
    rows = (_row(record, made, thumbnails_of) for record in records)
    scripts: list[str] = []
    n_records = 0
    while chunk := list(islice(rows, RECORDS_A_FILE)):
        name = f"{RECORDS}/{len(scripts):05}.js"
        # Plain ASCII: the file's encoding does not matter, nor what in a name would end a line of a script.
        lines = ",\n".join(map(json.dumps, chunk))
        (made / name).write_text(f"{CALL}[\n{lines}\n]);\n", encoding="ascii")
        scripts.append(name)
        n_records += len(chunk)
    said = {name: run[name] for name in SAID if name in run}
    said |= {"records": n_records, "links": [[name, _href(name)] for name in run.get("files", ())]}
    values = {
        "generator": GENERATOR,
        "title": html.escape(" \u00b7 ".join(["CAM gallery", *filter(None, [run.get("model")])])),
        # In a script element nothing but "<" could end it.
        "run": json.dumps(said).replace("<", "\\u003c"),
        "scripts": "\n".join(f'<script src="{name}"></script>' for name in scripts),
    }
    template = Path(__file__).with_name(PAGE).read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
    (made / PAGE).write_bytes(page.encode("utf-8", "backslashreplace"))
    # The thumbnails are on the disk already.
    for path in (*(made / name for name in scripts), made / PAGE, made / RECORDS, made / THUMBNAILS, made):
        files.sync(path)


def _row(record, made, thumbnails_of):
    """What the page is told of a picture."""
    folder = thumbnails_of(record) if record.error is None else None
    if folder is not None:
        for name in _names(record.index, len(record.classes)):
            _link(folder / name, made / THUMBNAILS / name)
    return {**record.as_dict(), "links": [_href(name) for name in record.files], "thumbnails": folder is not None}


def _href(name):
    """From the page to a file of the run. Not left to the browser: a name may hold bytes that are no characters."""
    return "../" + quote(os.fsencode(name))


def _link(source, target):
    """One file under two names, where the file system can do so: what is left of a killed run stays where it is."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
        files.sync(target)


def write_gallery(out: str | os.PathLike, records: Iterable[Record] | str | os.PathLike | None = None) -> Path:
    """Write the gallery of an earlier run anew, or the first one of a run that had none.

    A picture without thumbnails, since the run was without ``--html``, is shown as the file that was written for it.

    Args:
        out: the run's folder.
        records: what the gallery is to show: records, or a file of those lines of JSON that the run printed with
            ``--json``. Default: the records of the gallery that is there.

    Returns:
        The page.

    Raises:
        ValueError: there is no gallery and no records are given; or what is there under its name is no gallery.
        OSError: it cannot be read or written.
    """
    out = Path(out)
    check_place(out)
    place = out / FOLDER
    earlier = {record.index: record for record in _records_of(place)} if _is_gallery(place) else None
    if records is None:
        if earlier is None:
            raise ValueError(f"{out} has no gallery: run with --html, or give the records of its run")
        chosen: Iterable[Record] = earlier.values()
    elif isinstance(records, (str, os.PathLike)):
        chosen = sorted(_records_in(Path(records)), key=lambda record: record.index)
    else:
        chosen = records
    known = earlier or {}

    def thumbnails_of(record):
        # Those of another run's picture may have the same names.
        same = record.index in known and known[record.index].as_dict() == record.as_dict()
        names = _names(record.index, len(record.classes))
        return place / THUMBNAILS if same and all((place / THUMBNAILS / name).exists() for name in names) else None

    made = out / f".{FOLDER}.part"
    shutil.rmtree(made, ignore_errors=True)
    try:
        build(made, chosen, {} if earlier is None else _run_of(place), thumbnails_of)
        files.replace(made, place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    files.sync(out)
    return place / PAGE


def _records_of(place: Path) -> Iterator[Record]:
    """The records of a gallery."""
    for path in sorted((place / RECORDS).glob("*.js")):
        text = path.read_text(encoding="ascii")
        yield from map(_record, json.loads(text[len(CALL) : text.rindex(")")]))


def _records_in(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            if "index" in values:  # not the summary
                yield _record(values)


def _record(values):
    names = {field.name for field in fields(Record)}
    return Record(**{
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in names
    })  # fmt: skip


def _run_of(place):
    """What a gallery's page says of the run."""
    page = (place / PAGE).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="run">(.*?)</script>', page, re.S)
    return json.loads(found[1]) if found else {}
