"""Loading of every kind of image file, overlays, captions and atomic writes."""

import struct
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from matplotlib import colormaps
from PIL import features

from cfcam_gpu import images


@pytest.fixture
def noise(rng):
    """A random RGB photograph, wider than high."""
    return Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "webp"])
def test_lossless_formats_come_back_exactly(noise, tmp_path, extension):
    path = tmp_path / f"noise.{extension}"
    noise.save(path, lossless=True)
    assert images.load_image(path).mode == "RGB"
    assert (pixels(images.load_image(str(path))) == pixels(noise)).all()


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),  # outside 16 bits: its own range
        (np.array([[0, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[1000, 3000, 5000]], np.float32), [0, 128, 255]),
        (np.array([[7, 7]], np.float32), [0, 0]),  # constant: no range to stretch
    ],
)
def test_wide_greyscale_is_scaled_and_not_clipped(tmp_path, values, expected):
    path = tmp_path / "wide.tif"
    Image.fromarray(values).save(path)
    assert pixels(images.load_image(path)).tolist() == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize("bits", images.BIT_DEPTHS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_largest_value_decides_how_many_bits_there_are(rng, tmp_path, bits, dtype):
    largest = 2**bits - 1
    values = rng.integers(0, largest, (9, 7))
    values[4, 3] = rng.integers(largest - largest // 8, largest + 1)
    Image.fromarray(values.astype(dtype)).save(tmp_path / "scan.tif")
    got = pixels(images.load_image(tmp_path / "scan.tif"))
    assert (got == np.rint(255 * values / largest)[..., None]).all()
    if dtype == np.uint16:
        Image.fromarray(values.astype(dtype)).save(tmp_path / "scan.png")
        assert (pixels(images.load_image(tmp_path / "scan.png")) == got).all()


def test_packed_twelve_bits_are_twelve_however_small_the_values(rng, tmp_path):
    values = rng.integers(0, 900, (4, 6))
    bits = "".join(f"{value:012b}" for value in values.flat)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = [(256, 6), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "packed.tif").write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory)
    assert (pixels(images.load_image(tmp_path / "packed.tif")) == np.rint(255 * values / 4095)[..., None]).all()


def test_the_sample_range_of_a_tiff_file_is_taken(rng, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for dtype, code, low, high in ((np.uint16, 3, 300, 1700), (np.float32, 11, 0.25, 0.75)):
        values = rng.uniform(low, high, (5, 6)).astype(dtype)
        tags = [(images.SMALLEST_SAMPLE, code, 1, low, True), (images.LARGEST_SAMPLE, code, 1, high, True)]
        tifffile.imwrite(tmp_path / "ranged.tif", values, photometric="minisblack", extratags=tags)
        expected = 255 * (values.astype(float) - low) / (high - low)
        assert np.abs(pixels(images.load_image(tmp_path / "ranged.tif"))[..., 0] - expected).max() < 0.51
        values[0, 0] = 3 * high  # outside what the tags say: they are not believed
        tifffile.imwrite(tmp_path / "ranged.tif", values, photometric="minisblack", extratags=tags)
        assert len(np.unique(pixels(images.load_image(tmp_path / "ranged.tif")))) > 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float16, np.float64])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_zero_for_white(rng, tmp_path, dtype, byteorder):
    tifffile = pytest.importorskip("tifffile")
    top = {"u": np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 0, "f": 1}[np.dtype(dtype).kind]
    values = (rng.uniform(0, 1, (5, 6)) * top).astype(dtype)
    values[0, :2] = 0, top
    levels = {}
    for photometric in ("minisblack", "miniswhite"):
        tifffile.imwrite(tmp_path / "scan.tif", values, photometric=photometric, byteorder=byteorder)
        levels[photometric] = pixels(images.load_image(tmp_path / "scan.tif"))[..., 0]
    assert np.abs(levels["minisblack"] - 255 * values.astype(float) / top).max() < 0.51
    assert (levels["minisblack"] + levels["miniswhite"] == 255).all()


