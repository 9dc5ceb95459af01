"""A run over many pictures: reading, network and writing at the same time, picture by picture into the journal."""

import copy
import hashlib
import json
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch

from cfcam_gpu import (
    CFCAM,
    CFCAMConfig,
    __version__,
    class_names,
    hugging_face,
    images,
    layers,
    memory_format,
    models,
    pipeline,
    volumes,
)
from cfcam_gpu import probabilities as prob
from cfcam_gpu.checks import check_config
from cfcam_gpu.datasets import files, gallery, reading, scans, writing
from cfcam_gpu.datasets.journal import Journal, Record
from cfcam_gpu.datasets.transfer import Transfer
from cfcam_gpu.methods import METHODS
from cfcam_gpu.outputs import find_logits

DEFAULT_BATCH = {2: 16, 3: 1}
"""Images, or scans and videos, per forward pass."""

DEFAULT_TOP = 2
"""Classes that are explained of each image, of a model that has so many."""

OWN_SCORE = {
    hugging_face.CLASSES: "outputs: several labels an image, each explained by its own logit",
    hugging_face.TEXTS: "outputs: similarities to the texts, each explained by its own logit",
    hugging_face.REGIONS: "outputs: classes of pixels with their share of the picture, each explained where it is",
}
"""What is said where a score does not compete with the others, by `LoadedModel.scores`."""

GIVE_UP = 3
"""Images that the model fails on, before any has been explained, until it is the model's or the arguments' fault."""

ROWS_OF_PART = 4
"""Images at least that a thread explains at once, of a batch that several share: what Python does does not depend on
how many there are, and no two threads do it at the same time."""

COPIES_BYTES = 2**30
"""What the networks of such threads may take together."""

PLACES = 2**20
"""Of a tensor's values, how many are summed at once for its fingerprint."""

BATCHES_WAITING = 4
"""As many images as in these may wait for others of their size, or be read ahead."""

BATCHES_WRITTEN = 2
"""Batches that are being written at the same time as the next one is explained."""

MOST_WORKERS = {2: 8, 3: 2}
"""Threads that read, and threads that write: at most so many, and at most one a core, unless more are asked for. Fewer
of scans and videos, each of which may take a gigabyte."""


class Refused(ValueError):
    """The arguments cannot be carried out."""


@dataclass(frozen=True)
class Options:
    """What is done with each picture: the options of ``cfcam explain``, by the same names.

    ``versus`` of None: where there are two classes. ``device`` of None: CUDA if there is one. ``workers`` of None: as
    many threads for reading, and as many for writing, as there are cores, at most 8 each, of scans and videos 2.
    ``batch_size`` of None: 16, of scans and videos 1. ``frames`` of None: as many as the model says, else 16. ``text``:
    what a model of image and text compares pictures with.
    """

    out: Path
    model: str = "demo"
    text: Sequence[str] = ()
    top: int | None = None
    classes: list[int] | None = None
    versus: bool | None = False
    labels: Path | None = None
    multilabel: bool = False
    layer: str | None = None
    method: str = "cfcam"
    paper: bool = False
    backend: str = "auto"
    compile: bool = False
    device: torch.device | None = None
    batch_size: int | None = None
    frames: int | None = None
    colormap: str = "inferno"
    raw: bool = False
    write: Sequence[str] = ("overlay",)
    overlay_format: str = "png"
    maps_format: str = "npy"
    scores_format: str = "csv"
    html: bool = False
    overwrite: bool = False
    workers: int | None = None

    @property
    def where(self) -> torch.device:
        return self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


UNTOUCHED = ("out", "overwrite", "workers", "device", "labels")
"""Options that are no parameters of what is written. The class names of ``labels`` are one."""


class Report:
    """What a run says while it runs; each method may be replaced."""

    def start(self, n_images: int, n_done: int) -> None:
        """The run begins with so many images, of which an earlier part has done so many."""

    def note(self, text: str) -> None:
        """Something about the model or the run."""

    def warning(self, text: str) -> None:
        """A warning that something has given."""

    def record(self, record: Record, said: str) -> None:
        """A picture is done: what is said of its classes; or, with ``record.error``, it has failed."""

    def left_out(self, record: Record) -> None:
        """At the end: one of those that failed."""


