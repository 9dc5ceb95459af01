"""The command line on scans and videos: what is read of their files, what is written, and what is refused."""

import gzip
import re
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
for package in ("matplotlib", "tqdm", "tifffile"):
    pytest.importorskip(package)

import tifffile

from cfcam_gpu import CFCAM, CFCAMConfig, datasets, images, models, volume_preprocess, volumes
from cfcam_gpu.datasets import journal, scans

pytestmark = pytest.mark.usefixtures("one_thread")

NET = """
import torch
from torch import nn

class Net(nn.Module):
    '''Class 0 likes what is bright, the others what is dark.'''
    def __init__(self, channels=1, n_axes=3, n_classes=3, **config):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[n_axes]
        # More channels than a scan has slices: else its maps could be read channels last too.
        self.conv, self.act = kind(channels, 24, 3, 2, 1), nn.ReLU()
        bright = torch.arange(24) % 2
        weight = torch.rand(self.conv.weight.shape, generator=generator).transpose(0, -1) * (2 * bright - 1)
        self.conv.weight, self.conv.bias = nn.Parameter(weight.transpose(0, -1)), nn.Parameter(3.0 - 3 * bright)
        weight = torch.rand(n_classes, 24, generator=generator) + 0.5
        self.weight = nn.Parameter(torch.cat([weight[:1] * bright, weight[1:] * (1 - bright)]))
        vars(self).update(config)
    def forward(self, x):
        return self.act(self.conv(x)).flatten(2).mean(2) @ self.weight.T
"""


