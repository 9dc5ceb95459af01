"""The cuML engine: the call contract through a fake of cuML's interface, and cuML itself where it can run."""

import inspect
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from problems import CLUSTERING_KINDS, activations_like, clustering_rows, random_config
from sklearn.cluster import DBSCAN as SklearnDBSCAN

from cfcam_gpu import CFCAMConfig, cf_cam, cluster_channels, clustering, torch_backend
from cfcam_gpu.clustering import cuml as cuml_engine

CUML = clustering.ENGINES["cuml"].unavailable() is None


class FakeDBSCAN:
    """cuML 26.10's DBSCAN as far as it is called here; refuses every call that the real one would not serve well."""

    log = []

    def __init__(
        self,
        *,
        eps=0.5,
        min_samples=5,
        metric="euclidean",
        algorithm="brute",
        verbose=False,
        max_mbytes_per_batch=None,
        output_type=None,
        calc_core_sample_indices=True,
    ):
        assert metric == "precomputed", "another metric decides ties at eps by its own rounding"
        assert not calc_core_sample_indices, "core indices cost another synchronisation"
        assert output_type == "cupy", "labels must stay on the device"
        assert float(np.float32(eps)) == eps, "eps is narrowed to float32"
        self.eps, self.min_samples = eps, min_samples

    def fit_predict(self, X, y=None, sample_weight=None, *, out_dtype="int32"):
        assert isinstance(X, torch.Tensor) and X.dtype == torch.float32, "converted by a copy otherwise"
        assert X.is_contiguous() and not X.requires_grad and X.ndim == 2 and X.shape[0] == X.shape[1]
        assert torch.equal(X, X.T) and not X.diagonal().any()
        assert y is None and sample_weight is None and out_dtype == "int32"
        self.log.append("fit")
        labels = SklearnDBSCAN(eps=self.eps, min_samples=self.min_samples, metric="precomputed").fit(X.numpy()).labels_
        return labels.astype(out_dtype)  # an array with DLPack


class FakeStream:
    def __init__(self, name):
        self.name = name

    def wait_event(self, event):
        FakeDBSCAN.log.append(f"{self.name} waits for {event.recorded}")


class FakeEvent:
    def record(self, stream):
        self.recorded = stream.name


@pytest.fixture
def fake(monkeypatch):
    """cuML and the streams of torch.cuda replaced by recorders."""
    FakeDBSCAN.log.clear()
    cuml, cluster = ModuleType("cuml"), ModuleType("cuml.cluster")
    cluster.DBSCAN = FakeDBSCAN
    monkeypatch.setitem(sys.modules, "cuml", cuml)
    monkeypatch.setitem(sys.modules, "cuml.cluster", cluster)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream("torch"))

    def external(handle, device):
        assert handle == 2, "cudaStreamPerThread"
        return FakeStream("cuml")

    monkeypatch.setattr(torch.cuda, "ExternalStream", external)
    return FakeDBSCAN.log


def test_the_streams_are_ordered(fake):
    cuml_engine.dbscan(torch.eye(4, dtype=torch.bool), 2)
    assert fake == ["cuml waits for torch", "fit", "torch waits for cuml", "cuml waits for torch"]


@pytest.mark.parametrize(
    "call",
    [
        lambda square: FakeDBSCAN(0.5),
        lambda square: FakeDBSCAN(metric="euclidean", output_type="cupy", calc_core_sample_indices=False),
        lambda square: FakeDBSCAN(metric="precomputed", output_type="cupy"),
        lambda square: FakeDBSCAN(metric="precomputed", calc_core_sample_indices=False),
        lambda square: good(eps=0.1),
        lambda square: good().fit_predict(square.double(), out_dtype="int32"),
        lambda square: good().fit_predict(square.numpy(), out_dtype="int32"),
        lambda square: good().fit_predict(square.repeat(2, 2)[::2, ::2], out_dtype="int32"),
        lambda square: good().fit_predict(square.clone().requires_grad_(), out_dtype="int32"),
        lambda square: good().fit_predict(square + 1, out_dtype="int32"),
        lambda square: good().fit_predict(square[:3], out_dtype="int32"),
        lambda square: good().fit_predict(square, "int32"),
        lambda square: good().fit_predict(square, out_dtype="int64"),
    ],
)
def test_the_fake_refuses_wrong_calls(call):
    square = 1 - torch.eye(4)
    good().fit_predict(square, out_dtype="int32")
    with pytest.raises((AssertionError, TypeError)):
        call(square)


