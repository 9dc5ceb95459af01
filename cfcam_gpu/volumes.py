"""Scans and videos in, maps of them out: NIfTI, stacks of TIFF pages, arrays and video files.

Everything is read as (C, D, H, W). Of a scan the numbers are those of the file, as float32; the frames of a video are
uint8 (3, T, H, W), which is how a preprocess may tell one from the other.
"""

import gzip
import io
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cfcam_gpu import images
from cfcam_gpu.checks import needs

if TYPE_CHECKING:
    from PIL.Image import Image

NIFTI = (".nii", ".nii.gz")
STACKS = (".tif", ".tiff")
ANIMATIONS = (".gif", ".webp", ".png", ".apng", ".avif")
"""Images that may move; with one frame they are pictures."""

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ogv")

EXTENSIONS = (".npy", *NIFTI, *STACKS, ".gif", ".webp", *VIDEOS)
"""What counts as a volume or video when a folder is listed; a file that is named is always tried."""

FRAMES = 16
"""Frames that are taken of a video where the model does not say how many."""

FRAME_MS = 100
"""How long a frame is shown where the video does not say how long it lasts."""

N_SLICES = 9
"""Slices in a picture of a volume."""

DRAWN_PERCENTILES = (0.5, 99.5)
"""Black and white of a drawn slice: one bright voxel would otherwise make all others black."""

N_SAMPLED = 1_000_000
"""Voxels that those percentiles are taken of."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or a video.

    Attributes:
        values: tensor (C, D, H, W), float32; of a video uint8 (3, T, H, W).
        seconds: how long a video lasts, 0 where its file does not say; None of a scan.
        nifti: the nibabel image that it was read from, None of other files. Its axes (i, j, k) are (D, H, W).
    """

    values: torch.Tensor
    seconds: float | None = None
    nifti: Any = None

    @property
    def is_video(self) -> bool:
        """Whether it is a video, not a scan."""
        return self.seconds is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        _, depth, height, width = self.values.shape
        return depth, height, width


def extension(path: str | os.PathLike) -> str:
    """A file's extension in lower case, ``.nii.gz`` in one.

    >>> extension("brain.T1.NII.gz")
    '.nii.gz'
    """
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def stem(path: str | os.PathLike) -> str:
    """A file's name without its `extension`."""
    path = Path(path)
    return path.name[: -len(".nii.gz")] if extension(path) == ".nii.gz" else path.stem


def load(path: str | os.PathLike, n_axes: int = 2, n_frames: int = FRAMES) -> "Image | Volume":
    """What a network takes of a file: of images (``n_axes`` 2) a picture, of volumes (3) a `Volume`.

    For a network of images: what `images.load_image` reads, so of a stack or an animation the first picture; and arrays
    (H, W) or (H, W, 3), scaled as it says. For one of volumes: what `load_volume` and `load_video` read.

    Raises:
        FileNotFoundError, ValueError, ImportError: as those; and ValueError for an image where a volume is needed, and
            the other way round. The message begins with the path.

    >>> load("brain.nii.gz", n_axes=3).shape
    (182, 218, 182)
    """
    with images.any_size():
        return read(path, n_axes, n_frames)


def read(path: str | os.PathLike, n_axes: int = 2, n_frames: int = FRAMES) -> "Image | Volume":
    """`load` for several threads at once, which leaves Pillow's warnings to the caller as `images.read_image` does."""
    kind = extension(path)
    if n_axes == 2:
        if kind not in (".npy", *NIFTI, *VIDEOS):
            return images.read_image(path)
        path = images.check_file(path)
        if kind == ".npy":
            return _picture_of(path)
        raise ValueError(f"{path}: {_expected(2)}, got {'a volume' if kind in NIFTI else 'a video'}")
    path = images.check_file(path, "a volume or a video")
    if kind in (".npy", *NIFTI, *STACKS):
        return load_volume(path)
    if kind in VIDEOS or (kind in ANIMATIONS and _n_pictures(path) > 1):
        return load_video(path, n_frames)
    picture = images.read_image(path)
    raise _an_image(path, picture.height, picture.width)