def test_unsigned_32_bits(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "wide.tif", np.array([[0, 2**31 - 1, 2**32 - 1]], np.uint32), photometric="minisblack")
    assert pixels(images.load_image(tmp_path / "wide.tif"))[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colours(rng, tmp_path, bits, planes, channels):
    tifffile = pytest.importorskip("tifffile")
    largest = 2**bits - 1
    values = rng.integers(0, largest + 1, (5, 6, channels))
    values[0, 0] = largest
    options = {"photometric": "rgb", "planarconfig": planes, "extrasamples": ["unassalpha"] if channels == 4 else None}
    stored = np.moveaxis(values, 2, 0) if planes == "separate" else values
    turned = [(images.ORIENTATION, 3, 1, 6, True)]
    tifffile.imwrite(tmp_path / "deep.tif", stored.astype(np.uint16), extratags=turned, **options)
    got = pixels(images.load_image(tmp_path / "deep.tif"))
    expected = 255 * values / largest
    if channels == 4:
        expected = 255 + (expected[..., :3] - 255) * expected[..., 3:] / 255
    assert np.abs(got - np.rot90(expected, -1)).max() < 2


def test_sixteen_bit_colours_without_tifffile(rng, tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for largest in (4095, 65535):
        values = rng.integers(0, largest, (5, 6, 3)).astype(np.uint16)
        values[0, 0] = largest
        tifffile.imwrite(tmp_path / "deep.tif", values, photometric="rgb")
        if largest == 65535:
            assert np.abs(pixels(images.load_image(tmp_path / "deep.tif")) - values / 257).max() < 1.1
        else:  # in Pillow's eight bits there would be 16 levels
            with pytest.raises(ValueError, match="deep.tif: cannot be decoded: its 16-bit colours need tifffile"):
                images.load_image(tmp_path / "deep.tif")


def test_sixteen_bit_png(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 25700, 65535]], np.uint16)).save(path)
    assert pixels(images.load_image(path))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk(tmp_path):
    path = tmp_path / "print.tif"
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(path)
    assert pixels(images.load_image(path))[0, 0].tolist() == [255, 0, 0]


def test_bilevel(tmp_path):
    path = tmp_path / "fax.png"
    Image.fromarray(np.array([[True, False]])).save(path)
    assert pixels(images.load_image(path)).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("mode, color", [("RGBA", (255, 0, 0, 128)), ("LA", (0, 128))])
def test_transparency_is_laid_over_white(tmp_path, mode, color):
    path = tmp_path / "glass.png"
    Image.new(mode, (2, 2), color).save(path)
    expected = [255, 127, 127] if mode == "RGBA" else [127] * 3
    assert pixels(images.load_image(path))[0, 0].tolist() == expected


