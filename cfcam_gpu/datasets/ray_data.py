"""Data sets on a cluster, by Ray Data: tasks read and decode, a pool of actors explains, tasks draw and write.

>>> write(["photos/"], "out", "torchvision:resnet50", write=["maps"]).explained
200

`explain` is the pipeline alone, a lazy ``ray.data.Dataset`` with a row for each picture:

========  ==============  =====================================================================
column    type
========  ==============  =====================================================================
path      string          as the input names it
classes   list of int64   those that were explained, best first unless they were asked for
labels    list of string  their names
scores    list of float   their probabilities
shape     list of int32   of the maps, (K, H, W); with ``write=["maps"]``, as the next
maps      binary          little-endian float16 in C order
overlay   binary          the picture's file; with ``write=["overlay"]``
error     string          why there is nothing else in the row; null where there is
========  ==============  =====================================================================

Reading, preprocessing, explaining and drawing are those of a run on one machine (`running`). A picture's map does not
depend on the pictures beside it: every forward pass has ``batch_size`` rows, the last picture repeated where there are
fewer. So a run whose workers die, and which Ray gives other batches, ends as if they had not.
"""

import copy
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import socket
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import nn

from cfcam_gpu import images, models, volumes
from cfcam_gpu.checks import did_you_mean
from cfcam_gpu.datasets import files, reading, running, writing
from cfcam_gpu.datasets.journal import Record, compare
from cfcam_gpu.datasets.packages import arrow_package, ray_package

FOLDER = ".cfcam-ray"
"""In a run's own folder: the lock, the parameters, and files that are being written. Readers of Parquet skip it."""

ROWS_A_FILE = 1024
"""Pictures in a file of Parquet: of two maps of 224 x 224 pixels 200 MB before the compression."""

BATCHES_A_BLOCK = 4
"""What a task reads: enough that starting it does not count, and little enough that all actors have work soon."""

READS_AT_ONCE = 4
"""Threads in a task that reads: a disk or a network answers several while one is decoded."""

ANSWER_S = 5.0
"""Seconds in which a cluster must answer at its address."""

DIGEST = 16
"""Bytes of a path's hash: among a billion, two are alike with a probability of 1e-21."""

CLUSTER = ("address", "actors", "num_gpus", "num_cpus")
"""What `explain` takes beside the options of a run."""

UNUSED = ("inputs", "raw", "html", "frames", "maps_format", "scores_format")
"""Parameters of a run on one machine that are none here; more pictures may come in a later run."""


def connect(address: str | None = None) -> None:
    """Connect to a cluster, unless this process is connected.

    Args:
        address: "host:port" or "auto", as `ray.init` takes it; "local" starts one on this machine, without a
            dashboard. None: what RAY_ADDRESS names, else "local".

    Raises:
        ConnectionError: nothing answers there.
        ImportError: Ray is not installed.
    """
    ray = ray_package()
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        options["include_dashboard"] = False
    elif address != "auto":
        # Ray itself would try for minutes.
        where = urlsplit(address if "://" in address else f"//{address}")
        try:
            if where.hostname is None or where.port is None:
                raise ValueError("expected host:port")
            socket.create_connection((where.hostname, where.port), ANSWER_S).close()
        except (OSError, ValueError) as error:
            raise ConnectionError(f"no Ray cluster at {address}: {error}") from error
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise ConnectionError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from error


def show_progress(shown: bool) -> None:
    """Whether Ray Data shows its bars, and says what it does."""
    ray = ray_package()
    ray.data.DataContext.get_current().enable_progress_bars = shown
    logging.getLogger("ray.data").setLevel(logging.INFO if shown else logging.ERROR)


