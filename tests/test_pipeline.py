"""The public functions: what they refuse and in which words, what they choose, and arrays of other libraries."""

import math
from types import SimpleNamespace

import pytest
import torch
from device import DEVICE
from problems import activations_like

import cfcam_gpu
from cfcam_gpu import CFCAMConfig, cf_cam, checks, cluster_channels, pipeline
from cfcam_gpu.clustering import ENGINES

A = torch.rand(2, 8, 3, 3)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((A, A[:, :4]), ValueError, r"gradients must match activations \(2, 8, 3, 3\), got \(2, 4, 3, 3\)"),
        ((A[0, 0], A[0, 0]), ValueError, r"activations must have shape \(B, C, h, w\), .* got \(3, 3\)"),
        ((A[0], A[0], (9, 9)), TypeError, r"output_size must be \(T,\), got \(9, 9\)"),
        ((A[:0], A[:0]), ValueError, r"activations \(B, C, \.\.\.\) must not be empty, got \(0, 8, 3, 3\)"),
        ((A[:, :, :0], A[:, :, :0]), ValueError, "must not be empty"),
        ((A.int(), A), TypeError, "activations must be floating point, got torch.int32"),
        ((A, A.bool()), TypeError, "gradients must be floating point, got torch.bool"),
        ((A.tolist(), A), TypeError, "activations must be a torch.Tensor or an array with DLPack, got list"),
        ((A, None), TypeError, "gradients must be a torch.Tensor .* got NoneType"),
        ((A, A, 224), TypeError, r"output_size must be a pair \(H, W\), got 224"),
        ((A, A, (224.0, 224)), TypeError, r"output_size must be a pair \(H, W\) of integers, got \(224.0, 224\)"),
        ((A, A, (224, 0)), ValueError, r"output_size must be at least \(1, 1\), got \(224, 0\)"),
        ((A, A, None, "paper"), TypeError, "config must be a CFCAMConfig, got str"),
        ((A, A, None, None, "cuda"), ValueError, r"backend must be one of \('auto', .* got 'cuda'"),
        ((A, A, None, None, None), TypeError, "backend must be a string, got NoneType"),
        ((A, A, None, None, "auto", "kmeans"), ValueError, r"clustering must be one of .* got 'kmeans'"),
        ((A, A, None, None, "reference", "batched"), ValueError, "clusters with scikit-learn"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        cf_cam(*arguments)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_weights_without_maps(backend, seed):
    if backend == "reference" and pipeline.unavailable(backend):
        pytest.skip(f"the reference cannot run: {pipeline.unavailable(backend)}")
    activations, gradients = activations_like((2, 40, 4, 4)), torch.randn(2, 40, 4, 4)
    for config in (CFCAMConfig(), CFCAMConfig.paper()):
        expected = cf_cam(activations, gradients, None, config, backend=backend).weights
        weights = pipeline.channel_weights(activations, gradients, config, backend=backend)
        assert torch.equal(weights, expected)
    with pytest.raises(ValueError, match="gradients must match"):
        pipeline.channel_weights(activations, gradients[:1], CFCAMConfig())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["activations", "gradients"])
def test_not_finite(bad, name):
    arguments = {"activations": A.clone(), "gradients": A.clone()}
    arguments[name][1, 2, 0, 0] = bad
    with pytest.raises(ValueError, match=f"{name} must be finite, got 1 NaN or infinite values of 144"):
        cf_cam(**arguments)
    cf_cam(**arguments, check_finite=False)
    if name == "activations":
        with pytest.raises(ValueError, match="activations must be finite"):
            cluster_channels(arguments[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_values_whose_sum_is_not(dtype):
    activations = torch.full_like(A, torch.finfo(dtype).max / 4).to(dtype)
    assert activations.sum().isinf()
    labels, _ = cluster_channels(activations)
    assert labels.shape == A.shape[:2]
    activations[0, 0, 0, :2] = torch.tensor([torch.inf, -torch.inf])  # whose sum is NaN
    with pytest.raises(ValueError, match="got 2 NaN or infinite values"):
        cluster_channels(activations)


@pytest.mark.parametrize("activations, message", [(A[0, 0], "shape"), (A[:, :0], "empty")])
def test_cluster_channels_checks_too(activations, message):
    with pytest.raises(ValueError, match=message):
        cluster_channels(activations)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dominant_percentile": 101}, ValueError, r"dominant_percentile must be in \[0, 100\], got 101"),
        ({"eps_percentile": -1}, ValueError, r"eps_percentile must be in \[0, 100\], got -1"),
        ({"min_samples_fraction": float("nan")}, ValueError, r"min_samples_fraction must be in \[0, 1\], got nan"),
        ({"sigma": 0}, ValueError, "sigma must be above 0, got 0"),
        ({"affinity_power": 17}, ValueError, r"affinity_power must be in \[0, 16\], got 17"),
        ({"affinity_sigma": 0.0}, ValueError, "affinity_sigma must be above 0, got 0.0"),
        ({"affinity_range": 0.0}, ValueError, "affinity_range must be above 0, got 0.0"),
        ({"affinity_sigma": float("nan")}, ValueError, r"affinity_sigma must be in \[0, inf\], got nan"),
        ({"affinity_steps": 17}, ValueError, r"affinity_steps must be in \[0, 16\], got 17"),
        ({"affinity_steps": -1}, ValueError, r"affinity_steps must be in \[0, 16\], got -1"),
        ({"affinity_steps": 2.0}, TypeError, "affinity_steps must be an integer, got float"),
        ({"affinity_steps": True}, TypeError, "affinity_steps must be an integer, got bool"),
        ({"margin_temperature": -0.1}, ValueError, r"margin_temperature must be in \[0, 100\], got -0.1"),
        ({"margin_temperature": "1"}, TypeError, "margin_temperature must be a real number, got str"),
        ({"frozen_norms": 1}, TypeError, "frozen_norms must be a bool, got int"),
        ({"sigma": "1"}, TypeError, "sigma must be a real number, got str"),
        ({"sigma": True}, TypeError, "sigma must be a real number, got bool"),
        ({"boundary": "wrap"}, ValueError, r"boundary must be one of \('constant', 'reflect', 'nearest'\), got 'wrap'"),
        ({"descriptor": None}, TypeError, "descriptor must be a string, got NoneType"),
        ({"weighting": "sum"}, ValueError, "weighting must be one of"),
        ({"normalize": "l2"}, ValueError, "normalize must be one of"),
    ],
)
def test_bad_configurations(arguments, error, message):
    with pytest.raises(error, match=message):
        CFCAMConfig(**arguments)