def test_transparent_palette_entry_is_white(tmp_path):
    path = tmp_path / "palette.png"
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=0)
    assert pixels(images.load_image(path)).tolist() == [[[255] * 3, [0, 0, 200]]]


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, extension):
    path = tmp_path / f"film.{extension}"
    frames = [Image.new("RGB", (4, 4), color) for color in ("black", "white", "red")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(path).n_frames == 3
    assert (pixels(images.load_image(path)) == 0).all()


@pytest.mark.parametrize("extension", ["png", "tif", "webp", "jpg", "jfif", "jpe", "avif"])
def test_exif_rotation_is_applied(noise, tmp_path, extension):
    path = tmp_path / f"phone.{extension}"
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn a quarter clockwise to view
    photograph = noise.resize((4, 3)).resize((64, 48))  # smooth, so that a lossy format keeps it
    photograph.save(path, exif=exif, lossless=True, quality=100)
    tolerance = 0 if extension in ("png", "tif", "webp") else 20
    expected = np.rot90(pixels(photograph), -1)
    assert np.abs(pixels(images.load_image(path)) - expected).mean() <= tolerance / 2
    assert tolerance or (pixels(images.load_image(path)) == expected).all()


@pytest.mark.parametrize(
    "dtype, extension", [(np.uint16, "png"), (np.uint16, "tif"), (np.float32, "tif"), (np.uint8, "tif")]
)
def test_exif_rotation_of_greyscale(rng, tmp_path, dtype, extension):
    values = rng.uniform(0, 1, (5, 8)) * (1 if dtype == np.float32 else np.iinfo(dtype).max)
    exif = Image.Exif()
    exif[0x0112] = 8
    image = Image.fromarray(values.astype(dtype))
    image.save(tmp_path / f"upright.{extension}")
    image.save(tmp_path / f"turned.{extension}", exif=exif)
    upright, turned = (pixels(images.load_image(tmp_path / f"{name}.{extension}")) for name in ("upright", "turned"))
    assert (turned == np.rot90(upright)).all() and turned.shape == (8, 5, 3)


def test_heif(noise, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = noise.resize((4, 3)).resize((64, 48))
    pillow_heif.from_pillow(photograph).save(tmp_path / "phone.heic", quality=95, exif=exif.tobytes())
    (tmp_path / "phone.jpg").write_bytes((tmp_path / "phone.heic").read_bytes())  # as some apps name it
    for name in ("phone.heic", "phone.jpg"):
        got = pixels(images.load_image(tmp_path / name))
        assert np.abs(got - np.rot90(pixels(photograph), -1)).mean() < 10


def test_double_precision_without_tifffile(tmp_path, monkeypatch):
    pytest.importorskip("tifffile").imwrite(tmp_path / "double.tif", np.zeros((2, 3)), photometric="minisblack")
    assert (pixels(images.load_image(tmp_path / "double.tif")) == 0).all()
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match=r'double.tif: .* tifffile is not installed; .*"cfcam_gpu\[demo\]"'):
        images.load_image(tmp_path / "double.tif")


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heif_without_its_package(tmp_path, monkeypatch, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "phone.heic").write_bytes(struct.pack(">I4s4sI", 24, b"ftyp", brand, 0) + b"mif1heic" * 9)
    with pytest.raises(ImportError, match=r'phone.heic: HEIC and HEIF: .* pip install "cfcam_gpu\[heif\]"'):
        images.load_image(tmp_path / "phone.heic")


def test_a_broken_avif(tmp_path):
    (tmp_path / "phone.avif").write_bytes(struct.pack(">I4s4sI", 28, b"ftyp", b"avif", 0) + b"broken" * 9)
    message = "not an image in a known format" if features.check("avif") else "AVIF needs Pillow 11.3"
    with pytest.raises(ValueError, match=f"phone.avif: .*{message}"):
        images.load_image(tmp_path / "phone.avif")


def test_a_name_that_no_file_can_have(tmp_path):
    for name, reason in (("x" * 300 + ".png", "File name too long"), ("a\0b.png", "null")):
        with pytest.raises(ValueError, match=f"cannot be read: .*{reason}"):
            images.load_image(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="no such file"):
        images.load_image(tmp_path / "file" / "cat.png")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such file"):
        images.load_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "tif", "webp"])
def test_a_truncated_file(noise, tmp_path, extension):
    whole, cut = tmp_path / f"whole.{extension}", tmp_path / f"cut.{extension}"
    noise.resize((200, 200)).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"cut.{extension}: "):
        images.load_image(cut)


def test_files_that_are_no_images(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image, whatever its name says")
    Image.new("L", (40, 40)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name, reason in {
        ".": "expected an image file, got a folder",
        "empty.png": "the file is empty",
        "text.png": "not an image in a known format",
        "huge.png": "too many pixels: .*1600 pixels",
    }.items():
        with pytest.raises(ValueError, match=f"{tmp_path / name}: {reason}"):
            images.load_image(tmp_path / name)


def test_a_float_image_with_nan(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="must be finite"):
        images.load_image(tmp_path / "nan.tif")


def test_overlay_keeps_the_cold_and_colours_the_hot(noise):
    heat = np.zeros((4, 6), np.float32)
    heat[0, 0] = 1
    result = pixels(images.overlay(noise, heat, "viridis", alpha=1.0))
    assert result.shape == pixels(noise).shape
    assert (result[0, 0] == np.rint(255 * np.array(colormaps["viridis"](1.0)[:3]))).all()
    assert (result[10:, 15:] == pixels(noise)[10:, 15:]).all()
    half = pixels(images.overlay(noise, torch.from_numpy(heat).double(), "viridis", alpha=0.5))
    assert np.abs(half[0, 0] - (result[0, 0] + pixels(noise)[0, 0]) / 2).max() <= 1


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"heatmap": np.full((2, 2), np.nan)}, ValueError, r"heatmap must be in \[0, 1\], got values from nan"),
        ({"heatmap": np.full((2, 2), 1.5)}, ValueError, r"heatmap must be in \[0, 1\], got values from 1.5 to 1.5"),
        ({"heatmap": np.zeros((1, 2, 2))}, ValueError, r"heatmap must have shape \(h, w\), got \(1, 2, 2\)"),
        ({"heatmap": np.zeros((0, 2))}, ValueError, r"heatmap must have shape \(h, w\), got \(0, 2\)"),
        ({"heatmap": "hot"}, TypeError, "heatmap must be an array of real numbers, got str"),
        ({"alpha": 2}, ValueError, r"alpha must be in \[0, 1\], got 2"),
        ({"colormap": "viridish"}, ValueError, "colormap must be one of matplotlib's, .* did you mean viridis"),
    ],
)
def test_overlay_refuses(noise, change, error, message):
    with pytest.raises(error, match=message):
        images.overlay(**{"image": noise, "heatmap": np.zeros((2, 2)), **change})


