"""Data sets: what is read, what is written, and that a run which was killed ends as if it had not been."""

import csv
import errno
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import network_source
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

Image = pytest.importorskip("PIL.Image")
for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

from cfcam_gpu import CFCAM, cli, datasets, images, methods, models
from cfcam_gpu.datasets import files, journal, reading, running, streaming, writing
from cfcam_gpu.datasets.transfer import Transfer

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:maps are zero everywhere")]

NETWORK = (
    network_source(["ox", "ass", "mule", "hinny"])
    + """
def build_other():
    network, *others = build()
    with torch.no_grad():
        network[-1].bias[0] += 1
    return network, *others
class Any:
    def __call__(self, image):
        return torch.tensor(list(image.getdata())).view(image.height, image.width, 3).permute(2, 0, 1) / 255
    def seen(self, image):
        return image
def build_any_size():
    return build()[0], Any(), None
"""
)
N_PHOTOS = 11


@pytest.fixture(autouse=True)
def network(tmp_path, monkeypatch):
    """The small network in the current folder, which is empty else."""
    (tmp_path / "small_net.py").write_text(NETWORK)
    monkeypatch.setattr(writing, "PANEL_PIXELS", 64)  # a fiftieth of the pixels to draw and to compress
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "small_net:build"
    sys.modules.pop("small_net", None)


def photograph(rng, size=(90, 70)):
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(rng, tmp_path):
    """A folder of photographs."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(N_PHOTOS):
        photograph(rng).save(folder / f"p{index:02}.jpg")
    return folder


@pytest.fixture
def run(capfd):
    """Runs ``cfcam explain`` with the small network; returns status, stdout and stderr."""

    def run(*args, model="small_net:build", batch=4):
        args = ["explain", *map(str, args), "--model", model, "--batch-size", str(batch)]
        capfd.readouterr()
        status = cli.main(args)
        out, err = capfd.readouterr()
        kept = [line for line in err.splitlines() if " zero everywhere" not in line]
        return status, out, "\n".join(kept)

    return run


def tree(folder):
    """{relative path: bytes} of all files."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def expected_maps(paths, targets=None, top=2):
    """float32 (N, K, H, W) by one call a picture."""
    loaded = models.load_model("small_net:build")
    cam = CFCAM(loaded.model)
    inputs = [loaded.preprocess(images.load_image(path))[None] for path in paths]
    options = [{"top": top} if targets is None else {"targets": [[target]]} for target in targets or paths]
    return np.stack([cam.maps(each, **how)[0].numpy() for each, how in zip(inputs, options)])


# What is written


def test_the_formats_of_the_maps_agree(run, photos):
    zarr, pq = pytest.importorskip("zarr"), pytest.importorskip("pyarrow.parquet")
    for name in writing.formats_of("maps"):
        assert run(photos, "--write", "maps", "--maps-format", name, "--out", name)[0] == 0
    stems = [f"p{index:02}" for index in range(N_PHOTOS)]
    assert sorted(tree("npy")) == [f"{stem}_maps.npy" for stem in stems]
    assert [path.name for path in Path("zarr").iterdir()] == ["maps.zarr"]
    assert [path.name for path in Path("parquet").iterdir()] == ["maps.parquet"]
    maps = np.stack([np.load(f"npy/{stem}_maps.npy") for stem in stems])
    assert maps.dtype == np.float16 and maps.shape == (N_PHOTOS, 2, 64, 64)
    assert np.abs(maps - expected_maps(sorted(photos.iterdir()))).max() < 1e-3
    array = zarr.open_group("zarr/maps.zarr", mode="r")["maps"]
    assert array.dtype == np.float16 and (array[:] == maps).all()
    rows = pq.read_table("parquet/maps.parquet").to_pylist()
    assert [row["path"] for row in rows] == [str(photos / f"{stem}.jpg") for stem in stems]
    for row, expected in zip(rows, maps):
        assert (np.frombuffer(row["maps"], "<f2").reshape(row["shape"]) == expected).all()
        assert len(row["classes"]) == len(row["scores"]) == 2


def test_a_failed_picture_in_one_file_of_maps(run, photos):
    zarr, pq = pytest.importorskip("zarr"), pytest.importorskip("pyarrow.parquet")
    (photos / "p03.jpg").write_bytes(b"no image")
    for name in ("zarr", "parquet"):
        assert run(photos, "--write", "maps", "--maps-format", name, "--out", name)[0] == 1
    array = zarr.open_group("zarr/maps.zarr", mode="r")["maps"][:]
    assert np.isnan(array[3]).all() and np.isfinite(np.delete(array, 3, axis=0)).all()
    assert pq.read_table("parquet/maps.parquet")["index"].to_pylist() == [0, 1, 2, *range(4, N_PHOTOS)]