class Summary(NamedTuple):
    """What a run has done.

    Attributes:
        images: how many there were.
        explained: how many of them are done, those of an earlier part of the run included.
        resumed: how many of these an earlier part had done.
        lost: the records of the others, each with its error.
        files: names of the files of the whole run.
        seconds: how long it took, from the first picture on.
    """

    images: int
    explained: int
    resumed: int
    lost: list[Record]
    files: list[str]
    seconds: float


@dataclass(frozen=True, eq=False)
class Picture:
    """An image, a scan or a video that has been read."""

    index: int
    source: reading.Source
    panel: Any
    """What is drawn of it: a PIL image, or None; or a `scans.Seen`."""
    pixels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Failure:
    """An image that could not be read. ``error`` is None where its file is what is wrong, not the model."""

    index: int
    source: reading.Source
    reason: str
    error: Exception | None


def explain(
    options: Options, sources: Sequence[reading.Source] | reading.Inputs, report: Report | None = None
) -> Summary:
    """Explain all pictures and write what the options say; what an unfinished run has done is not done again.

    What fails on the first images, whichever they are, fails because of the model or the arguments, and is raised.

    Args:
        options: what is done with each picture.
        sources: the pictures, scans and videos; or where they are to be found once it is known what the model takes.
        report: is told what happens; default: nobody is.

    Raises:
        ValueError: the options cannot be carried out, or another run has the folder.
        OSError: the disk is full, or the folder cannot be written to; what is done is kept.
        ImportError: a package is missing.
    """
    report = report or Report()
    options = check(options)
    loaded = load(options)
    if options.html and loaded.n_axes == 3:
        raise Refused(f"--html shows images alone, {options.model} takes scans and videos")
    options = with_defaults(options, loaded)
    if isinstance(sources, reading.Inputs):
        sources = sources.sources(loaded.n_axes, options.frames or loaded.frames)
    sources = reading.shorten(sources, options.out)
    check_targets(options, sources)
    inputs = _inputs_there(options, sources)
    writing.check_packages(options)
    journal = Journal(options.out, parameters(options, loaded, sources), options.overwrite)
    ended = False
    report.start(len(sources), len(journal.done))
    try:
        with warnings.catch_warnings(), images.any_size():  # for the threads that read
            run = _Run(options, loaded, sources, journal, report, inputs)
            warnings.showwarning = run.warn
            try:
                run.run()
                summary = run.summary()
            except OSError as error:
                if error.errno in files.FULL:
                    raise OSError(error.errno, f"{options.out}: {error.strerror}{_kept(journal)}") from error
                raise
            finally:
                for record in sorted(run.lost, key=lambda record: record.index):
                    if run.n_explained or run.errors.get(record.index) is None:
                        report.left_out(record)
        ended = True
        return summary
    finally:
        journal.close(ended or not journal.n_explained)


def check(options: Options) -> Options:
    """The options, with what is to be written in order; ValueError where they cannot be carried out."""
    options = replace(options, write=writing.check_kinds(options.write))
    if "overlay" in options.write or options.html:
        images.get_colormap(options.colormap)
    if options.html:
        gallery.check_place(options.out)
    if options.out.exists() and not options.out.is_dir():
        raise Refused(f"--out must be a folder, got the file {options.out}")
    if options.paper and options.method != "cfcam":
        raise Refused(f"--paper is a procedure of --method cfcam, got --method {options.method}")
    if options.compile and options.method != "cfcam":
        raise Refused(f"--compile is for --method cfcam, got --method {options.method}")
    versus(options, options.top or DEFAULT_TOP)
    return options


def check_targets(options: Options, sources: Sequence[reading.Source]) -> None:
    """ValueError where both the options and the input say which classes to explain."""
    if any(source.target is not None for source in sources):
        for option, given in (("--classes", options.classes), ("--top", options.top), ("--versus", options.versus)):
            if given:
                raise Refused(f"{option} does not go with targets from the input, which are the classes to explain")


def load(options: Options, load_model: Callable[[], models.LoadedModel] | None = None) -> models.LoadedModel:
    """The options' model, or what ``load_model`` gives, with the options' class names."""
    names = None if options.labels is None else class_names.class_names(options.labels)
    pipeline.choose(options.backend, "auto", torch.empty(1, 1, 1, 1, device=options.where))
    loaded = load_model() if load_model else models.load_model(options.model, options.where, options.text)
    if options.labels is not None:
        loaded = replace(loaded, class_names=names)
    if options.layer is not None:
        layers.get_layer(loaded.model, options.layer)
    return loaded