def test_a_difference_of_zero_leaves_the_photograph(noise):
    for shape in ((20, 30), (4, 6), (1, 1), (50, 7)):
        assert (pixels(images.overlay_difference(noise, np.zeros(shape), alpha=1.0)) == pixels(noise)).all()


def test_overlay_difference_mixes_by_its_formula(noise, rng):
    difference = rng.uniform(-1, 1, (20, 30))
    difference.flat[:2] = 1, -1
    opacity = 0.6 * np.abs(difference)[..., None]
    expected = (1 - opacity) * pixels(noise) + opacity * 255 * colormaps["PuOr"]((1 + difference) / 2)[..., :3]
    result = pixels(images.overlay_difference(noise, torch.from_numpy(difference), "PuOr", alpha=0.6))
    # Half a level of rounding, and a colour of the map's 256 that float32 may round to its neighbour.
    assert np.abs(result - expected).max() < 5
    assert np.abs(result - expected).mean() < 0.5


def test_overlay_difference_tells_the_signs_apart_and_stretches_to_the_photograph():
    gray = Image.new("RGB", (30, 20), (128, 128, 128))
    difference = np.zeros((4, 6), np.float32)
    difference[0, 0], difference[-1, -1] = 1, -1
    result = pixels(images.overlay_difference(gray, difference))
    assert result.shape == (20, 30, 3)
    (first_red, _, first_blue), (second_red, _, second_blue) = result[0, 0], result[-1, -1]
    assert first_red > first_blue + 40 and second_blue > second_red + 40  # red against blue
    assert (result[:5, 15:] == 128).all() and (result[15:, :15] == 128).all()
    ends = pixels(images.overlay_difference(gray, difference, "coolwarm", alpha=1.0))[[0, -1], [0, -1]]
    assert (ends == np.rint(255 * colormaps["coolwarm"]([1.0, 0.0])[:, :3])).all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"difference": np.full((2, 2), np.nan)}, ValueError, r"difference must be in \[-1, 1\], got values from nan"),
        ({"difference": np.full((2, 2), 1.5)}, ValueError, r"difference must be in \[-1, 1\], got .* 1.5 to 1.5"),
        ({"difference": np.full((2, 2), -1.5)}, ValueError, r"difference must be in \[-1, 1\], got .* -1.5 to -1.5"),
        ({"difference": np.zeros((1, 2, 2))}, ValueError, r"difference must have shape \(h, w\), got \(1, 2, 2\)"),
        ({"difference": np.zeros((0, 2))}, ValueError, r"difference must have shape \(h, w\), got \(0, 2\)"),
        ({"difference": "hot"}, TypeError, "difference must be an array of real numbers, got str"),
        ({"alpha": -0.1}, ValueError, r"alpha must be in \[0, 1\], got -0.1"),
        ({"colormap": "coolworm"}, ValueError, "colormap must be one of matplotlib's, .* did you mean coolwarm"),
    ],
)
def test_overlay_difference_refuses(noise, change, error, message):
    with pytest.raises(error, match=message):
        images.overlay_difference(**{"image": noise, "difference": np.zeros((2, 2)), **change})


def test_panels_keep_their_pixels_and_captions_stay_in_their_columns(noise):
    panels = [noise.resize((120, 100)), noise.resize((240, 200))]
    row = images.side_by_side(panels, ["cat 0.38", "an endlessly long name of a class that nobody can read 0.25"])
    margin = round(images.MARGIN * 100)
    assert row.width == 2 * 120 + 3 * margin
    assert (pixels(row)[margin : margin + 100, margin : margin + 120] == pixels(panels[0])).all()
    ink = (pixels(row)[margin + 100 :].min((0, 2)) < 128).nonzero()[0]
    assert ((margin <= ink) & (ink < row.width - margin)).all()
    assert ((ink < margin + 120) | (ink >= 2 * margin + 120)).all()
    assert (ink < margin + 120).any() and (ink >= 2 * margin + 120).any()