def test_an_array_of_zarr_has_one_shape(run, rng):
    pytest.importorskip("zarr"), pytest.importorskip("pyarrow")
    for name, size in (("a", (64, 48)), ("b", (64, 48)), ("c", (48, 64))):
        photograph(rng, size).save(f"{name}.png")
    common = ["a.png", "b.png", "c.png", "--write", "maps"]
    status, _, err = run(*common, "--maps-format", "zarr", "--out", "zarr", model="small_net:build_any_size")
    assert status == 1 and "c.png: an array of Zarr holds maps of one shape, (2, 48, 64) of the first" in err
    status, _, _ = run(*common, "--maps-format", "parquet", "--out", "parquet", model="small_net:build_any_size")
    assert status == 0


def test_scores(run, photos):
    pq = pytest.importorskip("pyarrow.parquet")
    (photos / "p03.jpg").write_bytes(b"no image")
    for name in writing.formats_of("scores"):
        assert run(photos, "--write", "scores", "--scores-format", name, "--out", "out")[0] == 1
    with open("out/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    typed = pq.read_table("out/scores.parquet").to_pylist()
    assert len(rows) == len(typed) == 2 * (N_PHOTOS - 1) + 1 and list(rows[0]) == list(writing.COLUMNS) == list(
        typed[0]
    )
    for text, values in zip(rows, typed):
        assert {name: "" if value is None else str(value) for name, value in values.items() if name != "score"} == {
            name: value for name, value in text.items() if name != "score"
        }
        assert values["score"] is None or abs(float(text["score"]) - values["score"]) < 1e-6
    loaded = models.load_model("small_net:build")
    inputs = loaded.preprocess(images.load_image(photos / "p05.jpg"))[None]
    scores, classes = loaded.model(inputs).softmax(1)[0].topk(2)
    found = [row for row in typed if row["index"] == 5]
    assert [row["class"] for row in found] == classes.tolist() and [row["rank"] for row in found] == [1, 2]
    assert [row["label"] for row in found] == [loaded.class_names[index] for index in classes]
    np.testing.assert_allclose([row["score"] for row in found], scores.detach(), atol=1e-5)
    (failed,) = (row for row in typed if row["error"])
    assert failed["index"] == 3 and failed["error"].endswith("p03.jpg: not an image in a known format")


def test_the_formats_of_the_overlays_show_the_same(run, photos):
    written = {}
    for name, each in writing.formats_of("overlay").items():
        assert run(photos / "p00.jpg", "--overlay-format", name, "--out", "out")[0] == 0
        written[name] = Image.open(Path("out") / each.files.replace("NAME", "p00")).convert("RGB")
    png = np.asarray(written["png"], int)
    for name, picture in written.items():
        assert np.abs(np.asarray(picture, int) - png).mean() < 4, name
    # The lossless one: what the parts make when each is made in the plain way.
    loaded = models.load_model("small_net:build")
    photo = images.load_image(photos / "p00.jpg")
    (maps,) = expected_maps([photos / "p00.jpg"])
    seen = loaded.seen(photo)
    width = round(seen.width * writing.PANEL_PIXELS / seen.height)
    panel = seen.resize((width, writing.PANEL_PIXELS), Image.Resampling.LANCZOS)
    overlays = [images.overlay(panel, heat) for heat in maps]
    margin = round(images.MARGIN * writing.PANEL_PIXELS)
    for place, expected in enumerate([panel, *overlays]):
        left = margin + place * (width + margin)
        shown = png[margin : margin + writing.PANEL_PIXELS, left : left + width]
        assert np.abs(shown - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("package", ["isal", None])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (33, 20), (600, 500)])
def test_png_is_lossless(rng, size, package, monkeypatch):
    if package is None:
        monkeypatch.setitem(sys.modules, "isal", None)
    else:
        pytest.importorskip(package)
    for content in (rng.integers(0, 256, (*size[::-1], 3)), np.full((*size[::-1], 3), 7)):
        picture = Image.fromarray(content.astype(np.uint8))
        again = Image.open(io.BytesIO(writing.encoded(picture, "png")))
        again.verify()
        again = Image.open(io.BytesIO(writing.encoded(picture, "png")))
        assert again.mode == "RGB" and again.tobytes() == picture.tobytes()