def check_taken(label: str, image: "Image | Volume", n_axes: int) -> None:
    """ValueError for a volume where the network takes images, or the other way round."""
    if isinstance(image, Volume):
        if n_axes == 2:
            raise ValueError(f"{label}: {_expected(2)}, got {'a video' if image.is_video else 'a volume'}")
    elif n_axes == 3:
        raise _an_image(label, image.height, image.width)


def _expected(n_axes):
    if n_axes == 2:
        return "expected an image, or an array (H, W) or (H, W, 3), for a network of images"
    return "expected a volume or a video for a network of volumes"


def _an_image(path, height, width):
    return ValueError(f"{path}: {_expected(3)}, got an image of {height} x {width} pixels")


@contextmanager
def _decoding(path):
    """Whatever a decoder raises as a ValueError that begins with the path."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # decoders meet broken files with struct.error, EOFError, zlib.error and more
        reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
        reason = f"it is cut short ({reason})" if isinstance(error, EOFError) else reason
        raise ValueError(f"{path}: cannot be decoded: {reason}") from error


def load_volume(path: str | os.PathLike) -> Volume:
    """A scan with the numbers that its file stores.

    Args:
        path: one of

            - ``.npy``: (D, H, W) or (C, D, H, W) of real numbers;
            - ``.tif``, ``.tiff``: pages of one size, which are the slices (D, H, W); in colour, or of an ImageJ
              hyperstack, (C, D, H, W). Read by tifffile, which comes with scikit-image;
            - ``.nii``, ``.nii.gz``: NIfTI-1 or NIfTI-2 with three axes and an affine. The array is that of nibabel and
              of MONAI: its axes (i, j, k) in the file's own order are (D, H, W), neither turned nor resampled; its
              numbers are scaled by the file's slope and intercept.

    Returns:
        `Volume`, (1, D, H, W) or (C, D, H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short or broken, has another number of axes, one of size 0, other than real numbers, or
            NaN or infinite ones; of NIfTI, it has no affine. The message begins with the path.
        ImportError: nibabel or tifffile is not installed.

    >>> load_volume("stack.tif").values.shape
    torch.Size([1, 40, 512, 512])
    """
    path = images.check_file(path, "a volume")
    kind = extension(path)
    if kind in NIFTI:
        return _load_nifti(path)
    if kind == ".npy":
        return Volume(_voxels(path, _of_four_axes(path, _load_array(path))))
    if kind in STACKS:
        return Volume(_voxels(path, _load_stack(path)))
    raise ValueError(f"{path}: expected a volume in one of {' '.join(('.npy', *NIFTI, *STACKS))}, got {kind!r}")


def _voxels(path, values):
    """Finite float32 (C, D, H, W)."""
    values = np.ascontiguousarray(values, np.float32)
    n_bad = values.size - np.count_nonzero(np.isfinite(values))
    if n_bad:
        raise ValueError(
            f"{path}: voxels must be finite, got {n_bad} NaN or infinite of {values.size}; replace them first, as"
            " numpy.nan_to_num does"
        )
    return torch.from_numpy(values)


def _load_array(path):
    with _decoding(path), open(path, "rb") as file:
        # The header first: of an array of objects the rest may be a program.
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    _check(path, shape, dtype)
    with _decoding(path):
        return np.load(path)


def _check(path, shape, dtype):
    if dtype.kind not in "fiub":
        raise ValueError(f"{path}: expected real numbers, got {dtype}")
    if 0 in shape:
        raise ValueError(f"{path}: expected at least one number along every axis, got shape {tuple(shape)}")


def _of_four_axes(path, values):
    if values.ndim not in (3, 4):
        raise ValueError(f"{path}: expected a volume (D, H, W) or (C, D, H, W), got shape {values.shape}")
    return values if values.ndim == 4 else values[None]


def _picture_of(path):
    values = _load_array(path)
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[2] == 3):
        raise ValueError(f"{path}: {_expected(2)}, got shape {values.shape}")
    try:
        return images.image_of(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_logger_lock = threading.Lock()


@contextmanager
def _errors_logged(name):
    """The messages that a logger was given as errors, which nobody else gets; in one thread at a time."""
    messages, logger = [], logging.getLogger(name)

    def take(record):
        if record.levelno >= logging.ERROR:
            messages.append(record.getMessage())
        return record.levelno < logging.ERROR

    with _logger_lock:  # by the thread they cannot be told apart: tifffile decodes in threads of its own
        logger.addFilter(take)
        try:
            yield messages
        finally:
            logger.removeFilter(take)


def _load_stack(path):
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(f"{path}: a stack of TIFF pages: {needs('tifffile')}") from error
    # A stack that is cut short comes with the pages that are left, and is only complained of.
    with _errors_logged("tifffile") as complaints, _decoding(path), tifffile.TiffFile(path) as file:
        kinds, n_pages = list(dict.fromkeys(each.shape for each in file.series)), len(file.pages)
        axes, parts = file.series[0].axes, [each.asarray() for each in file.series if len(kinds) == 1]
    if complaints:
        raise ValueError(f"{path}: cannot be decoded: it is damaged or cut short ({complaints[0]})")
    if not parts:
        raise ValueError(f"{path}: expected slices of one size, got pages of {', '.join(map(str, kinds))}")
    if len(parts) > 1:  # pages that were appended one by one
        axes, parts = f"Q{axes}", [np.stack(parts)]
    (values,) = parts
    _check(path, values.shape, values.dtype)
    of_slices = [index for index, name in enumerate(axes) if name not in "YXSC" and values.shape[index] > 1]
    if not of_slices and "C" in axes:
        of_slices = [axes.index("C")]
    if not of_slices:
        raise _an_image(path, values.shape[axes.index("Y")], values.shape[axes.index("X")])
    if len(of_slices) > 1:
        raise ValueError(
            f"{path}: expected one axis of slices, got {n_pages} pages as {axes} {values.shape}; write each volume to"
            " a file of its own"
        )
    colours = [index for index, name in enumerate(axes) if name in "SC" and index not in of_slices]
    order = [*colours, *of_slices, axes.index("Y"), axes.index("X")]
    rest = [index for index in range(values.ndim) if index not in order]
    values = values.transpose(*rest, *order)
    return values.reshape(-1, *values.shape[-3:])


def _load_nifti(path):
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"{path}: NIfTI: {needs('nibabel', 'medical')}") from error
    with _decoding(path):
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):  # NIfTI-2 is one too; CIFTI is none
            raise ValueError(f"expected NIfTI-1 or NIfTI-2, got {type(image).__name__}")
        shape, dtype = image.shape, image.get_data_dtype()
        codes = [int(image.header[name]) for name in ("sform_code", "qform_code")]
    _check(path, shape, dtype)
    if len(shape) > 3 and max(shape[3:]) > 1:
        raise ValueError(
            f"{path}: expected one volume (X, Y, Z), got a series {shape}; take one of its {np.prod(shape[3:])} out,"
            " as nibabel does with image.slicer[..., 0]"
        )
    if len(shape) < 3:
        raise ValueError(f"{path}: expected a volume (X, Y, Z), got shape {shape}")
    if not any(codes):
        raise ValueError(
            f"{path}: expected an affine, got a sform and a qform of code 0: where its voxels lie is not known; set"
            " one, as nibabel does with image.set_sform(affine, code=1)"
        )
    if not (np.isfinite(image.affine).all() and abs(np.linalg.det(image.affine[:3, :3])) > 0):
        raise ValueError(f"{path}: expected an affine that can be inverted, got {image.affine.tolist()}")
    with _decoding(path):
        values = image.get_fdata(dtype=np.float32, caching="unchanged")
    return Volume(_voxels(path, values.reshape(1, *shape[:3])), nifti=image)


def load_video(path: str | os.PathLike, n_frames: int = FRAMES) -> Volume:
    """Frames of a video, evenly spread from its first to its last; where it has fewer, some are repeated.

    Args:
        path: any format that FFmpeg reads, by PyAV; animated GIF, WebP, PNG and AVIF by Pillow. Upright, as the file's
            metadata say; transparency is laid over white.
        n_frames: how many, at least 1; default `FRAMES`.

    Returns:
        `Volume`, uint8 (3, n_frames, H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short or broken, or has no picture; the message begins with the path.
        ImportError: PyAV or Pillow is not installed.

    >>> load_video("clip.mp4", 8).values.shape
    torch.Size([3, 8, 720, 1280])
    """
    path = images.check_file(path, "a video")
    read = _read_animation if extension(path) in ANIMATIONS else _read_video
    frames, seconds = read(path, n_frames)
    return Volume(torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous(), seconds)


def _spread(n, n_frames):
    """Indices of so many of n frames."""
    return np.linspace(0, n - 1, n_frames).round().astype(int).tolist()


def _n_pictures(path):
    PIL = images._pillow()
    try:
        with open(path, "rb") as file, PIL.Image.open(file) as image:
            return getattr(image, "n_frames", 1)
    except Exception:  # what is wrong with it is said by who reads it
        return 1


def _read_animation(path, n_frames):
    PIL = images._pillow()
    with _decoding(path), open(path, "rb") as file, PIL.Image.open(file) as image:
        n, chosen, milliseconds = image.n_frames, {}, 0
        wanted = _spread(n, n_frames)
        for index in range(n):
            image.seek(index)
            if index in wanted:
                chosen[index] = np.asarray(images._rgb(image))
            milliseconds += image.info.get("duration", 0)
    return [chosen[index] for index in wanted], milliseconds / 1000


def _read_video(path, n_frames):
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: videos: {needs('av', 'video')}") from error
    with _decoding(path):
        n, seconds = _packets(av, path)
        # A packet mostly holds one frame; where that is wrong, it is known once all have been decoded.
        while True:
            wanted = _spread(max(n, 1), n_frames)
            frames, found = _decode(av, path, set(wanted))
            if found in (0, n):
                break
            n = found
    if not found:
        raise ValueError(f"{path}: expected a video, got no frame")
    return [frames[index] for index in wanted], seconds


def _is_cut_matroska(path):
    """Whether a Matroska file is shorter than it says; FFmpeg gives what is left of it."""
    with open(path, "rb") as file:
        head = file.read(4096)
    at = head.find(b"\x18\x53\x80\x67") + 4  # the segment, which holds all the rest
    if at < 4 or at >= len(head) or not head[at]:
        return False
    length = 9 - head[at].bit_length()
    size = int.from_bytes(head[at : at + length], "big") - (1 << 7 * length)
    unknown = (1 << 7 * length) - 1  # of a live recording
    return size != unknown and at + length + size > path.stat().st_size


def _packets(av, path):
    """How many packets a video has, and how many seconds it lasts (0: not known)."""
    with av.open(os.fspath(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        if "matroska" in container.format.name and _is_cut_matroska(path):
            raise ValueError("it is cut short")
        stream, n = container.streams.video[0], 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError(f"it is damaged or cut short after {n} frames")
            n += bool(packet.size)
        # An edit list may hide frames that a QuickTime file stores and counts.
        if n < stream.frames and "mov" not in container.format.name:
            raise ValueError(f"it is damaged or cut short after {n} of {stream.frames} frames")
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    return n, max(seconds, 0.0)


def _decode(av, path, wanted):
    """The frames of these indices, as RGB, and how many there are in all."""
    frames, size, found = {}, None, 0
    with av.open(os.fspath(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if found in wanted:
                width, height = size = size or (frame.width, frame.height)
                pixels = frame.reformat(width, height, "rgb24").to_ndarray()
                frames[found] = np.rot90(pixels, getattr(frame, "rotation", 0) // 90)
            found += 1
    return frames, found


# Out


def save_nifti(heatmap: np.ndarray, like: Any, path: str | os.PathLike) -> None:
    """Write a map as ``.nii.gz``, where a scan's own voxels lie; the file appears whole or not at all.

    Args:
        heatmap: (X, Y, Z) of real numbers, written as float32.
        like: the nibabel image whose affine, axes and header it gets.
        path: the file.

    Raises:
        ValueError: the map has another shape than the image.
        OSError: the folder is missing or cannot be written to.
    """
    content = encoded_nifti(heatmap, like)
    with images.atomic_write(path) as file:
        file.write(content)


def encoded_nifti(heatmap: np.ndarray, like: Any) -> bytes:
    """The bytes of the file that `save_nifti` writes; ValueError as there."""
    if heatmap.shape != like.shape[:3]:
        raise ValueError(f"heatmap must have the image's shape {like.shape[:3]}, got {heatmap.shape}")
    header = like.header.copy()
    header.set_data_dtype(np.float32)
    header["cal_min"], header["cal_max"] = min(float(heatmap.min()), 0.0), 1.0
    header["descrip"] = b"class activation map"
    image = type(like)(np.asarray(heatmap, np.float32), like.affine, header)
    # Without a time in it, so that the same map makes the same file.
    content = io.BytesIO()
    with gzip.GzipFile("", "wb", 6, content, mtime=0) as packed:
        packed.write(image.to_bytes())
    return content.getvalue()


def save_animation(frames: Sequence["Image"], path: str | os.PathLike, seconds: float = 0.0) -> None:
    """Write pictures of one size as an animated WebP without end; the file appears whole or not at all.

    Args:
        frames: PIL images, one or more.
        path: the file.
        seconds: what they last together; 0, the default: `FRAME_MS` milliseconds each.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    content = encoded_animation(frames, seconds)
    with images.atomic_write(path) as file:
        file.write(content)


def encoded_animation(frames: Sequence["Image"], seconds: float = 0.0) -> bytes:
    """The bytes of the file that `save_animation` writes."""
    duration = max(1, round(1000 * seconds / len(frames))) if seconds else FRAME_MS
    packed = io.BytesIO()  # Pillow's encoder seeks
    options = {"duration": duration, "loop": 0, "quality": 85, "method": 2}
    frames[0].save(packed, "WEBP", save_all=True, append_images=frames[1:], **options)
    return packed.getvalue()


def draw_slices(
    volume: Volume, seen: torch.Tensor, heatmap: np.ndarray, height: int, colormap: str, difference: bool = False
) -> "Image":
    """Nine slices of a scan with a map over them, as `images.montage` lays them out.

    A scan with an affine is drawn as radiologists look at it: the slices lie across the axis of the widest spacing, the
    patient's right is on the left, and what is in front or above is at the top. Other scans are drawn along D. Black
    and white are the 0.5th and the 99.5th percentile.

    Args:
        volume: whose axes they are.
        seen: (C, D, H, W), what the network saw of it; the first channel is drawn.
        heatmap: (d, h, w) in [0, 1].
        height: of the picture, in pixels.
        colormap: name of a matplotlib colour map.
        difference: the map is a difference of two, in [-1, 1].

    Returns:
        PIL image, mode "RGB".
    """
    from PIL.Image import Resampling

    slices, aspect = _upright(volume, seen[0].float().numpy())
    some = slices.reshape(-1)[:: max(1, slices.size // N_SAMPLED)]
    black, white = np.percentile(some, DRAWN_PERCENTILES)
    if black < white:
        slices = slices.clip(black, white)
    heat = _upright(volume, heatmap)[0]
    sheet = images.montage(slices, heat, N_SLICES, colormap=colormap, difference=difference)
    width = max(1, round(sheet.width * height / sheet.height * aspect))
    return sheet.resize((width, height), Resampling.BILINEAR)


def _upright(volume, values):
    """(slices, rows, columns) of (D, H, W), and how much wider than high a pixel is."""
    if volume.nifti is None:
        return values, 1.0
    import nibabel

    affine = volume.nifti.affine
    turns = nibabel.io_orientation(affine)
    values = nibabel.apply_orientation(values, turns)
    spacing = np.empty(3)
    spacing[turns[:, 0].astype(int)] = nibabel.affines.voxel_sizes(affine)
    across = max(range(3), key=lambda axis: (round(float(spacing[axis]), 3), axis))
    columns, rows = (spacing[axis] for axis in range(3) if axis != across)
    # Axes grow to the patient's right, front and head; rows are counted from the top.
    return np.moveaxis(values, across, 0).transpose(0, 2, 1)[:, ::-1, ::-1], float(columns / rows)


def frames_of(seen: torch.Tensor) -> Iterator["Image"]:
    """The frames (3, T, H, W), uint8, as PIL images."""
    from PIL import Image

    for frame in seen.permute(1, 2, 3, 0).numpy():
        yield Image.fromarray(np.ascontiguousarray(frame))