def with_defaults(options: Options, loaded: models.LoadedModel) -> Options:
    """The options with what depends on the model, where it was None."""
    return replace(
        options,
        batch_size=options.batch_size or DEFAULT_BATCH[loaded.n_axes],
        frames=(options.frames or loaded.frames) if loaded.n_axes == 3 else None,
        workers=options.workers or min(MOST_WORKERS[loaded.n_axes], cores()),
    )


def _inputs_there(options, sources):
    """The real paths of those sources that may be in the run's folder; Refused where a picture would replace one."""
    if not options.out.is_dir() or not any(options.out.iterdir()):
        return frozenset()
    inputs = frozenset(os.path.realpath(source.label) for source in sources)
    for source in sources if "overlay" in options.write else ():
        picture = options.out / writing.picture_name(options, source.stem)
        if os.path.lexists(picture) and os.path.realpath(picture) in inputs:
            raise Refused(f"--out {options.out} would overwrite the input {picture}")
    return inputs


def _kept(journal):
    done = len(journal.done)
    return f"; {done} images are done, and the same command goes on after them" if done else ""


def parameters(options: Options, loaded: models.LoadedModel, sources: Sequence[reading.Source]) -> dict[str, Any]:
    """All that decides what a run writes, as plain values."""
    values = {name: value for name, value in asdict(options).items() if name not in UNTOUCHED}
    values["versus"] = bool(options.versus)
    values["config"] = asdict(CFCAMConfig.paper() if options.paper else check_config(None).of(loaded.n_axes))
    listed = hashlib.sha256()
    for source in sources:
        listed.update(os.fsencode(f"{source.label}\0{source.stem}\0{source.target}\0"))
    values["inputs"] = listed.hexdigest()
    values["class_names"] = hashlib.sha256(json.dumps(loaded.class_names).encode()).hexdigest()
    values["weights"] = fingerprint(loaded.model)
    values["size"] = getattr(loaded.preprocess, "size", None)
    values["preprocess"] = fingerprint_of_preprocess(loaded)
    values["version"] = __version__
    return values


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of a model's parameters and buffers: of names, shapes, types, and sums of their bits by their places."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        said = f"{name} {getattr(tensor, 'shape', None)} {getattr(tensor, 'dtype', None)}"
        if isinstance(tensor, torch.Tensor) and not tensor.is_quantized and tensor.layout == torch.strided:
            integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            # Integers, because their sum does not depend on the order, which depends on the number of threads.
            values = values.detach().contiguous().view(integers[values.element_size()]).flatten()
            # By their places, because classes that have changed theirs have the same sum; of odd factors none drops
            # bits, and the sums wrap around alike everywhere.
            places = 1 + 2 * torch.arange(min(PLACES, len(values)), device=values.device)
            sums = [int((part * places[: len(part)]).sum()) for part in values.split(PLACES)]
            said += f" {sums}"
        found.update(said.encode())
    return found.hexdigest()


def fingerprint_of_preprocess(loaded: models.LoadedModel) -> str | None:
    """A hash of what the preprocess makes of a picture, or of a volume; None where that is random, or fails here."""
    generator = np.random.default_rng(0)
    given: list[Any]
    if loaded.n_axes == 2:
        given = [images.image_of(generator.integers(0, 256, (48, 64, 3), np.uint8))]
    else:  # of one channel, or of colours
        given = [torch.from_numpy(generator.random((n, 8, 32, 32), np.float32)) for n in (1, 3)]
    for each in given:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are given with the user's pictures
                first, second = (loaded.preprocess(copy.deepcopy(each)) for _ in range(2))
            if torch.equal(first, second):
                return hashlib.sha256(first.contiguous().cpu().numpy().tobytes()).hexdigest()
        except Exception:  # of the user's code, which fails again with a picture of the user's
            continue
    return None


def versus(options: Options, top: int) -> bool:
    """Whether to compare the first two classes."""
    n_classes = len(options.classes) if options.classes else top
    if options.versus and n_classes < 2:
        given = f"--classes {options.classes[0]}" if options.classes else f"--top {top}"
        raise Refused(f"--versus needs two classes or more, got {given}")
    return options.versus is not False and n_classes > 1


