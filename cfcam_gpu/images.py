"""Photographs in, pictures out: robust loading, heat-map overlays, captioned panels and atomic writes."""

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from warnings import catch_warnings, filterwarnings

import numpy as np

from cfcam_gpu.checks import did_you_mean, needs

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".hif"),
    *(".bmp", ".gif", ".tif", ".tiff", ".jp2", ".pgm", ".ppm"),
)
"""What counts as an image when a folder is listed; a file that is named is always tried."""

BIT_DEPTHS = (8, 10, 12, 14, 16)
"""What instruments record; the numbers are stored in 16 bits all the same."""

BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, PLANAR, SAMPLE_FORMAT = 258, 262, 274, 284, 339
SMALLEST_SAMPLE, LARGEST_SAMPLE = 340, 341
"""TIFF tags; the last two are SMinSampleValue and SMaxSampleValue."""

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Bytes 8 to 12 of a HEIF file, whatever its extension."""

LEVELS = 256
"""Of the heat in an overlay: as many as a palette has."""

MARGIN = 0.03
"""White space around the panels of ``side_by_side``, as a share of their height."""

CAPTION_SIZE = 0.065
"""Caption font size, as a share of the panels' height."""

SMALLEST_CAPTION = 0.7
"""A long caption shrinks to this share of CAPTION_SIZE before it is cut with an ellipsis."""


def _pillow():
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError(needs("pillow")) from error
    return PIL


def load_image(path: str | os.PathLike) -> "Image":
    """The first frame of an image file as the viewer is meant to see it: upright, opaque, 8-bit RGB.

    The EXIF or TIFF orientation is applied, transparency is laid over white, and what a TIFF file stores with 0 for
    white is inverted. Of greyscale in more than 8 bits, integers or floats, and of 16-bit colours in a TIFF file, black
    and white are the first of these that holds all pixels:

    1. a TIFF file's own SMinSampleValue (or 0) and SMaxSampleValue;
    2. floats: 0 and 1; integers: 0 and the largest number of as many bits as a TIFF file's BitsPerSample, if below 16,
       else of 8, 10, 12, 14 or 16 bits. So a scan of 12 bits in a 16-bit file is not nearly black, and neither is a
       dark photograph of 16 bits whose pixels all fit in 12;
    3. the smallest and the largest pixel.

    Args:
        path: the file, in any format that Pillow reads. HEIC and HEIF need the package pillow-heif. TIFF files of
            float16 or float64, and of 16-bit colours, are read by tifffile, which comes with scikit-image; without it
            16-bit colours keep 8 bits, unless those are not enough.

    Returns:
        PIL image, mode "RGB".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, is empty, is no image, is cut short or has too many pixels; the message
            begins with the path.
        ImportError: Pillow is not installed; or the file needs pillow-heif or tifffile, which is not.

    >>> load_image("cat.jpg").mode
    'RGB'
    """
    with any_size():
        return read_image(path)


@contextmanager
def any_size() -> Iterator[None]:
    """Without Pillow's warning at half its limit: 100-megapixel photographs are no attack. Not for several threads at
    once: ``catch_warnings`` in one takes back what another has set."""
    with catch_warnings():
        filterwarnings("ignore", "Image size .* exceeds limit")  # not its class: what is read may not need Pillow
        yield


def read_image(
    path: str | os.PathLike,
    content: bytes | None = None,
    max_pixels: int | None = None,
    formats: Sequence[str] | None = None,
) -> "Image":
    """`load_image` for several threads at once, which leaves Pillow's DecompressionBombWarning to the caller.

    Args:
        path: the file.
        content: its bytes, where it is part of another file; ``path`` is then what errors call it.
        max_pixels: an image of more is refused by what the file says of its size, before it is decoded; None (default):
            Pillow's own limit.
        formats: the names, as Pillow has them, of the formats to try, beside HEIF; None (default): all.

    Raises:
        As `load_image`.
    """
    PIL = _pillow()
    if content is None:
        path = check_file(path)
    elif not content:
        raise ValueError(f"{path}: the file is empty")
    try:
        # Not by its name: of a file that it maps into memory, Pillow turns a TIFF's rows and columns wrongly.
        with open(path, "rb") if content is None else BytesIO(content) as file:
            return _decode(path, file, lambda: path if content is None else BytesIO(content), max_pixels, formats)
    except ImportError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image in a known format") from error
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too many pixels: {error}") from error
    except Exception as error:  # decoders meet broken files with SyntaxError, struct.error, EOFError and more
        raise ValueError(f"{path}: cannot be decoded: {error or type(error).__name__}") from error


