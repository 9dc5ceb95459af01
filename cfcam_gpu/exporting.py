"""`export`: a model and its maps as one compiled file, which explains without Python and without the model's code.

The whole of a call (trunk without autograd, head, its backward, the stages for a whole batch) is traced into one graph
of torch's own operators for any number of images, and compiled by AOTInductor. Before the file gets its name, its maps
are compared with those of `CFCAM`. `cfcam_gpu.exported` loads it.
"""

import itertools
import json
import os
import platform
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfcam_gpu.cam import CFCAM
from cfcam_gpu.capture import GuideLayer
from cfcam_gpu.checks import check_floating
from cfcam_gpu.class_names import class_names as read_class_names
from cfcam_gpu.class_names import fit
from cfcam_gpu.config import CFCAMConfig
from cfcam_gpu.inputs import check_inputs
from cfcam_gpu.outputs import find_logits
from cfcam_gpu.targets import OwnRule, scores_of_classes

if TYPE_CHECKING:
    from cfcam_gpu.models import Preprocess

FORMAT = "1"
"""Of the inputs, the outputs and the metadata; `exported` takes no other."""

TOP = -1
"""In the place of a class index: the image's top class."""

TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""By how much of 1, a map's maximum, the compiled file's maps may differ from those of `CFCAM` at the most; compiled
code rounds half precision less often."""

TRACEABLE: dict[str, Any] = {"backend": "torch", "clustering": "batched", "check_finite": False}
"""What `CFCAM` is to run: operators of torch alone, and none that asks for values."""

N_TRACED = 3
"""Images that are traced with. Not 1, which torch takes for a size of its own, and not a number of channels."""

MANY_IMAGES, MANY_PIXELS = 17, 2**22
"""Of the largest batch that is compared; fewer of large images, but more than are traced with. A model's code may have
another branch for many."""

SIDES = (0.5, 2.0)
"""A dynamic size's least and largest sides, in those of the example."""

N_SIZES = 300
"""Sizes, drawn at random, of which the branches that the model's code took are to be the same."""

MOST_IMAGES = 64
"""Of a batch that is drawn with them, where a branch asks for both."""


def export(
    model: nn.Module,
    example: torch.Tensor,
    target_layers: Sequence[nn.Module] | None,
    path: str | os.PathLike,
    *,
    reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    guide_layer: GuideLayer = "auto",
    config: CFCAMConfig | None = None,
    class_names: Any = None,
    preprocess: "Preprocess | None" = None,
    dynamic_size: bool = False,
) -> Path:
    """Write a file that explains without Python: an AOTInductor package with the model, its weights and CF-CAM.

    It takes images (B, C, H, W) of the example's size and dtype, any B, and int64 classes (B,), -1 for the top class;
    it returns logits (B, n), maps (B, H, W) as `CFCAM.maps` gives them, and the classes (B,). It runs on the model's
    kind of device. `cfcam_gpu.load` reads it in Python; C++ reads it with ``torch::inductor::AOTIModelPackageLoader``.

    Args:
        model: in evaluation mode; it returns logits, or what holds them. It is left as it was.
        example: images (B, C, H, W), B >= 1, floating point: what the model takes. On them the file is checked.
        target_layers, reshape_transform, guide_layer, config: as for `CFCAM`; None finds the layer.
        path: the file, whose name ends in ".pt2".
        class_names: as `cfcam_gpu.class_names.class_names` takes them, to be kept in the file.
        preprocess: a `cfcam_gpu.models.Preprocess`, to be kept in the file.
        dynamic_size: whether the file is to take images of any (H, W), each side from half to twice the example's
            (`SIDES`), and not of its size alone. It is for models that take any size, such as convolutional ones.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, the model is in training mode, or a layer is not in it;
            the model cannot be exported, because its values decide what runs or for another reason, which is named;
            it takes images of one size, or of some sizes, where ``dynamic_size`` is asked for;
            the maps of the file are not those of `CFCAM`, or the example's are zero everywhere, which shows nothing.
        RuntimeError: there is no C++ compiler that works.
        OSError: the file cannot be written.

    >>> path = cfcam_gpu.export(model, images, [model.layer4[-1]], "model.pt2")  # images (2, 3, 224, 224)
    >>> cfcam_gpu.load(path).maps(images, targets=[285, 282]).shape
    torch.Size([2, 224, 224])
    """
    path = _checked_path(path)
    _check(model, example)
    if not isinstance(dynamic_size, bool):
        raise TypeError(f"dynamic_size must be a bool, got {type(dynamic_size).__name__}")
    options = {"guide_layer": guide_layer, "config": config}
    kept = class_names, preprocess
    with torch.inference_mode(False):
        return _export(model, example, target_layers, path, reshape_transform, options, kept, dynamic_size)


