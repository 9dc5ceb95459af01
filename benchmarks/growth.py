"""How time and memory of the pipeline grow with channels, grid, batch and target layers, and the exponents fitted.

The pipeline runs alone, on activations and gradients of a layer's kind, but for the target layers: there it is
``cam.maps`` on a ResNet-50, and the time is what it takes beyond the plain forward in the same run. The maps of the
ways to compute one point are compared first: no agreement, no number.
"""

import math

import numpy as np
import torch

from cfcam_gpu import CFCAM, cf_cam
from cfcam_gpu.bench import subject, timing
from cfcam_gpu.bench.providers import BACKENDS
from cfcam_gpu.bench.run import TOLERANCE, reason_of, scaled

WAYS = {"auto": ("auto", "auto"), **{name: BACKENDS[name] for name in ("torch+batched", "torch+sklearn", "torch+cuml")}}
"""Backend and clustering engine of the ways that are followed."""

SHAPES = {
    "channels": {channels: (1, channels, 7, 7) for channels in (64, 128, 256, 512, 1024, 2048, 4096)},
    "grid": {side: (1, 512, side, side) for side in (7, 14, 28, 56)},
    "batch": {batch: (batch, 2048, 7, 7) for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)},
}
"""{what grows: {its value: (B, C, h, w)}}; a grid's value is its side."""

LAYERS = tuple(range(1, 7))
"""Numbers of target layers: the last blocks of a ResNet-50's third stage."""

LAYER_SHAPE = (1, 1024, 14, 14)
"""(B, C, h, w) of each."""


def problem(shape, device="cpu"):
    """Activations and gradients (B, C, h, w) like a last layer's: after a ReLU, channel scales spread out."""
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(shape, generator=generator).relu() * torch.rand(*shape[:2], 1, 1, generator=generator)
    return activations.to(device), (torch.randn(shape, generator=generator) * 1e-3).to(device)


def points():
    """All (what grows, its value)."""
    return [(along, x) for along, shapes in SHAPES.items() for x in shapes] + [("layers", n) for n in LAYERS]


def measure(along, x, device="cpu", time_limit_s=2.0, rounds=15, skip=None):
    """The rows of one point, a row per way; ``skip`` has {way: reason} of those not to try."""
    if along == "layers":
        return [_layers_row(x, device, time_limit_s, rounds)]
    shape, skip = SHAPES[along][x], skip or {}
    activations, gradients = problem(shape, device)
    ready, found, expected = {}, {}, None
    for way, (backend, engine) in WAYS.items():

        def run(backend=backend, engine=engine):
            return cf_cam(activations, gradients, None, backend=backend, clustering=engine).maps

        try:
            if way in skip:
                raise _Skip(skip[way])
            maps = scaled(run())
            expected = maps if expected is None else expected
            difference = float((maps - expected).abs().max())
            if not difference <= TOLERANCE:
                raise _Skip(f"no agreement with auto: the maps differ by {difference:.2g}")
            call_s = timing.seconds(run, device)
            if call_s * timing.MIN_ROUNDS > time_limit_s:
                raise _Skip(f"time limit: one call took {call_s:.2g} s at {along} {x}")
            found[way] = {"peak_mib": timing.peak_mib(run, device), "max_difference": difference}
            ready[way] = run, max(timing.MIN_ROUNDS, min(rounds, int(time_limit_s / call_s)))
        except Exception as error:
            found[way] = {"not_measured": reason_of(error)}
    if ready:
        runs, n_calls = ({way: each[index] for way, each in ready.items()} for index in (0, 1))
        for way, times in timing.interleaved(runs, device, n_calls).items():
            found[way].update(timing.quantiles_ms(times), rounds=len(times))
    return [_row(along, x, way, shape) | row for way, row in found.items()]


def _layers_row(n_layers, device, time_limit_s, rounds):
    row = _row("layers", n_layers, "auto", LAYER_SHAPE)
    try:
        one = subject("resnet50", device=device)
        layers = list(one.model.layer3)[-n_layers:]
        cam, reference = (CFCAM(one.model, layers, backend=backend) for backend in ("auto", "reference"))
        difference = float((scaled(cam.maps(one.images)) - scaled(reference.maps(one.images))).abs().max())
        if not difference <= TOLERANCE:
            raise _Skip(f"no agreement with reference: the maps differ by {difference:.2g}")
    except Exception as error:  # a package that is missing, too, is a reason and not the end of the run
        return row | {"not_measured": reason_of(error)}

    def maps():
        return cam.maps(one.images)

    @torch.no_grad()
    def forward():
        one.model(one.images)

    forward()
    n_calls = max(timing.MIN_ROUNDS, min(rounds, int(time_limit_s / timing.seconds(maps, device))))
    peak_mib = timing.peak_mib(maps, device)
    times = timing.interleaved({"maps": maps, "forward": forward}, device, {"maps": n_calls, "forward": n_calls})
    unit_ms = timing.quantiles_ms(times["forward"])["median_ms"]
    beyond = {name: value - unit_ms for name, value in timing.quantiles_ms(times["maps"]).items()}
    return row | {
        "max_difference": difference,
        "peak_mib": peak_mib,
        **beyond,
        "forward_ms": unit_ms,
        "rounds": n_calls,
    }


class _Skip(Exception):
    pass


def _row(along, x, way, shape):
    return {"op": "growth", "along": along, "x": x, "provider": way, "shape": list(shape), "dtype": "float32"}


def exponent(xs, ys):
    """b of the power law y = a x^b through the larger half of the points; None with fewer than three.

    The smaller half is left out because fixed costs hide the growth there.

    >>> exponent([1, 2, 4, 8], [3, 12, 48, 192])
    2.0
    """
    positive = sorted((x, y) for x, y in zip(xs, ys) if y is not None and y > 0)
    larger = positive[-max(3, math.ceil(len(positive) / 2)) :]
    if len(larger) < 3:
        return None
    slope, _ = np.polyfit(*np.log(np.array(larger, dtype=float).T), 1)
    return round(float(slope), 9)