def check_file(path: str | os.PathLike, expected: str = "an image file") -> Path:
    """The path of a file that is there and not empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, is empty or cannot be read; the message begins with the path.
    """
    path = Path(path)
    try:
        n_bytes = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # a name that is too long, a folder that is closed, a null character
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not path.is_file():
        raise ValueError(f"{path}: expected {expected}, got a {'folder' if path.is_dir() else 'special file'}")
    if not n_bytes:
        raise ValueError(f"{path}: the file is empty")
    return path


def image_of(values: np.ndarray) -> "Image":
    """An array as a picture: uint8 as it is, other numbers scaled as `load_image` scales those of a file.

    Args:
        values: (H, W) or (H, W, 3) of real numbers.

    Returns:
        PIL image, mode "RGB".

    Raises:
        ValueError: NaN or infinity.
    """
    values = values.astype(np.float32) if values.dtype == bool else values  # black and white, not two dark greys
    return _rgb(_pillow().Image.fromarray(values if values.dtype == np.uint8 else _eight_bit(values, {})))


def _decode(path, file, whole, max_pixels, formats):
    """The image in ``file``; ``whole()`` is it again from its beginning, for the other packages that read images."""
    PIL = _pillow()
    try:
        image = PIL.Image.open(file, formats=formats)
    except PIL.UnidentifiedImageError:
        file.seek(0)
        head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS:
            image = _open_heif(path, whole())
        elif head[4:12] in (b"ftypavif", b"ftypavis"):
            from PIL import features

            if "avif" in features.modules and features.check("avif"):
                raise
            raise ValueError("AVIF needs Pillow 11.3 or later, built with it") from None
        elif head[:4] in (b"II*\0", b"MM\0*"):
            try:
                import tifffile  # noqa: F401
            except ImportError as error:
                raise ImportError(f"{path}: a TIFF file that Pillow cannot read: {needs('tifffile')}") from error
            return _rgb(_read_tiff(whole(), max_pixels))
        else:
            raise
    with image:
        _check_pixels(*image.size, max_pixels)
        tags = getattr(image, "tag_v2", {})
        if image.mode in ("RGB", "RGBA") and set(tags.get(BITS_PER_SAMPLE, ())) == {16}:
            return _rgb(_read_deep_colours(whole(), image))
        tags = dict(tags)  # when it is loaded, a TIFF image is turned upright and loses some
        image.load()
        upright = PIL.ImageOps.exif_transpose(image)
        if upright.mode == "F" or upright.mode.startswith("I"):
            upright = PIL.Image.fromarray(_eight_bit(np.asarray(upright), tags))
        return _rgb(upright)


def _check_pixels(width, height, max_pixels):
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(f"too many pixels: {width} x {height}, at most {max_pixels} are taken")


def _open_heif(path, file):
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImportError(f"{path}: HEIC and HEIF: {needs('pillow-heif', 'heif')}") from error
    return HeifImageFile(file)


def _read_deep_colours(file, image):
    """16-bit colours by tifffile: Pillow keeps their high bytes, and of separate planes the low ones."""
    PIL = _pillow()
    planar = image.tag_v2.get(PLANAR, 1)
    try:
        return _read_tiff(file, None)
    except Exception as error:  # tifffile is missing, or what it needs for this compression
        image.load()
        if planar != 1 or max(high for _, high in image.convert("RGB").getextrema()) < 64:
            raise ValueError(f"its 16-bit colours need tifffile: {error}") from error
    return PIL.ImageOps.exif_transpose(image)


def _read_tiff(file, max_pixels):
    PIL = _pillow()
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        _check_pixels(page.imagewidth, page.imagelength, max_pixels)
        values, tags = page.asarray(), {tag.code: tag.value for tag in page.tags}
        values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
    if values.ndim == 2:
        image = PIL.Image.fromarray(_eight_bit(values, tags))
    elif values.ndim == 3 and values.shape[2] in (3, 4):
        parts = [_eight_bit(part, tags) for part in (values[..., :3], values[..., 3:]) if part.size]
        image = PIL.Image.fromarray(np.concatenate(parts, axis=2))
    else:
        raise ValueError(f"expected greyscale or RGB, got shape {values.shape}")
    image.getexif()[ORIENTATION] = tags.get(ORIENTATION, 1)
    return PIL.ImageOps.exif_transpose(image)


