"""pytorch-grad-cam's further methods, sped up, against its own classes: the same numbers, hooks and state."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed (extra: grad-cam)")
import pytorch_grad_cam as original
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from cfcam_gpu import projection
from cfcam_gpu.adapters import hooked, score
from cfcam_gpu.adapters.further import METHODS, accelerated

TOLERANCE = 2e-6
"""Largest difference from the original's maps, which reach 1."""

pytestmark = pytest.mark.usefixtures("one_thread", "seed")
TARGETS = [ClassifierOutputTarget(3), ClassifierOutputTarget(0)]


class Small(nn.Sequential):
    """Two layers of channels of both signs, more of them than cells in the second, and classes that depend on both."""

    def __init__(self, activation=nn.Tanh):
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.Tanh(),
            nn.Conv2d(16, 96, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(96),
            activation(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(384, 5),
        )
        for norm in (self[1], self[4]):
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
        self.eval()


@pytest.fixture
def images(seed):
    return torch.randn(2, 3, 28, 20)


def objects(method, model, layers=(2, 5), **options):
    """The original's object and ours."""
    layers = [] if method is original.FullGrad else [model[index] for index in layers]
    slow = method(model, layers, **options)
    return slow, accelerated(slow)


def fails(output):
    raise ZeroDivisionError


def assert_same(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)


def maps(cam, *args, **options):
    """The maps, of the same random numbers at every call."""
    np.random.seed(7)
    return cam(*args, **options)


SCORED = (original.AblationCAM, original.ScoreCAM)
"""Their weights are differences or exponentials of scores, and enlarge the rounding of the network's sums."""

BASE_CAMS = [method for method in METHODS if method is not original.FinerCAM]
EXACT = [method for method in METHODS if method not in SCORED]


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("layers", [(2,), (5,), (2, 5)])
def test_the_originals_numbers(images, method, layers):
    if method is original.ShapleyCAM and len(layers) > 1:
        pytest.skip("the original takes one layer: it lets go of the graph with the first")
    slow, fast = objects(method, Small(), layers)
    assert type(fast) is METHODS[method] and isinstance(fast, method)
    for targets in (TARGETS, None):
        expected = maps(slow, images, targets)
        assert_same(maps(fast, images, targets), expected)
        # Of a difference of two classes, or of random weights, all of the map may be negative.
        if method not in (original.FinerCAM, original.ShapleyCAM, original.RandomCAM):
            assert expected.max() > 0.1
    if method is not original.FinerCAM:
        torch.testing.assert_close(fast.outputs, slow.outputs)


@pytest.mark.parametrize("method", BASE_CAMS)
def test_smoothing(images, method):
    # In float64: the first component is as sensitive as the gap to the second is small. Scores are float32 even so.
    tolerance = 1e-3 if method in SCORED else 1e-5
    images = images.double()
    slow, fast = objects(method, Small().double(), [5])
    for smoothing in ("eigen_smooth", "aug_smooth"):
        if method is original.FullGrad and smoothing == "eigen_smooth":  # few pixels are left of small images
            continue
        options = {smoothing: True}
        assert_same(maps(fast, images, TARGETS, **options), maps(slow, images, TARGETS, **options), tolerance)


def test_random_numbers_of_several_views_and_layers(images):
    slow, fast = objects(original.RandomCAM, Small())
    assert_same(maps(fast, images, TARGETS, aug_smooth=True), maps(slow, images, TARGETS, aug_smooth=True))
    assert np.abs(maps(fast, images, TARGETS) - fast(images, TARGETS)).max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.3}, {"comparison_categories": [2, 4, 9]}, {"target_idx": 2}, {"eigen_smooth": True}],
)
@pytest.mark.parametrize("base", [original.GradCAM, original.EigenGradCAM])
def test_finer_cam(images, base, options):
    slow, fast = objects(original.FinerCAM, Small(), base_method=base)
    passes = []
    expected = slow(images, **options)
    slow.base_cam.model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert_same(fast(images, **options), expected)
    assert len(passes) == 1


def test_finer_cam_of_other_methods():
    model = Small()
    cam = original.FinerCAM(model, [model[5]], base_method=original.EigenCAM)
    with pytest.raises(ValueError, match="base_cam is a EigenCAM"):
        accelerated(cam)
    assert model[5]._forward_hooks


def test_shapley_cams_backward_ends_at_the_layer(images):
    model = Small()
    slow, fast = objects(original.ShapleyCAM, model, [2])
    expected = slow(images, TARGETS)
    assert slow.activations_and_grads.gradients
    runs = []
    model[1].register_full_backward_hook(lambda *_: runs.append(1))
    assert_same(fast(images, TARGETS), expected)
    assert not runs


def test_full_grad_counts_every_bias(images):
    """With the layers' part far above the input's, which is resized as before."""
    model = Small()
    with torch.no_grad():
        model[1].bias *= 100
        model[4].bias *= 100
    slow, fast = objects(original.FullGrad, model)
    expected = slow(images, TARGETS)
    assert_same(fast(images, TARGETS), expected)
    slow.bias_data = [0 * bias for bias in slow.bias_data]
    assert np.abs(slow(images, TARGETS) - expected).max() > 1e-2