def _export(model, example, target_layers, path, reshape_transform, options, kept, dynamic_size):
    cam = CFCAM(model, target_layers, reshape_transform, **options)
    images = _some_images(example).to(next(model.parameters(), example).device)
    cam.maps(images)  # finds the layers; what is wrong with the arguments is said here
    logits = find_logits(cam.outputs, len(images))
    metadata = _metadata(cam, images, logits, *kept)
    sides = sides_of(images.shape[2:]) if dynamic_size else None
    if sides is not None:
        metadata["sides"] = _text([side for of_axis in sides for side in of_axis])
    if target_layers is None:
        target_layers, reshape_transform = cam._found.target_layers, cam._found.reshape_transform
    traced = CFCAM(model, target_layers, reshape_transform, **options, **TRACEABLE)
    traced.maps(images)  # finds the guides, and what else is found out about a model in the first pass
    graph = _trace(traced, images, logits.shape[1], sides)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        part = folder / "model.pt2"
        _compile(graph, images, part, metadata, sides)
        _compare(part, images, cam, sides)
        os.replace(part, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _checked_path(path):
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file's path, got {type(path).__name__}")
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f'path must end in ".pt2", got {str(path)!r}')
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in a folder that is there, got {str(path)!r}")
    return path


def _check(model, example):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example, torch.Tensor):
        raise TypeError(f"example must be a torch.Tensor, the model's only input, got {type(example).__name__}")
    if example.ndim != 4 or 0 in example.shape:
        raise ValueError(f"example must be images (B, C, H, W), got {tuple(example.shape)}")
    check_floating("example", example)
    if example.dtype not in TOLERANCES:
        raise TypeError(f"example must be one of {', '.join(map(str, TOLERANCES))}, got {example.dtype}")
    in_training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if in_training:
        raise ValueError(f"model must be in evaluation mode, got {in_training[0]} in training mode: call model.eval()")


def _some_images(example):
    """As many images as are traced with: the example's, and where these are fewer, mirrored and darker ones."""
    found = example.detach().clone()  # none of inference mode, which autograd refuses
    while len(found) < N_TRACED:
        found = torch.cat([found, found.flip(-1) * 0.5])
    return found[:N_TRACED]


def sides_of(size: Sequence[int]) -> list[tuple[int, int]]:
    """The least and the largest side along each axis of a dynamic size, by the example's size (H, W)."""
    return [(max(1, int(SIDES[0] * side)), int(SIDES[1] * side)) for side in size]


def _metadata(cam, images, logits, class_names, preprocess):
    """What is kept in the file, text by names; lists of numbers without brackets, so that C++ reads them too."""
    from cfcam_gpu import __version__
    from cfcam_gpu.models import Preprocess

    names = None if class_names is None else read_class_names(class_names)
    if names is not None and not fit(names, logits.shape[1]):
        raise ValueError(f"class_names must fit the model's {logits.shape[1]} classes, got {len(names)} names")
    found = {
        "format": FORMAT,
        "cfcam_gpu": __version__,
        **about_here(images.device),
        "input": _text(images.shape[1:]),
        "dtype": str(images.dtype).removeprefix("torch."),
        "classes": str(logits.shape[1]),
        "target_layers": json.dumps(cam.target_names),
        "guide_layers": json.dumps(cam.guide_names),
        "config": json.dumps(asdict(cam.config)),
        "class_names": json.dumps(names),
    }
    if preprocess is not None:
        if not isinstance(preprocess, Preprocess):
            raise TypeError(
                f"preprocess must be a cfcam_gpu.models.Preprocess, which can be kept, got {type(preprocess).__name__}"
            )
        if tuple(preprocess.size) != tuple(images.shape[2:]):
            raise ValueError(f"preprocess must make the example's {tuple(images.shape[2:])}, got {preprocess.size}")
        found |= {field.name: _text(getattr(preprocess, field.name)) for field in fields(preprocess)}
    return found