def _rgb(image):
    PIL = _pillow()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


def _eight_bit(values, tags):
    """Integers of more than 8 bits, or floats, as 0 to 255 (uint8); ``tags`` are a TIFF file's, or empty."""
    if values.dtype == np.int32 and _first(tags, BITS_PER_SAMPLE) == 32 and _first(tags, SAMPLE_FORMAT, 1) == 1:
        values = values.view(np.uint32)  # Pillow has no mode for it
    floating = values.dtype.kind == "f"
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the pixels must be finite, got NaN or infinity")
    low, high = _black_and_white(values.min(), values.max(), floating, tags)
    levels = np.rint(255.0 * ((values - low) / max(high - low, 1e-300))).astype(np.uint8)
    return 255 - levels if _first(tags, PHOTOMETRIC) == 0 else levels


def _black_and_white(smallest, largest, floating, tags):
    choices = [(_first(tags, SMALLEST_SAMPLE, 0), _first(tags, LARGEST_SAMPLE, 0))]
    if floating:
        choices.append((0, 1))
    else:
        stored = _first(tags, BITS_PER_SAMPLE, 16)
        choices += [(0, 2**bits - 1) for bits in (*([stored] if stored < 16 else []), *BIT_DEPTHS)]
    fitting = ((low, high) for low, high in choices if low < high and low <= smallest and largest <= high)
    return next(fitting, (smallest, largest))


def _first(tags, code, default=None):
    """A tag's value, of the first channel where it has one for each."""
    value = tags.get(code)
    if isinstance(value, (tuple, list, np.ndarray)):
        value = value[0] if len(value) else None
    return default if value is None else value


def overlay(image: "Image", heatmap: Any, colormap: str = "inferno", alpha: float = 0.7) -> "Image":
    """The heat map over the photograph: hot regions take the colour map's colours, cold ones stay as they are.

    A pixel of heat m becomes (1 - a) * photograph + a * colour(m), with the opacity a = alpha * m.

    Args:
        image: PIL image; the result has its size.
        heatmap: (h, w) array or tensor of floats in [0, 1]; resized bilinearly to the image.
        colormap: name of a matplotlib colour map; default "inferno", whose lightness rises with the heat.
        alpha: opacity of the hottest point, in [0, 1]; default 0.7.

    Returns:
        PIL image, mode "RGB".

    Raises:
        TypeError: heatmap is not an array of real numbers.
        ValueError: heatmap is not 2-D, is empty or leaves [0, 1]; alpha leaves [0, 1]; colormap is unknown.
        ImportError: Pillow or matplotlib is not installed.

    >>> overlay(photo, maps[0]).size == photo.size
    True
    """
    return _overlay(image, "heatmap", heatmap, 0, colormap, alpha)


def overlay_difference(image: "Image", difference: Any, colormap: str = "RdBu_r", alpha: float = 0.7) -> "Image":
    """The difference of two heat maps over the photograph: one hue where the first is hotter, another where the second.

    A pixel of difference d becomes (1 - a) * photograph + a * colour((1 + d) / 2), with the opacity a = alpha * |d|:
    where the two agree, the photograph stays as it is.

    Args:
        image: PIL image; the result has its size.
        difference: (h, w) array or tensor of floats in [-1, 1], the first map minus the second; resized bilinearly to
            the image.
        colormap: name of a matplotlib colour map, best a diverging one; default "RdBu_r", red where the first is
            hotter and blue where the second is, which colour-blind people can tell apart.
        alpha: opacity where the difference is 1 or -1, in [0, 1]; default 0.7.

    Returns:
        PIL image, mode "RGB".

    Raises:
        TypeError: difference is not an array of real numbers.
        ValueError: difference is not 2-D, is empty or leaves [-1, 1]; alpha leaves [0, 1]; colormap is unknown.
        ImportError: Pillow or matplotlib is not installed.

    >>> overlay_difference(photo, maps[0] - maps[1]).size == photo.size
    True
    """
    return _overlay(image, "difference", difference, -1, colormap, alpha)