class Batch(NamedTuple):
    """Images of one shape, and the (B, C, H, W) or (B, C, D, H, W) input on the model's device."""

    pictures: Sequence[Picture]
    inputs: torch.Tensor

    def part(self, images):
        return Batch(*(each[images] for each in self))

    def parts(self, rows: int | None) -> "list[Batch]":
        """Batches of so many images at most; None: the batch, unless it is empty."""
        starts = range(0, len(self.pictures), rows or max(1, len(self.pictures)))
        return [self.part(slice(start, start + (rows or len(self.pictures)))) for start in starts]


class _Outcome(NamedTuple):
    """What became of a picture when it was written."""

    record: Record
    said: str
    maps: np.ndarray | None
    """What is to go into the one file of all."""
    error: Exception | None


def read(index: int, source: reading.Source, loaded: models.LoadedModel, artist: writing.Artist) -> Picture | Failure:
    """Read one image, scan or video and make the network's input of it, and what is drawn of it if anything is."""
    try:
        image = source.load()
        volumes.check_taken(source.label, image, loaded.n_axes)
    except (ImportError, OSError, ValueError, MemoryError) as error:  # they say which file it is
        return Failure(index, source, reason_of(error), None)
    except Exception as error:  # of a source that is the user's
        return Failure(index, source, f"{source.label}: {reason_of(error)}", None)
    if isinstance(source.target, str):
        return Failure(index, source, f"{source.label}: expected a class index, got {source.target!r}", None)
    try:
        if isinstance(image, volumes.Volume):
            pixels = loaded.preprocess(image.values)
            seen = loaded.seen(image.values) if artist.draws else None
            panel: Any = scans.Seen.of(image, seen, pixels.shape[1], loaded.to_volume)
        else:
            pixels = loaded.preprocess(image)
            # The photograph itself, which may be large, is let go of.
            panel = artist.panel(loaded.seen(image)) if artist.draws else None
    except Exception as error:  # of the user's preprocess
        return Failure(index, source, f"{source.label}: {reason_of(error)}", error)
    return Picture(index, source, panel, pixels)


