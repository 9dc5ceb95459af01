"""Faithfulness, against torch-cam, pytorch-grad-cam, closed forms and plain loops."""

from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from compare import assert_close
from measured import SIZE, shuffled
from torch import nn

from cfcam_gpu import metrics

pytestmark = pytest.mark.usefixtures("one_thread")


class Evidence(nn.Module):
    """Two classes; class 1 has probability 0.1 + 0.8 * (share of the evidence pixels that are 1), exactly."""

    def __init__(self, evidence):
        super().__init__()
        self.register_buffer("weights", 0.8 * evidence.double() / evidence.sum())

    def forward(self, images):
        probability = 0.1 + (images[:, 0].double() * self.weights).sum((1, 2))
        return torch.stack((1 - probability, probability), 1).log()


class Given:
    """What torch-cam's metrics want of an extractor, for maps that are given."""

    def __init__(self, model, maps):
        self.model, self.maps = model, maps

    def __call__(self, class_idx=None, scores=None, **_):
        return [self.maps]

    def fuse_cams(self, cams):
        return cams[0]

    def _hooks_off(self):
        return nullcontext()


def probabilities(model, images, targets):
    with torch.no_grad():
        return model(images).softmax(1)[torch.arange(len(images)), torch.as_tensor(targets)]


# Insertion and deletion.


@pytest.mark.parametrize("rows", [2, 8, 16])  # the evidence: an eighth, a half and all of the image
def test_insertion_deletion_in_closed_form(rows, rng):
    evidence = torch.zeros(SIZE, SIZE)
    evidence[rng.permutation(SIZE)[:rows]] = 1
    images, share = torch.ones(2, 1, SIZE, SIZE), rows / SIZE
    best = evidence + torch.rand(SIZE, SIZE) / 2
    maps = torch.stack((best, best.amax() - best))  # the evidence first, and the evidence last
    result = metrics.insertion_deletion(Evidence(evidence), images, maps, [1, 1], insertion_baseline="zero")
    # The probability climbs from 0.1 to 0.9 on a ramp as wide as the evidence's share, first or last.
    first, last = 0.9 - 0.8 * share / 2, 0.1 + 0.8 * share / 2
    assert_close(result.insertion, np.array([first, last]), torch.float64)
    assert_close(result.deletion, np.array([last, first]), torch.float64)
    ramp = np.minimum(np.linspace(0, 1, 33) / share, 1)
    assert_close(result.insertion_curve[0], 0.1 + 0.8 * ramp, torch.float64)
    assert_close(result.deletion_curve[0], 0.9 - 0.8 * ramp, torch.float64)
    assert_close(result.fractions, np.linspace(0, 1, 33), torch.float64)


@pytest.mark.parametrize("steps", [1, 4, 32])
@pytest.mark.parametrize("levels", [None, 3])  # distinct values; three values and hence many ties
def test_insertion_deletion_as_torchcam(problem, steps, levels):
    torchcam = pytest.importorskip("torchcam.metrics", reason="torch-cam is not installed (extra: torchcam)")
    model, images, maps, targets = problem
    maps = maps if levels is None else (maps * levels).floor() / levels
    baseline = torch.randn_like(images)
    arguments = {"steps": steps, "insertion_baseline": baseline, "deletion_baseline": baseline}
    result = metrics.insertion_deletion(model, images, maps, targets, **arguments)
    for index in range(len(images)):
        one = slice(index, index + 1)
        judge = torchcam.DeletionInsertionMetric(
            Given(model, maps[one]), partial(torch.softmax, dim=-1), steps=steps, baseline=baseline[one]
        )
        judge.update(images[one], [targets[index]])
        assert_close(result.insertion[index], judge.summary()["insertion_auc"])
        assert_close(result.deletion[index], judge.summary()["deletion_auc"])


def test_deletion_as_pytorch_grad_cams_most_relevant_first(problem):
    judges = pytest.importorskip(
        "pytorch_grad_cam.metrics.perturbation_confidence", reason="grad-cam is not installed (extra: grad-cam)"
    )
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    model, images, maps, targets = problem
    curve = metrics.insertion_deletion(model, images, maps, targets, steps=4).deletion_curve
    for step, percentile in enumerate((75, 50, 25), 1):
        perturbation = judges.RemoveMostRelevantFirst(percentile, lambda image, keep: image * keep)
        judge = judges.PerturbationConfidenceMetric(perturbation)
        softmax_targets = [ClassifierOutputSoftmaxTarget(target) for target in targets]
        assert_close(curve[:, step], judge(images, maps.numpy(), softmax_targets, model, return_diff=False))


