"""Mosaics and the grid pointing game, against Pillow and plain loops."""

import numpy as np
import pytest
import torch
from compare import assert_close

from cfcam_gpu import metrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shrink", [False, True])
def test_mosaics(shrink, rng):
    pil = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: demo)")
    images, classes = torch.rand(12, 3, 8, 6), [0, 0, 0, 5, 5, 5, 2, 2, 9, 9, 9, 7]
    result = metrics.mosaics(images, classes, 20, rng, shrink=shrink)
    height, width = (4, 3) if shrink else (8, 6)
    assert result.images.shape == (20, 3, 2 * height, 2 * width)
    assert result.classes.shape == result.sources.shape == (20, 4)
    for mosaic, four, sources in zip(result.images, result.classes, result.sources):
        assert len(set(four.tolist())) == 4
        assert [classes[source] for source in sources] == four.tolist()
        for cell, source in enumerate(sources):
            top, left = cell // 2 * height, cell % 2 * width
            for channel in range(3):
                plane = images[source, channel].numpy()
                if shrink:
                    plane = np.array(pil.fromarray(plane).resize((width, height), pil.Resampling.BILINEAR))
                assert_close(mosaic[channel, top : top + height, left : left + width], plane)
    assert {0, 2, 5, 7, 9} == set(result.classes.flatten().tolist())
    assert len({tuple(sources.tolist()) for sources in result.sources}) > 10
    once, again, other = (metrics.mosaics(images, torch.tensor(classes), 20, each).sources for each in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_pointing_game_of_a_loop(seed):
    maps = torch.randn(64, 10, 6)
    cells = torch.randint(0, 4, (64,))
    result = metrics.pointing_game(maps, cells)
    for index, cell in enumerate(cells.tolist()):
        inside = total = 0.0
        for y in range(10):
            for x in range(6):
                value = max(0.0, maps[index, y, x].item())
                total += value
                inside += value * ((y >= 5) * 2 + (x >= 3) == cell)
        assert abs(result.energy[index] - inside / total) < 1e-6
        y, x = np.unravel_index(maps[index].argmax().item(), (10, 6))
        assert result.hit[index].item() == ((y >= 5) * 2 + (x >= 3) == cell)
    assert not result.zero.any() and result.hit.any() and not result.hit.all()


def test_pointing_game_of_planted_flat_and_zero_maps():
    planted = torch.zeros(4, 8, 8)
    for cell in range(4):
        planted[cell, cell // 2 * 4 + 1, cell % 2 * 4 + 3] = 0.7
    right, wrong = (metrics.pointing_game(planted, cells) for cells in ([0, 1, 2, 3], [1, 2, 3, 0]))
    assert right.energy.tolist() == [1] * 4 and right.hit.all()
    assert wrong.energy.tolist() == [0] * 4 and not wrong.hit.any()
    flat = metrics.pointing_game(torch.full((4, 8, 8), 0.3), [0, 1, 2, 3])
    assert_close(flat.energy, [0.25] * 4)
    assert not flat.hit.any() and not flat.zero.any()
    zero = metrics.pointing_game(torch.zeros(2, 8, 8), [0, 3])
    assert zero.zero.all() and zero.energy.isnan().all() and not zero.hit.any()


def test_energy_in_a_mask_by_hand():
    maps = torch.tensor([[[3.0, -5.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    masks = torch.tensor([[[True, True], [False, False]], [[True, False], [False, False]]])
    energy = metrics.energy_in_mask(maps, masks)
    assert energy[0] == 0.75 and energy[1].isnan()
    volumes, boxes = torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    boxes[:, 1:, :2] = True
    expected = volumes[:, 1:, :2].double().flatten(1).sum(1) / volumes.double().flatten(1).sum(1)
    torch.testing.assert_close(metrics.energy_in_mask(volumes, boxes), expected)
    for bad, error, message in (
        (masks.int(), TypeError, "masks must be bool"),
        (masks.tolist(), TypeError, "masks must be a torch.Tensor"),
        (masks[:1], ValueError, "masks must match the maps"),
        (torch.zeros_like(masks), ValueError, "masks must each have a pixel"),
    ):
        with pytest.raises(error, match=message):
            metrics.energy_in_mask(maps, bad)