class Explaining:
    """Explains batches by a model of which the first one says what its outputs are and where to look.

    Args:
        options, loaded: how, and the model.
        earlier: what `found_layers` gave elsewhere, which is to be found here too; None: nothing is known.
        fill: the rows of every forward pass, the last picture repeated where a batch has fewer, so that which
            algorithms a network's operations take, and with them its last bits, do not depend on the batch. 0: as
            many as the batch has.

    Attributes:
        rows: the most rows of a forward pass; a batch of more is explained in parts. None: any number.
        memory_format: of the network's images.
    """

    def __init__(
        self,
        options: Options,
        loaded: models.LoadedModel,
        earlier: Mapping[str, Any] | None = None,
        fill: int = 0,
    ) -> None:
        self.options, self.loaded, self.earlier, self.fill = options, loaded, earlier, fill
        self.transfer = Transfer(options.where)
        self.cam: Any = None
        self.versus = False
        self._is_new = False
        """Whether the user has yet to be told where its guide is."""
        self.rows: int | None = None
        self.memory_format = torch.contiguous_format

    def note(self, text: str) -> None:
        """Something about the model, for the user."""

    def found_layers(self) -> dict[str, Any]:
        """The layers that are explained, once a batch has been."""
        return {"layer": self.cam.target_names, "guide": getattr(self.cam, "guide_names", None)}

    def explained(self, batch: Batch, fail: Callable[[Picture, Exception], None]) -> Iterator[tuple[Any, Any, Any]]:
        """Parts of a batch: the pictures, their (classes, scores, maps), and the mark after which these may be read.

        Where the network fails on a picture, ``fail`` is called, and the others are explained.
        """
        for part, found in self.begun(batch, fail):
            yield from self.settled(part, found, fail)

    def begun(self, batch: Batch, fail: Callable[[Picture, Exception], None]) -> Iterator[tuple[Batch, Any]]:
        """What `attempted` gives of the parts of a batch, once a picture has shown what the network is."""
        while self.cam is None and batch.pictures:
            try:
                self.prepare(batch.inputs[:1])
            except Refused:
                raise
            except Exception as error:  # of the user's network
                fail(batch.pictures[0], error)
                batch = batch.part(slice(1, None))
        return self.attempted(batch.parts(self.rows))

    def attempted(self, parts: list[Batch]) -> Iterator[tuple[Batch, Any]]:
        """Each part with what `attempt` gives of it, in their order."""
        return ((part, self.attempt(part)) for part in parts)

    def attempt(self, part: Batch) -> Any:
        """(classes, scores, maps) of a part of a batch; or the error of the network's."""
        return self._attempt(self.cam, part)

    def _attempt(self, cam, part):
        n, rows = len(part.pictures), max(len(part.pictures), self.fill)
        try:
            which = torch.arange(rows).clamp(max=n - 1)
            inputs = part.inputs if rows == n else part.inputs[which.to(part.inputs.device)]
            targets = [part.pictures[image].source.target for image in which.tolist()]
            return tuple(each[:n] for each in _explain_batch(self, cam, self.as_taken(inputs), targets))
        except Exception as error:
            return error

    def settled(
        self, part: Batch, found: Any, fail: Callable[[Picture, Exception], None]
    ) -> Iterator[tuple[Any, Any, Any]]:
        """What `explained` yields of a part; where it has failed, of each of its pictures on its own."""
        if not isinstance(found, Exception):
            if self._is_new and self.cam.guide_names != self.cam.target_names:
                self.note(f"guide layer: {self.cam.guide_names[0]}")
            self._is_new = False
            yield part.pictures, found, self.transfer.mark()
        elif len(part.pictures) == 1:
            fail(part.pictures[0], found)
        else:
            for single in part.parts(1):
                yield from self.settled(single, self.attempt(single), fail)

    def as_taken(self, inputs: torch.Tensor) -> torch.Tensor:
        """The images in the memory format in which the network takes them in least time."""
        channels_last = self.memory_format == torch.channels_last
        if not (channels_last and memory_format.pays(self.loaded.model, len(inputs))):
            return inputs
        return inputs.contiguous(memory_format=torch.channels_last)

    def prepare(self, image):
        """Look at the model with a first image (1, C, H, W) or volume: its layer, and what its outputs are."""
        options, model, note = self.options, self.loaded.model, self.note
        layer = options.layer
        if layer is None and self.earlier is not None:
            layer = self.earlier["layer"][0]
        with prob.looking(model) as ending:
            try:
                target = layers.inspect_target_layer(model, image, layer)
            except ValueError:
                if ending.name is None:
                    raise
        if ending.name is not None:
            # The layer too is chosen by the logits: behind a saturated softmax there is no gradient.
            with prob.give_logits(model, ending.name):
                target = layers.inspect_target_layer(model, image, layer)
            note(f"outputs: probabilities, by a {ending.name} of the model's own")
        n_classes = target.n_classes
        _check_classes(options, n_classes)
        scores = self.loaded.scores
        if scores == hugging_face.REGIONS and METHODS[options.method].of_scores:
            raise Refused(
                f"--method {options.method} changes the picture, and with it the pixels of {options.model}'s classes"
            )
        if scores == hugging_face.REGIONS and options.multilabel:
            raise Refused(f"--multilabel is for classes of the image, those of {options.model} share its pixels")
        if scores == hugging_face.TEXTS and not options.classes and options.top is None:
            self.options = options = replace(options, classes=list(range(n_classes)))
        self.top = options.top or min(DEFAULT_TOP, n_classes)
        self.versus = n_classes > 1 and versus(options, self.top)
        if options.versus and n_classes == 1:
            raise Refused(f"--versus needs two classes or more, {options.model} has one output")
        names = self.loaded.class_names
        if names and not class_names.fit(names, n_classes):
            said = f"{_counted(names)}, {options.model} has {n_classes} classes"
            if options.labels is not None:
                raise Refused(f"--labels {options.labels} has {said}")
            note(f"class names: not used, since there are {said}")
        config = CFCAMConfig.paper() if options.paper else None
        self.multilabel = options.multilabel or ending.name == "sigmoid" or prob.says_multilabel(model)
        if n_classes > 1 and (self.multilabel or scores != hugging_face.CLASSES):
            config = replace(config or check_config(None).of(len(target.shape) - 1), margin_temperature=0.0)
            note(OWN_SCORE[scores])
        note(f"target layer: {target.name} ({' x '.join(map(str, target.shape))})")
        self.n_classes = n_classes
        if options.method == "cfcam":
            self.cam = CFCAM(model, config=config, backend=options.backend, compile=options.compile)
        else:
            self.cam = METHODS[options.method](model, backend=options.backend)
            note(f"method: {self.cam.name}")
        self.cam._take(target, tuple(image.shape[1:]))
        self._is_new = isinstance(self.cam, CFCAM)
        self.memory_format = self.find_memory_format(image)

    def find_memory_format(self, image: torch.Tensor) -> torch.memory_format:
        """In which one the network takes its images, by a look at one (1, C, H, W)."""
        return memory_format.of_images(self.loaded.model, image)

    def named(self, classes, scores, maps):
        """An `Explained`, the captions of its maps, what is said of the picture, and what two maps are compared as."""
        if self.n_classes == 1:
            (positive,), (score,) = classes, scores
            names = [self.loaded.side_name(positive), self.loaded.side_name(not positive)]
            captions, keys = [f"{names[0]} {score:.2f}"], ["positive" if positive else "negative"]
            said = f"{captions[0]} ({names[1]} {1 - score:.2f})"
            return writing.Explained([int(positive)], names[:1], keys, scores, maps), captions, said, ""
        names = [self.loaded.class_name(index, self.n_classes) for index in classes]
        captions = [f"{name} {score:.2f}" for name, score in zip(names, scores)]
        compared = f"{names[0]}, not {names[1]}" if len(names) > 1 else ""
        found = writing.Explained(classes, names, list(map(str, classes)), scores, maps)
        return found, captions, ", ".join(captions), compared


