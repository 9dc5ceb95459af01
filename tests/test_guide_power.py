"""The factor of the guide's strength, and what it does to zero, NaN and very strong features."""

import dataclasses

import pytest
import torch
from device import DEVICE

from cfcam_gpu import CFCAMConfig, cf_cam, pipeline

pytestmark = pytest.mark.usefixtures("one_thread", "seed")


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("guide_power", [0.5, 2.0])
def test_the_map_counts_more_where_the_guide_is_strong(backend, guide_power):
    if pipeline.unavailable(backend):
        pytest.skip(f"{backend} cannot run: {pipeline.unavailable(backend)}")
    activations, gradients = torch.rand(2, 8, 3, 4), torch.rand(2, 8, 3, 4)  # all speaks for the class
    guide = torch.rand(2, 5, 6, 8)
    guide[0, :, 2, 3], guide[1] = 0, guide[1] * 1e3
    config = CFCAMConfig(normalize="max", guide_power=0, affinity_centring=0)
    plain = cf_cam(
        activations, gradients, (6, 8), config, "reference" if backend == "reference" else "torch", guide=guide
    )
    expected = plain.maps * guide.double().norm(dim=1) ** guide_power
    expected /= expected.amax((1, 2), keepdim=True)
    strong = dataclasses.replace(config, guide_power=guide_power)
    found = cf_cam(activations.to(DEVICE), gradients.to(DEVICE), (6, 8), strong, backend, guide=guide.to(DEVICE))
    torch.testing.assert_close(found.maps.cpu().double(), expected.double(), rtol=0, atol=5e-6)
    assert found.maps[0, 2, 3] < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("guide_power", [0.5, 2.0])
def test_a_guide_without_features_leaves_the_map_as_it_was(backend, guide_power):
    if pipeline.unavailable(backend):
        pytest.skip(f"{backend} cannot run: {pipeline.unavailable(backend)}")
    tensors = torch.rand(1, 8, 3, 4).to(DEVICE), torch.randn(1, 8, 3, 4).to(DEVICE)
    guide = torch.zeros(1, 5, 6, 8, device=DEVICE)
    config = CFCAMConfig(guide_power=guide_power)
    found = cf_cam(*tensors, (12, 16), config, backend, guide=guide).maps
    plain = cf_cam(*tensors, (12, 16), dataclasses.replace(config, guide_power=0), backend, guide=guide).maps
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_features_that_are_not_finite_are_none(backend):
    if pipeline.unavailable(backend):
        pytest.skip(f"{backend} cannot run: {pipeline.unavailable(backend)}")
    tensors = torch.rand(1, 8, 3, 4).to(DEVICE), torch.rand(1, 8, 3, 4).to(DEVICE)
    guide = torch.rand(1, 5, 6, 8).to(DEVICE)
    guide[0, 1, 2, 3], guide[0, 2, 4, 4] = torch.nan, torch.inf
    config = CFCAMConfig(normalize="max", affinity_centring=0)
    maps = cf_cam(*tensors, (6, 8), config, backend, guide=guide, check_finite=False).maps
    assert maps.isfinite().all() and maps[0, 2, 3] < 1e-6 and maps[0, 4, 4] < 1e-6
    assert maps[0].gt(0.1).sum() > 30


def test_several_classes_are_weighed_alike():
    activations, gradients, guide = torch.rand(2, 8, 3, 4), torch.randn(2, 3, 8, 3, 4), torch.rand(2, 5, 6, 8)
    for backend in ("torch", "triton"):
        if not pipeline.unavailable(backend):
            on_device = (each.to(DEVICE) for each in (activations, gradients))
            maps = cf_cam(*on_device, (12, 16), backend=backend, guide=guide.to(DEVICE)).maps.cpu()
            for index in range(3):
                alone = cf_cam(activations, gradients[:, index], (12, 16), backend="torch", guide=guide).maps
                torch.testing.assert_close(maps[:, index], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("value, message", [(-0.1, "in \\[0, 2\\], got -0.1"), (2.5, "guide_power must be")])
def test_bad_powers(value, message):
    with pytest.raises(ValueError, match=message):
        CFCAMConfig(guide_power=value)