@pytest.fixture
def explain(run, tmp_path, monkeypatch):
    """Explains files with a network given in source text; returns status, stdout and stderr. All lies in ``tmp_path``,
    which is the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a source of the same second and size may be taken for it

    def explain(*args, net="Net()"):
        sys.modules.pop("net3d", None)
        Path("net3d.py").write_text(f"{NET}\ndef build(): return {net}\n")
        status, out, err = run("explain", *args, "--model", "net3d:build", "--out", "out")
        # Nothing speaks for the dark classes.
        return status, out, re.sub("^cfcam: warning: .* zero everywhere.*\n", "", err, flags=re.M)

    yield explain
    sys.modules.pop("net3d", None)


BLOB, SHAPE = (15, 4, 8), (20, 16, 12)


def scan(shape=SHAPE, at=BLOB):
    """A bright ball on a dark ground."""
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return np.exp(-sum((axis - centre) ** 2 for axis, centre in zip(axes, at)) / 3).astype(np.float32)


def written():
    return sorted(path.name for path in Path("out").iterdir())


def peak(heat):
    return np.unravel_index(heat.argmax(), heat.shape)


AFFINE = np.array([[0.0, -1.2, 0.3, 20.0], [0.8, 0.1, 0.0, -35.5], [0.0, 0.2, 3.0, 7.25], [0.0, 0.0, 0.0, 1.0]])
"""Neither diagonal nor isotropic; the first axis runs to the front, the second to the left."""


def nifti(path, values=None, affine=AFFINE, kind="Nifti1Image"):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed (extra: medical)")
    image = getattr(nibabel, kind)(scan() if values is None else values, affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine, code=1, strip_shears=True)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return nibabel.load(path)


# What is read and written


@pytest.mark.parametrize("name", ["brain.nii.gz", "brain.nii"])
@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
def test_a_nifti_gets_its_maps_where_its_voxels_lie(explain, name, kind):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed (extra: medical)")
    Path("in").mkdir()
    image = nifti(Path("in") / name, 100 + 900 * scan(), kind=kind)
    status, out, err = explain(Path("in") / name, "--classes", "0,1", "--versus", "--raw")
    assert (status, err) == (0, "") and f"in/{name} -> out/brain.png: class 0 " in out
    assert "target layer: act (24 x 10 x 8 x 6)" in out
    maps = ["brain_0-1.nii.gz", "brain_0-1.npy", "brain_0.nii.gz", "brain_0.npy", "brain_1.nii.gz", "brain_1.npy"]
    assert written() == ["brain.png", *maps]
    found = nibabel.load("out/brain_0.nii.gz")
    assert type(found) is type(image) and found.shape == SHAPE and found.get_data_dtype() == np.float32
    np.testing.assert_array_equal(found.affine, image.affine)
    for codes in ("sform_code", "qform_code", "xyzt_units"):
        assert found.header[codes] == image.header[codes]
    np.testing.assert_array_equal(found.header.get_qform(), image.header.get_qform())
    np.testing.assert_allclose(found.header.get_zooms(), image.header.get_zooms())
    heat = found.get_fdata()
    np.testing.assert_array_equal(heat.astype(np.float32), np.load("out/brain_0.npy"))
    assert 0 <= heat.min() and 0.9 < heat.max() <= 1
    world = nibabel.affines.apply_affine
    distance = np.abs(world(np.linalg.inv(AFFINE), world(found.affine, peak(heat))) - BLOB)
    assert (distance <= 1.001).all()  # a cell of the network's grid is two voxels
    difference = nibabel.load("out/brain_0-1.nii.gz").get_fdata()
    np.testing.assert_allclose(difference, heat - nibabel.load("out/brain_1.nii.gz").get_fdata(), atol=1e-6)


def test_a_nifti_is_drawn_as_radiologists_look_at_it():
    pytest.importorskip("nibabel", reason="nibabel is not installed (extra: medical)")
    from nibabel import Nifti1Image

    shape, spacing = (10, 12, 6), (2.0, 1.0, 4.0)
    values = np.zeros(shape, np.float32)
    values[1, 10, 3] = 1  # right to left: 1 of 10 is far to the right
    affine = np.diag([*spacing, 1])
    affine[0, 0] *= -1  # the first axis runs from the patient's right to the left
    slices, aspect = volumes._upright(volumes.Volume(torch.zeros(1, *shape), nifti=Nifti1Image(values, affine)), values)
    assert slices.shape == (6, 12, 10) and aspect == 2
    index, row, column = peak(slices)
    assert index == 3 and row == 1 and column == 1  # in front is at the top, the patient's right on the left
    # The same scan, stored otherwise, is the same picture.
    turned, affine = values.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]]
    image = Nifti1Image(turned, affine)
    again, aspect = volumes._upright(volumes.Volume(torch.zeros(1, *turned.shape), nifti=image), turned)
    np.testing.assert_array_equal(again, slices)
    assert aspect == 2


@pytest.mark.parametrize("channels", [1, 2])
def test_arrays(explain, channels):
    values = scan() if channels == 1 else np.stack([scan(), np.zeros(SHAPE)])
    np.save("scan.npy", values)
    status, out, err = explain("scan.npy", "--raw", "--classes", 0, net=f"Net({channels})")
    assert (status, err) == (0, "") and written() == ["scan.png", "scan_0.npy"]
    heat = np.load("out/scan_0.npy")
    assert heat.shape == SHAPE and heat.dtype == np.float32
    assert np.abs(np.subtract(peak(heat), BLOB)).max() <= 1
    assert Image.open("out/scan.png").height > scans.MONTAGE_PIXELS  # slices, and a caption beneath


def test_a_batch_by_another_method(explain):
    places = {"a": BLOB, "b": (4, 11, 8)}
    for name, at in places.items():
        np.save(f"{name}.npy", scan(at=at))
    arguments = ["a.npy", "b.npy", "--batch-size", 2, "--method", "gradcam", "--classes", 0, "--raw"]
    status, out, err = explain(*arguments)
    assert (status, err) == (0, "") and "method: Grad-CAM\n" in out
    for name, at in places.items():
        assert np.abs(np.subtract(peak(np.load(f"out/{name}_0.npy")), at)).max() <= 1


def test_a_series_of_one_is_a_volume(explain):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed (extra: medical)")
    nifti("brain.nii.gz", scan()[..., None])
    status, _, err = explain("brain.nii.gz", "--classes", 0)
    assert (status, err) == (0, "") and nibabel.load("out/brain_0.nii.gz").shape == SHAPE


def test_a_map_has_the_scans_shape_whatever_the_networks_size(explain):
    np.save("scan.npy", scan() ** 0.2)
    status, out, _ = explain("scan.npy", "--raw", "--classes", 0, net="Net(img_size=(8, 8, 8))")
    assert status == 0 and "target layer: act (24 x 4 x 4 x 4)" in out
    heat = np.load("out/scan_0.npy")
    assert heat.shape == SHAPE
    assert (np.abs(np.subtract(peak(heat), BLOB)) <= np.array(SHAPE) / 4).all()  # a cell


def test_the_scan_is_scaled_by_its_range_and_resized():
    values = torch.rand(1, 6, 9, 7) * 3000 - 1000
    made = volume_preprocess.VolumePreprocess()(values)
    assert made.min() == 0 and made.max() == 1
    torch.testing.assert_close(made, (values - values.min()) / (values.max() - values.min()))
    smaller = volume_preprocess.VolumePreprocess((3, 4, 5), channels=3)(values)
    expected = torch.nn.functional.interpolate(made[None], (3, 4, 5), mode="trilinear")[0]
    torch.testing.assert_close(smaller, expected.expand(3, -1, -1, -1))
    assert not volume_preprocess.VolumePreprocess()(torch.full((1, 2, 2, 2), 7.0)).any()
    video = torch.full((3, 2, 2, 2), 51, dtype=torch.uint8)
    torch.testing.assert_close(volume_preprocess.VolumePreprocess(channels=1)(video), torch.full((1, 2, 2, 2), 0.2))


@pytest.mark.parametrize("kind", ["pages", "colours", "imagej"])
def test_the_pages_of_a_tiff_are_slices(explain, kind):
    values = np.round(60000 * scan()).astype(np.uint16)
    if kind == "pages":
        with tifffile.TiffWriter("scan.tif") as file:
            for page in values:
                file.write(page, contiguous=False)
    elif kind == "colours":
        colours = np.stack([values, values // 2, values // 3], -1)
        tifffile.imwrite("scan.tif", colours, photometric="rgb")
    else:
        tifffile.imwrite("scan.tif", np.stack([values, values // 2], 1), imagej=True, metadata={"axes": "ZCYX"})
    n_channels = {"pages": 1, "colours": 3, "imagej": 2}[kind]
    read = volumes.load_volume("scan.tif").values
    assert read.shape == (n_channels, *SHAPE)
    np.testing.assert_array_equal(read[0], values)
    status, _, err = explain("scan.tif", "--raw", "--classes", 0, net=f"Net({n_channels})")
    assert (status, err) == (0, "")
    assert np.abs(np.subtract(peak(np.load("out/scan_0.npy")), BLOB)).max() <= 1


def moving(n=12, height=32, width=48):
    """Frames (n, H, W, 3) of a white square that moves to the right, the red of whose ground counts them."""
    frames = np.zeros((n, height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[..., 0] = 20 * index
        frame[8:16, 2 + 3 * index : 10 + 3 * index] = 255
    return frames


def video(path, frames, codec="mpeg4", rate=10, **options):
    av = pytest.importorskip("av", reason="av is not installed (extra: video)")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate = 2_000_000
        if codec == "vp8":
            stream.options = {"deadline": "realtime", "cpu-used": "8"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("name, codec", [("clip.mp4", "mpeg4"), ("clip.avi", "mpeg4"), ("clip.mkv", "mpeg4")])
def test_a_video(explain, name, codec):
    video(name, moving(), codec)
    status, out, err = explain(name, "--frames", 4, "--raw", "--classes", 0, net="Net(3)")
    assert (status, err) == (0, "") and f"{name} -> out/clip.webp: class 0 " in out
    assert written() == ["clip.webp", "clip_0.npy"]
    heat = np.load("out/clip_0.npy")
    assert heat.shape == (4, 32, 48) and heat.max() == 1
    with Image.open("out/clip.webp") as animation:
        assert animation.n_frames == 4 and animation.height > scans.FRAME_PIXELS
        animation.seek(3)
        animation.load()
        assert animation.info["duration"] == 300  # 12 frames at 10 a second
    red = volumes.load_video(name, 4).values[0].float()[:, 25:, :].mean((1, 2))  # below the square
    assert np.abs(red.numpy() - 20 * np.array([0, 4, 7, 11])).max() < 8


def test_a_video_that_was_filmed_upright():
    video("clip.mp4", moving())
    filed = bytearray(Path("clip.mp4").read_bytes())
    at = filed.find(b"tkhd") + 44  # the matrix by which its frames are turned when they are shown: 90 degrees clockwise
    assert struct.unpack(">9i", filed[at : at + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    filed[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    Path("turned.mp4").write_bytes(filed)
    straight, turned = (volumes.load_video(name, 3).values.numpy() for name in ("clip.mp4", "turned.mp4"))
    np.testing.assert_array_equal(turned, np.rot90(straight, -1, (2, 3)))


def test_frames_are_spread_from_the_first_to_the_last():
    assert volumes._spread(100, 4) == [0, 33, 66, 99] and volumes._spread(2, 4) == [0, 0, 1, 1]
    assert volumes._spread(1, 3) == [0, 0, 0] and volumes._spread(9, 1) == [0]


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_an_animation_without_ffmpeg(explain, monkeypatch, extension):
    monkeypatch.setitem(sys.modules, "av", None)
    first, *others = map(Image.fromarray, moving())
    first.save(f"clip.{extension}", save_all=True, append_images=others, duration=50, lossless=True)
    status, _, err = explain(f"clip.{extension}", "--classes", 0, net="Net(3)")
    assert (status, err) == (0, "") and written() == ["clip.webp"]
    read = volumes.load(f"clip.{extension}", 3, 12)
    assert read.is_video and read.seconds == pytest.approx(0.6)
    assert np.abs(read.values.permute(1, 2, 3, 0).numpy().astype(int) - moving()).max() <= 24  # a palette of GIF


def test_a_network_of_images_takes_the_first_picture_and_arrays(explain, rng):
    first, *others = map(Image.fromarray, moving())
    first.save("clip.gif", save_all=True, append_images=others)
    tifffile.imwrite("stack.tif", np.round(255 * scan()).astype(np.uint8))
    np.save("grey.npy", scan()[15])
    np.save("colour.npy", rng.integers(0, 256, (32, 24, 3), dtype=np.uint8))
    files = ["clip.gif", "stack.tif", "grey.npy", "colour.npy"]
    assert explain(*files, "--classes", 0, net="Net(3, 2)")[::2] == (0, "")
    assert written() == sorted(Path(name).stem + ".png" for name in files)
    np.testing.assert_array_equal(np.asarray(volumes.load("colour.npy")), np.load("colour.npy"))
    np.testing.assert_array_equal(np.asarray(volumes.load("grey.npy"))[..., 0], np.rint(255.0 * scan()[15]))


def test_a_folder_gives_what_the_network_takes():
    folder = Path("mixed")
    names = ["a.npy", "b.nii.gz", "c.NII", "d.mp4", "e.png", "f.jpg", "g.tif", "notes.txt"]
    of_images, of_volumes = ["e", "f", "g"], ["a", "b", "c", "d", "g"]
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"?")
    inputs = datasets.Inputs(["mixed"])
    for n_axes, expected in ((2, of_images), (3, of_volumes)):
        assert [source.stem for source in inputs.sources(n_axes)] == expected
        assert [source.stem for source in datasets.find_sources(["mixed"], n_axes=n_axes)] == expected


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Networks


def test_torchvisions_video_networks_by_name(monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision is not installed (extra: test)")
    from torchvision.models.video import MC3_18_Weights

    for name in ("kaiming_normal_", "kaiming_uniform_"):  # most of the time that such a network takes
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **options: tensor)
    loaded = models.load_model("torchvision:mc3_18:random")
    assert (loaded.n_axes, loaded.frames) == (3, 16) and loaded.class_name(0, 400) == "abseiling"
    frames = torch.randint(256, (3, 4, 60, 90), dtype=torch.uint8)
    expected = MC3_18_Weights.DEFAULT.transforms()(frames.transpose(0, 1))
    torch.testing.assert_close(loaded.preprocess(frames), expected)
    assert loaded.preprocess(torch.rand(1, 4, 60, 90)).shape == (3, 4, 112, 112)
    # 171 x 128 pixels, of which 112 in the middle are left.
    assert loaded.seen(frames).shape == (3, 4, 52, 59)
    heat = loaded.to_volume(torch.ones(2, 7, 7), (4, 60, 90))
    assert heat.shape == (4, 60, 90) and heat.sum() == 4 * 52 * 59 and heat[:, 4:56, 16:75].all()
    with pytest.raises(ValueError, match="did you mean torchvision:r3d_18"):
        models.load_model("r3d18")


def test_torchvisions_transforms_come_with_a_users_network(explain):
    pytest.importorskip("torchvision", reason="torchvision is not installed (extra: test)")
    np.save("scan.npy", scan((4, 40, 40), (1, 20, 20)))
    transforms = (
        "__import__('torchvision').transforms._presets.VideoClassification(crop_size=(24, 24), resize_size=(32,))"
    )
    assert explain("scan.npy", "--raw", "--classes", 1, net=f"(Net(3), {transforms})")[0] == 0
    heat = np.load("out/scan_1.npy")
    assert heat.shape == (4, 40, 40) and not heat[:, :5].any() and not heat[:, :, 35:].any()


def test_the_layers_of_a_network_of_volumes(explain, run):
    explain("nothing.npy", net="Net(2)")
    status, out, err = run("layers", "net3d:build")
    assert (status, err) == (0, "") and "->  act    ReLU    32x32x32  24" in out
    status, out, err = run("layers", "net3d:build", "--size", 10)
    assert (status, err) == (0, "") and "5x5x5" in out
    explain("nothing.npy", net="Net(3)")
    assert "8x5x5" in run("layers", "net3d:build", "--size", 10)[1]  # frames


def test_a_preprocess_of_the_users(explain):
    Path("mine.py").write_text(
        "class Half:\n"
        "    frames = 6\n"
        "    def __call__(self, values): return values[:, :, 8:].float().transpose(1, 3)\n"
        "    def seen(self, values): return values[:, :, 8:]\n"
        "    def to_volume(self, heat, shape):\n"
        "        whole = heat.new_zeros(shape)\n"
        "        whole[:, 8:] = heat.transpose(0, 2)\n"
        "        return whole\n"
    )
    np.save("scan.npy", scan(at=(4, 11, 8)))
    status, out, err = explain("scan.npy", "--raw", "--classes", 0, net="(Net(), __import__('mine').Half())")
    assert (status, err) == (0, "") and "target layer: act (24 x 6 x 4 x 10)" in out
    heat = np.load("out/scan_0.npy")
    assert heat.shape == SHAPE and not heat[:, :8].any()
    assert np.abs(np.subtract(peak(heat), (4, 11, 8))).max() <= 1
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    "net, message",
    [
        ("Net(4)", "expected 4 channels, as the network takes, got 1: (1, 20, 16, 12)"),
        (
            "(Net(), lambda values: values[0])",
            "the preprocess must make a (C, D, H, W) tensor of one, got (20, 16, 12)",
        ),
    ],
)
def test_a_scan_that_does_not_fit_the_network(explain, net, message):
    np.save("scan.npy", scan())
    assert explain("scan.npy", net=net) == (2, "", f"cfcam: error: {message}\n")


def test_channels_that_come_last_are_named():
    with pytest.raises(ValueError, match=r"expected 1 channel, .* got 2: \(2, 3, 4, 1\); its channels must come first"):
        volume_preprocess.with_channels(torch.rand(2, 3, 4, 1), 1)


def test_maps_of_planes_hold_for_all_slices(explain):
    net = "type('Flat', (Net,), {'forward': lambda self, x: self.plane(x.mean(2)).abs().mean((2, 3)) @ self.weight.T})"
    np.save("scan.npy", scan())
    build = f"[(net.add_module('plane', nn.Conv2d(1, 24, 3)), net)[1] for net in [{net}()]][0]"
    status, _, err = explain("scan.npy", "--raw", "--classes", 0, net=build)
    heat = np.load("out/scan_0.npy")
    assert status == 0 and heat.shape == SHAPE and (np.abs(heat - heat[:1]) < 1e-6).all()


@pytest.mark.parametrize("options, name", [([], "positive"), (["--classes", 0], "positive")])
def test_one_logit(explain, options, name):
    np.save("scan.npy", scan())
    status, out, err = explain("scan.npy", "--raw", *options, net="Net(n_classes=1)")
    assert (status, err) == (0, "") and f"scan.npy -> out/scan.png: {name} 0." in out
    assert np.abs(np.subtract(peak(np.load(f"out/scan_{name}.npy")), BLOB)).max() <= 1


# In the run of many pictures


def test_every_format(explain):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra: datasets)")
    zarr = pytest.importorskip("zarr", reason="zarr is not installed (extra: datasets)")
    nifti("brain.nii.gz")
    np.save("scan.npy", scan(at=(4, 11, 8)))
    Image.new("RGB", (7, 6)).save("photo.png")
    Path("table.csv").write_text("path,class\nbrain.nii.gz,0\nphoto.png,0\nscan.npy,1\n")
    inputs = ["table.csv", "--target-column", "class", "--write", "maps,scores"]
    status, _, err = explain(*inputs, net="Net(img_size=(8, 8, 8))")
    assert status == 1 and err.startswith("cfcam: photo.png: expected a volume") and err.count("\n") == 1
    assert written() == ["brain_0.nii.gz", "brain_maps.npy", "scan_maps.npy", "scores.csv"]
    maps = [np.load(f"out/{name}_maps.npy") for name in ("brain", "scan")]
    assert all(each.shape == (1, *SHAPE) and each.dtype == np.float16 for each in maps)
    for kind in ("parquet", "zarr"):
        assert explain(*inputs, "--maps-format", kind, net="Net(img_size=(8, 8, 8))")[0] == 1
    for row, expected in zip(pq.read_table("out/maps.parquet").to_pylist(), maps):
        assert (np.frombuffer(row["maps"], "<f2").reshape(row["shape"]) == expected).all()
    array = zarr.open_group("out/maps.zarr", mode="r")["maps"]
    assert (array[0] == maps[0]).all() and np.isnan(array[1]).all() and (array[2] == maps[1]).all()
    assert array.metadata.dimension_names == ("picture", "class", "z", "y", "x")


def test_a_gallery_is_of_images_alone(explain):
    nifti("brain.nii.gz")
    status, out, err = explain("brain.nii.gz", "--html")
    assert (status, out, err) == (
        2,
        "",
        "cfcam: error: --html shows images alone, net3d:build takes scans and videos\n",
    )
    assert not Path("out").exists()


def test_scores_alone_draw_and_write_nothing_else(explain, monkeypatch):
    nifti("brain.nii.gz")
    monkeypatch.setattr(images, "side_by_side", None)
    assert explain("brain.nii.gz", "--write", "scores")[0] == 0 and written() == ["scores.csv"]


def test_a_run_that_was_ended_goes_on(explain, monkeypatch):
    nifti("a.nii.gz")
    for name in "bcd":
        np.save(f"{name}.npy", scan(at=(3, 3, 3 + ord(name) % 4)))
    inputs = ["a.nii.gz", "b.npy", "c.npy", "d.npy", "--raw", "--classes", "0,1", "--versus", "--write", "overlay,maps"]
    assert explain(*inputs)[0] == 0
    undisturbed = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for path in Path("out").iterdir():
        path.unlink()
    add, batches = journal.Journal.add, []

    def ended(self, records):
        if len(batches) == 2:
            raise OSError(28, "No space left on device")
        batches.append(records)
        add(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", ended)
        assert "2 images are done, and the same command goes on after them" in explain(*inputs)[2]
    assert "had batch_size 1, this one has 2" in explain(*inputs, "--batch-size", 2)[2]
    status, out, _ = explain(*inputs)
    assert status == 0 and "going on with the unfinished run in out: 2 of 4 images are done" in out
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == undisturbed


def test_by_default_a_volume_is_explained_by_its_own_configuration(explain):
    np.save("scan.npy", scan())
    assert explain("scan.npy", "--raw", "--classes", 0)[0] == 0
    loaded = models.load_model("net3d:build")
    pixels = loaded.preprocess(torch.from_numpy(scan())[None])[None]

    def maps(config):
        return CFCAM(loaded.model, config=config).maps(pixels, [0])[0].numpy()

    volume = maps(CFCAMConfig.volumes())
    np.testing.assert_allclose(np.load("out/scan_0.npy"), volume, atol=1e-5)
    assert np.abs(maps(CFCAMConfig()) - volume).max() > 0.01
    assert explain("scan.npy", "--raw", "--classes", 0, "--multilabel")[0] == 0
    several = maps(replace(CFCAMConfig.volumes(), margin_temperature=0.0))
    np.testing.assert_allclose(np.load("out/scan_0.npy"), several, atol=1e-5)


def test_a_source_of_ones_own_is_refused_where_the_network_takes_another_kind(explain):
    values = torch.from_numpy(scan())[None]
    mine = [
        datasets.Source("volume", lambda: volumes.Volume(values), "volume"),
        datasets.Source("picture", lambda: Image.new("RGB", (7, 6)), "picture"),
    ]
    for net, refused in (("Net()", "picture"), ("Net(3, 2)", "volume")):
        explain("nothing.npy", net=net)
        summary = datasets.explain(datasets.Options(Path("out"), "net3d:build", write=["scores"]), mine)
        assert summary.explained == 1 and [record.path for record in summary.lost] == [refused]
        assert summary.lost[0].error.startswith(f"{refused}: expected a")


def test_what_is_said_of_one_stack_is_not_taken_for_what_is_wrong_with_another(monkeypatch):
    for index in range(8):
        tifffile.imwrite(f"{index}.tif", scan())
    asarray, both = tifffile.TiffPageSeries.asarray, threading.Barrier(2)

    def complains(self, *args, **options):
        with suppress(threading.BrokenBarrierError):
            both.wait(0.1)  # with another that is being read, if there is one
        if self.parent.filename == "5.tif":
            tifffile.tifffile.logger().error("a page is missing")
        with suppress(threading.BrokenBarrierError):
            both.wait(0.1)
        return asarray(self, *args, **options)

    def read(index):
        try:
            return volumes.read(f"{index}.tif", 3).shape
        except ValueError as error:
            return str(error)

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", complains)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read, range(8)))
    assert found.pop(5) == "5.tif: cannot be decoded: it is damaged or cut short (a page is missing)"
    assert found == [SHAPE] * 7


def test_an_animation_never_overwrites_its_input(explain):
    Path("out").mkdir()
    first, *others = map(Image.fromarray, moving())
    first.save("out/clip.webp", save_all=True, append_images=others, lossless=True)
    np.save("scan.npy", np.zeros((3, *SHAPE), np.float32))
    before = Path("out/clip.webp").read_bytes()
    status, _, err = explain("out/clip.webp", "scan.npy", "--classes", 0, net="Net(3)")
    assert status == 1 and Path("out/clip.webp").read_bytes() == before
    assert "cfcam: out/clip.webp: out/clip.webp would overwrite an input: choose another --out\n" in err


# What is refused


def bad_files():
    """Name, what makes it, and what is said of it."""
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed (extra: medical)")
    nan = scan()
    nan[3, 4, :2] = np.nan
    lost = nifti("brain.nii.gz")
    lost.set_sform(None, code=0), lost.set_qform(None, code=0)
    nibabel.save(lost, "no_affine.nii.gz")
    nifti("series.nii.gz", np.zeros((4, 5, 6, 7), np.float32))
    nifti("nan.nii.gz", nan)
    nifti("flat.nii.gz", np.zeros((4, 5), np.float32))
    np.save("flat.npy", np.zeros((4, 5)))
    np.save("five.npy", np.zeros((1, 1, 4, 5, 6)))
    np.save("objects.npy", np.array([{}, []], object), allow_pickle=True)
    np.save("complex.npy", np.zeros((4, 5, 6), complex))
    np.save("empty.npy", np.zeros((4, 0, 6)))
    np.save("infinite.npy", np.where(np.isnan(nan), np.inf, nan))
    Path("text.npy").write_text("no array")
    Path("zero.nii").touch()
    tifffile.imwrite("series.tif", np.zeros((5, 4, 6, 7), np.uint8), photometric="minisblack")
    with tifffile.TiffWriter("sizes.tif") as file:
        for side in (8, 8, 4):
            file.write(np.zeros((side, side), np.uint8), contiguous=False)
    tifffile.imwrite("page.tif", np.zeros((6, 7), np.uint8))
    Image.new("RGB", (7, 6)).save("photo.png")
    return {
        "no_affine.nii.gz": "expected an affine, got a sform and a qform of code 0: where its voxels lie is not known;"
        " set one, as nibabel does with image.set_sform(affine, code=1)",
        "series.nii.gz": "expected one volume (X, Y, Z), got a series (4, 5, 6, 7); take one of its 7 out, as nibabel"
        " does with image.slicer[..., 0]",
        "nan.nii.gz": "voxels must be finite, got 2 NaN or infinite of 3840; replace them first, as numpy.nan_to_num"
        " does",
        "flat.nii.gz": "expected a volume (X, Y, Z), got shape (4, 5)",
        "flat.npy": "expected a volume (D, H, W) or (C, D, H, W), got shape (4, 5)",
        "five.npy": "expected a volume (D, H, W) or (C, D, H, W), got shape (1, 1, 4, 5, 6)",
        "objects.npy": "expected real numbers, got object",
        "complex.npy": "expected real numbers, got complex128",
        "empty.npy": "expected at least one number along every axis, got shape (4, 0, 6)",
        "infinite.npy": "voxels must be finite, got 2 NaN or infinite of 3840; replace them first, as"
        " numpy.nan_to_num does",
        "text.npy": "cannot be decoded: the magic string is not correct; expected b'\\x93NUMPY', got b'no arr'",
        "zero.nii": "the file is empty",
        "series.tif": "expected one axis of slices, got 20 pages as QQYX (5, 4, 6, 7); write each volume to a file of"
        " its own",
        "sizes.tif": "expected slices of one size, got pages of (8, 8), (4, 4)",
        "page.tif": "expected a volume or a video for a network of volumes, got an image of 6 x 7 pixels",
        "photo.png": "expected a volume or a video for a network of volumes, got an image of 6 x 7 pixels",
        "nowhere.nii.gz": "no such file",
        "nowhere.mp4": "no such file",
    }


def test_bad_files_are_listed_each_in_a_line_and_the_others_done(explain):
    expected = bad_files()
    np.save("good.npy", scan())
    status, out, err = explain(*expected, "good.npy")
    assert status == 1 and written() == ["good.png"] and out.count(" -> ") == 1
    assert err.splitlines() == [f"cfcam: {name}: {message}" for name, message in expected.items()]


def test_a_network_of_images_refuses_volumes(explain):
    np.save("scan.npy", scan())
    np.save("good.npy", scan()[0])
    for name in ("brain.nii.gz", "clip.mp4"):
        Path(name).write_bytes(b"?")
    status, _, err = explain("scan.npy", "brain.nii.gz", "clip.mp4", "good.npy", net="Net(3, 2)")
    start = "expected an image, or an array (H, W) or (H, W, 3), for a network of images, got"
    assert status == 1 and [line for line in err.splitlines() if "warning" not in line] == [
        f"cfcam: scan.npy: {start} shape (20, 16, 12)",
        f"cfcam: brain.nii.gz: {start} a volume",
        f"cfcam: clip.mp4: {start} a video",
    ]


@pytest.mark.parametrize("module, name, extra", [("nibabel", "x.nii.gz", "medical"), ("av", "x.mp4", "video")])
def test_a_missing_package_names_its_extra(explain, monkeypatch, module, name, extra):
    monkeypatch.setitem(sys.modules, module, None)
    Path(name).write_bytes(b"?")
    status, _, err = explain(name)
    assert status == 1 and err.count("\n") == 1
    assert err.startswith(f"cfcam: {name}: ") and f'pip install "cfcam_gpu[{extra}]"' in err


def make(name):
    if name.endswith((".nii", ".nii.gz")):
        nifti(name, np.random.default_rng(0).random(SHAPE, np.float32))
    elif name.endswith(".npy"):
        np.save(name, scan())
    elif name.endswith(".tif"):
        with tifffile.TiffWriter(name) as file:
            for page in scan():
                file.write(page, contiguous=False)
    elif name == "fast.mp4":
        video(name, moving(), movflags="faststart")
    else:
        video(name, moving(), "vp8" if name.endswith(".webm") else "mpeg4")


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.npy", "x.tif", "x.mp4", "fast.mp4", "x.avi", "x.webm"])
def test_a_file_that_is_cut_short_is_not_explained_by_what_is_left(explain, name):
    make(name)
    whole, cut = Path(name).read_bytes(), []
    for share in (0.02, 0.5, 0.9):
        cut.append(f"{share}_{name}")
        Path(cut[-1]).write_bytes(whole[: int(share * len(whole))])
    status, out, err = explain(*cut, name, "--frames", 2, net="Net(3)" if name.endswith(volumes.VIDEOS) else "Net()")
    assert status == 1 and out.count(" -> ") == 1 and len(written()) <= 4
    lines = [line for line in err.splitlines() if line.startswith("cfcam: ")]
    assert [line.split(": ")[1] for line in lines] == cut
    assert all("cannot be decoded" in line for line in lines)


def test_no_half_of_a_file_remains(explain, monkeypatch):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed (extra: medical)")
    nifti("brain.nii.gz")

    def full(self, data):
        self.fileobj.write(b"some bytes")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gzip.GzipFile, "write", full)
        assert explain("brain.nii.gz", "--classes", 0)[2] == "cfcam: error: [Errno 28] out: No space left on device\n"
    assert written() == ["brain.png"]
    with pytest.raises(ValueError, match=re.escape(f"heatmap must have the image's shape {SHAPE}, got (2, 2, 2)")):
        volumes.save_nifti(np.zeros((2, 2, 2)), nibabel.load("brain.nii.gz"), "x.nii.gz")
    with pytest.raises(OSError):
        volumes.save_animation([Image.new("RGB", (4, 4))], "nowhere/x.webp")


def test_an_input_is_never_overwritten(explain):
    np.save("scan.npy", scan())
    Path("out").mkdir()
    np.save("out/scan_0.npy", scan(at=(3, 3, 3)))
    before = Path("out/scan_0.npy").read_bytes()
    status, _, err = explain("out/scan_0.npy", "scan.npy", "--raw", "--classes", 0)
    assert status == 1 and Path("out/scan_0.npy").read_bytes() == before
    assert err == "cfcam: scan.npy: out/scan_0.npy would overwrite an input: choose another --out\n"


def test_a_montage_of_a_difference(rng):
    volume, difference = rng.random((4, 6, 8)), rng.uniform(-1, 1, (4, 6, 8)).astype(np.float32)
    sheet = images.montage(volume, difference, 1, colormap="RdBu_r", difference=True)
    low, high = volume.min(), volume.max()
    photo = Image.fromarray(np.rint(255 * (volume[0].astype(np.float32) - low) / (high - low)).astype(np.uint8))
    assert np.abs(np.asarray(sheet, int) - np.asarray(images.overlay_difference(photo, difference[0]), int)).max() <= 1
    with pytest.raises(ValueError, match=r"heatmap must be in \[0, 1\]|difference must be in"):
        images.montage(volume, difference)


def test_the_messages_of_the_page_on_troubles_are_those():
    text = (Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    alike = lambda message: re.sub(r"\d+", "#", re.sub("[A-Z]{2}YX", "axes", message))
    shown = re.findall(r"^cfcam: (?:brain|scan)\.[a-z.]+: (.*)$", text, re.M)
    elsewhere = ("nibabel is not installed", "tifffile", "expected # channels", "expected an image")
    known = {alike(message) for message in bad_files().values()}
    assert sum(alike(message) in known for message in shown) == 8
    unknown = [message for message in shown if alike(message) not in known]
    assert [message for message in unknown if not any(part in alike(message) for part in elsewhere)] == []