def montage(
    volume: Any,
    heatmap: Any,
    n_slices: int = 9,
    axis: int = 0,
    colormap: str = "inferno",
    alpha: float = 0.7,
    difference: bool = False,
) -> "Image":
    """Slices of a volume, or frames of a video, with the heat map over each, row by row in one picture.

    Args:
        volume: (D, H, W) array or tensor of real numbers, black and white at its smallest and largest value; or frames
            (D, H, W, 3) in 0 to 255.
        heatmap: (d, h, w) of floats in [0, 1]; the slice nearest to each of the volume's is taken, and resized
            bilinearly to it.
        n_slices: how many, evenly spread; default 9, at most as many as there are.
        axis: along which the slices are counted: 0 (default), 1 or 2.
        colormap, alpha: as for `overlay`.
        difference: heatmap is the difference of two maps, in [-1, 1], and is drawn as `overlay_difference` draws it;
            "RdBu_r" is then the colour map to pass. Default False.

    Returns:
        PIL image, mode "RGB": as many columns as rows, or one more.

    Raises:
        TypeError: an argument is not an array of real numbers, or n_slices or axis no integer.
        ValueError: shapes of another kind, n_slices below 1, an axis that is not there; as for `overlay`.
        ImportError: Pillow or matplotlib is not installed.

    >>> montage(scan, maps[0], n_slices=4).size  # scan (16, 112, 112)
    (224, 224)
    """
    PIL = _pillow()
    volume, heatmap = (_array(name, each) for name, each in (("volume", volume), ("heatmap", heatmap)))
    in_colour = volume.ndim == 4 and volume.shape[-1] == 3
    if not (volume.ndim == 3 or in_colour) or 0 in volume.shape:
        raise ValueError(f"volume must be (D, H, W) or (D, H, W, 3) and not empty, got {volume.shape}")
    if heatmap.ndim != 3 or 0 in heatmap.shape:
        raise ValueError(f"heatmap must be (d, h, w) and not empty, got {heatmap.shape}")
    for name, value in (("n_slices", n_slices), ("axis", axis)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if n_slices < 1:
        raise ValueError(f"n_slices must be at least 1, got {n_slices}")
    if axis not in (0, 1, 2):
        raise ValueError(f"axis must be 0, 1 or 2, got {axis}")
    if not in_colour:
        low, high = float(volume.min()), float(volume.max())
        volume = 255 * (volume - low) / max(high - low, 1e-300)
    volume, heatmap = np.moveaxis(volume, axis, 0), np.moveaxis(heatmap, axis, 0)
    depth, times = len(volume), len(heatmap) / len(volume)
    chosen = np.unique(np.linspace(0, depth - 1, min(n_slices, depth)).round().astype(int))
    tiles, over = [], overlay_difference if difference else overlay
    for index in chosen:
        photo = PIL.Image.fromarray(np.rint(volume[index]).clip(0, 255).astype(np.uint8))
        nearest = min(int((index + 0.5) * times), len(heatmap) - 1)
        tiles.append(over(photo.convert("RGB"), np.ascontiguousarray(heatmap[nearest]), colormap, alpha))
    n_columns = math.ceil(math.sqrt(len(tiles)))
    width, height = tiles[0].size
    sheet = PIL.Image.new("RGB", (n_columns * width, math.ceil(len(tiles) / n_columns) * height))
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % n_columns * width, place // n_columns * height))
    return sheet


def _array(name, values):
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of real numbers, got {values.dtype}")
    return values.astype(np.float32)


def _overlay(image, name, values, low, colormap, alpha):
    """Values in [low, 1] over the photograph: their size is the opacity, and the colours span their whole range."""
    PIL = _pillow()
    values = _checked_values(name, values, low)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    palette = _palette(get_colormap(colormap))
    # In eight bits and by Pillow: in floating point this is half of what a run that writes overlays does.
    times = LEVELS / (1 - low)
    level = PIL.Image.fromarray(values).point(lambda value: value * times - low * times).convert("L")  # floor, to 255
    level = level.resize(image.size, PIL.Image.Resampling.BILINEAR)
    size = np.abs(low + (1 - low) * np.linspace(0, 1, LEVELS))
    size = (size - size.min()) / (1 - size.min())  # of a difference, both levels beside its middle are nothing
    opacity = level.point(np.rint(255 * alpha * size).tolist())
    level.putpalette(palette)
    mixed = image.convert("RGB")  # a copy
    mixed.paste(level.convert("RGB"), mask=opacity)
    return mixed


def _palette(colormap):
    """The colours at the middles of `LEVELS` equal parts of a colour map, as Pillow takes them."""
    return np.rint(255 * colormap((np.arange(LEVELS) + 0.5) / LEVELS)[:, :3]).astype(np.uint8).tobytes()


def _checked_values(name, values, low):
    if hasattr(values, "detach"):
        values = values.detach().cpu().float().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of real numbers, got {type(values).__name__} of {array.dtype}")
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} must have shape (h, w), got {array.shape}")
    array = array.astype(np.float32)
    if not (array.min() >= low and array.max() <= 1.0):  # also refuses NaN
        raise ValueError(f"{name} must be in [{low}, 1], got values from {array.min()} to {array.max()}")
    return array


