"""Data sets by Ray Data, on a Ray of this machine: the same maps as without it, and nothing lost or doubled.

``make test-ray`` runs these: Ray and its workers take seconds to begin.
"""

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import bomb

ray = pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
pytest.importorskip("ray.data", reason="ray[data] is not installed (extra: ray)")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra: ray)")
Image = pytest.importorskip("PIL.Image")
for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

import pyarrow as pa

from cfcam_gpu import cli, datasets, images, models
from cfcam_gpu.datasets import ray_data, reading, writing

pytestmark = [
    pytest.mark.ray,
    pytest.mark.xdist_group("ray"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:maps are zero everywhere"),
]

NETWORK = """
import os
import time
from pathlib import Path

import torch
from torch import nn
from cfcam_gpu.models import Preprocess

def build():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    return nn.Sequential(*layers), Preprocess((64, 64)), ['ox', 'ass', 'mule', 'hinny']

class Slow(nn.Sequential):
    def forward(self, x):
        if len(x) > 1:  # not in the look at a picture of noise
            folder = Path(__file__).parent / "pids"
            folder.mkdir(exist_ok=True)
            (folder / str(os.getpid())).touch()
            time.sleep(0.2)
        return super().forward(x)

def build_slow():
    network, *others = build()
    return Slow(*network), *others
"""
N_PHOTOS = 11
HOW = {"batch_size": 4, "actors": 2, "num_cpus": 0.25}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray on this machine, whose workers find the small network."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "small_net.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(ray_data.__file__).parents[2]), *sys.path[:1]]))
        ray.init(address="local", num_cpus=2, object_store_memory=150 * 2**20, **options)
        ray_data.show_progress(False)
        yield folder
        ray.shutdown()
    sys.path.remove(str(folder))
    sys.modules.pop("small_net", None)