def explain(pictures: Any, model: Any = "demo", **how: Any) -> Any:
    """Explain pictures on a cluster, lazily.

    Args:
        pictures: one of

            - paths: what `find_sources` takes, or a list of `Source`. The list of pictures is made here;
            - URIs such as "s3://bucket/photos", folders or files, read by `ray.data.read_binary_files`. None of them
              may be a plain path;
            - a ``ray.data.Dataset`` with the column "path", and, where the files are not to be opened by that, their
              content in "bytes"; and the class to explain of each picture in "target", if it has that column. This is
              the way for more pictures than a list should hold: ``ray.data.read_parquet("paths/")``.

            Paths must be distinct. Files must be where the workers run, by the same path.
        model: the ``spec`` of `load_model`; or a module, or ``(module, preprocess[, class_names])``, of which a copy
            goes to each node once; or a function that gives such, called in every actor. Default "demo".
        how: the fields of `Options` but ``out``, ``device``, ``raw`` and the formats other than ``overlay_format``, by
            their names, ``write=["maps"]`` by default; and

            - actors: how many explain, each with its own model; an integer, or (least, most) for a pool that grows.
              Default: one a GPU, or without a GPU one a core;
            - num_gpus: of each actor; may be a fraction. Default: 1 if the cluster has any, else 0;
            - num_cpus: of each actor. Default: Ray's own beside a GPU, else 1, or less to leave a core for the tasks;
            - address: of the cluster, as for `connect`.

    Returns:
        ``ray.data.Dataset`` of the columns above. A picture that cannot be read or explained is a row with its error.

    Raises:
        ValueError, TypeError: the arguments cannot be carried out; the model cannot explain a picture of noise.
        OSError: a folder or a list cannot be read.
        ConnectionError: see `connect`.
        ImportError: Ray is not installed.

    >>> rows = explain(ray.data.read_binary_files("s3://bucket/photos", include_paths=True), build_model)
    >>> rows.write_parquet("s3://bucket/maps", compression="zstd")
    """
    job = _Job(model, Path(), how)
    return job.explained(job.given(pictures))


def write(
    pictures: Any,
    out: str | os.PathLike,
    model: Any = "demo",
    *,
    overwrite: bool = False,
    rows_per_file: int = ROWS_A_FILE,
    **how: Any,
) -> running.Summary:
    """`explain` into Parquet files, compressed with zstd, in a folder; what is there already is skipped.

    Files are written in the folder ``.cfcam-ray`` of ``out`` and moved when they are whole. A run that died, and one
    that ended, are gone on with by the same call, also with more pictures: those with a row in the folder, which may
    hold an error, are done.

    Args:
        pictures, model, how: as for `explain`.
        out: a folder that all nodes see by this path.
        overwrite: remove what an earlier run has written there, first.
        rows_per_file: pictures in a file, and what is done again after a kill, at most for each writing task; default
            1024.

    Returns:
        `Summary`, of all that is in the folder; ``images`` are those with a row there, ``lost`` those whose row holds
        an error.

    Raises:
        As `explain`; and
        ValueError: an earlier run there had other parameters; another run is writing there.
        RuntimeError: the rows are not those of the pictures, each once.
    """
    begun = time.perf_counter()
    path = Path(os.path.abspath(out))
    job = _Job(model, path, how)
    given = job.given(pictures)
    folder = _Folder(path, job.parameters(), overwrite)
    try:
        done = _Done(folder.finished())
        given, n_todo = done.left(given, job)
        n_before = len(done)
        n_resumed = n_before - len(folder.errors())
        if n_todo != 0:
            job.run(given, folder.begin(), rows_per_file)
            folder.collect()
            done = _Done(folder.finished())
            if not done.distinct or (n_todo is not None and len(done) != n_before + n_todo):
                expected = "each path once" if n_todo is None else f"{n_before} + {n_todo} paths"
                raise RuntimeError(
                    f"{path}: expected {expected}, found {len(done)}{'' if done.distinct else ', some twice'}: were"
                    " the inputs' paths distinct?"
                )
        lost = folder.errors()
        names = [file.name for file in folder.finished()]
        seconds = time.perf_counter() - begun
        return running.Summary(len(done), len(done) - len(lost), n_resumed, lost, names, seconds)
    finally:
        folder.close()