def good(**changes):
    right = {"metric": "precomputed", "output_type": "cupy", "calc_core_sample_indices": False, "min_samples": 2}
    return FakeDBSCAN(**{**right, **changes})


def test_labels_equal_the_other_engines(fake, rng):
    for problem in range(210):
        rows = torch.from_numpy(clustering_rows(rng, int(rng.integers(1, 60)), CLUSTERING_KINDS[problem % 7]))
        config = random_config(rng, dominant_percentile=100.0)
        activations = rows[None, :, :, None]
        labels, eps = torch_backend.cluster_channels(activations, config, "cuml")
        expected, expected_eps = torch_backend.cluster_channels(activations, config, "batched")
        assert torch.equal(labels, expected), f"problem {problem}: {config}"
        assert torch.equal(eps, expected_eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_with_dominant_and_dead_channels(fake, dtype, seed):
    for descriptor in ("raw", "unit"):
        activations = activations_like((3, 50, 4, 4), dtype=dtype)
        activations[1] = 0
        config = CFCAMConfig(descriptor=descriptor)
        labels, _ = torch_backend.cluster_channels(activations, config, "cuml")
        assert torch.equal(labels, torch_backend.cluster_channels(activations, config, "batched")[0])


def test_on_the_kernels_distances(fake, seed):
    triton_backend = pytest.importorskip("cfcam_gpu.triton_backend", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the fake is for machines without a GPU")
    activations = activations_like((2, 50, 4, 4))
    expected = triton_backend.cluster_channels(activations, CFCAMConfig(), "batched")
    for actual, wanted in zip(triton_backend.cluster_channels(activations, CFCAMConfig(), "cuml"), expected):
        assert torch.equal(actual, wanted)


def test_absent_cuml_names_the_extra_and_the_pip_line(monkeypatch):
    monkeypatch.setattr(clustering, "is_installed", lambda package: package != "cuml")
    activations = torch.rand(1, 8, 3, 3)
    for call in (lambda: cluster_channels(activations, clustering="cuml"),):
        with pytest.raises(ImportError, match=r'cuml is not installed; .*: pip install "cfcam_gpu\[cuml\]"'):
            call()


def test_cuml_without_a_gpu(monkeypatch):
    monkeypatch.setattr(clustering, "is_installed", lambda package: True)
    with pytest.raises(ValueError, match="clustering='cuml' cannot run: no CUDA device is usable here"):
        cf_cam(torch.rand(1, 8, 3, 3), torch.rand(1, 8, 3, 3), clustering="cuml")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match='clustering="cuml" needs tensors on a CUDA device, got cpu'):
        cf_cam(torch.rand(1, 8, 3, 3), torch.rand(1, 8, 3, 3), clustering="cuml")


def test_the_real_signatures():
    dbscan = pytest.importorskip("cuml.cluster", reason="cuML is not installed").DBSCAN
    ours = inspect.signature(FakeDBSCAN.__init__).parameters
    theirs = inspect.signature(dbscan.__init__).parameters
    for name, parameter in ours.items():
        assert name in theirs and theirs[name].kind == parameter.kind, name
        assert theirs[name].default == parameter.default, name
    assert inspect.signature(dbscan.fit_predict).parameters["out_dtype"].default == "int32"


@pytest.mark.skipif(not CUML, reason="cuML and a GPU do not meet here")
@pytest.mark.parametrize("kind", CLUSTERING_KINDS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_cuml_itself(kind, backend, rng):
    for n in (2, 40, 300, 1536):
        rows = torch.from_numpy(clustering_rows(rng, n, kind)).cuda()[None, :, :, None]
        config = random_config(rng, dominant_percentile=100.0)
        labels, _ = cluster_channels(rows, config, backend, clustering="cuml")
        expected, _ = cluster_channels(rows, config, backend, clustering="batched")
        assert torch.equal(labels, expected)