def test_what_is_written_is_chosen(run, photos, monkeypatch):
    monkeypatch.setattr(images, "side_by_side", None)  # nothing is drawn for nothing
    status, out, _ = run(photos, "--write", "scores, maps", "--out", "out", "--raw")
    assert status == 0 and len(tree("out")) == 1 + 3 * N_PHOTOS
    assert f"{N_PHOTOS} of {N_PHOTOS} images explained: " in out.splitlines()[-1]
    for given, message in (("map", "did you mean maps"), ("", "--write takes overlay, maps, scores")):
        status, _, err = run(photos, "--write", given)
        assert status == 2 and message in err and err.count("\n") == 0


def test_the_table_of_formats_is_in_the_page():
    page = ROOT / "docs" / "datasets.md"
    if not page.is_file():
        pytest.skip("not a checkout")
    assert writing.table() in page.read_text(encoding="utf-8")
    for each in datasets.FORMATS:
        assert getattr(running.Options(out=Path()), f"{each.write}_format") in writing.formats_of(each.write)


@pytest.mark.parametrize("package", ["pyarrow", "zarr"])
def test_a_missing_package_is_named_before_anything_is_done(run, photos, monkeypatch, package):
    kind = {"pyarrow": ["--write", "scores", "--scores-format", "parquet"],
            "zarr": ["--write", "maps", "--maps-format", "zarr"]}[package]  # fmt: skip
    for name in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = run(photos, *kind, "--out", "out")
    assert status == 2 and f'{package} is not installed; it comes with the "datasets" extra' in err
    assert not Path("out").exists()


def test_lines_of_json(run, photos):
    (photos / "p03.jpg").write_bytes(b"no image")
    status, out, err = run(photos, "--write", "maps", "--json", "--out", "out")
    lines = [json.loads(line) for line in out.splitlines()]
    records = sorted((line for line in lines if "index" in line), key=lambda record: record["index"])
    assert status == 1 and len(lines) == N_PHOTOS + 1 and "target layer: 1" in err
    assert [record["index"] for record in records] == list(range(N_PHOTOS))
    assert set(records[0]) == {field.name for field in fields(journal.Record)} - {"at"}
    assert records[0]["files"] == ["p00_maps.npy"] and len(records[0]["classes"]) == 2 and not records[0]["error"]
    assert records[3]["error"] and records[3]["files"] == []
    summary = lines[-1]["summary"]
    assert (summary["images"], summary["explained"], summary["lost"]) == (N_PHOTOS, N_PHOTOS - 1, 1)


# What is read


def archive(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_inputs_of_all_kinds_give_the_same_pictures(photos, monkeypatch):
    paths = sorted(photos.iterdir())
    stems = [path.stem for path in paths]
    Path("list.txt").write_text("".join(f"photos/{path.name}\n\n" for path in paths))
    Path("table.csv").write_text("file,class\n" + "".join(f'"{path}",{i % 4}\n' for i, path in enumerate(paths)))
    members = {}
    for index, path in enumerate(paths):
        members[f"a/{path.stem}.jpg"] = path.read_bytes()
        members[f"a/{path.stem}.cls"] = f" {index % 4}\n".encode()
    archive("shard.tar", members)
    inputs = {
        "folder": ["photos"],
        "pattern": ["photos/*.jpg"],
        "list": ["@list.txt"],
        "stdin": ["-"],
        "csv": ["table.csv"],
        "tar": ["shard.tar"],
    }
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"file": list(map(str, paths)), "class": [i % 4 for i in range(len(paths))]}
        pq.write_table(pa.table(columns), "table.parquet")
        inputs["parquet"] = ["table.parquet"]
    except ImportError:
        pass
    pixels = [images.load_image(path).tobytes() for path in paths]
    for kind, given in inputs.items():
        for separator in (b"\n", b"\0"):
            content = separator.join(os.fsencode(path) for path in paths)
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
            column = {"csv": "class", "parquet": "class", "tar": "cls"}.get(kind)
            sources = datasets.find_sources(given, path_column="file", target_column=column)
            assert [source.stem for source in sources] == stems, kind
            assert [source.load().tobytes() for source in sources] == pixels, kind
            assert [source.target for source in sources] == [column and i % 4 for i in range(len(paths))], kind


def test_the_targets_are_explained(run, photos):
    paths = sorted(photos.iterdir())
    targets = [(3 * index + 1) % 4 for index in range(N_PHOTOS)]
    rows = [f"{path},{target}" for path, target in zip(paths, targets)]
    Path("table.csv").write_text("\n".join(["path,class", *rows, f"{paths[0]},", f"{paths[0]},ox", f"{paths[0]},9"]))
    common = ["table.csv", "--target-column", "class", "--write", "maps,scores,overlay"]
    status, _, err = run(*common, "--out", "out")
    assert status == 1 and err.splitlines() == [
        f"cfcam: {paths[0]}: expected a class index, got ''",
        f"cfcam: {paths[0]}: expected a class index, got 'ox'",
        err.splitlines()[2],
    ]
    assert "9" in err.splitlines()[2]
    maps = np.stack([np.load(f"out/{path.stem}_maps.npy") for path in paths])
    assert np.abs(maps - expected_maps(paths, targets)).max() < 1e-3
    with open("out/scores.csv", newline="") as file:
        found = [int(row["class"]) for row in csv.DictReader(file) if row["class"]]
    assert found == targets
    for option in (["--classes", "1"], ["--top", "1"], ["--versus"]):
        status, _, err = run(*common, *option)
        assert status == 2 and f"{option[0]} does not go with targets" in err


