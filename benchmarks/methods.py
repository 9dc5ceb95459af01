"""Every method of the other libraries, as it is and accelerated: time, ratio, largest difference.

    python benchmarks/methods.py                              # a ResNet-50, two threads
    python benchmarks/methods.py --model vit_b_16 --only AblationCAM LayerIntegratedGradients
    python benchmarks/methods.py --model demo --only ScoreCAM # pretrained: half of its channels are zero everywhere

The two objects explain the same images in turn. Before the clock starts, each explains them once, with the random
numbers of one seed, and the results are compared; where they differ by more than `ROUNDING`, both also with the
library's in float64. One row a method is appended to results/methods.jsonl. A method that takes minutes is timed in a
single call. Random weights, but for the demo.
"""

import argparse
import inspect
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import captum.attr
import numpy as np
import pytorch_grad_cam
import rows
import torch
import torchcam.methods
import torchvision
from torch import nn

from cfcam_gpu import accelerate
from cfcam_gpu.adapters import captum as captum_adapter
from cfcam_gpu.adapters import further
from cfcam_gpu.adapters import torchcam as torchcam_adapter
from cfcam_gpu.bench import timing
from cfcam_gpu.models import load_model

SECONDS = 12.0
"""For the calls of the slower of the two; at least one, at most `ROUNDS`."""

ROUNDS = 15

SLOW = 20.0
"""Seconds of a call beside which the recording of a head is nothing."""

ROUNDING = 2e-6
"""Of a result's maximum: above it the row says how far both are from the library's own result in float64."""

TARGET = 7


class Subject(NamedTuple):
    model: nn.Module
    layer: nn.Module
    early: nn.Module  # with fewer channels, for what runs the network many times for each
    images: torch.Tensor
    reshape: object = None  # tokens to a grid


def tokens_to_grid(tokens):
    return tokens[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)


def subject(name):
    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224)
    if name == "demo":
        model, layer = load_model("demo").model, nn.Identity()
        # Its last activation is a module that runs many times: what it gives last is the pooling's input.
        model._avg_pooling = nn.Sequential(layer, model._avg_pooling)
        return Subject(model, layer, model._blocks[4], images)
    model = torchvision.models.get_model(name, weights=None).eval()
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision's are zeros
        layer = model.encoder.layers[-1].ln_1
        return Subject(model, layer, layer, images, tokens_to_grid)
    if name.startswith("convnext"):
        return Subject(model, model.features[-1][-1], model.features[1][-1], images)
    return Subject(model, model.layer4[-1], model.layer1[-1], images)


class Case(NamedTuple):
    """A method: ``make(subject)`` gives the library's object, ``call(object, subject)`` its result."""

    library: str
    cls: type
    make: object
    call: object
    note: str = ""


def _pytorch_grad_cam():
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    names = [name for name in dir(pytorch_grad_cam) if inspect.isclass(getattr(pytorch_grad_cam, name))]
    skipped = ("AblationLayer", "AblationLayerVit", "AblationLayerFasterRCNN", "ActivationsAndGradients")
    skipped += ("DeepFeatureFactorization", "GuidedBackpropReLUModel")
    for name in names:
        if name in skipped:
            continue
        cls = getattr(pytorch_grad_cam, name)

        def make(one, cls=cls, name=name):
            options = {"num_scales": 2} if name == "SESS" else {}
            if name == "AblationCAM" and one.reshape is not None:
                options["ablation_layer"] = pytorch_grad_cam.AblationLayerVit()
            layers = [one.early, one.layer] if name == "RefineCAM" else [one.layer]
            return cls(one.model, layers, reshape_transform=one.reshape, **options)

        def call(cam, one):
            return cam(one.images, [ClassifierOutputTarget(TARGET)])

        yield Case("pytorch-grad-cam", cls, make, call, {"SESS": "two scales"}.get(name, ""))


def _torch_cam():
    few = {"SSCAM": {"num_samples": 2}, "ISCAM": {"num_samples": 2}}
    for name in (
        "CAM",
        "GradCAM",
        "GradCAMpp",
        "SmoothGradCAMpp",
        "XGradCAM",
        "LayerCAM",
        "ScoreCAM",
        "SSCAM",
        "ISCAM",
    ):
        yield _of_torch_cam(name, few.get(name, {}), name in few)
    for name in ("FinerCAM", "RefineCAM", "LeGrad"):
        yield _of_torch_cam(name, {}, False)


def _of_torch_cam(name, options, early):
    cls = getattr(torchcam.methods, name)

    def make(one):
        layer = one.early if early else one.layer
        layer = [one.early, one.layer] if name == "RefineCAM" else layer
        cam = cls(one.model, layer, **options)
        cam.disable_hooks()
        return cam

    def call(cam, one):
        cam.enable_hooks()  # the other object is on the same model
        scores = one.model(one.images)
        maps = torch.cat([of_layer.flatten(1) for of_layer in cam([TARGET] * len(scores), scores)], dim=1)
        cam.disable_hooks()
        return maps

    return Case("torch-cam", cls, make, call, "an early layer, two samples" if early else "")


class Selected(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)[:, TARGET]


