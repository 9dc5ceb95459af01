"""The weights of the CAM methods, against pytorch-grad-cam's classes and against loops over their formulas."""

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import nn

from cfcam_gpu import weights

SHAPES = [(1, 3, 1, 1), (1, 7, 5, 5), (3, 16, 4, 6)]  # one cell; primes; a batch of grids that are no squares

CLASSES = {
    "Grad-CAM": "GradCAM",
    "Grad-CAM++": "GradCAMPlusPlus",
    "XGrad-CAM": "XGradCAM",
    "LayerCAM": "LayerCAM",
    "HiResCAM": "HiResCAM",
    "GradCAMElementWise": "GradCAMElementWise",
}


def layer(shape, dtype=torch.float32):
    """Activations as behind a ReLU, and gradients with zeros among them; channel 0 is dead."""
    activations, gradients = torch.randn(shape, dtype=dtype).relu(), torch.randn(shape, dtype=dtype)
    activations[:, 0] = 0
    gradients[torch.rand(shape) < 0.2] = 0
    return activations, gradients


def grid(activations, of_channels):
    of_cells = of_channels if of_channels.ndim == activations.ndim else of_channels[:, :, None, None]
    return (of_cells * activations).sum(1)


# Each formula as its paper has it: of one channel, the weight of the cell (y, x).
FORMULAS = {
    "Grad-CAM": lambda a, g, y, x: g.mean(),
    "Grad-CAM++": lambda a, g, y, x: sum(
        max(d, 0) * d**2 / (2 * d**2 + a.sum() * d**3 + 1e-6) for d in g.flat if d != 0
    ),
    "XGrad-CAM": lambda a, g, y, x: sum(v * d / (a.sum() + 1e-7) for v, d in zip(a.flat, g.flat)),
    "LayerCAM": lambda a, g, y, x: max(g[y, x], 0),
    "HiResCAM": lambda a, g, y, x: g[y, x],
    "GradCAMElementWise": lambda a, g, y, x: g[y, x] if g[y, x] * a[y, x] > 0 else 0,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", weights.WEIGHTS)
def test_weights_of_a_loop(name, shape, seed):
    activations, gradients = layer(shape, torch.float64)
    before = activations.clone(), gradients.clone()
    actual = weights.WEIGHTS[name](activations, gradients)
    expected = np.zeros(shape)
    for (b, c, y, x), _ in np.ndenumerate(expected):
        expected[b, c, y, x] = FORMULAS[name](activations[b, c].numpy(), gradients[b, c].numpy(), y, x)
    if actual.ndim == 2:
        assert (expected == expected[:, :, :1, :1]).all()
        expected = expected[:, :, 0, 0]
    assert_close(actual, expected, torch.float64)
    assert torch.equal(activations, before[0]) and torch.equal(gradients, before[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", weights.WEIGHTS)
def test_maps_are_pytorch_grad_cams(name, shape, seed):
    original = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed (extra: grad-cam)")
    activations, gradients = layer(shape)
    model = nn.Conv2d(1, 1, 1)  # any: the formula does not look at it
    cam = getattr(original, CLASSES[name])(model, [model])
    expected = cam.get_cam_image(None, None, None, activations.numpy(), gradients.numpy(), False)
    actual = grid(activations, weights.WEIGHTS[name](activations, gradients))
    if name == "GradCAMElementWise":  # the original cuts off each term, ours the weights: the products are the same
        assert (actual >= 0).all()
    assert_close(actual, expected)
    assert np.abs(expected).max() > 0 or shape[2:] == (1, 1)


@pytest.mark.parametrize("name", weights.WEIGHTS)
def test_any_number_of_grid_axes(name, seed):
    activations, gradients = layer((2, 5, 4, 6))
    expected = weights.WEIGHTS[name](activations, gradients)
    for axes in ((24,), (4, 2, 3)):
        actual = weights.WEIGHTS[name](*(each.reshape(2, 5, *axes) for each in (activations, gradients)))
        assert actual.shape in ((2, 5), (2, 5, *axes))
        assert_close(actual.reshape(expected.shape), expected)


def test_every_method_has_its_judges():
    assert set(weights.WEIGHTS) == set(FORMULAS) == set(CLASSES)


def test_exact_grad_cam_plus_plus(seed):
    activations, gradients = layer((2, 6, 3, 4), torch.float64)
    actual = weights.exact_grad_cam_plus_plus(activations, gradients)
    expected = np.zeros((2, 6))
    for b, c in np.ndindex(2, 6):
        total = activations[b, c].sum().item()
        expected[b, c] = sum(max(d, 0) / (2 + total * d) for d in gradients[b, c].flatten().tolist())
    assert_close(actual, expected, torch.float64)
    # So small that g^2 is below the 1e-6 of the other form, and g^3 underflows in float32.
    tiny = gradients.float() * 1e-15
    assert_close(weights.exact_grad_cam_plus_plus(activations.float(), tiny), tiny.relu().sum((2, 3)) / 2)
    assert (weights.grad_cam_plus_plus(activations.float(), tiny) < 1e-20).all()
    # Where 2 + g sum A is 0 and g negative, 0 / 0 would be: such a cell counts nothing.
    pole = weights.exact_grad_cam_plus_plus(torch.ones(1, 1, 1, 2), torch.tensor([[[[-1.0, 1.0]]]]))
    assert_close(pole, [[0.25]])
    half = weights.exact_grad_cam_plus_plus(activations.bfloat16(), gradients.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half, actual, torch.bfloat16, stretch=10)


def test_principal_projection(seed):
    terms = torch.randn(3, 7, 4, 5)
    terms[0, 0, 0, 0] = torch.nan
    actual = weights.principal_projection(terms)
    for image, projection in zip(terms.nan_to_num(0.0).double().flatten(2), actual.double().flatten(1)):
        cells = image.T - image.T.mean(0)
        expected = cells @ torch.linalg.eigh(cells.T @ cells).eigenvectors[:, -1]
        assert_close(projection, expected * torch.sign(expected @ projection))
    svd = pytest.importorskip("pytorch_grad_cam.utils.svd_on_activations", reason="grad-cam is not installed")
    assert_close(actual, svd.get_2d_projection(terms.numpy().copy()))


def test_sums_are_numpys(seed):
    values = torch.randn(2, 2048, 7, 7)
    assert torch.equal(weights.summed(values, 1), torch.from_numpy(values.numpy().sum(1)))
    on_device = weights.summed(values.to("meta"), (2, 3))
    assert on_device.shape == (2, 2048) and on_device.device.type == "meta"
