"""`cf_cam` in code that torch.compile compiles: one graph, any batch, the results of the call without it."""

import pytest
import torch
from torch import nn
from torch.library import opcheck

from cfcam_gpu import CFCAM, CFCAMConfig, cf_cam, cluster_channels
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.operators import plain_values

pytestmark = pytest.mark.usefixtures("one_thread", "seed")

CONFIG = CFCAMConfig(sigma=(1.0, 2.0), dominant_percentile=60)


def tensors(batch=2, grid=(5, 6), guide_grid=(9, 11), classes=()):
    activations, guide = torch.randn(batch, 16, *grid).relu(), torch.rand(batch, 8, *guide_grid)
    return activations, torch.randn(batch, *classes, 16, *grid), guide


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "shapes, size, config",
    [
        ({}, (20, 24), CONFIG),
        ({"classes": (3,)}, (7, 7), CFCAMConfig.paper()),
        ({"grid": (2, 3, 4), "guide_grid": (4, 6, 8)}, (4, 6, 8), CFCAMConfig()),
    ],
    ids=["images", "several classes", "volumes"],
)
def test_operators_are_what_torch_expects(shapes, size, config):
    activations, gradients, guide = tensors(**shapes)
    rest = *plain_values(config), "auto", "auto", None
    for each in (None, guide):
        opcheck(torch.ops.cfcam_gpu.cf_cam, (activations, gradients, each, size, *rest))
    opcheck(torch.ops.cfcam_gpu.cluster_channels, (activations, *rest))
    found = torch.ops.cfcam_gpu.cf_cam(activations, gradients, guide, size, *rest)
    for one, other in zip(found, cf_cam(activations, gradients, size, config, guide=guide)):
        assert torch.equal(one, other)


def test_a_compiled_function_is_one_graph_for_all_shapes(fresh_compiler):
    def function(activations, gradients, guide):
        height, width = activations.shape[2:]
        found = cf_cam(activations + 1, gradients, (4 * height, 4 * width), CONFIG, guide=guide)
        labels, eps = cluster_channels(activations)
        return found.maps - 1, found.labels, found.weights, found.eps, labels, eps

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for arguments in (tensors(), tensors(3, (4, 7)), tensors(5, (6, 9), (12, 18)), tensors(classes=(4,))):
        with torch.compiler.set_stance("fail_on_recompile" if len(arguments[0]) in (3, 5) else "default"):
            found = compiled(*arguments)
        for one, other in zip(found, function(*arguments), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("shape, config", [((2, 8, 4, 5), CFCAMConfig()), ((2, 8, 3, 4, 5), CFCAMConfig.volumes())])
def test_the_defaults_in_compiled_code(fresh_compiler, shape, config):
    activations, gradients = torch.rand(shape), torch.randn(shape, requires_grad=True)
    compiled = torch.compile(lambda *pair: cf_cam(*pair), fullgraph=True, backend="eager")
    maps = compiled(activations, gradients).maps
    assert torch.equal(maps, cf_cam(activations, gradients, config=config).maps) and not maps.requires_grad


@pytest.mark.parametrize("kind", ["double", "half", "reference"])
def test_the_dtypes_of_the_results(fresh_compiler, kind):
    if kind == "reference":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: reference)")
    backend = "reference" if kind == "reference" else "auto"
    dtype = {"double": torch.float64, "half": torch.float16}.get(kind, torch.float32)
    activations, gradients, guide = (each.to(dtype) for each in tensors())
    call = lambda: cf_cam(activations, gradients, backend=backend, guide=guide)
    for one, other in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(), call(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_what_is_wrong_is_said_in_compiled_code(fresh_compiler):
    activations, gradients, _ = tensors()
    compiled = torch.compile(lambda *pair: cf_cam(*pair), backend="aot_eager")
    with pytest.raises(ValueError, match="gradients must match activations"):
        compiled(activations, gradients[:, 1:])
    with pytest.raises(ValueError, match="must be finite, got 1 NaN"):
        compiled(activations, gradients.clone().index_put_((torch.tensor([0]),) * 4, torch.tensor(float("nan"))))


@pytest.mark.parametrize("calls", ["maps", "explain", "cam", "capture", "a function"])
def test_compiled_calls_of_cfcam(fresh_compiler, calls):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Softplus()), *head).eval()
    images = torch.rand(2, 3, 12, 16)
    cam, capture = CFCAM(model, [model[0]]), HeadCapture(model, [model[0]])
    call = {
        "maps": cam.maps,
        "explain": lambda images, targets: cam.explain(images, targets).maps,
        "cam": lambda images, targets: torch.from_numpy(cam(images, targets)),
        "capture": lambda images, targets: capture(images, targets).gradients[0],
        "a function": lambda images, targets: 2 * cam.maps(images + 0.5, targets).sum(0),
    }[calls]
    expected = call(images, [1, 2])
    compiled = torch.compile(call, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(images, [1, 2]), expected, rtol=0, atol=1e-6)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert all("needs hooks on the model" in reason for reason in breaks) and breaks
    assert not model[0]._forward_hooks


def test_cfcam_of_a_compiled_model(fresh_compiler):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Softplus()), *head).eval()
    images = torch.rand(2, 3, 12, 16)
    expected = CFCAM(model, [model[0]]).maps(images, [1, 2])
    compiled = torch.compile(model, backend="aot_eager")
    scores = compiled(images)
    cam = CFCAM(compiled, [model[0]])
    assert torch.equal(cam.maps(images, [1, 2]), expected)
    torch.testing.assert_close(compiled(images), scores)
    assert torch.equal(torch.compile(cam.maps, backend="aot_eager")(images, [1, 2]), expected)
