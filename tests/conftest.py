"""Shared fixtures: a fresh, replayable seed for every test."""

import importlib
import os
import secrets
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

# Before the first import of triton: without a GPU its kernels run in the interpreter, on CPU tensors.
if not (Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Before the first import of torch: where there is a process a core (pytest -n auto), each has one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture
def seed(request):
    """A fresh seed per test; printed on failure, replayed with CFCAM_TEST_SEED=<seed>."""
    value = int(os.environ.get("CFCAM_TEST_SEED", secrets.randbelow(2**31)))
    torch.manual_seed(value)
    print(f"seed: CFCAM_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed):
    """NumPy generator on the test's seed."""
    return np.random.default_rng(seed)


@pytest.fixture
def poisoned(monkeypatch):
    """Every ``torch.empty`` comes filled with NaN or the largest integer: a value that no kernel wrote shows."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch):
    """In the interpreter a program takes milliseconds, so that what is many small programs on a GPU is fewer larger."""
    module = sys.modules.get("cfcam_gpu.kernels.affinity_sum")
    if module is not None and os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(module, "STORED_CELLS_AT_ONCE", 32)


@pytest.fixture
def device_path(monkeypatch, poisoned):
    """The path that tensors on a device take: there, or on CPU tensors, with the kernels in the interpreter.

    ``device`` is where the model belongs, ``launched`` the growing list of the names of the kernels that ran.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    from device import DEVICE, GPU, launched

    from cfcam_gpu import pipeline, triton_backend

    choose = pipeline.choose

    def choose_as_on_a_device(backend, clustering, activations=None):
        if backend == "auto" and activations is not None and triton_backend.refusal(activations) is None:
            backend = "triton"
        return choose(backend, clustering, activations)

    if not GPU:
        monkeypatch.setattr(pipeline, "choose", choose_as_on_a_device)
    return SimpleNamespace(device=DEVICE, launched=launched(monkeypatch))


@pytest.fixture
def use_threads():
    """``use_threads(n)``: torch's threads until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(use_threads):
    """For small inputs: threads that wait for a busy core would take many times longer than the work."""
    use_threads(1)


@pytest.fixture
def a_module(tmp_path, monkeypatch):
    """``a_module(name, source)``: a module in the test's folder, which it can import, and in which it works."""
    written = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def resnet18(seed):
    """torchvision's ResNet-18 with random weights, in eval mode."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed (extra: test)")
    return torchvision.models.resnet18(weights=None).eval()


@pytest.fixture
def network(seed):
    """A small network of 5 classes with sharp probabilities, for images of ``measured.SIZE``."""
    from measured import SIZE

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * (SIZE - 2) ** 2, 5))
    with torch.no_grad():
        model[-1].weight *= 10
    return model.eval()


@pytest.fixture
def problem(network):
    """`network` and (images, maps, targets) of a batch of 3."""
    from measured import SIZE

    return network, torch.randn(3, 3, SIZE, SIZE), torch.rand(3, SIZE, SIZE), [4, 0, 2]


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the folder benchmarks/ by its name, as a script in there would."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not folder.is_dir():
        pytest.skip("not a checkout")
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module


@pytest.fixture
def run(capfd):
    """Runs ``cfcam`` in this process; returns status, stdout and stderr."""

    from cfcam_gpu import cli

    def run(*args):
        status = cli.main([str(arg) for arg in args])
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium; none is downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: test)")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("Chromium is not installed (Debian and Ubuntu: apt install chromium)")
    with playwright.sync_playwright() as driver:
        # Chromium has no sandbox for root.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()