class _Job:
    """The pipeline for a model and its options."""

    def __init__(self, model: Any, out: Path, how: Mapping[str, Any]) -> None:
        self.ray = ray_package()
        arrow_package()
        how = {"write": ["maps"], **how}
        address, self.actors, num_gpus, num_cpus = (how.pop(name, None) for name in CLUSTER)
        names = [field.name for field in fields(running.Options) if field.name not in ("out", "model", "overwrite")]
        for name in how:
            if name not in names:
                raise TypeError(f"no option {name!r}{did_you_mean(name, [*names, *CLUSTER])}")
        said = model if isinstance(model, str) else getattr(model, "__qualname__", type(model).__name__)
        options = running.check(running.Options(out=out, model=said, **how))
        if options.raw:
            raise running.Refused("--raw does not go with Ray: its maps are float16 in Parquet")
        if options.html:
            raise running.Refused("--html does not go with Ray, which writes Parquet")
        if options.device is not None:
            raise running.Refused("--device does not go with Ray, which gives each actor its GPU: take --actor-gpus")
        if isinstance(model, (nn.Module, tuple)):
            loaded = models.loaded_from(model, "model must be a spec, a function, or")
            # A copy, because the caller's own is neither to change its mode nor its device.
            model = replace(loaded, model=copy.deepcopy(loaded.model).cpu().eval())
        elif not (isinstance(model, str) or callable(model)):
            raise TypeError(f"model must be a spec, a module or a function that builds one, got {type(model).__name__}")
        # In this process the model only shows what it is. A GPU, and a backend for it, are the actors'.
        cpu = torch.device("cpu")
        here = replace(options, device=cpu, backend="auto")
        loaded = running.load(here, partial(_load, model, cpu, options.text))
        if loaded.n_axes == 3:
            raise running.Refused(f"Ray explains images alone, {said} takes scans and videos: leave out --engine ray")
        self.options = running.with_defaults(options, loaded)
        self.weights = running.fingerprint(loaded.model)
        self.found, self.versus = _looked_at(here, loaded)
        self.loaded = replace(loaded, model=nn.Module())
        connect(address)  # after the model is there: workers look for modules where this process has
        # A module by reference, so that a node receives it once.
        self.model = self.ray.put(model) if isinstance(model, models.LoadedModel) else model
        self._place(num_gpus, num_cpus)

    def _place(self, num_gpus, num_cpus):
        there = self.ray.cluster_resources()
        n_gpus, n_cpus = there.get("GPU", 0), there.get("CPU", 1)
        self.num_gpus = (1 if n_gpus else 0) if num_gpus is None else num_gpus
        if self.actors is None:
            self.actors = max(1, int(n_gpus / self.num_gpus if self.num_gpus else n_cpus))
        most = self.actors if isinstance(self.actors, int) else self.actors[1]
        if not self.num_gpus and num_cpus is None:
            num_cpus = min(1, (n_cpus - 1) / most)  # a task needs a whole core, or nothing would ever be read
        self.num_cpus = num_cpus

    def parameters(self):
        values = running.parameters(self.options, self.loaded, [])
        values.update(weights=self.weights, **self.found)
        return {name: value for name, value in values.items() if name not in UNUSED}

    def given(self, pictures):
        """The pictures as a list of sources, or as a data set that has the column "path"."""
        data = self.ray.data
        if isinstance(pictures, data.Dataset):
            columns = pictures.columns() or []
            if "path" not in columns:
                there = f"it has {', '.join(columns)}" if columns else "it has none, or is empty"
                raise ValueError(f"the data set has no column 'path' ({there}{did_you_mean('path', columns)})")
            return pictures
        if isinstance(pictures, reading.Inputs):
            pictures = pictures.sources()
        items = [pictures] if isinstance(pictures, (str, os.PathLike)) else list(pictures)
        remote = ["://" in str(item) for item in items if not isinstance(item, reading.Source)]
        if any(remote):
            if not all(remote) or len(remote) < len(items):
                raise ValueError("expected URIs alone or paths alone, got both")
            extensions = [extension[1:] for extension in images.EXTENSIONS]
            return data.read_binary_files(list(map(str, items)), include_paths=True, file_extensions=extensions)
        named = [os.fspath(item) for item in items if not isinstance(item, reading.Source)]
        sources = [item for item in items if isinstance(item, reading.Source)]
        sources += reading.find_sources(named) if named else []
        running.check_targets(self.options, sources)
        # The workers' current folder is another one.
        return list({source.label: _absolute(source) for source in sources}.values())

    def explained(self, given):
        """The data set that `explain` returns."""
        pa, options, size = arrow_package(), self.options, self.options.batch_size
        if isinstance(given, list):
            block = size * max(1, min(BATCHES_A_BLOCK, len(given) // (8 * size)))
            rows = [{"path": writing.as_text(source.label), "source": pickle.dumps(source)} for source in given]
            schema = pa.schema({"path": pa.string(), "source": pa.binary()})
            starts = range(0, max(1, len(rows)), block)
            given = self.ray.data.from_arrow([pa.Table.from_pylist(rows[at : at + block], schema) for at in starts])
        common = {"batch_format": "pyarrow", "batch_size": size}
        rows = given.map_batches(_decoded, fn_kwargs={"loaded": self.loaded, "options": options}, **common)
        resources = {"num_gpus": self.num_gpus} | ({} if self.num_cpus is None else {"num_cpus": self.num_cpus})
        pool = (
            {"size": self.actors} if isinstance(self.actors, int) else dict(zip(("min_size", "max_size"), self.actors))
        )
        rows = rows.map_batches(
            _Explainer,
            fn_constructor_kwargs={
                "model": self.model,
                "class_names": self.loaded.class_names,
                "options": replace(options, labels=None),  # a file of this machine
                "found": self.found,
            },
            compute=self.ray.data.ActorPoolStrategy(**pool),
            **resources,
            **common,
        )
        if "overlay" in options.write:
            rows = rows.map_batches(_drawn, fn_kwargs={"options": options, "versus": self.versus}, **common)
        return rows

    def run(self, given, part, rows_per_file):
        """Write what `explained` gives into a folder; RuntimeError, in a line, where Ray gives up."""
        try:
            self.explained(given).write_parquet(
                str(part),
                compression="zstd",
                min_rows_per_file=rows_per_file,
                try_create_dir=False,  # or what is left of a dead run would make its folder anew
            )
        except self.ray.exceptions.RayError as error:
            # A worker's exception comes as text, with its own as the first that is no part of a stack.
            first = re.search(r"^[\w.]+: .+$", str(error), re.M)
            raise RuntimeError(f"{self.options.out}: {first[0] if first else running.reason_of(error)}") from error


def _looked_at(options, loaded):
    """The layers that are explained, and whether two classes are compared: what a picture of noise shows.

    Not the first picture: it would have to be read, and the next run may have another.
    """
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))
    source = reading.Source("a picture of noise", lambda: noise, "noise")
    picture = running.read(0, source, loaded, writing.Artist(replace(options, write=["maps"])))
    if isinstance(picture, running.Failure):
        raise running.Refused(picture.reason)

    def fail(picture, error):
        raise running.Refused(running.reason_of(error)) from error

    explaining = running.Explaining(options, loaded)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*zero everywhere")
        list(explaining.explained(running.Batch([picture], picture.pixels[None]), fail))
    return explaining.found_layers(), explaining.versus


