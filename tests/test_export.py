"""`export` and `load`: the graph against `CFCAM`, what is refused, and the compiled file in processes of its own.

``make test-compiled`` compiles; ``make test`` takes the graph that is compiled in the place of the file.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cfcam_gpu
from cfcam_gpu import CFCAM, CFCAMConfig, cli, constants, exported, exporting, gaussian, symbolic
from cfcam_gpu.gaussian import filter_matrix
from cfcam_gpu.models import Preprocess

ROOT = Path(__file__).resolve().parent.parent
N_CLASSES = 10
SIZE = 3, 32, 24
BATCHES = 1, 2, 5, 8
OTHER = CFCAMConfig.paper()
TOLERANCE = 1e-5
"""Of a map's maximum, which is 1."""

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual block, whose ReLU changes its input in place."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.ways = nn.ModuleList(nn.Conv2d(before, after, 3, stride, padding=1) for _ in range(2))
        self.norm, self.relu = nn.BatchNorm2d(after), nn.ReLU(inplace=True)

    def forward(self, x):
        first, second = self.ways
        return self.relu(self.norm(first(x)) + second(x))


def network(n_classes=N_CLASSES):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, n_classes)
    return nn.Sequential(Block(3, 8, 2), Block(8, 16, 2), Block(16, 24, 2), *head).eval()


def traced(model, layers, n_classes=N_CLASSES, size=SIZE, sides=None, **options):
    """What is compiled: images, classes -> logits, maps, classes."""
    cam = CFCAM(model, layers, **options, **exporting.TRACEABLE)
    images = torch.randn(exporting.N_TRACED, *size)
    cam.maps(images)
    return exporting._trace(cam, images, n_classes, sides)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return network()


@pytest.fixture(scope="module")
def graph(model):
    return traced(model, [model[2]])


@pytest.fixture(scope="module")
def metadata(model):
    cam, images = CFCAM(model, [model[2]]), torch.randn(1, *SIZE)
    cam.maps(images)
    names = {1: "cat", 3: "döner"}
    preprocess = Preprocess(SIZE[1:], resize=(40, 30), std=(0.25,) * 3)
    return exporting._metadata(cam, images, cam.outputs, names, preprocess)


def largest_difference(run, cam, batch, size=SIZE[1:]):
    """Between the maps of ``run`` and those of a `CFCAM`, for the top class and for others that are given."""
    draws = (torch.randn(batch, SIZE[0], *size) for _ in range(50))
    images, found = next(images for images in draws if cam.maps(images).max() > 0.5), []  # a map may be of zeros
    for classes in (torch.full((batch,), -1), torch.randint(N_CLASSES, (batch,))):
        logits, maps, explained = run(images, classes)
        expected = cam.maps(images, None if classes[0] < 0 else classes)
        assert torch.equal(explained, cam.classes)
        torch.testing.assert_close(logits, cam.outputs)
        found.append((maps - expected).abs().max().item())
        assert maps.shape == (batch, *size)
    return max(found)


# The graph.


@pytest.mark.filterwarnings("ignore:maps are zero")
@pytest.mark.parametrize("batch", BATCHES)
def test_the_graph_gives_the_maps_of_cfcam_for_any_batch(graph, model, seed, batch):
    assert largest_difference(graph, CFCAM(model, [model[2]]), batch) <= TOLERANCE


def test_a_graph_of_real_sizes_is_found_to_fix_the_batch(model, seed, monkeypatch):
    from torch.fx.experimental.proxy_tensor import make_fx

    cam = CFCAM(model, [model[2]], **exporting.TRACEABLE)
    images = torch.randn(3, *SIZE)
    cam.maps(images)
    monkeypatch.setattr(exporting, "_require_none", lambda count, message: None)  # asks for values, which no size has

    def explain(images, classes):
        return exporting._explain(cam, images, classes, N_CLASSES)

    fixed = make_fx(explain, tracing_mode="real")(images, torch.tensor([1, 2, 3]))
    with pytest.raises((AssertionError, RuntimeError)):
        assert largest_difference(fixed, CFCAM(model, [model[2]]), 5) <= TOLERANCE


@pytest.mark.parametrize("sigma", [0.4, 2.0, float("inf")])
def test_matrices_of_symbolic_sizes_are_those_of_gaussian(sigma):
    for target, size in ((1, 1), (1, 3), (3, 5), (7, 14), (7, 28), (5, 20)):
        shape = target, size
        for boundary in ("constant", "reflect", "nearest") if sigma < 10 else ():
            arguments = shape, (sigma, 1.0), boundary
            found = symbolic.pooling_weights(*arguments).numpy()
            np.testing.assert_allclose(found, gaussian.pooling_weights(*arguments), atol=1e-15)
        for name in ("window_matrix", "coverage"):
            arguments = (size, target, sigma) if name == "window_matrix" else (target, size, sigma)
            found = getattr(symbolic, name)(*arguments).numpy()
            np.testing.assert_allclose(found, getattr(gaussian, name)(*arguments), rtol=1e-12)