def photograph(rng):
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize((90, 70), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(rng, tmp_path, monkeypatch):
    """A folder of photographs, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for index in range(N_PHOTOS):
        photograph(rng).save(tmp_path / "photos" / f"p{index:02}.jpg")
    return tmp_path / "photos"


def rows_of(folder):
    """{path: row} of all Parquet files; each path is there once."""
    rows = [row for file in sorted(Path(folder).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


def maps_of(row):
    return np.frombuffer(row["maps"], "<f2").reshape(row["shape"])


def without_ray(paths, out, **how):
    """{path: row} of a run on one machine."""
    options = datasets.Options(
        Path(out), "small_net:build", write=["maps", "scores"], maps_format="parquet", batch_size=4, **how
    )
    summary = datasets.explain(options, datasets.find_sources(list(map(str, paths))))
    return rows_of_maps(out), {record.path: record.error for record in summary.lost}


def rows_of_maps(out):
    return {row["path"]: row for row in pq.read_table(Path(out) / "maps.parquet").to_pylist()}


def test_the_rows_are_those_of_a_run_on_one_machine(cluster, photos, capfd):
    (photos / "p01.jpg").write_bytes(b"no image")
    (photos / "p02.jpg").write_bytes(b"")
    (photos / "p03.png").write_bytes(bomb(60_000, colour=2))
    Path("list.txt").write_text("".join(f"{path}\n" for path in [*sorted(photos.iterdir()), photos / "missing.jpg"]))
    expected, errors = without_ray(["@list.txt"], "local")
    assert len(errors) == 4 and len(expected) == N_PHOTOS - 2
    command = ["explain", "@list.txt", "--engine", "ray", "--model", "small_net:build", "--out", "out", "--actors", "2"]
    capfd.readouterr()
    assert cli.main([*command, "--batch-size", "4", "--write", "maps,overlay"]) == 1
    out, err = capfd.readouterr()
    assert f"{N_PHOTOS - 2} of {N_PHOTOS + 2} images explained, 4 left out" in out
    rows = rows_of("out")
    assert {path: row["error"] for path, row in rows.items() if row["error"]} == errors
    assert all(f"cfcam: {error}" in err for error in errors.values())
    assert set(rows) == {*expected, *errors}
    for path, row in rows.items():
        if path in errors:
            assert row["maps"] is row["overlay"] is row["classes"] is None
            continue
        assert (row["classes"], row["shape"]) == (expected[path]["classes"], expected[path]["shape"])
        np.testing.assert_allclose(row["scores"], expected[path]["scores"], atol=1e-6)
        np.testing.assert_allclose(maps_of(row), maps_of(expected[path]), atol=1e-3)
    # The picture is the file that a run on one machine writes.
    options = datasets.Options(Path("pictures"), "small_net:build", batch_size=4)
    datasets.explain(options, datasets.find_sources([str(photos / "p04.jpg")]))
    there, here = (
        np.asarray(Image.open(file), int)
        for file in (io.BytesIO(rows[str(photos / "p04.jpg")]["overlay"]), "pictures/p04.png")
    )
    assert there.shape == here.shape
    # Where maps differ in their last bits, a pixel may take the next of a colour map's 256 colours.
    assert np.abs(there - here).max() <= 4 and np.abs(there - here).mean() < 0.05


def test_a_killed_actor_loses_and_doubles_nothing(cluster, photos, rng):
    for index in range(30):
        photograph(rng).save(photos / f"q{index:02}.jpg")
    pids, killed, ended = cluster / "pids", [], threading.Event()

    def kill():
        while not killed and not ended.is_set():  # however long a busy machine takes to begin
            for pid in pids.glob("*"):
                time.sleep(0.3)  # in the middle of its work
                os.kill(int(pid.name), signal.SIGKILL)
                killed.append(int(pid.name))
                break
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = ray_data.write(photos, "out", "small_net:build_slow", rows_per_file=8, **HOW)
    finally:
        ended.set()
        killer.join()
    assert killed and len(list(pids.iterdir())) > 2  # another actor has taken its place
    assert summary.explained == summary.images == N_PHOTOS + 30 and not summary.lost
    expected, _ = without_ray([photos], "local")
    rows = rows_of("out")
    assert set(rows) == set(expected)
    assert all(np.abs(maps_of(row) - maps_of(expected[path])).max() <= 1e-3 for path, row in rows.items())


def test_a_run_goes_on(cluster, photos, monkeypatch):
    paths = sorted(map(str, photos.iterdir()))
    first = ray_data.write(paths[:6], "out", "small_net:build", **HOW)
    assert (first.images, first.explained, first.resumed) == (6, 6, 0)
    out, (file,) = Path("out"), first.files
    before = (out / file).read_bytes()
    # As runs leave it that were killed: a file that is whole, and one that is not.
    dead = out / ray_data.FOLDER / "run-dead"
    dead.mkdir()
    (out / file).rename(dead / "whole.parquet")
    (dead / "half.parquet").write_bytes(before[: len(before) // 2])
    (dead / "new.parquet").write_bytes(b"")
    again = ray_data.write(photos, out, "small_net:build", **HOW)
    assert (again.images, again.explained, again.resumed) == (N_PHOTOS, N_PHOTOS, 6)
    assert (out / "whole.parquet").read_bytes() == before and len(again.files) == 2
    assert sorted(path.name for path in (out / ray_data.FOLDER).iterdir()) == ["lock", "parameters.json"]
    assert set(rows_of(out)) == set(paths)
    # Nothing is left to do; and then other parameters.
    monkeypatch.setattr(ray_data._Job, "explained", None)
    assert ray_data.write(photos, out, "small_net:build", **HOW).resumed == N_PHOTOS
    with pytest.raises(ValueError, match="an earlier run in .*out had top none, this one has 1"):
        ray_data.write(photos, out, "small_net:build", top=1, **HOW)
    with pytest.raises(ValueError, match="had batch_size 4, this one has 5"):
        ray_data.write(photos, out, "small_net:build", **{**HOW, "batch_size": 5})
    other = Path("other")
    other.mkdir()
    (other / "table.parquet").write_bytes(before)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="Parquet files of another program"):
            ray_data.write(photos, other, "small_net:build", overwrite=overwrite, **HOW)
    assert (other / "table.parquet").read_bytes() == before


def test_a_module_a_function_and_the_batch_do_not_change_a_map(cluster, photos):
    sources = datasets.find_sources([str(photos)])
    loaded = models.load_model("small_net:build")
    module = loaded.model.train()
    given = (module, loaded.preprocess, loaded.class_names)
    rows = ray_data.explain(sources, given, **HOW).take_all()
    assert module.training and len(rows) == N_PHOTOS
    assert set(rows[0]) == {"path", "classes", "labels", "scores", "shape", "maps", "error"}

    def build():
        return given

    # Other batches: backwards, and one fewer.
    others = ray_data.explain(sources[::-1][1:], build, **HOW).take_all()
    assert len(others) == N_PHOTOS - 1
    found = {row["path"]: row for row in rows}
    for row in others:
        assert row["maps"] == found[row["path"]]["maps"] and list(row["scores"]) == list(found[row["path"]]["scores"])
        assert list(row["labels"]) == [loaded.class_names[index] for index in row["classes"]]


def test_data_sets_of_paths_and_of_bytes(cluster, photos):
    (photos / "p01.jpg").write_bytes(b"no image")
    (photos / "p02.jpg").write_bytes(b"")
    paths = sorted(map(str, photos.iterdir()))
    targets = [index % 4 for index in range(N_PHOTOS)]
    pq.write_table(pa.table({"path": [*paths, None], "target": [*targets, 0]}), "paths.parquet")
    table = ray.data.read_parquet(os.path.abspath("paths.parquet"))  # the workers' folder is another one
    summary = ray_data.write(table.limit(5), "out", "small_net:build", **HOW)
    assert (summary.images, summary.explained) == (5, 3)
    summary = ray_data.write(table, "out", "small_net:build", **HOW)
    assert (summary.images, summary.explained, summary.resumed) == (N_PHOTOS + 1, N_PHOTOS - 2, 3)
    rows = rows_of("out")
    assert rows.pop("")["error"].endswith("the row has no path")
    assert all(row["error"] or row["classes"] == [target] for row, target in zip(map(rows.get, paths), targets))
    uris = ray_data.explain(f"file://{photos}", "small_net:build", **HOW).take_all()
    assert sorted(row["path"] for row in uris) == paths
    assert {row["path"]: row["error"] for row in uris if row["error"]} == {
        path: rows[path]["error"] for path in paths[1:3]
    }


def test_what_cannot_be_carried_out(cluster, photos, tmp_path, monkeypatch):
    explain = lambda *args, **how: ray_data.explain(*args, **{**HOW, **how})
    with pytest.raises(ValueError, match="no column 'path' .it has item"):
        explain(ray.data.from_items([1, 2]), "small_net:build")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no image in folder"):
        explain(tmp_path / "nothing", "small_net:build")
    with pytest.raises(ValueError, match="URIs alone or paths alone"):
        explain([photos, "s3://bucket/photos"], "small_net:build")
    with pytest.raises(TypeError, match="no option 'tops'; did you mean top"):
        explain(photos, "small_net:build", tops=1)
    with pytest.raises(TypeError, match="a spec, a module or a function that builds one, got int"):
        explain(photos, 3)
    with pytest.raises(TypeError, match="the function that builds the model must return a torch.nn.Module"):
        explain(photos, lambda: 3)
    with pytest.raises(ValueError, match="at most 4 for small_net:build, got 5"):
        explain(photos, "small_net:build", top=5)
    with pytest.raises(ValueError, match="--raw does not go with Ray"):
        explain(photos, "small_net:build", raw=True)
    with pytest.raises(ValueError, match="--html does not go with Ray"):
        explain(photos, "small_net:build", html=True)
    with pytest.raises(ValueError, match="Ray explains images alone, Conv3d takes scans and videos"):
        explain(photos, torch.nn.Conv3d(1, 4, 3))
    with pytest.raises(ValueError, match="--device does not go with Ray"):
        explain(photos, "small_net:build", device=torch.device("cpu"))
    if os.geteuid():
        (tmp_path / "nothing").chmod(0)
        with pytest.raises(OSError, match="nothing"):
            explain(tmp_path / "nothing", "small_net:build")
    with pytest.raises(ValueError, match="another run.* is writing into"):
        folder = ray_data._Folder(tmp_path / "out", {}, False)
        try:
            ray_data.write(photos, tmp_path / "out", "small_net:build", **HOW)
        finally:
            folder.close()


def test_the_command_refuses_in_a_line(photos, capfd, monkeypatch):
    def refused(*args):
        assert cli.main(["explain", *args, "--engine", "ray", "--out", "out"]) == 2
        return capfd.readouterr().err

    pq.write_table(pa.table({"file": ["a.jpg"]}), "table.parquet")
    assert "no column 'path' (it has file)" in refused("table.parquet")
    assert "no image in folder" in refused(".")
    for args in (["--json"], ["--html"], ["--workers", "2"], ["--maps-format", "zarr"]):
        assert f"{args[0]} does not go with --engine ray" in refused("photos", *args)
    monkeypatch.setattr(ray_data.ray_package(), "is_initialized", lambda: False)
    begun = time.monotonic()
    for address in ("127.0.0.1:1", "nowhere.invalid:6379", "nothing"):
        with pytest.raises(ConnectionError, match=f"no Ray cluster at {address}: "):
            ray_data.connect(address)
    assert time.monotonic() - begun < 3 * ray_data.ANSWER_S
    monkeypatch.setitem(sys.modules, "ray", None)
    assert 'ray is not installed; it comes with the "ray" extra' in refused("photos")


def test_what_fails_as_a_whole_is_a_line_and_what_is_done_is_kept(cluster, photos, monkeypatch, capfd):
    def full(table, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray_data, "_drawn", full)
    out = "a folder, 100% #1"
    command = ["explain", "photos", "--engine", "ray", "--model", "small_net:build", "--out", out, "--batch-size", "4"]
    assert cli.main(command) == 2
    err = capfd.readouterr().err
    (line,) = (line for line in err.splitlines() if line.startswith("cfcam: error: "))
    assert "No space left on device" in line and "Traceback" not in line
    monkeypatch.undo()
    os.chdir(photos.parent)
    assert cli.main(command) == 0 and len(rows_of(out)) == N_PHOTOS


def test_which_pictures_are_done(rng, tmp_path):
    names = [f"{rng.integers(2**62)}" for _ in range(1000)]
    for part in range(2):
        pq.write_table(pa.table({"path": names[part:800:2]}), tmp_path / f"{part}.parquet")
    done = ray_data._Done(sorted(tmp_path.iterdir()))
    assert len(done) == 800 and done.distinct
    assert done.has(names).tolist() == [True] * 800 + [False] * 200
    pq.write_table(pa.table({"path": names[:1]}), tmp_path / "twice.parquet")
    assert not ray_data._Done(sorted(tmp_path.iterdir())).distinct
    nothing = ray_data._Done([])
    assert not len(nothing) and nothing.distinct and not nothing.has(names).any()


def test_sources_are_found_from_another_folder(photos):
    import pickle
    import tarfile

    with tarfile.open("shard.tar", "w") as tar:
        tar.add("photos/p00.jpg", "p00.jpg")
    sources = datasets.find_sources(["photos/p00.jpg", "shard.tar"])
    sent = [pickle.loads(pickle.dumps(ray_data._absolute(source))) for source in sources]
    os.chdir("/")
    pixels = images.load_image(photos / "p00.jpg").tobytes()
    assert [source.load().tobytes() for source in sent] == [pixels, pixels]
    assert [source.label for source in sent] == [source.label for source in sources]
    assert reading.Source("a", photograph, "a") == ray_data._absolute(reading.Source("a", photograph, "a"))
    assert writing.as_text("a\udcff") == "a\\udcff"