def _load(model: Any, device: torch.device, text: Sequence[str] = ()) -> models.LoadedModel:
    """The model that was sent, on the device."""
    if isinstance(model, str):
        return models.load_model(model, device, text)
    if isinstance(model, ray_package().ObjectRef):
        model = ray_package().get(model)
    if isinstance(model, models.LoadedModel):
        # Weights from the object store are read-only memory of all processes.
        return replace(model, model=copy.deepcopy(model.model).to(device))
    loaded = models.loaded_from(model(), "the function that builds the model must return")
    loaded.model.eval().to(device)
    return loaded


def _absolute(source):
    load = source.load
    if not isinstance(load, partial):
        return source
    if load.func is volumes.read:
        path, *how = load.args
        return source._replace(load=partial(volumes.read, Path(os.path.abspath(path)), *how))
    if hasattr(load.func, "__self__") and hasattr(load.func.__self__, "archive"):
        member = load.func.__self__
        member = member._replace(archive=os.path.abspath(member.archive))
        return source._replace(load=partial(member.load, *load.args))
    return source


# What the workers do


def _source(row: Mapping[str, Any]) -> reading.Source:
    if row.get("source") is not None:
        return pickle.loads(row["source"])
    path, target = row["path"], row.get("target")
    stem = Path(path or "").stem
    if path is None:
        return reading.Source("", _no_path, stem)
    if row.get("bytes") is not None:
        return reading.Source(path, partial(images.read_image, path, row["bytes"]), stem, target)
    return reading.Source(path, partial(_opened, path), stem, target)