@pytest.mark.parametrize("steps", [7, 100])  # which do not divide the 256 pixels
def test_curves_are_those_of_a_loop(problem, steps):
    model, images, maps, targets = problem
    result = metrics.insertion_deletion(model, images, maps, targets, steps=steps, insertion_baseline="mean")
    ranks = metrics.pixel_ranks(maps)
    for index, image in enumerate(images):
        for step in range(steps + 1):
            changed = ranks[index] < step * SIZE * SIZE // steps
            assert_close(result.fractions[step], changed.double().mean())
            mean = image.mean((1, 2))[:, None, None]
            mixtures = torch.stack((torch.where(changed, image, mean), torch.where(changed, 0, image)))
            inserted, deleted = probabilities(model, mixtures, [targets[index]] * 2)
            assert (result.insertion_curve[index, step] - inserted).abs() < 1e-5
            assert (result.deletion_curve[index, step] - deleted).abs() < 1e-5
    for curve, area in (
        (result.insertion_curve, result.insertion),
        (result.deletion_curve, result.deletion),
    ):
        assert_close(area, np.trapezoid(curve.numpy(), result.fractions.numpy(), axis=1))


def test_ranking_of_a_loop_with_ties_by_index(rng):
    for levels in (1, 2, 1000):
        maps = rng.integers(0, levels, (3, 5, 7)).astype(np.float32)
        expected = np.empty((3, 35), int)
        for index, values in enumerate(maps.reshape(3, -1)):
            for place, pixel in enumerate(sorted(range(35), key=lambda pixel: (-values[pixel], pixel))):  # noqa: B023
                expected[index, pixel] = place
        assert (metrics.pixel_ranks(torch.from_numpy(maps)).numpy().reshape(3, -1) == expected).all()


def test_a_shuffled_map_scores_worse_where_the_evidence_is_planted(seed):
    evidence = torch.zeros(SIZE, SIZE)
    evidence[3:8, 5:11] = 1
    model, images = Evidence(evidence), torch.ones(4, 1, SIZE, SIZE)
    maps = evidence.expand(4, -1, -1) * (0.5 + torch.rand(4, SIZE, SIZE) / 2)
    true, worse = (metrics.insertion_deletion(model, images, each, [1] * 4) for each in (maps, shuffled(maps)))
    true, worse = (each._asdict() for each in (true, worse))
    # The blurred baseline shows all of the evidence in an image of ones.
    assert_close(true["insertion"], [0.9] * 4)
    assert (true["deletion"] < worse["deletion"] - 0.1).all()
    zeros = {"insertion_baseline": "zero"}
    true, worse = (metrics.insertion_deletion(model, images, each, [1] * 4, **zeros) for each in (maps, shuffled(maps)))
    assert (true.insertion > worse.insertion + 0.1).all()
    true, worse = (metrics.average_drop(model, images, each, [1] * 4) for each in (maps, shuffled(maps)))
    assert (true < worse - 0.1).all()