@pytest.mark.parametrize(
    "content, args, message",
    [
        ("file,class\na.jpg,1\n", ["t.csv"], "t.csv has no column 'path' (it has file, class)"),
        ("Path,class\na.jpg,1\n", ["t.csv"], "did you mean Path"),
        (
            "path\na.jpg\n",
            ["t.csv", "--target-column", "class"],
            "has no column 'class' (it has path); name the",
        ),
        ("path\n", ["t.csv"], "no row in t.csv"),
        ("path,x\n,1\n", ["t.csv"], "t.csv: row 1 has no path in column 'path'"),
        ("", ["@t.csv"], "no path in t.csv"),
        ("", ["--list", "t.csv"], "no path in t.csv"),
        ("x", ["@nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        ("x", ["nowhere.csv"], "No such file or directory: 'nowhere.csv'"),
        ("x", [], "the following arguments are required: IMAGE|FOLDER|GLOB"),
    ],
)
def test_bad_inputs_are_named_and_nothing_is_written(run, content, args, message):
    Path("t.csv").write_text(content)
    status, _, err = run(*args, "--out", "out")
    assert status == 2 and message in err and err.count("\n") == 0
    assert not Path("out").exists()


def test_a_parquet_file_that_is_none_or_lacks_the_column(run):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"file": ["a.jpg"]}), "t.parquet")
    status, _, err = run("t.parquet", "--out", "out")
    assert status == 2 and "t.parquet has no column 'path' (it has file)" in err
    Path("t.parquet").write_bytes(b"no table")
    status, _, err = run("t.parquet", "--out", "out")
    assert status == 2 and "t.parquet: expected a Parquet table" in err and not Path("out").exists()


def test_a_folder_that_is_closed(run, photos, monkeypatch):
    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    status, _, err = run(photos, "--out", "out")
    assert status == 2 and f"Permission denied: '{photos}'" in err and not Path("out").exists()