def test_configuration():
    published, ours = ("raw", 25.0, 0.05, 1.0, "constant", "softmax", "max"), ("raw", 25.0, 0.05, 1.0, "constant")
    without = {"affinity_power": 0.0, "margin_temperature": 0.0, "frozen_norms": False}
    assert CFCAMConfig.paper() == CFCAMConfig(75.0, *published, **without)
    assert CFCAMConfig() == CFCAMConfig(25.0, *ours, "signed", "minmax", 1.0, 2.0, 2, 1.35, 0.5, True, 0.6, 1.75)
    assert CFCAMConfig.stable() == CFCAMConfig(
        25.0, *ours, "signed", "minmax", 1.5, 2.0, 3, 1.5, affinity_range=math.inf
    )
    assert CFCAMConfig().averages
    for off in ({"affinity_power": 0}, {"affinity_steps": 0}):
        assert not CFCAMConfig(**off).averages
    with pytest.raises(AttributeError):
        CFCAMConfig().sigma = 2.0
    assert [CFCAMConfig().min_samples(n) for n in (0, 39, 60, 1536)] == [2, 2, 3, 76]


def test_auto_is_the_torch_backend_on_a_cpu(seed):
    activations, gradients = activations_like((1, 40, 5, 5)), torch.randn(1, 40, 5, 5)
    assert pipeline.choose("auto", "auto", activations) == ("torch", "host")
    assert pipeline.choose("auto", "batched", activations) == ("torch", "batched")
    assert pipeline.choose("auto", "auto", activations.to("meta")) == ("torch", "batched")
    for auto, named in zip(cf_cam(activations, gradients), cf_cam(activations, gradients, backend="torch")):
        assert torch.equal(auto, named)


def test_auto_is_triton_on_a_gpu_where_it_takes_the_tensors():
    def on_gpu(shape=(2, 8, 3, 3), dtype=torch.float16):  # what the choice looks at, without a GPU
        return SimpleNamespace(device=torch.device("cuda"), shape=shape, dtype=dtype)

    assert pipeline.choose("auto", "auto", on_gpu()) == ("triton", "batched")
    assert pipeline.choose("auto", "sklearn", on_gpu()) == ("triton", "sklearn")
    assert pipeline.choose("auto", "auto", on_gpu(dtype=torch.float64)) == ("torch", "batched")
    assert pipeline.choose("auto", "auto", on_gpu(shape=(1, 5000, 3, 3))) == ("torch", "batched")


GUIDE = torch.rand(2, 5, 4, 6)