def about_here(device: torch.device) -> dict[str, str]:
    """What a file that was compiled here needs where it is loaded, by the names of the metadata."""
    if device.type == "cuda":
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        capability = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__.partition("+")[0],
        "device": device.type,
        "machine": platform.machine(),
        "capability": capability,
    }


def _text(value):
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


# The graph.


def _trace(cam, images, n_classes, sides=None):
    """The whole call as one graph of torch's operators: images, classes -> logits, maps, classes."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    def explain(images, classes):
        return _explain(cam, images, classes, n_classes)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbolic = []
    for tensor, axes in ((images, (0,) if sides is None else (0, 2, 3)), (_top(images), (0,))):
        # Static, or the other sizes would be symbols too.
        sizes = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(tensor.ndim)]
        symbolic.append(mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
    symbols = [n.node.expr for n in symbolic[0].shape if isinstance(n, torch.SymInt)]
    try:
        graph = make_fx(explain, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*symbolic)
    except Exception as error:  # the model's own code may raise anything on tensors without values
        raise _cannot(cam.model, error) from error
    if sides is not None:
        _check_any_size(cam.model, mode.shape_env, symbols, sides)
    return graph


def _check_any_size(model, shapes, symbols, sides):
    """Refuse a model whose code compares sizes, where another size in the range would take another branch.

    The graph has the branches that were taken alone. What its operators ask of a size, `torch.export` finds out.

    Args:
        symbols: of (B, H, W).
    """
    import sympy

    name, (batch, *symbols) = type(model).__name__, symbols
    for symbol in symbols:
        other = shapes.replacements.get(symbol, symbol)
        if other != symbol:
            said = f"compares a side with {other}" if other.is_number else "wants one side to be as the other"
            raise ValueError(f"dynamic_size: {name} takes images of one shape alone: its code {said}")
    batch = shapes.replacements.get(batch, batch)
    draw = random.Random(0)
    sizes = [*itertools.product(*sides), *(tuple(draw.randint(*side) for side in sides) for _ in range(N_SIZES))]
    batches = [draw.randint(2, MOST_IMAGES) for _ in sizes]
    for condition in {guard.expr.xreplace(shapes.replacements) for guard in shapes.guards}:
        if not condition.free_symbols & set(symbols) or condition.free_symbols - {batch, *symbols}:
            continue
        for number, size in zip(batches, sizes):
            if condition.xreplace(dict(zip((batch, *symbols), map(sympy.Integer, (number, *size))))) != sympy.true:
                said = condition.xreplace(dict(zip((batch, *symbols), sympy.symbols("B H W"))))
                raise ValueError(
                    f"dynamic_size: {name} takes images of some sizes alone: its code, or the map of its layer, asks"
                    f" {said}, which {size} is not"
                )


def _explain(cam, images, classes, n_classes):
    wrong = (classes < TOP) | (classes >= n_classes)
    _require_none(wrong.sum(), f"classes must be in [0, {n_classes}), or {TOP} for the top class")
    seen = {}

    def rule(outputs):
        logits = find_logits(outputs, images.shape[0])
        top = classes < 0
        seen["logits"] = logits.detach()
        # Clamped, because the compiler may order this before the check.
        seen["classes"] = torch.where(top, seen["logits"].argmax(1), classes.clamp(0, n_classes - 1))
        found = scores_of_classes(logits, seen["classes"], cam.config.margin_temperature)
        if n_classes == 1:  # the side that was chosen, as `CFCAM` has it
            found = torch.where(top & (seen["logits"][:, 0] < 0), -found, found)
        return [found.sum()]

    passed = cam._run(check_inputs(images), OwnRule(rule), None, stacklevel=0)
    if images.device.type == "cpu":  # elsewhere the host would wait in the middle, as in `CFCAM`
        captured = (*passed.capture.activations, *passed.capture.gradients)
        # Logits of minus infinity are of classes that the model has ruled out.
        n_others = sum((~each.isfinite()).sum() for each in captured) + (~(seen["logits"] < torch.inf)).sum()
        _require_none(n_others, "logits, activations and gradients must be finite")
    return seen["logits"], cam._result(passed)[0], seen["classes"]


def _require_none(count, message):
    """An error of the compiled file, which its caller sees as an exception, where a count is not 0 at run time."""
    torch.ops.aten._assert_scalar.default(count.item() == 0, message)


def _top(images):
    return torch.full((images.shape[0],), TOP, dtype=torch.int64, device=images.device)


def _cannot(model, error):
    """Why a model cannot be exported, in words where they are known."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    name = type(model).__name__
    if isinstance(error, (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)):
        return ValueError(
            f"model must run the same operations whatever the values are, but {name} decides by the values of a tensor"
            f" what runs, or how large a result is ({_first_line(error)}): make that part static, with torch.where or a"
            " mask, or export without it"
        )
    return ValueError(f"{name} cannot be exported: {type(error).__name__}: {_first_line(error)}")