@pytest.fixture(scope="module")
def sized(model):
    """The graph for sizes from half to twice; of a square, of which nothing says which side is which."""
    return traced(model, [model[2]], size=(3, 32, 32), sides=exporting.sides_of((32, 32)))


@pytest.mark.filterwarnings("ignore:maps are zero")
@pytest.mark.parametrize("batch, size", [(1, (32, 24)), (3, (17, 47)), (2, (64, 16)), (5, (33, 25))])
def test_a_graph_of_dynamic_size_gives_the_maps_of_cfcam_for_any(sized, model, seed, batch, size):
    assert largest_difference(sized, CFCAM(model, [model[2]]), batch, size) <= TOLERANCE


def test_models_of_one_size_have_no_dynamic_size(tmp_path):
    from torchvision.models import VisionTransformer

    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x) * (2 if x.shape[-1] > 40 else 1)

    class Square(Doubling):
        def forward(self, x):
            assert x.shape[-1] == x.shape[-2], "images must be square"
            return self.body(x)

    vit = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=N_CLASSES).eval()
    nn.init.normal_(vit.heads.head.weight)
    branching, square = Doubling().eval(), Square().eval()
    one_shape = "takes images of one shape alone: its code"
    for model, layers, size, says in (
        (vit, None, (32, 32), f"VisionTransformer {one_shape} compares a side with 32"),
        (square, [square.body[2]], (32, 32), f"Square {one_shape} wants one side to be as the other"),
        (branching, [branching.body[2]], SIZE[1:], "Doubling takes images of some sizes alone: .* asks W <= 40, which"),
    ):
        with pytest.raises(ValueError, match=f"dynamic_size: {says}"):
            cfcam_gpu.export(model, torch.randn(1, 3, *size), layers, tmp_path / "model.pt2", dynamic_size=True)
    with pytest.raises(TypeError, match="dynamic_size must be a bool, got int"):
        cfcam_gpu.export(vit, torch.randn(1, 3, 32, 32), None, tmp_path / "model.pt2", dynamic_size=224)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes", [[N_CLASSES, 0], [0, -2]])
def test_a_wrong_class_is_an_error_of_the_graph(graph, classes):
    with pytest.raises(RuntimeError):
        graph(torch.randn(2, *SIZE), torch.tensor(classes))


def test_values_that_are_not_finite_are_an_error_of_the_graph(graph):
    images = torch.randn(2, *SIZE)
    images[1, 0, 3, 4] = torch.nan
    with pytest.raises(RuntimeError):
        graph(images, torch.tensor([-1, -1]))


@pytest.mark.filterwarnings("ignore:maps are zero")
def test_a_single_logit_is_explained_on_the_side_that_was_chosen(seed):
    model = network(1)
    nn.init.zeros_(model[-1].bias)
    graph, cam = traced(model, [model[2]], n_classes=1, config=OTHER), CFCAM(model, [model[2]], config=OTHER)
    images = torch.randn(4, *SIZE)
    for classes, targets in ((-1, None), (0, [0] * 4)):
        maps = graph(images, torch.full((4,), classes))[1]
        torch.testing.assert_close(maps, cam.maps(images, targets), rtol=0, atol=TOLERANCE)


def test_tensors_that_are_kept_have_values_also_while_a_graph_is_traced(rng):
    from torch._subclasses import FakeTensorMode

    sigma = float(rng.uniform(1, 2))  # in no cache yet
    with FakeTensorMode():
        kept = constants.constant(filter_matrix, (5, sigma, "constant"), torch.device("cpu"), torch.float64)
    assert type(kept) is torch.Tensor
    np.testing.assert_array_equal(kept.numpy(), filter_matrix(5, sigma, "constant"))


# What is refused.


class Deciding(nn.Module):
    """Its values decide what runs."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


class Counting(nn.Module):
    """Gives other outputs in every call, by what it keeps from the one before."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = network(), 0

    def forward(self, x):
        self.calls += 1
        return self.body(x.roll(self.calls, -1))


