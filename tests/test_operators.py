"""`cf_cam` in code that torch.compile compiles: one graph, any batch, the results of the call without it."""

import pytest
import torch
from torch.library import opcheck

from cfcam_gpu import CFCAMConfig, cf_cam, cluster_channels
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