def _first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


# The file.


def _compile(graph, images, part, metadata, sides=None):
    from torch._inductor import aoti_compile_and_package
    from torch.export import Dim
    from torch.export import export as export_graph

    batch = Dim("batch", min=1)
    axes = {0: batch}
    for axis, name, (least, most) in zip((2, 3), ("height", "width"), sides or ()):
        axes[axis] = Dim(name, min=least, max=most)
    try:
        program = export_graph(graph, (images, _top(images)), dynamic_shapes=(axes, {0: batch}))
    except Exception as error:
        what = "number of images" if sides is None else "number or size of images"
        lines = [line.strip(" -") for line in str(error).splitlines() if "Not all values" in line]
        raise ValueError(f"the graph takes no other {what}: {(lines or [_first_line(error)])[0]}") from error
    # As many threads as the process has that loads the file, not as this one has.
    options = {"aot_inductor.metadata": metadata, "cpp.dynamic_threads": True}
    aoti_compile_and_package(program, package_path=str(part), inductor_configs=options)


def _compare(part, images, cam, sides=None):
    """Refuse a file whose maps are not those of `CFCAM`, also for another number of images than was traced with, and
    for other sizes where it takes them."""
    from cfcam_gpu.exported import load

    loaded, highest = load(part), 0.0
    many = max(N_TRACED + 1, min(MANY_IMAGES, MANY_PIXELS // images[0, 0].numel()))
    compared = [images, images[:1], images.repeat(-(-many // len(images)), 1, 1, 1)[:many]]
    if sides is not None:
        (low, high), (left, right) = sides
        compared += [_resized(images[:2], size) for size in ((low, right), (high, left), (high - 1, right - 1))]
    for some in compared:
        number = len(some)
        for targets in (None, [0] * number, [loaded.n_classes - 1] * number):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of maps that are zero everywhere
                expected = cam.maps(some, targets)
            difference = (loaded.maps(some, targets) - expected).abs().max().item()
            if not difference <= TOLERANCES[images.dtype]:
                raise ValueError(
                    f"{type(cam.model).__name__} cannot be exported: of images {tuple(some.shape)} the compiled maps"
                    f" differ by {difference:.1e} from those of CFCAM; is something in it random, or kept from one call"
                    " to the next?"
                )
            highest = max(highest, expected.max().item())
    if highest == 0:
        raise ValueError("example must have maps that are not zero everywhere, so that the file's can be compared")


def _resized(images, size):
    return nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