def _no_path():
    raise ValueError("the row has no path")


def _opened(path: str) -> Any:
    if "://" not in path:
        return volumes.read(path)
    from pyarrow.fs import FileSystem

    system, inner = FileSystem.from_uri(path)
    with system.open_input_file(inner) as file:
        return images.read_image(path, file.read())


def _decoded(table: Any, loaded: models.LoadedModel, options: running.Options) -> Any:
    """The pictures of a batch, read and made the network's input; or why they could not be."""
    pa, artist = arrow_package(), writing.Artist(options)
    with images.any_size(), ThreadPoolExecutor(READS_AT_ONCE) as pool:
        sources = [_source(row) for row in table.to_pylist()]
        read = list(pool.map(lambda index: running.read(index, sources[index], loaded, artist), range(len(sources))))
    rows = []
    for each in read:
        row: dict[str, Any] = {"path": writing.as_text(each.source.label)}
        if isinstance(each, running.Failure):
            row["error"] = writing.as_text(each.reason)
        else:
            pixels = each.pixels.contiguous()
            row["target"], row["shape"] = each.source.target, list(pixels.shape)
            row["dtype"] = str(pixels.dtype).removeprefix("torch.")
            row["pixels"] = pixels.view(-1).view(torch.uint8).numpy().tobytes()
            if each.panel is not None:
                row["panel"], row["panel_size"] = each.panel.convert("RGB").tobytes(), each.panel.size
        rows.append(row)
    schema = {
        "path": pa.string(),
        "target": pa.int64(),
        "shape": pa.list_(pa.int32()),
        "dtype": pa.string(),
        "pixels": pa.binary(),
        **_panel(pa, artist.draws),
        "error": pa.string(),
    }
    return pa.Table.from_pylist(rows, pa.schema(schema))


def _panel(pa, draws):
    return {"panel": pa.binary(), "panel_size": pa.list_(pa.int32())} if draws else {}