def get_colormap(name: str) -> Any:
    """matplotlib's colour map of that name; ValueError with close matches when there is none."""
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError(needs("matplotlib")) from error
    if name not in colormaps:
        raise ValueError(f"colormap must be one of matplotlib's, got {name!r}{did_you_mean(name, list(colormaps))}")
    return colormaps[name]


def side_by_side(panels: Sequence["Image"], captions: Sequence[str]) -> "Image":
    """The panels in a row on white, each with its caption beneath.

    Args:
        panels: PIL images, one or more; each is resized to the first one's height.
        captions: one string per panel; a long one shrinks and then ends in an ellipsis, never clipped.

    Returns:
        PIL image, mode "RGB".

    Raises:
        ValueError: no panel, or the two counts differ.
        ImportError: Pillow is not installed.

    >>> side_by_side([photo, overlay(photo, heat)], ["photograph", "Egyptian cat 0.38"])
    """
    PIL = _pillow()
    panels, captions = list(panels), list(captions)
    if not panels or len(panels) != len(captions):
        raise ValueError(f"expected one caption per panel, got {len(panels)} panels and {len(captions)} captions")
    height = panels[0].height
    widths = [max(1, round(panel.width * height / panel.height)) for panel in panels]
    margin, font_size = max(2, round(MARGIN * height)), max(10, round(CAPTION_SIZE * height))
    band = round(1.9 * font_size)
    size = (sum(widths) + margin * (len(panels) + 1), height + margin + band)
    canvas = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(canvas)
    left = margin
    for panel, width, caption in zip(panels, widths, captions):
        # A photograph has some megabytes: each copy that is none counts where thousands are drawn.
        panel = panel if panel.mode == "RGB" else panel.convert("RGB")
        if panel.size != (width, height):
            panel = panel.resize((width, height), PIL.Image.Resampling.LANCZOS)
        canvas.paste(panel, (left, margin))
        # File names may hold bytes that are no characters.
        caption = str(caption).encode("utf-8", "replace").decode()
        text, font = _fitted(" ".join(caption.split()), width, font_size)
        draw.text((left + width / 2, margin + height + band / 2), text, fill="black", font=font, anchor="mm")
        left += width + margin
    return canvas


@lru_cache(maxsize=64)
def _font(size):
    """Pillow's own font, which each call of its would decode anew."""
    return _pillow().ImageFont.load_default(size)


def _fitted(text, width, font_size):
    """The text and font that fit in ``width`` pixels: smaller type first, then an ellipsis before the last word.

    The last word of a caption is its score, so the middle is what gives way.
    """
    font = _font(font_size)
    if font.getlength(text) > width:
        font = _font(max(SMALLEST_CAPTION * font_size, font_size * 0.98 * width / font.getlength(text)))
    head, _, tail = text.rpartition(" ")
    while font.getlength(text) > width and len(text) > 1:
        if head:
            head = head[:-1].rstrip()
            text = f"{head}\u2026 {tail}"
        else:
            tail = tail[:-1]
            text = f"{tail}\u2026"
    return text, font


def save_image(image: "Image", path: str | os.PathLike) -> None:
    """Write a PIL image, in the format that the extension names; the file appears whole or not at all.

    Raises:
        ValueError: the extension names no format that Pillow writes.
        OSError: the folder is missing or cannot be written to.
    """
    PIL = _pillow()
    path = Path(path)
    kind = PIL.Image.registered_extensions().get(path.suffix.lower())
    if kind not in PIL.Image.SAVE:
        raise ValueError(f"{path}: expected an extension of an image format, got {path.suffix!r}")
    with atomic_write(path) as file:
        image.save(file, format=kind)


@contextmanager
def atomic_write(path: str | os.PathLike, part: Path | None = None, sync: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes the place ``path`` when the block ends, and vanishes when it raises.

    Args:
        path: the file.
        part: where it is until then, in the same file system; default: beside ``path``.
        sync: it is on the disk when it gets its name.
    """
    path = Path(path)
    if part is None:
        # Not the whole name: with more before and behind it, it may be too long for the file system.
        part = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