def test_a_flat_map_ranks_by_index(seed):
    evidence = torch.zeros(SIZE, SIZE)
    evidence[: SIZE // 2] = 1  # the first half of the pixels in the order of their index
    flat = torch.full((1, SIZE, SIZE), 0.5)
    result = metrics.insertion_deletion(
        Evidence(evidence), torch.ones(1, 1, SIZE, SIZE), flat, [1], insertion_baseline="zero"
    )
    assert_close(result.insertion, [0.7])


def test_targets_default_to_the_top_class(problem):
    model, images, maps, _ = problem
    top = model(images).argmax(1)
    for measure in (metrics.insertion_deletion, metrics.average_drop, metrics.increase_in_confidence):
        for targets in (top.tolist(), top, top.to(torch.int32)):
            default, named = measure(model, images, maps), measure(model, images, maps, targets)
            assert all(torch.equal(one, other) for one, other in zip(default, named))


def test_baselines(problem):
    model, images, maps, targets = problem
    scipy = pytest.importorskip("scipy.ndimage", reason="SciPy is not installed (extra: reference)")
    blur = scipy.gaussian_filter(images.numpy(), 10, axes=(2, 3), mode="nearest")
    with torch.autocast("cpu"):
        assert_close(metrics.blurred(images), blur)
    means = images.numpy().mean((2, 3), keepdims=True) + np.zeros_like(blur)
    for name, values in (("blurred", blur), ("mean", means), ("zero", 0 * blur)):
        expected = probabilities(model, torch.from_numpy(values), targets)
        arguments = {"steps": 3, "insertion_baseline": name, "deletion_baseline": name}
        result = metrics.insertion_deletion(model, images, maps, targets, **arguments)
        assert_close(result.insertion_curve[:, 0], expected)
        assert_close(result.deletion_curve[:, -1], expected)
    defaults = metrics.insertion_deletion(model, images, maps, targets, steps=3)
    assert_close(defaults.insertion_curve[:, 0], probabilities(model, torch.from_numpy(blur), targets))
    assert_close(defaults.deletion_curve[:, -1], probabilities(model, torch.zeros_like(images), targets))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_chunks_change_nothing_and_no_forward_is_wasted(problem, batch_size):
    model, images, maps, targets = problem
    sizes = []

    def counted(batch):
        assert not torch.is_grad_enabled()
        sizes.append(len(batch))
        return model(batch)

    result = metrics.insertion_deletion(counted, images, maps, targets, steps=8, batch_size=batch_size)
    assert sum(sizes) == len(images) * (2 * 8 + 1)
    assert max(sizes) <= batch_size
    whole = metrics.insertion_deletion(model, images, maps, targets, steps=8)
    for one, other in zip(result, whole):
        assert_close(one, other)


# Drop and increase.


@pytest.fixture
def many(network):
    """Like `problem`, with 64 images and maps near 1, so that confidence rises for some of them."""
    images = torch.randn(64, 3, SIZE, SIZE)
    return network, images, 0.5 + torch.rand(64, SIZE, SIZE) / 2, network(images).argmax(1).tolist()


def test_drop_and_increase_as_torchcam(many):
    torchcam = pytest.importorskip("torchcam.metrics", reason="torch-cam is not installed (extra: torchcam)")
    model, images, maps, targets = many
    drop = metrics.average_drop(model, images, maps, targets, batch_size=7)
    increase = metrics.increase_in_confidence(model, images, maps, targets, batch_size=7)
    assert drop.shape == increase.shape == (64,)
    assert 0 < increase.mean() < 1 and drop.mean() > 0.01
    judge = torchcam.ClassificationMetric(Given(model, maps), partial(torch.softmax, dim=-1))
    judge.update(images, targets)
    assert_close(drop.double().mean(), judge.summary()["avg_drop"])
    assert_close(increase.double().mean(), judge.summary()["conf_increase"])


def test_drop_and_increase_as_pytorch_grad_cam(many):
    judges = pytest.importorskip(
        "pytorch_grad_cam.metrics.cam_mult_image", reason="grad-cam is not installed (extra: grad-cam)"
    )
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    model, images, maps, targets = many
    arguments = images, maps.numpy(), [ClassifierOutputSoftmaxTarget(target) for target in targets], model
    drop = metrics.average_drop(model, images, maps, targets)
    # That library does not divide by the image's own probability.
    assert_close(drop * probabilities(model, images, targets), judges.DropInConfidence()(*arguments))
    increase = metrics.increase_in_confidence(model, images, maps, targets)
    assert_close(increase, judges.IncreaseInConfidence()(*arguments))


def test_maps_of_ones_and_zeros(problem):
    model, images, maps, targets = problem
    ones, zeros = torch.ones_like(maps), torch.zeros_like(maps)
    assert (metrics.average_drop(model, images, ones, targets) == 0).all()
    assert (metrics.increase_in_confidence(model, images, ones, targets) == 0).all()
    before, after = (probabilities(model, each, targets) for each in (images, 0 * images))
    assert_close(metrics.average_drop(model, images, zeros, targets), (1 - after / before).clamp_min(0))


def test_the_authors_variants(many):
    model, images, maps, targets = many
    maps = (maps - 0.5) * 2
    drop = metrics.average_drop(model, images, maps, targets, variant="authors")
    increase = metrics.increase_in_confidence(model, images, maps, targets, variant="authors")
    black = -np.array([0.485, 0.456, 0.406]) / np.array([0.229, 0.224, 0.225])
    colour = np.array([0.485, 0.456, 0.406])
    for index in range(len(images)):
        image, heat, target = images[index].numpy(), maps[index].numpy(), targets[index]
        seen, kept = image.copy(), image.copy()
        for channel in range(3):
            seen[channel][heat <= 0.5] = black[channel]
            kept[channel][heat <= 0.3] = colour[channel]
        blank = np.broadcast_to(colour[:, None, None], image.shape)
        batch = torch.from_numpy(np.stack((image, seen, kept, blank)).astype(np.float32))
        whole, hidden, inserted, empty = probabilities(model, batch, [target] * 4)
        assert abs(drop[index] - (whole - hidden) / whole) < 1e-5
        assert abs(increase[index] - (inserted - empty)) < 1e-5
    assert drop.min() < 0 or increase.min() < 0  # signed, unlike the standard ones
    given = metrics.average_drop(model, images, maps, targets, variant="authors", fill=black.tolist())
    assert torch.equal(given, drop)
    other = metrics.average_drop(model, images, maps, targets, variant="authors", fill=torch.zeros(3))
    assert not torch.allclose(other, drop)


def test_the_model_is_left_as_it_was(problem):
    _, images, maps, targets = problem
    # Dropout would show a change of mode, batch norm's statistics are constant in eval mode alone.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[1].eval()
    model[2].train()
    images.requires_grad_()
    before = deepcopy(model.state_dict())
    for measure in (metrics.insertion_deletion, metrics.average_drop, metrics.increase_in_confidence):
        result = measure(model, images, maps, [0, 1, 2])
        assert not (result if isinstance(result, torch.Tensor) else result.insertion).requires_grad
    assert model[2].training and not model[1].training
    assert images.grad is None and all(each.grad is None and each.requires_grad for each in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# Volumes.


def bright_voxels(volumes):
    """Logits of two classes: the first is the sum of the bright corner of the first frames."""
    score = volumes[:, 0, :2, :3, :3].sum((1, 2, 3))
    return torch.stack([score, torch.zeros_like(score)], dim=1)


def test_insertion_and_deletion_of_volumes_by_voxels_and_by_frames():
    volumes, right = torch.rand(2, 1, 4, 6, 6) + 0.5, torch.zeros(2, 4, 6, 6)
    right[:, :2, :3, :3] = 1
    wrong = right.flip(1)
    for options in ({"steps": 9}, {"by": "frames", "steps": 4}):
        options.update(targets=[0, 0], insertion_baseline="zero")
        good = metrics.insertion_deletion(bright_voxels, volumes, right, **options)
        bad = metrics.insertion_deletion(bright_voxels, volumes, wrong, **options)
        assert (good.insertion > bad.insertion).all() and (good.deletion < bad.deletion).all()
    # Frame by frame, in the order of their means: after two of four all that counts is there.
    torch.testing.assert_close(good.insertion_curve[:, 2], good.insertion_curve[:, 4])
    assert torch.equal(good.fractions, torch.arange(5) / 4)
    assert metrics.average_drop(bright_voxels, volumes, right, [0, 0]).abs().max() < 1e-6
    for arguments, message in (
        ({"by": "slices"}, 'by must be "pixels" or "frames"'),
        ({"by": "frames", "steps": 5}, "steps must be at least 1 and at most 4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.insertion_deletion(bright_voxels, volumes, right, **arguments)
    with pytest.raises(ValueError, match=r'by="frames" needs maps \(B, D, H, W\)'):
        metrics.insertion_deletion(bright_voxels, volumes[:, :, 0], right[:, 0], by="frames")


def test_a_blurred_volume_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed (extra: reference)")
    volumes = torch.rand(1, 2, 5, 7, 6, dtype=torch.float64)
    expected = ndimage.gaussian_filter(volumes.numpy(), (0, 0, 1.5, 1.5, 1.5), mode="nearest", truncate=4.0)
    np.testing.assert_allclose(metrics.blurred(volumes, 1.5), expected, atol=1e-12)