class _Explainer:
    """An actor: a model, and what explains batches by it."""

    def __init__(self, model: Any, class_names: Any, options: running.Options, found: Mapping[str, Any]) -> None:
        self.options, self.found = options, found
        loaded = replace(
            running.load(options, partial(_load, model, options.where, options.text)), class_names=class_names
        )
        self.size = options.batch_size or running.DEFAULT_BATCH[2]
        self.explaining = running.Explaining(options, loaded, found, fill=self.size)

    def __call__(self, table: Any) -> Any:
        pa, options, explaining = arrow_package(), self.options, self.explaining
        rows = table.to_pylist()
        draws = "overlay" in options.write
        done = [{"path": row["path"], "error": row["error"]} for row in rows]
        pictures = []
        for index, row in enumerate(rows):
            if row["error"] is None:
                pixels = torch.frombuffer(bytearray(row["pixels"]), dtype=getattr(torch, row["dtype"]))
                source = reading.Source(row["path"], _no_path, "", row["target"])
                pictures.append(running.Picture(index, source, None, pixels.view(row["shape"])))

        def fail(picture, error):
            label = picture.source.label
            done[picture.index]["error"] = writing.as_text(f"{label}: {running.reason_of(error)}")

        key = lambda picture: (picture.pixels.shape, picture.pixels.dtype, picture.source.target is None)
        for group in reading.grouped(pictures, key, self.size, self.size):
            inputs = torch.stack([picture.pixels for picture in group])
            batch = running.Batch(group, explaining.transfer.to_device(inputs))
            for parts, found, mark in explaining.explained(batch, fail):
                mark.wait()
                self._check()
                for picture, *of_it in zip(parts, *found):
                    classes, scores, maps = of_it
                    named, captions, _, compared = explaining.named(classes.tolist(), scores.tolist(), maps.numpy())
                    row = done[picture.index]
                    row.update(classes=named.classes, labels=named.labels, scores=named.scores)
                    if draws:
                        given = rows[picture.index]
                        row.update(panel=given["panel"], panel_size=given["panel_size"])
                        row.update(captions=captions, compared=compared)
                    row["shape"] = list(named.maps.shape)
                    # As they are for the colours; else as they are written.
                    row["maps"] = named.maps.astype("<f4" if draws else "<f2").tobytes()
        schema = _explained_schema(pa)
        if draws:
            texts = {"captions": pa.list_(pa.string()), "compared": pa.string()}
            schema.update(**texts, **_panel(pa, True))
        if not draws and "maps" not in options.write:
            schema = {name: kind for name, kind in schema.items() if name not in ("maps", "shape")}
        return pa.Table.from_pylist(done, pa.schema(schema))

    def _check(self):
        here = self.explaining.found_layers()
        if here != self.found:
            raise RuntimeError(f"an actor explains {here}, the run {self.found}: name the layer with --layer")


def _explained_schema(pa):
    return {
        "path": pa.string(),
        "classes": pa.list_(pa.int64()),
        "labels": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "shape": pa.list_(pa.int32()),
        "maps": pa.binary(),
        "error": pa.string(),
    }


def _drawn(table: Any, options: running.Options, versus: bool) -> Any:
    """The batch with its pictures drawn, and the maps as they are written."""
    from PIL import Image

    pa, artist, done = arrow_package(), writing.Artist(options, versus), []
    for row in table.to_pylist():
        kept = {name: row[name] for name in ("path", "classes", "labels", "scores", "error")}
        if row["error"] is None:
            maps = np.frombuffer(row["maps"], "<f4").reshape(row["shape"])
            panel = Image.frombytes("RGB", tuple(row["panel_size"]), row["panel"])
            name = Path(row["path"]).stem
            _, kept["overlay"] = artist.picture(name, panel, maps, row["captions"], row["compared"])
            kept["shape"], kept["maps"] = row["shape"], maps.astype("<f2").tobytes()
        done.append(kept)
    schema = _explained_schema(pa)
    error = schema.pop("error")
    if "maps" not in options.write:
        del schema["maps"], schema["shape"]
    return pa.Table.from_pylist(done, pa.schema({**schema, "overlay": pa.binary(), "error": error}))


# The folder of a run