def test_a_long_caption_keeps_its_score():
    text, font = images._fitted("an endlessly long name of a class that nobody can read 0.25", 150, 20)
    assert text.endswith("\u2026 0.25") and text.startswith("an endless")
    assert font.getlength(text) <= 150 and font.size >= 20 * images.SMALLEST_CAPTION - 1
    text, font = images._fitted("W" * 99, 60, 20)
    assert text.endswith("W\u2026") and font.getlength(text) <= 60
    assert images._fitted("cat 0.38", 150, 20)[0] == "cat 0.38"


def test_captions_and_panels_must_match(noise):
    with pytest.raises(ValueError, match="one caption per panel, got 1 panels and 2 captions"):
        images.side_by_side([noise], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 panels"):
        images.side_by_side([], [])


def test_a_failed_write_leaves_what_was_there(noise, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    images.save_image(noise, path)

    def fail_half_way(self, file, **options):
        file.write(b"half a picture")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises(OSError, match="disk is full"):
        images.save_image(noise.rotate(90), path)
    assert (pixels(images.load_image(path)) == pixels(noise)).all()
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_a_name_as_long_as_there_can_be_is_written(noise, tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    images.save_image(noise, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_caption_with_bytes_that_are_no_characters(noise):
    assert images.side_by_side([noise], ["caf\udce9"]).size == images.side_by_side([noise], ["cafe"]).size


def test_an_extension_without_a_format(noise, tmp_path):
    with pytest.raises(ValueError, match="expected an extension of an image format, got '.txt'"):
        images.save_image(noise, tmp_path / "picture.txt")


def test_a_montage_is_the_overlays_of_its_slices(rng):
    volume, heatmap = rng.normal(size=(8, 6, 10)), rng.random((4, 3, 5))
    sheet = images.montage(volume, torch.from_numpy(heatmap), n_slices=4)
    assert sheet.size == (20, 12)
    grey = 255 * (volume - volume.min()) / (volume.max() - volume.min())
    for place, index in enumerate((0, 2, 5, 7)):
        photo = Image.fromarray(np.rint(grey[index]).astype(np.uint8)).convert("RGB")
        expected = pixels(images.overlay(photo, heatmap[index // 2]))
        row, column = divmod(place, 2)
        found = pixels(sheet)[6 * row : 6 * row + 6, 10 * column : 10 * column + 10]
        assert np.abs(found - expected).max() <= 1
    assert images.montage(volume, heatmap, n_slices=99, axis=2).size == (4 * 6, 3 * 8)
    frames = rng.integers(0, 256, (5, 6, 10, 3))
    assert images.montage(frames, heatmap, n_slices=1).size == (10, 6)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((np.ones((4, 5)), np.ones((2, 2, 2))), ValueError, r"volume must be \(D, H, W\) or \(D, H, W, 3\)"),
        ((np.ones((4, 5, 6)), np.ones((2, 2))), ValueError, r"heatmap must be \(d, h, w\)"),
        ((np.ones((4, 5, 6)), np.ones((2, 2, 2)), 0), ValueError, "n_slices must be at least 1"),
        ((np.ones((4, 5, 6)), np.ones((2, 2, 2)), 2.0), TypeError, "n_slices must be an integer"),
        ((np.ones((4, 5, 6)), np.ones((2, 2, 2)), 2, 3), ValueError, "axis must be 0, 1 or 2"),
        (("scan", np.ones((2, 2, 2))), TypeError, "volume must be an array of real numbers"),
    ],
)
def test_bad_montages(arguments, error, message):
    with pytest.raises(error, match=message):
        images.montage(*arguments)


@pytest.mark.parametrize(
    "package, call",
    [
        ("PIL.Image", lambda: images.load_image("cat.jpg")),
        ("matplotlib", lambda: images.overlay(Image.new("RGB", (2, 2)), np.zeros((2, 2)))),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, call):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=r'is not installed; .* pip install "cfcam_gpu\[demo\]"'):
        call()