def _captum():
    def of(name, note="", channels=False, model=lambda one: one.model, images=1, target=True, **options):
        cls = getattr(captum.attr, name)

        def call(attribution, one):
            given = dict(options)
            if target:
                given["target"] = TARGET
            if channels:
                given["layer_mask"] = _channels(one, channels)
            if name == "LayerGradientShap":
                given["baselines"] = torch.zeros(1, *one.images.shape[1:])
            inputs = one.images.repeat(images, 1, 1, 1) + torch.arange(images).view(-1, 1, 1, 1) / 10
            return attribution.attribute(inputs, **given)

        return Case("captum", cls, lambda one: cls(model(one), one.layer), call, note)

    yield of("LayerIntegratedGradients", "50 steps", n_steps=50)
    yield of("LayerFeatureAblation", "64 groups of channels", channels=64)
    yield of(
        "LayerFeaturePermutation", "64 groups of channels, 2 images", 64, lambda one: Selected(one.model), 2, False
    )
    yield of("LayerGradientShap", "5 samples", n_samples=5)
    yield of("LayerGradCam")
    for cls in captum_adapter.REASONS:
        yield of(cls.__name__)
    gradients = captum.attr.LayerIntegratedGradients

    def noisy(attribution, one):
        return attribution.attribute(one.images, nt_samples=3, n_steps=20, target=TARGET, nt_samples_batch_size=1)

    def make(one):
        return captum.attr.NoiseTunnel(gradients(one.model, one.layer))

    yield Case("captum", captum.attr.NoiseTunnel, make, noisy, "of LayerIntegratedGradients: 3 samples, 20 steps")


def _channels(one, groups):
    kept = []
    handle = one.layer.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        one.model(one.images)
    handle.remove()
    shape = kept[0].shape
    channels = shape[-1] if one.reshape is not None else shape[1]
    mask = torch.arange(channels) * groups // channels
    return mask.view(1, 1, -1) if one.reshape is not None else mask.view(1, -1, 1, 1)


REASONS = {**captum_adapter.REASONS, **further.REASONS, **torchcam_adapter.REASONS}
"""The libraries' class -> why it is left alone."""


def cases():
    return [*_pytorch_grad_cam(), *_torch_cam(), *_captum()]


def measure(case, one):
    """The row of a method."""
    row = {"op": "methods", "library": case.library, "method": case.cls.__name__, "note": case.note}
    if case.cls in REASONS:
        return row | {"left_alone": REASONS[case.cls]}
    objects = {}
    try:
        theirs, results, first = case.make(one), [], []
        for name in ("as it is", "accelerated"):
            # torch-cam's are accelerated in place.
            objects[name] = theirs if name == "as it is" else accelerate(_again(case, one, theirs))
            torch.manual_seed(1)
            np.random.seed(1)
            start = time.perf_counter()
            results.append(_numbers(case.call(objects[name], one)))
            first.append(1e3 * (time.perf_counter() - start))
        if objects["accelerated"] is theirs:
            raise RuntimeError("left as it is")
        scale = np.abs(results[0]).max()
        row |= {"max_difference": float(np.abs(results[1] - results[0]).max() / scale), "first_ms": first[1]}
        if row["max_difference"] > ROUNDING and first[0] < 1e3 * SLOW:
            exact = _in_float64(case, one)
            off = [float(np.abs(result - exact).max() / np.abs(exact).max()) for result in results]
            row |= {"theirs_off_float64": off[0], "ours_off_float64": off[1]}
        row["same_peak"] = bool(results[0].argmax() == results[1].argmax())
        n_rounds = max(1, min(ROUNDS, int(SECONDS / (first[0] / 1e3))))
        runs = {name: (lambda cam=cam: case.call(cam, one)) for name, cam in objects.items()}
        if (
            n_rounds == 1
        ):  # the call that was compared; ours once more, since it recorded the head, unless that is lost in it
            again = [first[1] / 1e3] if first[1] > 1e3 * SLOW else [timing.seconds(runs["accelerated"], "cpu")]
            times = {"as it is": [first[0] / 1e3], "accelerated": again}
        else:
            times = timing.interleaved(runs, "cpu", dict.fromkeys(runs, n_rounds))
        medians = {name: 1e3 * float(np.median(of_method)) for name, of_method in times.items()}
        row |= {"theirs_ms": medians["as it is"], "ours_ms": medians["accelerated"], "rounds": n_rounds}
        row["ratio"] = medians["as it is"] / medians["accelerated"]
    except Exception as error:
        row["not_measured"] = str(error).splitlines()[0][:200] or type(error).__name__
    finally:
        for cam in objects.values():
            if hasattr(cam, "remove_hooks"):
                cam.remove_hooks()
    return row


def _again(case, one, theirs):
    """What is accelerated: ``theirs``, or a second object where that is changed."""
    return case.make(one) if case.library == "torch-cam" else theirs


def _in_float64(case, one):
    """The library's own result, of the same weights and images in float64."""
    try:
        double = one._replace(model=one.model.double(), images=one.images.double())
        torch.manual_seed(1)
        np.random.seed(1)
        return _numbers(case.call(case.make(double), double))
    finally:
        one.model.float()


def _numbers(result):
    return result.detach().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help='"demo", or a model of torchvision')
    parser.add_argument("--only", nargs="*", help="only the methods with these names")
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    args = parser.parse_args(argv)
    logging.getLogger("cfcam_gpu").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    here = rows.about("grad-cam", "torchcam", "captum", device="cpu")
    one = subject(args.model)
    for case in cases():
        if args.only and case.cls.__name__ not in args.only:
            continue
        row = measure(case, one) | {"model": args.model} | here
        rows.write("methods", [row], args.out)
        text = row.get("left_alone") or row.get("not_measured")
        text = (
            text
            or f"{row['theirs_ms']:.0f} ms, {row['ours_ms']:.0f} ms, {row['ratio']:.2f}x, {row['max_difference']:.1g}"
        )
        print(f"{case.library} {case.cls.__name__}: {text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
