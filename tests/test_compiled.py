"""`CFCAM(compile=True)`: the eager maps and labels, from programs; a model that changes is refused, and never touched.

Inductor itself compiles two small networks, with ``make test-compiled``. The rest is tested with the graphs as they are
before Inductor, run node by node: what is noted of a network, where it is cut, and when it may be used.
"""

import copy
import pickle
import random
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import vit
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from cfcam_gpu import CFCAM, CFCAMConfig, compiled, programs, torch_backend, unchanged, warm_up
from cfcam_gpu.compiled_pipeline import PipelinePrograms
from cfcam_gpu.cuda_graph import CapturedCFCAM
from cfcam_gpu.programs import NotCompiled
from cfcam_gpu.unchanged import Watch

pytestmark = [
    pytest.mark.usefixtures("one_thread", "seed", "compiled_is_quicker"),
    pytest.mark.filterwarnings("ignore:maps are zero everywhere"),  # random networks
    pytest.mark.filterwarnings("error:.* runs uncompiled"),
]

SIZE = 48

PER_KIND = 4
"""Graphs: forward, backward from any cotangents, backward from classes, and of each layer the pipeline."""


@pytest.fixture
def compiled_is_quicker(monkeypatch):
    """Of networks as small as these the times say nothing."""
    monkeypatch.setattr(warm_up, "medians", lambda ways, device: {name: name == warm_up.EAGER for name in ways})


@pytest.fixture
def no_inductor(monkeypatch):
    """The graphs, as they are; returns the growing list of them."""
    made = []

    def as_it_is(graph, inputs):
        made.append(graph)
        return graph

    monkeypatch.setattr(programs, "compile_graph", as_it_is)
    return made