class _Done:
    """The pictures with a row in some files: sorted hashes of their paths, 16 bytes each."""

    def __init__(self, finished: Iterable[Path]) -> None:
        parts = [np.zeros(0, f"V{DIGEST}")]
        for file in finished:
            parts.append(_digests(_column(file, "path")))
        halves = np.concatenate(parts).view([("a", "<u8"), ("b", "<u8")])
        self.digests = halves[np.lexsort((halves["b"], halves["a"]))]
        self.distinct = len(self.digests) < 2 or bool((self.digests[1:] != self.digests[:-1]).all())

    def __len__(self):
        return len(self.digests)

    def has(self, paths: Sequence[str]) -> np.ndarray:
        """Whether each of the paths is there, (N,) bool."""
        if not len(self):
            return np.zeros(len(paths), bool)
        asked = _digests(paths).view(self.digests.dtype)
        found = np.zeros(len(asked), bool)
        first = self.digests["a"]
        for index, (start, end) in enumerate(
            zip(np.searchsorted(first, asked["a"]), np.searchsorted(first, asked["a"], "right"))
        ):
            found[index] = (self.digests["b"][start:end] == asked["b"][index]).any()
        return found

    def left(self, given, job):
        """What is not done of sources or of a data set, and how many that are; None of a data set."""
        if isinstance(given, list):
            there = self.has([writing.as_text(source.label) for source in given])
            left = [source for source, done in zip(given, there) if not done]
            return left, len(left)
        if len(self):
            given = given.map_batches(_left, fn_kwargs={"done": job.ray.put(self)}, batch_format="pyarrow")
        return given, None


def _left(table: Any, done: Any) -> Any:
    pa, ray = arrow_package(), ray_package()
    done = ray.get(done) if isinstance(done, ray.ObjectRef) else done
    paths = [writing.as_text(path or "") for path in table["path"].to_pylist()]
    return table.filter(pa.array(~done.has(paths)))


def _digests(paths):
    hashes = b"".join(hashlib.blake2b(path.encode(), digest_size=DIGEST).digest() for path in paths)
    return np.frombuffer(hashes, f"V{DIGEST}")


def _column(file, name):
    import pyarrow.parquet as pq

    return pq.read_table(file, columns=[name], partitioning=None)[name].to_pylist()


class _Folder:
    """The folder of a run, which this process alone writes into, with the parameters of all that is there."""

    def __init__(self, out: Path, parameters: Mapping[str, Any], overwrite: bool) -> None:
        self.out, self.folder = out, out / FOLDER
        self._lock = files.lock(self.folder / "lock", out)
        try:
            header = self.folder / "parameters.json"
            now = json.loads(json.dumps(dict(parameters)))
            if overwrite and header.exists():
                for path in (*self.finished(), header):
                    path.unlink(missing_ok=True)
                for path in self.folder.glob("run-*"):
                    shutil.rmtree(path)
            if header.exists():
                compare(out, json.loads(header.read_text()), now, "an earlier run")
                self.collect()
            elif self.finished():
                raise ValueError(f"{out} has Parquet files of another program: take another folder")
            else:
                files.write_file(header, json.dumps(now, indent=1).encode(), self.folder)
                files.sync(self.folder)
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        self._lock.close()

    def finished(self) -> list[Path]:
        return sorted(self.out.glob("*.parquet"))

    def begin(self) -> Path:
        """A new folder for what is being written. Each run has its own: tasks of a dead one may live on for a while."""
        part = self.folder / f"run-{os.urandom(8).hex()}"
        part.mkdir()
        return part

    def collect(self) -> None:
        """Move what is whole, which its end shows, to where it belongs, and remove the rest."""
        for run in sorted(self.folder.glob("run-*")):
            for path in sorted(run.glob("*.parquet")):
                if _is_whole(path):
                    files.sync(path)
                    os.replace(path, self.out / path.name)
            files.sync(self.out)
            shutil.rmtree(run)

    def errors(self) -> list[Record]:
        """The pictures whose row holds an error."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        lost = []
        for file in self.finished():
            table = pq.read_table(file, columns=["path", "error"], partitioning=None)
            for row in table.filter(pc.is_valid(table["error"])).to_pylist():
                lost.append(Record(-1, row["path"], Path(row["path"]).stem, error=row["error"]))
        return sorted(lost, key=lambda record: record.path)


def _is_whole(path):
    """A file of Parquet ends with where its parts are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows > 0
    except (OSError, pa.ArrowException):
        return False