def test_a_score_for_all_blank_channels(images):
    """Channels that are 0 everywhere, the first and the last among them, cost one image together."""
    model, images = Small(nn.ReLU).double(), images.double()
    n_channels = model[4].bias.numel()
    blank = torch.rand(n_channels) < 0.5
    blank[0] = blank[-1] = True
    with torch.no_grad():
        model[4].weight[blank], model[4].bias[blank] = 0, -1
        model[4].running_mean[blank] = 0
        model[4].bias[~blank] += 3
    slow, fast = objects(original.ScoreCAM, model, [5])
    expected = slow(images, TARGETS)
    rows = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert_same(fast(images, TARGETS), expected)
    seen = fast.activations_and_grads.activations[0].flatten(2).any(2)
    assert not seen[:, blank].any()
    n_once = len(images)  # the pass for the activations, and a blank channel of each image
    assert sum(rows) == n_once + seen.sum() + n_once
    assert max(rows) == score.BATCH_SIZE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, TOLERANCE), (torch.float32, 1e-4)])
def test_score_cam(images, dtype, tolerance):
    """In float64 nothing is left of the order of the network's sums, which goes by the batch and the memory layout."""
    slow, fast = objects(original.ScoreCAM, Small(nn.Sigmoid).to(dtype), [2, 5])
    fast.batch_size = 7
    for targets in (TARGETS, None):
        assert_same(fast(images.to(dtype), targets), slow(images.to(dtype), targets), tolerance)


def test_a_batch_that_does_not_fit_is_halved(images, caplog):
    model, images = Small().double(), images.double()
    slow, fast = objects(original.ScoreCAM, model, [5])
    expected = slow(images, TARGETS)

    def full(module, args):
        if len(args[0]) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(full)
    assert_same(fast(images, TARGETS), expected)
    assert "out of memory" in caplog.text and "batches of 4" in caplog.text


def test_score_cam_in_training_is_the_originals(images):
    """Batch norm in training: a score depends on what else is in its batch."""
    model = Small()
    slow, fast = objects(original.ScoreCAM, model, [5])
    model.train()
    for norm in (model[1], model[4]):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    np.testing.assert_array_equal(fast(images, TARGETS), slow(images, TARGETS))


@pytest.mark.parametrize("method", BASE_CAMS)
def test_hooks_and_records(images, method):
    """No hook of ours stays, the original's are as before and see no pass of ours, and neither keeps masked images."""
    model, images = Small().double(), images.double()
    slow, fast = objects(method, model, [5])
    before = {module: list(module._forward_hooks) for module in model.modules()}
    slow(images, TARGETS)
    n_before = len(slow.activations_and_grads.activations)
    for targets in (TARGETS, [fails, fails]):
        with nullcontext() if targets is TARGETS or method is original.EigenCAM else pytest.raises(ZeroDivisionError):
            fast(images, targets)
        assert {module: list(module._forward_hooks) for module in model.modules()} == before
    assert len(slow.activations_and_grads.activations) == n_before
    layers = 3 if method is original.FullGrad else 1
    assert len(fast.activations_and_grads.activations) == layers
    expected = maps(slow, images, TARGETS)
    del slow
    assert not any(module._forward_hooks for module in model.modules())
    assert_same(maps(fast, images, TARGETS), expected, 1e-4)
    with fast:
        assert_same(maps(fast, images, TARGETS), expected, 1e-4)


@pytest.mark.parametrize("method", BASE_CAMS)
def test_built_directly(images, method):
    model, images = Small().double(), images.double()
    layers = [] if method is original.FullGrad else [model[5]]
    expected = maps(method(model, layers), images, TARGETS)
    assert_same(maps(METHODS[method](model, layers), images, TARGETS), expected, 1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_first_layers_gradient_edge_outlives_in_place_operations():
    layer = nn.Linear(3, 3)
    hooks = hooked.CallHooks(nn.Sequential(layer, nn.ReLU(inplace=True)), [layer], detach=False)
    outputs = hooks(torch.randn(2, 3))
    torch.autograd.grad(outputs.sum(), hooks.edges, create_graph=True)
    assert torch.equal(hooks.gradients[0], (hooks.activations[0] > 0).float())


@pytest.mark.parametrize("name", ["detach", "uses_gradients", "compute_input_gradient"])
def test_refuses_other_settings(name):
    cam = original.EigenCAM(Small(), [])
    setattr(cam, name, not getattr(cam, name))
    with pytest.raises(ValueError, match=name):
        accelerated(cam)


def test_refuses_what_is_the_users_own():
    class Own(original.EigenCAM):
        pass

    with pytest.raises(ValueError, match="no subclasses, got Own"):
        accelerated(Own(Small(), []))
    cam = original.ScoreCAM(Small(), [])
    cam.get_cam_weights = lambda *args: None
    with pytest.raises(ValueError, match="its own get_cam_weights"):
        accelerated(cam)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_blas_has_its_threads_back():
    blas = projection._libraries().select(user_api="blas")
    before = [library["num_threads"] for library in blas.info()]
    with projection.ONE_THREAD.on():
        assert all(library["num_threads"] == 1 for library in blas.info())
    projection.first_component(np.ones((1, 3, 2, 2), np.float32))
    with pytest.raises(np.linalg.LinAlgError):
        projection.first_component(np.full((1, 3, 2, 2), np.inf, np.float32))
    assert [library["num_threads"] for library in blas.info()] == before