class Residual(nn.Module):
    """Batch norm, in-place layers, a shortcut around them, and an output that is a dictionary."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.side = nn.Conv2d(8, 16, 1, 2)
        self.head = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 7)
        for norm in (self.stem[1], self.body[1]):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)

    def forward(self, images, scale=1.0):
        images.mul_(scale)
        stem = self.stem(images)
        found = self.body(stem)
        found += self.side(stem)
        found = self.head(found.relu_()).relu()
        return {"logits": self.fc(found.mean((2, 3))), "stem": stem, "n": 3}


def transformer():
    model = vit(SIZE, layers=2)
    nn.init.normal_(model.heads.head.weight)
    return model


NETWORKS = {
    "residual": lambda: Residual().eval(),
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7).eval(),
    "vit": transformer,
}


def images(n=2, size=SIZE):
    return torch.randn(n, 3, size, size)


def scores(output):
    return output["logits"] if isinstance(output, dict) else output


def targets():
    """Of two images."""

    def score(output):
        return scores(output)[2] ** 2 - scores(output)[1]

    callables = [lambda output: scores(output)[1], score]
    return {
        "the top class": {},
        "indices": {"targets": [3, 0]},
        "a tensor of several": {"targets": torch.tensor([[3, 1, 0], [2, 5, 6]])},
        "the top three": {"top": 3},
        "callables": {"targets": callables},
        "several callables": {"targets": [callables, callables[::-1]]},
    }


def close(found, expected):
    """Maps within 1e-4, the same labels, and outputs but for rounding."""
    torch.testing.assert_close(found.maps, expected.maps, atol=1e-4, rtol=0)
    assert torch.equal(found.labels, expected.labels)
    one, other = scores(found.outputs), scores(expected.outputs)
    torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)
    assert not one.requires_grad


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["residual", "vit"])
def test_inductor(name):
    model, some = NETWORKS[name](), images()
    before, order = copy.deepcopy(model.state_dict()), [str(each) for each in model.modules()]
    cam, eager = CFCAM(model, compile=True), CFCAM(model)
    for options in targets().values():
        close(cam.explain(some, **options), eager.explain(some, **options))
    assert cam._found._watch is not None
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) and after[key].stride() == before[key].stride() for key in before)
    assert [str(each) for each in model.modules()] == order and all(each.grad is None for each in model.parameters())
    assert cam(some).shape == (2, SIZE, SIZE)
    frozen = model.fc if name == "residual" else model.heads.head
    with torch.no_grad():
        frozen.weight.mul_(2)
    with pytest.raises(ValueError, match="weight' has been changed in place"):
        cam.maps(some)


@pytest.mark.parametrize("name", NETWORKS)
def test_graphs(no_inductor, name):
    model, some = NETWORKS[name](), images()
    kept, seen = some.clone(), torch.tensor(False)
    cam, eager = CFCAM(model, compile=True), CFCAM(model)
    for options in targets().values():
        expected = eager.explain(some, **options)
        seen |= expected.maps.any()
        close(cam.explain(some, **options), expected)
        assert torch.equal(some, kept)
    assert seen and len(no_inductor) == PER_KIND and cam.guide_names == eager.guide_names
    # Other images than it was compiled with, of the same kind.
    other = images()
    close(cam.explain(other), eager.explain(other))
    assert len(no_inductor) == PER_KIND


def test_layers_and_guides(no_inductor):
    model, some, seen = NETWORKS["residual"](), images(), torch.tensor(False)
    for options in (
        {"target_layers": [model.head, model.stem], "config": CFCAMConfig(margin_temperature=0)},
        {"target_layers": [model.body[0], model.head], "guide_layer": [None, model.stem[1]]},
        {"target_layers": [model.side], "config": CFCAMConfig.paper()},
    ):
        found, expected = (CFCAM(model, compile=each, **options).explain(some) for each in (True, False))
        torch.testing.assert_close(found.maps, expected.maps, atol=1e-4, rtol=0)
        seen |= expected.maps.any()
    assert seen  # one of a random network may be of zeros
    assert len(no_inductor) == 3 * PER_KIND + 2  # two of the three have two layers


def test_a_score_that_does_not_depend_on_a_layer_is_refused(no_inductor):
    model = NETWORKS["residual"]()
    for compile in (False, True):
        cam = CFCAM(model, [model.head, model.stem], compile=compile)
        cam.maps(images(), [lambda output: output["logits"][1] + output["stem"].sum()] * 2)
        with pytest.raises(ValueError, match="the score does not depend on target layer 'head'"):
            cam.maps(images(), [lambda output: output["stem"].sum()] * 2)


def test_values_that_are_not_finite_are_refused(no_inductor):
    model, some = NETWORKS["residual"](), images()
    cam = CFCAM(model, compile=True)
    cam.maps(some)
    some[1, 0, 20, 20] = torch.nan
    with pytest.raises(ValueError, match="activations must be finite"):
        cam.maps(some)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["activations", "gradients", "guide"])
def test_a_pipeline_looks_at_each_value(no_inductor, name, value):
    shapes = {"activations": (2, 6, 4, 5), "gradients": (2, 6, 4, 5), "guide": (2, 3, 8, 10)}
    given, made = {each: torch.randn(shape) for each, shape in shapes.items()}, PipelinePrograms()

    def maps():
        activations, gradients, guide = given.values()
        return made.cf_cam(activations, gradients, (16, 20), CFCAMConfig(), "auto", "auto", None, guide).maps

    assert maps().isfinite().all() and len(no_inductor) == 1 and all(made._programs.values())
    place = tuple(int(torch.randint(side, ())) for side in shapes[name])
    given[name][place] = value
    with pytest.raises(ValueError, match=f"{name} must be finite, got 1 NaN or infinite"):
        maps()


@pytest.mark.parametrize("shape, size", [((7,), (50,)), ((7, 9), (64, 30)), ((5, 1), (5, 4)), ((2, 3, 4), (5, 7, 6))])
def test_a_resize_in_a_graph_is_torchs_interpolation(shape, size):
    grids, mode = torch.randn(3, *shape, dtype=torch.float64), {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
    graph, (found,) = programs.trace(lambda each: [torch_backend.resize(each, size)], (grids,))
    expected = nn.functional.interpolate(grids[:, None], size, mode=mode, align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert not [
        node for node in graph.graph.nodes if "interpolate" in str(node.target) or "upsample" in str(node.target)
    ]


def test_what_was_chosen_is_told(no_inductor, monkeypatch):
    model = NETWORKS["residual"]()
    cam = CFCAM(model, compile=True)
    assert cam.compiled == [] == CFCAM(model).compiled
    cam.maps(images())
    monkeypatch.setattr(warm_up, "medians", lambda ways, device: dict.fromkeys(ways, 1.0))
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cam.maps(images(1))
    one, other = cam.compiled
    assert (one.shape, one.runs, one.reason) == ((2, 3, SIZE, SIZE), "compiled", None) and one.warm_up_seconds > 0
    assert (other.shape, other.runs) == ((1, 3, SIZE, SIZE), "eager") and "quicker for (1, 3" in other.reason
    assert other.pass_seconds == {"eager": 1.0, "compiled": 1.0} and other.dtype == torch.float32


def test_the_quickest_way(monkeypatch):
    monkeypatch.undo()  # the times are the clock's
    clock, calls = [0.0], []
    monkeypatch.setattr(warm_up.time, "perf_counter", lambda: clock[0])

    def takes(name, *seconds):
        def way():
            calls.append(name)
            clock[0] += seconds[calls.count(name) % len(seconds)]

        return way

    cpu = torch.device("cpu")
    for seconds, best in ((0.9, "other"), (0.98, "usual"), (1.1, "usual")):
        calls.clear()
        ways = {"usual": takes("usual", 1.0), "other": takes("other", seconds)}
        assert warm_up.quickest(ways, cpu)[0] == best
        assert calls[2:6] == ["usual", "other", "other", "usual"] and len(calls) == 2 + 2 * warm_up.LEAST_ROUNDS
    calls.clear()
    ways = {
        "usual": takes("usual", 0.1),
        "other": takes("other", 0.08, 0.08, 0.5),
    }  # a median, so that one slow is none
    assert warm_up.quickest(ways, cpu) == ("other", pytest.approx({"usual": 0.1, "other": 0.08}))
    assert len(calls) == 2 + 2 * warm_up.ROUNDS


def test_inputs_and_outputs_are_as_the_networks(no_inductor):
    model, some = NETWORKS["residual"](), images()
    cam, eager = CFCAM(model, compile=True), CFCAM(model)
    found, expected = cam.explain(some, scale=2.0), eager.explain(some, scale=2.0)
    close(found, expected)
    assert found.outputs["n"] == 3
    torch.testing.assert_close(found.outputs["stem"], expected.outputs["stem"])
    for _ in range(2):  # another constant is another program
        close(cam.explain(some, scale=3.0), eager.explain(some, scale=3.0))
    assert len(no_inductor) == 2 * PER_KIND
    found = cam.explain(some.to(memory_format=torch.channels_last), scale=3.0)
    close(found, eager.explain(some, scale=3.0))
    assert len(no_inductor) == 2 * PER_KIND
    with pytest.raises(ValueError, match="target"):
        cam.maps(some, [70, 0], scale=2.0)
    with pytest.raises(ValueError, match="that no gradient flows back from"):
        cam.maps(some, [lambda output: output["stem"].sum()] * 2, scale=2.0)


def test_a_further_kind_of_inputs_is_compiled_when_it_comes_again(no_inductor, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_PROGRAMS", 2)
    model = NETWORKS["residual"]()
    cam, eager = CFCAM(model, [model.head], compile=True), CFCAM(model, [model.head])
    for n, of_programs in ((2, 1), (1, 1), (1, 2), (2, 2), (1, 2)):
        some = images(n)
        close(cam.explain(some), eager.explain(some))
        assert len(no_inductor) == PER_KIND * of_programs, n
    with pytest.warns(UserWarning, match="compiled for 2 other kinds of inputs already"):
        cam.maps(images(3))


CHANGES = {
    "training of 'stem.1' is True": lambda model: model.stem[1].train(),
    "stem.0.weight' has been changed in place": lambda model: model.stem[0].weight.detach().mul_(2),
    "body.1.running_mean' has been changed in place": lambda model: model.body[1].running_mean.zero_(),
    "'stem.0.weight' has been changed in": lambda model: model.load_state_dict(model.state_dict()),
    "fc.weight' has been replaced": lambda model: setattr(model.fc, "weight", nn.Parameter(model.fc.weight * 2)),
    "num_batches_tracked' has been rep": lambda model: setattr(model.stem[1], "num_batches_tracked", torch.tensor(0)),
    "'fc' has been replaced": lambda model: setattr(model, "fc", nn.Linear(16, 7)),
    "(is elsewhere|has been replaced)": lambda model: model.double(),
    "'side.weight' is elsewhere": lambda model: model.side.to(memory_format=torch.channels_last),
    "'fc.bias' is elsewhere": lambda model: setattr(model.fc.bias, "data", torch.zeros(7)),
    "stride of 'side'": lambda model: setattr(model.side, "stride", (1, 1)),
    "'head' has a new attribute, forward": lambda model: setattr(model.head, "forward", lambda x: x),
    "'body' has a hook": lambda model: model.body.register_forward_hook(lambda *_: None),
    "'body.1' has a hook": lambda model: model.body[1].register_full_backward_pre_hook(lambda *_: None),
}


@pytest.fixture(params=["counted", "compared"])
def looked_at(request, monkeypatch):
    """With what torch has for its own compiler, and without it."""
    if request.param == "compared":
        monkeypatch.setattr(unchanged, "dict_version", None)
        monkeypatch.setattr(unchanged, "equal_addresses", None)
    else:
        assert unchanged.dict_version and unchanged.equal_addresses  # else both would be one


@pytest.mark.parametrize("said", CHANGES)
def test_a_change_is_seen(looked_at, said):
    model, some = NETWORKS["residual"](), images()
    watch = Watch(model)
    model.eval().requires_grad_(False)  # no change
    model.zero_grad()
    with torch.no_grad():
        model(some)
        CFCAM(model, [model.head]).maps(some)
        assert watch.change() is None
        CHANGES[said](model)
    assert re.search(said, watch.change())


@pytest.mark.parametrize("said", ["'fc' has been replaced", "'body' has a hook"])
def test_a_changed_model_is_refused(no_inductor, said):
    model, some = NETWORKS["residual"](), images()
    cam = CFCAM(model, [model.head], compile=True)
    expected = cam.maps(some)
    model.eval().zero_grad()  # no change
    assert torch.equal(cam.maps(some), expected)
    CHANGES[said](model)
    with pytest.raises(ValueError, match=f"model must be as it was when it was compiled, but .*{said}"):
        cam.maps(some)


def test_a_hook_on_all_modules_is_refused(no_inductor):
    cam = CFCAM(NETWORKS["residual"](), compile=True)
    cam.maps(images())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="every module has a hook"):
            cam.maps(images())
    finally:
        handle.remove()
    cam.maps(images())  # as it was again


def test_a_replayed_graph_looks_whether_the_model_has_changed(no_inductor):
    model, some = NETWORKS["residual"](), images()
    cam = CFCAM(model, compile=True)
    replay = object.__new__(CapturedCFCAM)  # as on a device: what is captured there is replayed with its own weights
    replay._input, replay._targets, replay._check_unchanged = some, None, cam.check_unchanged
    replay.maps, replay._graph = cam.maps(some), SimpleNamespace(replay=lambda: None)
    assert replay(some) is replay.maps
    with torch.no_grad():
        model.fc.weight.mul_(2)
    with pytest.raises(ValueError, match="'fc.weight' has been changed in place"):
        replay(some)


def test_what_is_not_to_be_compiled_is_refused(no_inductor):
    model = NETWORKS["residual"]()
    cam = CFCAM(model, [model.head], compile=True)
    model.body.train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cam.maps(images())
    model.eval()
    handle = model.body.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'body' has a hook"):
        cam.maps(images())
    handle.remove()
    cam.maps(images())
    with pytest.raises(TypeError, match="compile must be a bool, got str"):
        CFCAM(model, compile="yes")


class Odd(nn.Sequential):
    def __init__(self, what):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        self.what, self.calls = what, 0
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, images):
        return super().forward(self.what(self, images))


def counts(model, images):
    model.calls += 1
    return images


def keeps(model, images):
    model.seen += images.mean()
    return images


ODD = {
    "depends on the values|value out of": lambda model, images: images if images.max() > 0 else -images,
    "takes values out of a tensor, by numpy": lambda model, images: images * float(images.numpy().std()),
    "takes values out of a tensor, by tolist": lambda model, images: images * images.std().tolist(),
    "takes values out of a tensor, by __array__": lambda model, images: images * np.asarray(images).std(),
    "aten.nonzero": lambda model, images: images + images.mean((1, 2, 3)).nonzero().sum(),
    "aten.index": lambda model, images: images + images[images > 0].mean(),
    "is random": lambda model, images: images + 1e-9 * torch.randn_like(images),
    "a pass changes the model: calls": counts,
    "changes a tensor of the model's": keeps,
}


@pytest.mark.parametrize("said", ODD)
def test_what_cannot_be_compiled_runs_eagerly_and_says_why(no_inductor, said):
    model, some = Odd(ODD[said]).eval(), images()
    cam = CFCAM(model, [model[1]], compile=True)
    with pytest.warns(UserWarning, match=f"Odd runs uncompiled: .*({said})"):
        found = cam.maps(some)
    torch.testing.assert_close(found, CFCAM(model, [model[1]]).maps(some), atol=1e-4, rtol=0)
    cam.maps(some)  # once is enough


def test_chance_that_torch_does_not_know_of(no_inductor):
    model = Odd(lambda model, images: images * random.random()).eval()
    with pytest.warns(UserWarning, match="Odd runs uncompiled: the program's outputs differ from the network's"):
        CFCAM(model, [model[1]], compile=True).maps(images())


def test_values_of_the_models_own_are_constants(no_inductor):
    model, some = Odd(lambda model, images: images * (1 + model.seen.tolist()[0])).eval(), images()
    cam = CFCAM(model, [model[1]], compile=True)
    torch.testing.assert_close(cam.maps(some), CFCAM(model, [model[1]]).maps(some), atol=1e-4, rtol=0)
    model.seen += 1
    with pytest.raises(ValueError, match="'seen' has been changed in place"):
        cam.maps(some)


def test_a_program_that_computes_something_else_is_found_out(monkeypatch):
    def wrong(graph, inputs):
        return lambda *given: [1.1 * each for each in graph(*given)]

    monkeypatch.setattr(programs, "compile_graph", wrong)
    model, some = NETWORKS["residual"](), images()
    with pytest.warns(UserWarning, match="the program's outputs differ from the network's"):
        found = CFCAM(model, compile=True).maps(some)
    assert torch.equal(found, CFCAM(model).maps(some))


def test_without_a_compiler(monkeypatch):
    def fails(graph, inputs):
        raise NotCompiled("Inductor failed: InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(programs, "compile_graph", fails)
    model, some = NETWORKS["residual"](), images()
    with pytest.warns(UserWarning, match=r"No working C\+\+ compiler"):
        assert torch.equal(CFCAM(model, compile=True).maps(some), CFCAM(model).maps(some))


def test_where_the_network_is_quicker_it_goes_on(no_inductor, monkeypatch):
    monkeypatch.setattr(
        warm_up, "medians", lambda ways, device: {name: 0.98 + 0.02 * (name == "eager") for name in ways}
    )
    model, some = NETWORKS["residual"](), images()
    cam = CFCAM(model, compile=True)
    with pytest.warns(UserWarning, match="uncompiled: that is quicker for .*, or as quick"):
        assert torch.equal(cam.maps(some), CFCAM(model).maps(some))
    with torch.no_grad():
        model.fc.weight.mul_(2)  # nothing is compiled, so nothing is refused
    assert torch.equal(cam.maps(some), CFCAM(model).maps(some))


def test_threads(no_inductor):
    model, some = NETWORKS["residual"](), [images() for _ in range(8)]
    cam, eager = CFCAM(model, compile=True), CFCAM(model)
    expected = [eager.explain(each) for each in some]
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(cam.explain, each) for each in some]
        others = [pool.submit(eager.explain, each) for each in some]
        for one, other in zip(found, expected):
            close(one.result(), other)
        assert all(torch.equal(one.result().maps, other.maps) for one, other in zip(others, expected))
    assert len(no_inductor) == PER_KIND


def test_copies_compile_for_themselves(no_inductor):
    model, some = NETWORKS["residual"](), images()
    cam = CFCAM(model, compile=True)
    expected = cam.maps(some)
    for other in (copy.deepcopy(cam), pickle.loads(pickle.dumps(cam))):
        assert torch.equal(other.maps(some), expected)
        with torch.no_grad():
            other.model.fc.weight.mul_(2)
        with pytest.raises(ValueError, match="changed in place"):
            other.maps(some)
    assert len(no_inductor) == 3 * PER_KIND and torch.equal(cam.maps(some), expected)


def test_in_inference_mode(no_inductor):
    model = NETWORKS["residual"]()
    cam = CFCAM(model, compile=True)
    with torch.inference_mode():
        some = images()
        found = cam.explain(some, top=2)
    close(found, CFCAM(model).explain(some, top=2))
    close(cam.explain(some.clone(), top=2), found)


def test_autocast_is_another_program(no_inductor):
    model, some = NETWORKS["residual"](), images()
    cam, eager = CFCAM(model, compile=True), CFCAM(model)
    cam.maps(some)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = cam.explain(some), eager.explain(some)
    assert len(no_inductor) == 2 * PER_KIND and found.outputs["logits"].dtype == torch.bfloat16
    torch.testing.assert_close(found.maps, expected.maps, atol=1e-2, rtol=0)


def test_weights_of_inference_mode_are_not_compiled(no_inductor):
    with torch.inference_mode():
        model = NETWORKS["residual"]()
    with pytest.warns(UserWarning, match="is of torch.inference_mode, where changes are not counted"):
        CFCAM(model, [model.head], compile=True).maps(images())


def test_a_watch_of_what_a_program_has_read():
    model = nn.Sequential(nn.Linear(2, 2))
    model.scale = torch.ones(2)
    watch = Watch(model, [model.scale])
    assert watch.change() is None
    model.scale.mul_(1)
    assert watch.change() == "a tensor that it uses has been changed in place"
    watch = Watch(model, [model.scale])
    model.scale = torch.ones(2)
    assert watch.change() == "scale of Sequential is Tensor, and was Tensor"


def test_a_watch_of_what_is_equal_and_may_change_on_its_own():
    model = nn.Sequential(nn.Linear(2, 2))
    model.sizes = ([1],)
    watch = Watch(model)
    model.sizes = ([1],)
    assert watch.change() is None and watch.change() is None
    model.sizes[0].append(2)
    assert watch.change() == "sizes of Sequential is ([1, 2],), and was ([1],)"
    model.sizes[0].pop()
    assert watch.change() is None


@dataclass
class Settings:
    scale: float = 1.0


WITHIN = {
    "factors": lambda module: module.factors.update(adapter=2.0),
    "sides": lambda module: module.sides.append(3),
    "names": lambda module: module.names.add("other"),
    "nested": lambda module: module.nested["inner"].append(1),
    "pair": lambda module: module.pair[1].clear(),
    "space": lambda module: setattr(module.space, "scale", 2.0),
    "settings": lambda module: setattr(module.settings, "scale", 2.0),
    "held": lambda module: module.held.__setitem__(0, torch.ones(2)),
    "kind": lambda module: setattr(module, "kind", torch.float64),
    "array": lambda module: setattr(module, "array", np.zeros(2)),
    "replaced": lambda module: setattr(module, "replaced", [2]),
}


@pytest.mark.parametrize("name", WITHIN)
def test_a_watch_of_what_containers_hold(looked_at, name):
    """Adapters keep their scales in dictionaries, and configurations are objects."""
    model = nn.Sequential(nn.Linear(2, 2))
    vars(model[0]).update(
        factors={"adapter": 1.0},
        sides=[1, 2],
        names={"one"},
        nested={"inner": [0], "cache": torch.ones(2)},
        pair=(1, [2]),
        space=SimpleNamespace(scale=1.0),
        settings=Settings(),
        held=[torch.ones(2)],
        kind=torch.float32,
        array=np.ones(2),
        replaced=[1],
    )
    watch = Watch(model, [model[0].held[0]])
    model[0].sides = [1, 2]  # equal
    model[0].nested["cache"] = torch.zeros(2)  # which no program has read
    model[0].settings = Settings()
    assert watch.change() is None and watch.change() is None
    WITHIN[name](model[0])
    assert f"{name} of '0'" in watch.change()


def test_command_line(no_inductor, run, tmp_path):
    from PIL import Image

    photograph = tmp_path / "noise.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(photograph)
    options = ("--model", "torchvision:resnet18:random", "--out", tmp_path / "out")
    status, _, said = run("explain", photograph, *options, "--compile")
    assert status == 0, said
    assert len(no_inductor) == PER_KIND - 1  # its maps are pytorch-grad-cam's scaled grids
    status, _, said = run("explain", photograph, *options, "--compile", "--method", "gradcam")
    assert status == 2 and "--compile is for --method cfcam" in said