def test_a_model_that_decides_by_values_is_refused_by_name(tmp_path):
    model = Deciding().eval()
    with pytest.raises(ValueError, match=r"Deciding decides by the values of a tensor what runs"):
        cfcam_gpu.export(model, torch.randn(1, *SIZE), [model.body[2]], tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(
    "kind, says, change",
    [
        (TypeError, "model must be a torch.nn.Module, got str", {"model": "resnet"}),
        (TypeError, "example must be a torch.Tensor", {"example": [1]}),
        (TypeError, "example must be floating point", {"example": torch.zeros(1, *SIZE, dtype=torch.uint8)}),
        (ValueError, r"example must be images \(B, C, H, W\), got \(3, 32, 24\)", {"example": torch.zeros(SIZE)}),
        (ValueError, "must be one of the modules of Sequential, got a ReLU", {"target_layers": [nn.ReLU()]}),
        (ValueError, 'path must end in ".pt2"', {"path": "model.onnx"}),
        (TypeError, "path must be a file's path, got int", {"path": 3}),
        (FileNotFoundError, "must lie in a folder that is there", {"path": "nowhere/model.pt2"}),
        (ValueError, "class_names must fit the model's 10 classes, got 2 names", {"class_names": ["cat", "dog"]}),
        (TypeError, "preprocess must be a cfcam_gpu.models.Preprocess", {"preprocess": lambda image: image}),
        (ValueError, r"preprocess must make the example's \(32, 24\)", {"preprocess": Preprocess((8, 8))}),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(model, kind, says, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": model, "example": torch.randn(1, *SIZE), "target_layers": [model[2]], "path": "model.pt2"}
    with pytest.raises(kind, match=says):
        cfcam_gpu.export(**{**arguments, **change})
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_mode_is_refused(tmp_path):
    model = network()
    model[1].norm.train()
    with pytest.raises(ValueError, match=r"got 1\.norm in training mode: call model\.eval\(\)"):
        cfcam_gpu.export(model, torch.randn(1, *SIZE), [model[2]], tmp_path / "model.pt2")


def test_maps_that_are_not_those_of_cfcam_are_refused(model, graph, metadata, tmp_path, monkeypatch):
    """The comparison is what finds what tracing has lost; with the graph in the file's place."""
    cam, images, maps = CFCAM(model, [model[2]]), exporting._some_images(torch.randn(1, *SIZE)), {}

    def run(images, classes):
        logits, found, classes = graph(images, classes)
        return logits, maps["of"](found), classes

    monkeypatch.setattr(exported, "load", lambda path: exported.ExportedCFCAM(run, metadata))
    maps["of"] = lambda found: found
    exporting._compare(tmp_path / "model.pt2", images, cam)
    many = lambda found: found.flip(0) if len(found) > 3 else found
    for maps["of"] in (torch.zeros_like, lambda found: found.flip(0), lambda found: found + 0.001, many):
        with pytest.raises(ValueError, match="the compiled maps differ by"):
            exporting._compare(tmp_path / "model.pt2", images, cam)
    monkeypatch.setattr(cam, "maps", lambda images, targets: torch.zeros(len(images), *SIZE[1:]))
    maps["of"] = torch.zeros_like
    with pytest.raises(ValueError, match="example must have maps that are not zero everywhere"):
        exporting._compare(tmp_path / "model.pt2", images, cam)


def test_the_command_names_what_it_refuses(capsys, tmp_path):
    out = str(tmp_path / "model.pt2")
    assert cli.main(["export", "torchvision:resnet18:random", "--layer", "layer9", "--out", out]) == 2
    assert "ResNet has no layer 'layer9'; did you mean" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The file in Python; the graph in the place of compiled code.


@pytest.fixture
def loaded(graph, metadata):
    return exported.ExportedCFCAM(graph, metadata)


def test_a_loaded_file_says_what_it_is(loaded):
    assert (loaded.input_size, loaded.n_classes, loaded.dtype) == (SIZE, N_CLASSES, torch.float32)
    assert (loaded.target_names, loaded.guide_names, loaded.config) == (["2"], ["1"], CFCAMConfig())
    assert loaded.class_names == {1: "cat", 3: "döner"}
    assert loaded.preprocess == Preprocess(SIZE[1:], resize=(40, 30), std=(0.25,) * 3)
    assert loaded.metadata["cfcam_gpu"] == cfcam_gpu.__version__
    assert loaded.outputs is None and loaded.classes is None
    assert exported._preprocess({}) is None


@pytest.mark.filterwarnings("ignore:maps are zero")
def test_a_loaded_file_explains_as_cfcam_does(loaded, model, seed):
    images = torch.randn(4, *SIZE)
    explained = loaded.explain(images.to(memory_format=torch.channels_last), [1, 2, 3, 4])
    torch.testing.assert_close(
        explained.maps, CFCAM(model, [model[2]]).maps(images, [1, 2, 3, 4]), rtol=0, atol=TOLERANCE
    )
    assert explained.targets.tolist() == loaded.classes.tolist() == [1, 2, 3, 4]
    assert loaded.outputs is explained.outputs and not explained.maps.requires_grad


@pytest.mark.parametrize(
    "kind, says, arguments",
    [
        (TypeError, "input_tensor must be a torch.Tensor, got list", ([1],)),
        (TypeError, "input_tensor must be torch.float32, got torch.float64", (torch.zeros(1, *SIZE).double(),)),
        (
            ValueError,
            r"input_tensor must be \(B, 3, 32, 24\) with B >= 1, got \(1, 3, 8, 8\)",
            (torch.zeros(1, 3, 8, 8),),
        ),
        (ValueError, "with B >= 1", (torch.zeros(0, *SIZE),)),
        (ValueError, r"targets must be class indices in \[0, 10\), got 10", (torch.zeros(1, *SIZE), [10])),
        (ValueError, r"targets must be class indices in \[0, 10\), got -1", (torch.zeros(1, *SIZE), [-1])),
        (ValueError, "expected 1, got 2", (torch.zeros(1, *SIZE), [1, 2])),
        (ValueError, "input_tensor must be finite", (torch.full((1, *SIZE), torch.nan), [1])),
        (TypeError, "a file has no callables", (torch.zeros(1, *SIZE), [lambda output: output[0]])),
    ],
)
def test_a_loaded_file_refuses_what_it_was_not_made_for(loaded, kind, says, arguments):
    with pytest.raises(kind, match=says):
        loaded.maps(*arguments)
    assert loaded.outputs is None


def test_a_loaded_file_of_dynamic_size_takes_those_that_it_was_made_for(sized, metadata):
    found = exported.ExportedCFCAM(sized, {**metadata, "sides": "16 64 20 64"})
    assert found.sides == [(16, 64), (20, 64)] and found.maps(torch.randn(2, 3, 64, 20)).shape == (2, 64, 20)
    for size in ((15, 24), (65, 24), (32, 19), (32, 65)):
        with pytest.raises(ValueError, match=r"must be \(B, 3, 16 to 64, 20 to 64\) with B >= 1, got \(1, 3, "):
            found.maps(torch.zeros(1, 3, *size))


def write_archive(path, metadata):
    """A file with this metadata where AOTInductor keeps it, and nothing to run."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {
            "archive_format": "pt2",
            "byteorder": sys.byteorder,
            ".data/version": "3",
            "version": "3",
            "data/aotinductor/model/made.wrapper_metadata.json": json.dumps(metadata),
        }.items():
            archive.writestr(f"{path.stem}/{name}", content)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"format": "9", "cfcam_gpu": "7.0"}, "format 9 of cfcam_gpu 7.0, this version reads 1: export it again"),
        ({"torch": "1.13.0"}, "compiled for torch 1.13.0, here is"),
        ({"machine": "vax"}, "compiled for the processor vax, here is"),
        ({"capability": "AVX9000"}, "compiled for a processor or GPU with AVX9000, here is"),
    ],
)
def test_a_file_of_another_version_or_processor_is_refused_by_name(metadata, change, says, tmp_path):
    path = tmp_path / "model.pt2"
    write_archive(path, {**metadata, **change})
    assert exported.read_metadata(path) == {**metadata, **change}
    with pytest.raises(ValueError, match=says):
        cfcam_gpu.load(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is here")
def test_a_file_of_another_device_is_refused_by_name(metadata, tmp_path):
    write_archive(tmp_path / "model.pt2", {**metadata, "device": "cuda"})
    with pytest.raises(ValueError, match="compiled for device 'cuda', which is not here"):
        cfcam_gpu.load(tmp_path / "model.pt2")


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(TypeError, match="path must be a file's path, got int"):
        cfcam_gpu.load(3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        cfcam_gpu.load(tmp_path / "model.pt2")
    (tmp_path / "text.pt2").write_text("text")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt2")
    for name in ("text", "weights"):
        with pytest.raises(ValueError, match=f"{name}.pt2: not a file of cfcam_gpu.export"):
            cfcam_gpu.load(tmp_path / f"{name}.pt2")
    write_archive(tmp_path / "other.pt2", {"AOTI_DEVICE_KEY": "cpu"})
    with pytest.raises(ValueError, match="an AOTInductor package, but not one of cfcam_gpu.export"):
        cfcam_gpu.load(tmp_path / "other.pt2")


# The compiled file: make test-compiled.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, model):
    """The file, and in another what `CFCAM` gives for batches of 1, 3 and 8."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("exported")
    names = [f"class {index}" for index in range(N_CLASSES)]
    preprocess = Preprocess(SIZE[1:], resize=(40, 30))
    path = cfcam_gpu.export(
        model, torch.randn(1, *SIZE), [model[2]], folder / "model.pt2", class_names=names, preprocess=preprocess
    )
    assert [each.name for each in folder.iterdir()] == ["model.pt2"]
    cam, expected = CFCAM(model, [model[2]]), {}
    for batch in (1, 3, 8):
        images = torch.randn(batch, *SIZE)
        expected[batch] = images, cam.maps(images), cam.outputs, cam.classes, cam.maps(images, [7] * batch)
    torch.save(expected, folder / "expected.pt")
    return path


FRESH = """
import sys
import torch
import cfcam_gpu

cam = cfcam_gpu.load(sys.argv[1])
for images, maps, outputs, classes, of_seven in torch.load(sys.argv[2]).values():
    assert (cam.maps(images) - maps).abs().max() <= 1e-5
    assert torch.equal(cam.classes, classes) and torch.allclose(cam.outputs, outputs, atol=1e-5)
    assert (cam.maps(images, [7] * len(images)) - of_seven).abs().max() <= 1e-5
assert cam.class_names[7] == "class 7"
try:
    cam._run(images, torch.full((len(images),), 10))
except RuntimeError:
    print("refused")
"""


@pytest.mark.inductor
def test_the_file_gives_the_maps_of_cfcam_in_a_fresh_process(compiled):
    expected = compiled.with_name("expected.pt")
    ran = subprocess.run([sys.executable, "-c", FRESH, compiled, expected], capture_output=True, text=True, cwd=ROOT)
    assert (ran.returncode, ran.stdout) == (0, "refused\n"), ran.stderr


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:maps are zero")
def test_a_file_of_dynamic_size(model, tmp_path, seed):
    path = cfcam_gpu.export(model, torch.randn(1, *SIZE), [model[2]], tmp_path / "model.pt2", dynamic_size=True)
    found, cam = cfcam_gpu.load(path), CFCAM(model, [model[2]])
    for batch, size in ((1, (16, 48)), (3, (32, 24)), (8, (63, 13))):

        def run(images, classes):
            explained = found.explain(images, None if classes[0] < 0 else classes)
            return explained.outputs, explained.maps, explained.targets

        assert largest_difference(run, cam, batch, size) <= TOLERANCE


@pytest.mark.inductor
def test_a_model_that_is_another_in_every_call_is_refused(tmp_path):
    model = Counting().eval()
    with pytest.raises(ValueError, match="the compiled maps differ by"):
        cfcam_gpu.export(model, torch.randn(1, *SIZE), [model.body[2]], tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.inductor
def test_the_program_in_c_plus_plus_writes_the_map(compiled, tmp_path):
    from PIL import Image

    for program in ("cmake", "g++"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if not Path("/usr/include/png.h").is_file():
        pytest.skip("needs libpng's headers")
    source, build = ROOT / "examples" / "cpp", tmp_path / "build"
    assert len((source / "main.cpp").read_text().splitlines()) <= 60
    configure = ["cmake", "-S", source, "-B", build, f"-DTORCH={torch.__path__[0]}"]
    for command in (configure, ["cmake", "--build", build]):
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]

    cam = cfcam_gpu.load(compiled)
    photograph = torch.randint(256, (40, 30, 3), dtype=torch.uint8)  # of the size that the preprocessing resizes to
    Image.fromarray(photograph.numpy()).save(tmp_path / "photograph.png")
    images = cam.preprocess(Image.open(tmp_path / "photograph.png"))[None]

    def explain(*arguments):
        command = [build / "explain", compiled, tmp_path / "photograph.png", tmp_path / "map.png", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    for arguments, targets in (((), None), (("7",), [7])):
        ran = explain(*arguments)
        assert ran.returncode == 0, ran.stderr
        expected = cam.maps(images, targets)[0]
        assert ran.stdout.startswith(f"class {int(cam.classes[0])}, logit ")
        written = torch.from_numpy(np.array(Image.open(tmp_path / "map.png")))
        assert written.shape == SIZE[1:] and written.max() == 255
        assert (written / 255 - expected).abs().max() <= 0.5 / 255 + 1e-4
    (tmp_path / "map.png").unlink()
    for wrong in ("10", "-2", "cat"):
        ran = explain(wrong)
        assert ran.returncode == 1 and ran.stderr.rstrip().splitlines()[-1].startswith("explain: ")
        assert not (tmp_path / "map.png").exists()
