"""Batches that threads share on a CPU: the same maps, whatever the network's code notes in the network."""

import sys
import threading
import warnings

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

from pictures import random_photographs

from cfcam_gpu import cli, datasets
from cfcam_gpu.datasets import journal, running

N_PHOTOS, BATCH = 19, 8

NETWORK = """
import threading
import time
import torch
from torch import nn
from cfcam_gpu.models import Preprocess

OVERLAPS = []  # of passes of one network
USED = set()  # (thread, network) of each forward pass of several images

class Noting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 4)
        self.layer = nn.ReLU()
    def forward(self, x):
        if len(x) > 1:
            USED.add((threading.current_thread().name, id(self)))
        if getattr(self, "busy", False):
            OVERLAPS.append(self)
        self.busy = True
        self.noted = self.layer(self.first(x))
        time.sleep(0.02)  # others come between
        self.busy = False
        return self.head(self.noted.mean((2, 3)))

class Alone(Noting):
    def __deepcopy__(self, memo):
        raise RuntimeError("there is only one")

class Failing(Noting):
    def forward(self, x):
        if (x.amax((2, 3)) == x.amin((2, 3))).any():
            raise ValueError("a picture of one colour")
        return super().forward(x)

def made(kind):
    torch.manual_seed(0)
    return kind(), Preprocess((64, 64))
def build():
    return made(Noting)
def build_alone():
    return made(Alone)
def build_failing():
    return made(Failing)
def build_any():
    network, preprocess = build()
    return network, lambda image: preprocess(image)
"""

pytestmark = pytest.mark.filterwarnings("ignore:maps are zero everywhere")


@pytest.fixture(autouse=True)
def network(a_module):
    a_module("noting_net", NETWORK)


@pytest.fixture
def photos(rng, tmp_path):
    return random_photographs(tmp_path / "photos", N_PHOTOS, rng)


@pytest.fixture(params=[2, 3, 4])
def threads(request, use_threads):
    use_threads(request.param)
    return request.param


@pytest.fixture
def two_threads(use_threads):
    use_threads(2)


def explained(photos, out, model="build", **how):
    """float32 maps of every photograph, {file: (H, W)}; and the summary."""
    options = datasets.Options(photos.parent / out, f"noting_net:{model}", raw=True, write=["maps"], **how)
    summary = datasets.explain(options, datasets.find_sources([str(photos)]))
    return {path.name: np.load(path) for path in options.out.glob("p??_?.npy")}, summary


def used():
    """How many threads and how many networks have explained; and begin anew."""
    found = sys.modules["noting_net"].USED
    counts = tuple(len(set(each)) for each in zip(*found))
    found.clear()
    return counts


def same(found, expected):
    return set(found) == set(expected) and all(np.abs(found[name] - expected[name]).max() < 1e-5 for name in expected)


def test_the_maps_are_the_same(photos, threads, seed):
    found, summary = explained(photos, "found", batch_size=BATCH)
    n_threads, n_networks = used()
    # Of four threads two, because a part has four pictures; of three none, because they cannot be shared out to two.
    assert n_networks == {2: 2, 3: 1, 4: 2}[threads] and (n_threads > 1) == (n_networks > 1)
    assert torch.get_num_threads() == threads and summary.explained == N_PHOTOS
    expected, _ = explained(photos, "expected", batch_size=1)
    assert len(expected) == 2 * N_PHOTOS and max(map(np.max, expected.values())) == 1
    assert same(found, expected)


@pytest.mark.parametrize("model, batch", [("build_alone", BATCH), ("build_any", BATCH), ("build", 7), ("build", 30)])
def test_what_is_not_shared(photos, two_threads, model, batch):
    """A network that cannot be copied, one of which nobody knows the size, and batches that are too small or alone."""
    explained(photos, "found", model, batch_size=batch)
    assert used() == (1, 1) and torch.get_num_threads() == 2


def test_a_large_network_is_not_copied(photos, two_threads, monkeypatch):
    monkeypatch.setattr(running, "COPIES_BYTES", 1000)
    explained(photos, "found", batch_size=BATCH)
    assert used() == (1, 1)


def test_pictures_that_fail_are_named_and_the_others_explained(photos, two_threads):
    for index in (0, 1, 3, 9, 18):  # 9: in a part beside another
        Image.new("RGB", (90, 70), (9, 9, 9)).save(photos / f"p{index:02}.png")
    _, summary = explained(photos, "found", "build_failing", batch_size=BATCH)
    assert [record.name for record in summary.lost] == ["p00", "p01", "p03", "p09", "p18"]
    assert all("a picture of one colour" in record.error for record in summary.lost)
    assert summary.explained == N_PHOTOS - 5 and used()[1] == 2
    assert not sys.modules["noting_net"].OVERLAPS


def test_notices_are_given_once(photos, two_threads):
    told = []

    class Report(running.Report):
        def warning(self, text):
            told.append(text)

    for path in photos.iterdir():
        Image.new("RGB", (90, 70), (9, 9, 9)).save(path)
    options = datasets.Options(photos.parent / "out", "noting_net:build", write=["maps"], batch_size=BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        datasets.explain(options, datasets.find_sources([str(photos)]), Report())
    assert used()[1] == 2 and sum("zero everywhere" in each for each in told) == 1


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_ends_as_if_it_had_not_been(photos, two_threads, monkeypatch, after):
    args = ["explain", str(photos), "--model", "noting_net:build", "--batch-size", str(BATCH), "--write", "maps,scores"]
    assert cli.main([*args, "--out", "undisturbed"]) == 0
    with monkeypatch.context() as patch:
        add, n_added = journal.Journal.add, []

        def added(self, records):
            if len(n_added) == after:
                raise KeyboardInterrupt
            add(self, records)
            n_added.append(records)

        patch.setattr(journal.Journal, "add", added)
        assert cli.main([*args, "--out", "out"]) == 130
    assert torch.get_num_threads() == 2
    assert not any(each.name.startswith("cfcam-explain") for each in threading.enumerate())
    assert cli.main([*args, "--out", "out"]) == 0
    found, expected = ({path.name: path.read_bytes() for path in photos.parent.joinpath(name).iterdir()}
                       for name in ("out", "undisturbed"))  # fmt: skip
    assert found == expected and len(found) == N_PHOTOS + 1