def test_archives(run, photos):
    content = (photos / "p00.jpg").read_bytes()
    archive("shard.tar", {
        "x/one.jpg": content, "x/one.seg.png": content, "two.JPG": content, "two.json": b"{}", "three.png": b"no image",
        "x/notes.txt": b"?",
    })  # fmt: skip
    sources = datasets.find_sources(["shard.tar"])
    assert [source.label for source in sources] == [
        *("shard.tar/x/one.jpg", "shard.tar/x/one.seg.png", "shard.tar/two.JPG", "shard.tar/three.png")
    ]
    assert [source.stem for source in sources] == ["one", "one.seg", "two", "three"]
    status, _, err = run("shard.tar", "--out", "out")
    assert status == 1 and err == "cfcam: shard.tar/three.png: not an image in a known format"
    archive("empty.tar", {"a.txt": b"?"})
    assert "no image in empty.tar" in run("empty.tar")[2]
    Path("no.tar").write_bytes(b"?" * 2000)
    assert "no.tar: expected a tar archive that is not compressed" in run("no.tar")[2]
    whole = Path("shard.tar").read_bytes()
    Path("cut.tar").write_bytes(whole[: 512 + len(content) // 2])
    status, _, err = run("cut.tar", "shard.tar")
    assert status in (1, 2) and "cut.tar" in err


def test_a_list_may_name_a_file_again(run, photos):
    Path("list.txt").write_text("photos/p00.jpg\n" * 40)
    sources = datasets.find_sources(["@list.txt", "photos/p00.jpg"])
    assert [source.stem for source in sources] == ["p00", *(f"p00-{number}" for number in range(2, 42))]
    assert len(datasets.find_sources(["photos/p00.jpg", "photos/../photos/p00.jpg"])) == 1


# Reading ahead, and batches


def test_ahead_is_in_order_and_bounded():
    asked, given = [], []

    def slow(item):
        time.sleep(0.001 * (item % 3))
        return item

    def items():
        for item in range(50):
            asked.append(item)
            assert len(asked) - len(given) <= 6
            yield item

    with ThreadPoolExecutor(3) as pool:
        for item in reading.ahead(pool, slow, items(), 5):
            given.append(item)
        assert given == list(range(50))

        def fails(item):
            if item == 3:
                raise KeyError(item)
            return item

        with pytest.raises(KeyError):
            list(reading.ahead(pool, fails, range(9), 5))


def test_what_follows_the_first_groups_does_not_depend_on_them(rng):
    """So a run that goes on after some batches makes the same ones as a run that was never killed."""
    for _ in range(100):
        items = [(index, int(rng.integers(0, 4))) for index in range(60)]
        size, waiting = int(rng.integers(1, 6)), int(rng.integers(1, 15))
        groups = list(reading.grouped(items, lambda item: item[1], size, waiting))
        assert sorted(item for group in groups for item in group) == items
        assert all(len(group) <= size and len({kind for _, kind in group}) == 1 for group in groups)
        n = int(rng.integers(0, len(groups)))
        done = {item for group in groups[:n] for item in group}
        rest = [item for item in items if item not in done]
        assert list(reading.grouped(rest, lambda item: item[1], size, waiting)) == groups[n:]


def test_batches_are_filled_across_files(run, rng, monkeypatch):
    for index in range(12):
        photograph(rng, (64, 48) if index % 2 else (48, 64)).save(f"p{index:02}.png")
    batches, load = [], models.load_model

    def counted(*args):
        loaded = load(*args)
        loaded.model.register_forward_pre_hook(lambda model, inputs: batches.append(tuple(inputs[0].shape)))
        return loaded

    monkeypatch.setattr(models, "load_model", counted)
    assert run("*.png", "--write", "maps", "--out", "out", batch=5, model="small_net:build_any_size")[0] == 0
    rows = [shape[0] for shape in batches]
    assert set(rows[:3]) == {1} and rows[3:] == [5, 5, 5, 5]  # after three looks at one; the last two filled up
    assert len(tree("out")) == 12


def test_what_is_held_at_once_does_not_grow(photos):
    """Pictures that were read and are not yet written."""
    held, most, load = set(), [], images.read_image
    lock = threading.Lock()

    class Counting(running.Report):
        def record(self, record, said):
            with lock:
                held.discard(record.name)

    def counted(source):
        with lock:
            held.add(source.stem)
            most.append(len(held))
        return load(source.label)

    for n in (60, 240):
        Path("list.txt").write_text("".join(f"photos/p{index % N_PHOTOS:02}.jpg\n" for index in range(n)))
        sources = datasets.find_sources(["@list.txt"])
        sources = [source._replace(load=lambda source=source: counted(source)) for source in sources]
        most.clear()
        options = running.Options(Path(f"out{n}"), "small_net:build", batch_size=4, write=["maps"], workers=2)
        summary = datasets.explain(options, sources, Counting())
        assert summary.explained == n and not held
        # Batches: one being filled, one explained, two written; and what is read ahead.
        assert max(most) <= 4 * (2 + running.BATCHES_WRITTEN) + (4 + 2) + 2


def test_a_source_of_ones_own_may_raise_anything(photos):
    def load():
        raise KeyError("gone")

    sources = [*datasets.find_sources(["photos"]), datasets.Source("mine", load, "mine")]
    summary = datasets.explain(running.Options(Path("out"), "small_net:build", write=["scores"]), sources)
    assert summary.explained == N_PHOTOS and summary.files == ["scores.csv"]
    assert [record.error for record in summary.lost] == ["mine: KeyError: 'gone'"]


# Going on


class Killed(BaseException):
    pass


def interrupted(monkeypatch, run, after, *args, **options):
    """A run that ends, without any clearing up, when it has journalled so many batches."""
    with monkeypatch.context() as patch:
        add, close = journal.Journal.add, journal.Journal.close

        def added(self, records):
            if self.batches < after:
                add(self, records)
                self.batches += 1
            if self.batches == after:
                raise Killed

        def closed(self, forget):
            close(self, False)

        patch.setattr(journal.Journal, "batches", 0, raising=False)
        patch.setattr(journal.Journal, "add", added)
        patch.setattr(journal.Journal, "close", closed)
        with pytest.raises(Killed):
            run(*args, **options)


ALL = ["--write", "overlay,maps,scores", "--raw", "--versus"]
IN_ONE_FILE = {
    "npy": [],
    "zarr": ["--maps-format", "zarr"],
    "parquet": ["--maps-format", "parquet", "--scores-format", "parquet"],
}


@pytest.mark.parametrize("kind", IN_ONE_FILE)
@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_ends_as_if_it_had_not_been(run, photos, monkeypatch, kind, after):
    if kind != "npy":
        pytest.importorskip(kind.replace("parquet", "pyarrow"))
    (photos / "p01.jpg").write_bytes(b"no image")
    common = [photos, *ALL, *IN_ONE_FILE[kind]]
    expected = run(*common, "--out", "undisturbed")
    interrupted(monkeypatch, run, after, *common, "--out", "out")
    assert 0 < len(tree("out"))
    status, out, err = run(*common, "--out", "out")
    assert f"going on with the unfinished run in out: {4 * after} of {N_PHOTOS} images are done" in out
    assert status == 1 and err == expected[2]
    assert tree("out") == tree("undisturbed")


def test_a_killed_process(photos, tmp_path, seed):
    script = ROOT / "benchmarks" / "kill.py"
    if not script.is_file():
        pytest.skip("not a checkout")
    args = ["explain", photos, "--model", "small_net:build", "--batch-size", 2, "--out", "out", *ALL]
    command = [sys.executable, script, 3, seed, *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    said = json.loads(process.stdout)
    assert said["statuses"] == [0, 0] and len(said["kills"]) == 3
    assert tree("out") == tree("out-undisturbed") and tree("out")


@pytest.mark.parametrize("end", [b'{"batch": [[7, "p07', b"\0\0\0\0\0\0", b'{"batch": []}', b"\n", b"17\n", b"\xff\n"])
def test_a_journal_that_was_cut_short(tmp_path, end):
    parameters = {"model": "demo", "layer": None}
    found = {"classes": [1], "labels": ["ox"], "scores": [0.5]}
    done = [journal.Record(index, f"{index}.png", str(index), **found) for index in range(4)]
    first = journal.Journal(tmp_path / "out", parameters)
    first.set_found({"layer": ["1"]})
    first.add(done[:2])
    first.spooled(b"maps of a batch that was not finished")
    (first.parts / "half.part").write_bytes(b"?")
    first.close(False)
    path = tmp_path / "out" / journal.FOLDER / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    again = journal.Journal(tmp_path / "out", parameters)
    assert sorted(again.done) == [0, 1] and again.found == {"layer": ["1"]} and again.n_explained == 2
    assert path.read_bytes() == whole and not list(again.parts.iterdir()) and again.spool.stat().st_size == 0
    again.add(done[2:])
    assert [record.as_dict() for record in again.records()] == [record.as_dict() for record in done]
    again.close(True)
    assert not list((tmp_path / "out").iterdir())


def test_a_journal_of_every_length(tmp_path):
    """Whatever part of it reached the disk, it is read as the batches that did."""
    first = journal.Journal(tmp_path / "out", {"model": "demo"})
    for index in range(3):
        first.add([journal.Record(index, f"{index}.png", str(index))])
    first.close(False)
    path = tmp_path / "out" / journal.FOLDER / "journal.jsonl"
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    near = {end + step for end in ends for step in (-2, -1, 0, 1)}
    for length in sorted({0, len(whole), *near, *range(0, len(whole), 29)} & set(range(len(whole) + 1))):
        path.write_bytes(whole[:length])
        again = journal.Journal(tmp_path / "out", {"model": "demo"})
        assert len(again.done) == max(0, sum(end <= length for end in ends) - 1)
        again.close(False)


def test_an_earlier_run_had_the_same_parameters(run, photos, monkeypatch):
    interrupted(monkeypatch, run, 1, photos, "--out", "out")
    left = tree("out")
    for args, options, message in (
        (["--top", 3], {}, "had top none, this one has 3"),
        (["--layer", 0], {}, "had layer none, this one has 0"),
        (["--paper"], {}, "had "),
        (["--write", "maps"], {}, "had write overlay, this one has maps"),
        ([], {"batch": 3}, "had batch_size 4, this one has 3"),
        ([], {"model": "small_net:build_other"}, "had model small_net:build, this one has small_net:build_other"),
        (["--labels", "names.txt"], {}, "had other class names"),
    ):
        Path("names.txt").write_text("a\nb\nc\nd\n")
        status, _, err = run(photos, *args, "--out", "out", **options)
        assert status == 2 and "an unfinished run in out " in err and message in err and "--overwrite" in err, args
        assert tree("out") == left
    (photos / "p99.jpg").write_bytes((photos / "p00.jpg").read_bytes())
    status, _, err = run(photos, "--out", "out")
    assert status == 2 and "had other images" in err
    assert run(photos, "--out", "out", "--overwrite", "--top", 3)[0] == 0
    assert run(photos, "--out", "undisturbed", "--top", 3)[0] == 0
    assert tree("out") == tree("undisturbed") and len(tree("out")) == N_PHOTOS + 1


def test_an_earlier_run_had_the_same_weights_and_size(run, photos, monkeypatch):
    interrupted(monkeypatch, run, 1, photos, "--out", "out")
    module = Path("small_net.py")
    for change, message in (
        (("manual_seed(0)", "manual_seed(1)"), "had a model with other weights"),
        (("(64, 64)", "(72, 72)"), "had size 64,64, this one has 72,72"),
        (("(64, 64)", "(64, 64), squash=True"), "had another preprocess"),
    ):
        sys.modules.pop("small_net")
        __import__("importlib").invalidate_caches()
        __import__("shutil").rmtree("__pycache__", ignore_errors=True)
        module.write_text(NETWORK.replace(*change))
        status, _, err = run(photos, "--out", "out")
        assert status == 2 and message in err


def test_the_fingerprint_of_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).half())
    first = running.fingerprint(model)
    assert first == running.fingerprint(model)
    with torch.no_grad():
        model[0].weight[1, 2] += 1e-6
    assert running.fingerprint(model) != first
    for layer in (model[0], model[2]):  # classes in another order are another model
        before = running.fingerprint(model)
        layer.load_state_dict({name: tensor.flip(0) for name, tensor in layer.state_dict().items()})
        assert running.fingerprint(model) != before


def test_the_fingerprint_of_a_preprocess():
    def of(preprocess, n_axes=2):
        loaded = models.LoadedModel(nn.Identity(), preprocess, None, n_axes=n_axes)
        return running.fingerprint_of_preprocess(loaded)

    plain = of(models.Preprocess((64, 64)))
    assert plain == of(models.Preprocess((64, 64))) != of(models.Preprocess((64, 64), std=(0.5,) * 3))
    assert of(lambda image: torch.rand(3, 8, 8)) is None and of(lambda image: 1 / 0) is None
    assert of(lambda volume: volume[:, :4], 3) != of(lambda volume: volume[:, 4:], 3)


def test_two_runs_at_once(run, photos, tmp_path):
    held = journal.Journal(tmp_path / "out", {"model": "demo"})
    status, _, err = run(photos, "--out", "out")
    assert status == 2 and f"another run, process {os.getpid()}, is writing into out" in err
    held.close(True)
    assert run(photos, "--out", "out")[0] == 0


def test_a_finished_run_leaves_no_journal_and_is_done_anew(run, photos):
    for _ in range(2):
        status, out, _ = run(photos, "--write", "maps", "--out", "out")
        assert status == 0 and out.count(" -> ") == N_PHOTOS
        assert len(tree("out")) == N_PHOTOS and not (Path("out") / journal.FOLDER).exists()


# What ends a run


def test_a_full_disk_ends_the_run_and_nothing_is_half_written(run, photos, monkeypatch):
    assert run(photos, *ALL, "--out", "undisturbed")[0] == 0
    whole = tree("undisturbed")
    write, n_written = files.write_file, [0]

    def full(path, content, beside):
        n_written[0] += 1
        if n_written[0] > 30:  # five a picture, twenty a batch
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content, beside)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_file", full)
        status, _, err = run(photos, *ALL, "--workers", 1, "--out", "out")
    assert status == 2 and "out: No space left on device; 4 images are done, and the same command goes on" in err
    assert all(content == whole[name] for name, content in tree("out").items() if not name.startswith(journal.FOLDER))
    assert run(photos, *ALL, "--out", "out")[0] == 0
    assert tree("out") == whole