@pytest.mark.parametrize(
    "guide, error, message",
    [
        (GUIDE[:1], ValueError, "guide must have the activations' batch size 2, got 1"),
        (GUIDE[0], ValueError, r"guide must have a grid of as many axes as the activations' \(3, 3\), got \(6,\)"),
        (GUIDE[:, :0], ValueError, r"guide \(B, C, \.\.\.\) must not be empty, got \(2, 0, 4, 6\)"),
        (GUIDE.int(), TypeError, "guide must be floating point, got torch.int32"),
        (GUIDE[:, :, :, :2], ValueError, r"guide must have a grid of at least the activations' \(3, 3\), got \(4, 2\)"),
        (GUIDE.to("meta"), ValueError, "guide must be on the activations' device cpu, got meta"),
        (GUIDE.tolist(), TypeError, "guide must be a torch.Tensor or an array with DLPack, got list"),
        (GUIDE / 0, ValueError, "guide must be finite, got 240 NaN or infinite values of 240"),
    ],
)
def test_bad_guides(guide, error, message):
    for config in (CFCAMConfig(), CFCAMConfig.paper()):  # one that has no effect is refused too
        with pytest.raises(error, match=message):
            cf_cam(A, A, config=config, guide=guide)
    if isinstance(guide, torch.Tensor) and "finite" not in message:
        with pytest.raises(error, match=message):
            pipeline.class_grid(A, A[:, :, 0, 0], config=CFCAMConfig(), guide=guide)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_guide_that_has_no_effect(backend, seed):
    if backend == "reference" and pipeline.unavailable(backend):
        pytest.skip(f"the reference cannot run: {pipeline.unavailable(backend)}")
    activations, gradients = activations_like((2, 40, 4, 4)), torch.randn(2, 40, 4, 4)
    guide = torch.rand(2, 3, 9, 8)
    for config in (CFCAMConfig.paper(), CFCAMConfig(affinity_power=0), CFCAMConfig(affinity_steps=0)):
        plain = cf_cam(activations, gradients, (9, 9), config, backend)
        guided = cf_cam(activations, gradients, (9, 9), config, backend, guide=guide)
        assert all(torch.equal(*pair) for pair in zip(plain, guided))
    guided = cf_cam(activations, gradients, (9, 9), backend=backend, guide=guide.numpy())
    assert not torch.equal(guided.maps, cf_cam(activations, gradients, (9, 9), backend=backend).maps)


def test_devices_must_match():
    message = "gradients must be on the activations' device cpu, got meta"
    with pytest.raises(ValueError, match=message):
        cf_cam(A, A.to("meta"))


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA or ROCm device"):
        cf_cam(A, A, backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match='backend="triton" needs tensors on a CUDA or ROCm device, got cpu'):
        cf_cam(A, A, backend="triton")


@pytest.mark.parametrize(
    "activations, error, message",
    [
        (A.double(), ValueError, "takes torch.float16, torch.bfloat16, torch.float32, got torch.float64; use backend"),
        (torch.rand(1, 4097, 1, 2), ValueError, "at most 4096 channels, got 4097"),
        (torch.rand(1, 1, 257, 256), ValueError, "at most 65536 grid cells, got 65792"),
    ],
)
def test_limits_of_the_kernels(activations, error, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for function, arguments in ((cf_cam, (activations, activations)), (cluster_channels, (activations,))):
        with pytest.raises(error, match=message):
            function(*arguments, backend="triton")


def test_every_engine_of_the_table_runs_or_says_why_not(seed):
    activations = activations_like((2, 40, 4, 4))
    expected, _ = cluster_channels(activations)
    for name, engine in ENGINES.items():
        assert engine.name == name and engine.summary and callable(engine.load().cluster)
        if engine.unavailable() or engine.refusal(activations.device):
            with pytest.raises((ImportError, ValueError), match=name):
                cluster_channels(activations, clustering=name)
            continue
        labels, _ = cluster_channels(activations, clustering=name)
        assert torch.equal(labels, expected), name


def test_the_engine_that_a_cpu_takes_has_a_name():
    assert pipeline.choose("auto", "auto", A) == pipeline.choose("auto", "host", A) == ("torch", "host")
    assert pipeline.choose("torch", "host", A.to("meta")) == ("torch", "host")


def test_other_engines_label_the_kernels_distances(seed):
    triton_backend = pytest.importorskip("cfcam_gpu.triton_backend", reason="triton is not installed")
    activations = activations_like((2, 40, 4, 4)).to(DEVICE)
    expected, _ = triton_backend.cluster_channels(activations, CFCAMConfig(), "batched")
    for name, engine in ENGINES.items():
        if not engine.in_kernels and engine.unavailable() is None and engine.refusal(activations.device) is None:
            labels, _ = triton_backend.cluster_channels(activations, CFCAMConfig(), name)
            assert torch.equal(labels, expected), name


def test_the_reference_names_its_extra(monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "sklearn" else object())
    for arguments in ({"backend": "reference"}, {"clustering": "sklearn"}):
        with pytest.raises(ImportError, match=r'sklearn is not installed; .* pip install "cfcam_gpu\[reference\]"'):
            cf_cam(A, A, **arguments)


def test_default_output_size_is_the_grid():
    assert cf_cam(A, A).maps.shape == (2, 3, 3)


def test_inputs_are_left_alone(seed):
    activations, gradients = activations_like((2, 30, 4, 4)), torch.randn(2, 30, 4, 4)
    activations.requires_grad_()
    before = activations.detach().clone(), gradients.clone()
    result = cf_cam(activations, gradients, (8, 8))
    assert torch.equal(activations, before[0]) and torch.equal(gradients, before[1])
    assert not any(tensor.requires_grad for tensor in result)


def test_the_public_names():
    assert sorted(cfcam_gpu.__all__) == [
        "CFCAM",
        "CFCAMConfig",
        "CFCAMResult",
        "Explanation",
        "accelerate",
        "cf_cam",
        "cluster_channels",
        "export",
        "load",
    ]
    assert all(hasattr(cfcam_gpu, name) for name in cfcam_gpu.__all__)