class _Run(Explaining):
    """The images of one run: a pool reads them ahead, the calling thread explains batch after batch, and a second pool
    writes what was found, while a thread keeps the journal, in the order of the batches."""

    def __init__(self, options, loaded, sources, journal, report, inputs):
        # The last batch of several is filled up: its pictures get the maps that they would have in any other batch.
        super().__init__(options, loaded, journal.found, options.batch_size if len(sources) > options.batch_size else 0)
        self.sources, self.journal, self.report = sources, journal, report
        self.writer = writing.Writer(options, journal, inputs)
        self.note, self.found = report.note, None
        self.broken = False
        """Whether a batch could not be journalled."""
        self.lost = [record for record in journal.records() if record.error is not None]
        self.errors = {}
        """{index: the model's or the writer's error} of those of ``lost`` whose files are not what is wrong."""
        self.resumed = self.n_explained = len(journal.done) - len(self.lost)
        self.n_computed = 0
        self.unsettled = deque()
        self.free_cams = SimpleQueue()
        self.n_threads = torch.get_num_threads()
        self.started = time.perf_counter()
        self.n_ahead = options.batch_size + options.workers
        self.explainers = None
        self.pools = self.readers, self.writers, self.keeper = [
            ThreadPoolExecutor(options.workers, "cfcam-read"),
            ThreadPoolExecutor(options.workers, "cfcam-write"),
            ThreadPoolExecutor(1, "cfcam-journal"),
        ]

    def warn(self, message, category, filename, lineno, file=None, line=None):
        text = " ".join(str(message).split())
        if not issubclass(category, UserWarning):
            text = f"{filename}:{lineno}: {category.__name__}: {text}"
        self.report.warning(text)

    def run(self):
        done, size = self.journal.done, self.options.batch_size
        if done:
            what = f"{len(done)} of {len(self.sources)} images are done"
            self.report.note(f"going on with the unfinished run in {self.options.out}: {what}")
        todo = ((index, source) for index, source in enumerate(self.sources) if index not in done)
        begun = deque()
        try:
            read = reading.ahead(self.readers, self._read, todo, self.n_ahead)
            key = lambda picture: (picture.pixels.shape, picture.pixels.dtype, picture.source.target is None)
            for pictures in reading.grouped(self._that_were_read(read), key, size, BATCHES_WAITING * size):
                inputs = torch.stack([picture.pixels for picture in pictures])
                begun.append(self.begin(Batch(pictures, self.transfer.to_device(inputs))))
                # Where parts are explained side by side, the next batch's are there when the first thread is free.
                while len(begun) > (self.rows is not None):
                    self.end(*begun.popleft())
                self._settle(BATCHES_WRITTEN)
            for each in begun:
                self.end(*each)
            self._settle(0)
            self.check()
        finally:
            for pool in self.pools:
                pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.n_threads)

    def summary(self):
        unread = [record for record in self.lost if record.index not in self.journal.done]
        written = self.writer.finish(len(self.sources), unread)
        if self.options.html:
            self.report.note(f"gallery: {self.options.out / gallery.FOLDER / gallery.PAGE}")
        seconds = time.perf_counter() - self.started
        lost = sorted(self.lost, key=lambda record: record.index)
        return Summary(len(self.sources), self.n_explained, self.resumed, lost, written, seconds)

    # Reading

    def _read(self, numbered):
        """In a reader's thread."""
        return read(*numbered, self.loaded, self.writer)

    def _that_were_read(self, read):
        for each in read:
            if isinstance(each, Picture):
                yield each
            else:
                self._lose(_failed(each, each.reason), each.error)

    # What fails

    def _lose(self, record, error):
        """Count a failure; ``error`` is None where the image's file is what is wrong."""
        self.lost.append(record)
        self.report.record(record, "")
        if error is not None:
            self.errors[record.index] = error
            if not self.n_computed:
                self.give_up()
        return record

    def give_up(self):
        if len(self.errors) >= GIVE_UP:
            self.check()

    def check(self):
        """Raise the first error if the model has explained nothing."""
        if self.errors and not self.n_explained:
            error = next(iter(self.errors.values()))
            raise Refused(reason_of(error)) from error

    # Explaining

    def prepare(self, image):
        super().prepare(image)
        self.writer.versus = self.versus
        self._divide(image)

    def find_memory_format(self, image):
        # Of a batch or less the look would take longer than what it saves.
        return super().find_memory_format(image) if self.fill else self.memory_format

    def _divide(self, image):
        """Have batches explained in parts, side by side, if that may be.

        On a CPU threads that compute parts of one operation wait for each other after each, and for those that read and
        write; threads with pictures of their own do not. Each has a copy of the network, whose code may note in it what
        it computes. All have one size of picture: where the guide is depends on it.
        """
        n_parts = self._n_parts()
        if n_parts == 1:
            return
        try:
            # The copies shall know where the guide is: a pass that looks for it holds more, here of one picture alone.
            self.cam.maps(self.as_taken(image))
            # Notices are given once, by whomever.
            shared = {id(self.cam._notices): self.cam._notices}
            cams = [copy.deepcopy(self.cam, dict(shared)) for _ in range(n_parts - 1)]
        except Exception:  # of the user's network
            return
        for cam in (self.cam, *cams):
            self.free_cams.put(cam)
        # No more threads than networks: each keeps the memory of its own passes.
        self.explainers = ThreadPoolExecutor(n_parts, "cfcam-explain")
        self.pools.append(self.explainers)
        self.rows = self.fill = -(-self.options.batch_size // n_parts)
        # Of this thread, and of those that torch has not seen yet.
        torch.set_num_threads(self.n_threads // n_parts)

    def _n_parts(self):
        """As many as the threads can be shared out to, with enough pictures each, and copies that are not too large."""
        options, model = self.options, self.loaded.model
        plain = isinstance(self.cam, CFCAM) and not options.compile and options.where.type == "cpu"
        if not (plain and self.fill and getattr(self.loaded.preprocess, "size", None)):
            return 1
        n_bytes = sum(each.nbytes for each in model.state_dict().values() if isinstance(each, torch.Tensor))
        most = min(options.batch_size // ROWS_OF_PART, 1 + COPIES_BYTES // max(1, n_bytes))
        return max(n for n in range(1, max(1, most) + 1) if self.n_threads % n == 0)

    def attempted(self, parts):
        if self.rows is None:
            return super().attempted(parts)
        futures = [self.explainers.submit(self.attempt, part) for part in parts]
        return ((part, future.result()) for part, future in zip(parts, futures))

    def attempt(self, part):
        if self.rows is None:
            return super().attempt(part)
        cam = self.free_cams.get()
        try:
            return self._attempt(cam, part)
        finally:
            self.free_cams.put(cam)

    def begin(self, batch):
        """Have a batch explained, at once where threads do it, else by `end`, which takes what is returned."""
        failed = []

        def fail(picture, error):
            failed.append(self._lose(_failed(picture, f"{picture.source.label}: {reason_of(error)}"), error))

        return self.begun(batch, fail), fail, failed

    def end(self, begun, fail, failed):
        """Have a batch written that was begun; where one image fails, the others."""
        explained = []
        for part, found in begun:
            for each in self.settled(part, found, fail):
                explained.append(each)
                self.n_computed += len(each[0])
        if explained:
            self.journal_found()
        self._hand_over(explained, failed)

    def journal_found(self):
        """The layers that the batches to come, of this run or of one that goes on with it, are explained at."""
        if self.found is None:
            self.found = self.found_layers()
            # Not in this thread: the journal is the other's.
            self.keeper.submit(self.journal.set_found, self.found).result()

    # Writing

    def _hand_over(self, explained, failed):
        """Give what was found of a batch, and the records of its images that failed, to those who write."""
        outcomes = [
            self.writers.submit(self._write, picture, *(each[image] for each in found), mark)
            for pictures, found, mark in explained
            for image, picture in enumerate(pictures)
        ]
        self.unsettled.append(self.keeper.submit(self._journal, outcomes, failed))

    def _write(self, picture, classes, scores, maps, mark):
        """In a writer's thread."""
        mark.wait()
        source = picture.source
        try:
            found, captions, said, compared = self.named(classes.tolist(), scores.tolist(), maps.numpy())
            written = self.writer.write(source.stem, picture.panel, found, captions, compared)
            self.writer.write_thumbnails(picture.index, picture.panel, found.maps)
        except Exception as error:  # what cannot be written
            if getattr(error, "errno", None) in files.FULL:
                raise
            return _Outcome(_failed(picture, f"{source.label}: {reason_of(error)}"), "", None, error)
        border = [gallery.border_share(heat) for heat in found.maps] if self.loaded.n_axes == 2 else ()
        record = Record(
            *(picture.index, source.label, source.stem, source.target),
            *(found.classes, found.labels, found.scores, border, written.files),
        )
        return _Outcome(record, said, written.to_keep, None)

    def _journal(self, outcomes, failed):
        """In the thread of the journal: a batch is done when all of it is in place, and when those before it are."""
        broken, self.broken = self.broken, True
        if broken:
            return []
        kept = []
        for outcome in [future.result() for future in outcomes]:
            record = outcome.record
            if outcome.maps is not None:
                try:
                    outcome = outcome._replace(record=replace(record, at=self.writer.keep(outcome.maps)))
                except ValueError as error:
                    record = replace(
                        record, classes=(), labels=(), scores=(), border=(), error=f"{record.path}: {error}"
                    )
                    outcome = _Outcome(record, "", None, error)
            kept.append(outcome._replace(maps=None))
        self.journal.add([*(outcome.record for outcome in kept), *failed])
        self.broken = False
        return kept

    def _settle(self, n):
        """Wait until at most ``n`` batches are being written, and report the others."""
        while len(self.unsettled) > n:
            outcomes = self.unsettled.popleft().result()
            self.n_explained += sum(outcome.error is None for outcome in outcomes)
            for record, said, _, error in outcomes:
                if error is None:
                    self.report.record(record, said)
                else:
                    self._lose(record, error)
            self.give_up()


def _failed(picture, reason):
    """The record of a `Picture` or a `Failure`."""
    source = picture.source
    return Record(picture.index, source.label, source.stem, source.target, error=reason)


def reason_of(error: BaseException) -> str:
    """An error in one line, with its class where it is none that users are told of."""
    text = " ".join(str(error).split())
    if isinstance(error, (ImportError, OSError, RuntimeError, TypeError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _counted(names):
    return f"an index {max(names)}" if isinstance(names, dict) else f"{len(names)} names"


def _check_classes(options, n_classes):
    for index in options.classes or []:
        if index >= n_classes:
            raise Refused(f"--classes must be in [0, {n_classes}) for {options.model}, got {index}")
    if options.top is not None and options.top > n_classes:
        raise Refused(f"--top must be at most {n_classes} for {options.model}, got {options.top}")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _explain_batch(run, cam, inputs, targets):
    """Classes (B, K), their scores (B, K) and their maps (B, K, H, W), of volumes (B, K, D, H, W), on the host when the
    device has come so far.

    Of a model with one output a class is the side that is explained, True or False, and the score that side's.
    """
    one_output = run.n_classes == 1
    classes = run.options.classes and [run.options.classes] * len(inputs)
    if targets[0] is not None:
        classes = [[target] for target in targets]
    found = cam.explain(inputs, classes, top=None if classes or one_output else run.top)
    logits = find_logits(found.outputs, len(inputs))
    scores = prob.probabilities(logits, run.multilabel)
    maps = found.maps.float()
    if one_output:
        positive = torch.ones_like(logits, dtype=torch.bool) if classes else logits >= 0
        results = positive, torch.where(positive, scores, 1 - scores), maps if classes else maps.unsqueeze(1)
    else:
        results = found.targets, scores.gather(1, found.targets), maps
    return tuple(run.transfer.to_host(result) for result in results)