def test_a_limit_on_the_size_of_files(run, photos):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        status, _, err = run(photos, "--write", "maps", "--out", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "out: File too large" in err and not tree("out")


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        files.write_file(path, b"new", tmp_path)
    assert tree(tmp_path).get("a.npy") == b"old" and not list(tmp_path.glob("*.part"))


# Loaders


@pytest.fixture
def cam(seed):
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return CFCAM(network.eval(), [network[1]])


class Named(nn.Module):
    """A model that takes its images by the name that transformers gives them, and more."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixel_values, scale=None):
        return {"logits": self.network(pixel_values) * (1.0 if scale is None else scale[:, None])}


def test_a_stream_is_the_calls_one_after_the_other(cam):
    pictures, labels = torch.rand(10, 3, 32, 32), torch.randint(0, 4, (10,))
    parts = list(zip(pictures.split(4), labels.split(4)))
    loader = DataLoader(TensorDataset(pictures, labels), batch_size=4)
    loaders = {
        "loader": loader,
        "pairs": parts,
        "lists": [(list(each), target.tolist()) for each, target in parts],
        "dicts": [{"pixel_values": each, "label": target, "path": ["?"] * len(each)} for each, target in parts],
        "more": [(each, target, "paths") for each, target in parts],
    }
    for kind, given in loaders.items():
        for options, expected in (
            ({}, [cam.explain(each, target) for each, target in parts]),
            ({"use_targets": False}, [cam.explain(each) for each, _ in parts]),
            ({"top": 2}, [cam.explain(each, top=2) for each, _ in parts]),
        ):
            found = list(cam.stream(given, **options))
            assert len(found) == len(expected), kind
            for one, other in zip(found, expected):
                assert (one.maps == other.maps).all() and (one.targets == other.targets).all(), kind
                assert (one.outputs == other.outputs).all() and (one.weights == other.weights).all(), kind
    assert found[0].batch is loaders["more"][0]
    for given in (list(pictures.split(4)), [(each,) for each, _ in parts], [list(each) for each, _ in parts]):
        assert [len(found.maps) for found in cam.stream(given)] == [4, 4, 2]
    assert [
        len(found.maps) for found in methods.GradCAM(cam.model, [cam.model[1]]).stream(list(pictures.split(5)))
    ] == [5, 5]


def test_a_stream_of_a_loader_that_fills_the_same_memory_again(cam):
    pictures, labels = torch.rand(6, 3, 32, 32), torch.tensor([0, 3, 2, 1, 0, 3])
    buffers = torch.empty(1, 3, 32, 32), torch.empty(1, dtype=torch.long)

    def loader():
        for index in range(len(pictures)):
            for buffer, values in zip(buffers, (pictures, labels)):
                buffer.copy_(values[index : index + 1])
            yield buffers

    stream = cam.stream(loader())
    found = []
    for each in stream:
        time.sleep(0.02)  # the next ones are there before this one is explained
        found.append(each)
    assert torch.equal(torch.cat([each.targets for each in found]), labels)
    for each, image, label in zip(found, pictures.split(1), labels.split(1)):
        assert torch.equal(each.maps, cam.maps(image, label))


def test_a_stream_of_named_inputs(cam):
    pictures, scale = torch.rand(2, 3, 32, 32), torch.tensor([1.0, 2.0])
    named = CFCAM(Named(cam.model), [cam.model[1]])
    batch = {"pixel_values": pictures, "scale": scale, "labels": torch.tensor([1, 2]), "id": ["a", "b"]}
    (found,) = named.stream([batch])
    expected = named.explain({"pixel_values": pictures, "scale": scale}, [1, 2])
    assert (found.maps == expected.maps).all() and (found.outputs["logits"] == expected.outputs["logits"]).all()


@pytest.mark.parametrize(
    "batch, message",
    [
        ("images", "a batch must be a tensor of images"),
        ((torch.rand(2, 3, 8, 8), torch.rand(2)), "targets must be class indices or callables, got torch.float32"),
        ({"a": torch.rand(2, 3, 8, 8), "b": torch.rand(2, 3, 8, 8)}, "images in one column, got a, b"),
        ({"label": torch.tensor([1])}, "images in one column, got nothing"),
    ],
)
def test_batches_that_are_none(cam, batch, message):
    with pytest.raises(TypeError, match=message):
        next(cam.stream([batch]))


def test_a_stream_raises_what_the_loader_raises_after_what_came_before(cam):
    def loader():
        yield torch.rand(1, 3, 32, 32)
        raise OSError("the disk is gone")

    stream = cam.stream(loader())
    assert next(stream).maps.shape == (1, 32, 32)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_a_stream_loads_ahead_and_ends_with_its_loop():
    given = []

    def loader():
        for index in range(1000):
            given.append(index)
            yield index

    stream = streaming.prefetched(loader(), 2)
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(given) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(given) == 4  # one is here, two wait, and one is in the thread's hands
    stream.close()
    deadline = time.monotonic() + 10
    while any(thread.name == "cfcam-load" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not any(thread.name == "cfcam-load" for thread in threading.enumerate())


def test_loading_and_computing_overlap():
    def loader():
        for index in range(10):
            time.sleep(0.02)
            yield index

    begun = time.perf_counter()
    for _ in streaming.prefetched(loader(), 2):
        time.sleep(0.02)
    assert time.perf_counter() - begun < 0.36  # one after the other: 0.4 and more


def test_copies_on_the_cpu_are_none():
    transfer, tensor = Transfer(torch.device("cpu")), torch.rand(3)
    assert transfer.to_device(tensor) is tensor and transfer.to_host(tensor) is tensor
    transfer.mark().wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_on_a_gpu():
    transfer, tensors = Transfer(torch.device("cuda")), [torch.rand(1000, 1000) for _ in range(8)]
    moved = [transfer.to_host(transfer.to_device(tensor) * 2) for tensor in tensors]
    transfer.mark().wait()
    assert all((found == 2 * tensor).all() for found, tensor in zip(moved, tensors))
    assert moved[0].is_pinned()
