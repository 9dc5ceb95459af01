"""What models return: the logits in every kind of container, an image's part of it, and a single logit."""

import collections
import copy
import dataclasses
import enum
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from cfcam_gpu import CFCAM, CFCAMConfig
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.outputs import find_logits, image_part, map_tensors

pytestmark = pytest.mark.usefixtures("seed", "one_thread")

BATCH, N_CLASSES = 3, 5


class Fields(NamedTuple):
    scores: torch.Tensor
    features: torch.Tensor


class Derived(Fields):
    best = property(lambda self: self.scores.max())


@dataclasses.dataclass
class Data:
    scores: torch.Tensor
    features: torch.Tensor
    note: str = "note"
    later: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        assert len(self.scores) == BATCH, "the constructor is for the whole batch"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    scores: torch.Tensor
    features: torch.Tensor


class Ordered(collections.OrderedDict):
    """Values under keys and attributes, as transformers' outputs have them."""

    def __init__(self, **values):
        super().__init__(values)
        self.__dict__.update(values)


class AttributeDict(dict):
    def __init__(self, **values):
        super().__init__(values)
        self.__dict__ = self


class Slots:
    __slots__ = ("scores", "features")

    def __init__(self, scores, features):
        self.scores, self.features = scores, features


CONTAINERS = {
    "dict": (lambda s, f: {"scores": s, "features": f}, lambda o: o["scores"]),
    "tuple": (lambda s, f: (f, s), lambda o: o[1]),
    "list": (lambda s, f: [f, "text", s, None], lambda o: o[2]),
    "named tuple": (Fields, lambda o: o.scores),
    "derived named tuple": (Derived, lambda o: o.scores),
    "dataclass": (Data, lambda o: o.scores),
    "frozen dataclass with slots": (Frozen, lambda o: o.scores),
    "ordered dict, by key": (lambda s, f: Ordered(scores=s, features=f), lambda o: o["scores"]),
    "ordered dict, by name": (lambda s, f: Ordered(scores=s, features=f), lambda o: o.scores),
    "attribute dict": (lambda s, f: AttributeDict(scores=s, features=f), lambda o: o.scores),
    "user dict": (lambda s, f: collections.UserDict(scores=s, features=f), lambda o: o["scores"]),
    "default dict": (lambda s, f: collections.defaultdict(list, scores=s, features=f), lambda o: o["scores"]),
    "namespace": (lambda s, f: SimpleNamespace(scores=s, features=f, n=3), lambda o: o.scores),
    "slots": (Slots, lambda o: o.scores),
}
NESTED = {
    "dataclass in dict": (lambda s, f: {"a": Data(s, f)}, lambda o: o["a"].scores),
    "dict in dataclass": (lambda s, f: Data(s, {"x": [f]}), lambda o: o.scores),
    "named tuple in list in namespace": (lambda s, f: SimpleNamespace(a=[Fields(s, f)]), lambda o: o.a[0].scores),
}


class Net(nn.Module):
    def __init__(self, wrap=lambda scores, features: scores, n_classes=N_CLASSES):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU()), nn.Linear(12, n_classes)
        self.wrap = wrap

    def forward(self, x):
        features = self.body(x)
        return self.wrap(self.head(features.mean((2, 3))), features)


def network(wrap, **options):
    return Net(wrap, **options).double().eval()


def images():
    return torch.randn(BATCH, 3, 12, 10, dtype=torch.float64)


def gradients_by_hand(model, x, score):
    """d score(logits) / d body(x), the logits of the plain network."""
    features = model.body(x).detach().requires_grad_()
    score(model.head(features.mean((2, 3)))).backward()
    model.zero_grad()
    return features.grad


def of_class(*classes):
    return lambda logits: sum(logits[row, index] for row, index in enumerate(classes))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_class_indices_find_the_logits(kind):
    wrap, read = CONTAINERS[kind]
    model, x = network(wrap), images()
    capture = HeadCapture(model, [model.body])(x, [4, 0, 3])
    torch.testing.assert_close(capture.gradients[0], gradients_by_hand(model, x, of_class(4, 0, 3)), rtol=0, atol=1e-15)
    top = model.head(model.body(x).mean((2, 3))).argmax(1)
    capture = HeadCapture(model, [model.body])(x)
    assert torch.equal(capture.classes, top)
    expected = gradients_by_hand(model, x, of_class(*top.tolist()))
    torch.testing.assert_close(capture.gradients[0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", [*CONTAINERS, *NESTED])
def test_a_callable_gets_its_images_part(kind):
    wrap, read = {**CONTAINERS, **NESTED}[kind]
    model, x, parts = network(wrap), images(), []

    def target(output):
        parts.append(output)
        return read(output).square().sum()  # of a whole batch it would be another number

    cam = CFCAM(model, [model.body])
    capture = HeadCapture(model, [model.body])(x, [target] * BATCH)
    expected = gradients_by_hand(model, x, lambda logits: logits.square().sum())
    torch.testing.assert_close(capture.gradients[0], expected, rtol=0, atol=1e-15)
    raw = model(x)
    for index, part in enumerate(parts):
        assert type(part) is type(raw)
        torch.testing.assert_close(read(part), read(raw)[index])
    cam.maps(x, [target] * BATCH)
    assert type(cam.outputs) is type(raw)
    assert torch.equal(read(cam.outputs), read(raw)) and not read(cam.outputs).requires_grad
    assert read(raw).requires_grad and len(read(raw)) == BATCH, "the model's own output is as it was"


def test_what_is_not_a_row_per_image_is_as_it_is():
    marker = enum.Enum("Marker", "here").here
    shared = {
        "loss": torch.rand(()),
        "mask": torch.rand(7, BATCH),
        "n": BATCH,
        "kind": marker,
        "layer": nn.Linear(3, 3),
    }
    part = image_part({**shared, "scores": torch.rand(BATCH, 2)}, 1, BATCH)
    assert part["scores"].shape == (2,)
    assert all(part[name] is each for name, each in shared.items())


def test_a_tensor_under_several_names_stays_one():
    scores = torch.rand(BATCH, 2)
    part = image_part(Ordered(scores=scores, also=scores), 2, BATCH)
    assert part["scores"] is part.scores is part.also and torch.equal(part.scores, scores[2])


def test_an_object_that_leads_back_to_itself():
    value = SimpleNamespace(scores=torch.rand(BATCH, 2))
    value.itself = [value]
    assert torch.equal(image_part(value, 1, BATCH).scores, value.scores[1])


def test_a_list_of_one_element_per_image():
    boxes = [{"scores": torch.rand(BATCH)} for _ in range(BATCH)]  # B boxes in each, by chance
    assert image_part(boxes, 1, BATCH) is boxes[1]
    detections = [torch.rand(2 + index, 6) for index in range(BATCH)]
    assert image_part(detections, 2, BATCH) is detections[2]
    with pytest.raises(ValueError, match=f"a list of {BATCH} tensors of {BATCH} rows each, which could be either"):
        image_part([torch.rand(BATCH, 4)] * BATCH, 0, BATCH)


class Opaque:
    """Gives its tensor only when asked."""

    def __init__(self, tensor):
        self.read = lambda: tensor


def test_outputs_whose_images_cannot_be_told_apart():
    with pytest.raises(TypeError, match="hold tensors, .* got Opaque, in which none is found"):
        image_part(Opaque(torch.rand(BATCH, 2)), 0, BATCH)
    alone = Opaque(torch.rand(1, 2))
    assert image_part(alone, 0, 1) is alone
    with pytest.raises(ValueError, match=rf"one row per image, \({BATCH}, ...\), got \({2 * BATCH}, 5\)"):
        image_part(torch.rand(2 * BATCH, 5), 0, BATCH)
    assert image_part(torch.rand(()), 0, BATCH).ndim == 0

    class NotCopied(SimpleNamespace):
        def __copy__(self):
            raise RuntimeError("one of a kind")

    with pytest.raises(TypeError, match="got NotCopied, which cannot be copied: one of a kind"):
        image_part(NotCopied(scores=torch.rand(BATCH, 2)), 0, BATCH)


@pytest.mark.parametrize(
    "make, found",
    [
        (lambda t: {"other": t + 1, "logits": t}, True),
        (lambda t: SimpleNamespace(other=t + 1, logits=t), True),
        (lambda t: {"loss": t.sum(), "hidden": (t,), "scores": t, "classes": t.argmax(1), "long": t.long()}, True),
        (lambda t: {"a": t, "b": t}, True),  # one tensor
        (lambda t: {"a": t, "b": t + 1}, False),
        (lambda t: (t, t + 1), False),
        (lambda t: {"scores": t[:, :, None]}, False),
        (lambda t: {"deep": {"scores": t}}, False),
    ],
)
def test_which_tensor_is_the_logits(make, found):
    logits = torch.rand(BATCH, N_CLASSES)
    if found:
        assert find_logits(make(logits), BATCH) is logits
    else:
        with pytest.raises(ValueError, match="targets must be one callable per image .*, got "):
            find_logits(make(logits), BATCH)


def test_logits_as_a_property():
    class Output(dict):
        logits = property(lambda self: self["a"])

    output = Output(a=torch.rand(BATCH, 2), b=torch.rand(BATCH, 2))
    assert find_logits(output, BATCH) is output["a"]


def test_the_error_lists_what_there_is():
    output = Data(torch.rand(BATCH, 4), torch.rand(BATCH, 9, dtype=torch.float64))
    with pytest.raises(ValueError) as caught:
        find_logits(output, BATCH)
    assert str(caught.value) == (
        "targets must be one callable per image for a model that returns Data: class indices and None need"
        " (3, n_classes), called logits or the only such tensor, got scores: (3, 4) torch.float32,"
        " features: (3, 9) torch.float64, note: str, later: list"
    )


def test_map_tensors_copies_only_what_holds_one():
    value = {"tensor": torch.ones(2), "other": SimpleNamespace(a=[1, 2]), "data": Frozen(torch.zeros(1), None)}
    before = copy.deepcopy(value)
    mapped = map_tensors(lambda tensor: tensor + 1, value)
    assert mapped["tensor"].tolist() == [2, 2] and mapped["data"].scores.tolist() == [1]
    assert mapped["other"] is value["other"]
    assert torch.equal(value["tensor"], before["tensor"]) and torch.equal(value["data"].scores, before["data"].scores)


# A single logit


def test_a_single_logit_explains_the_side_that_was_chosen():
    model, x = network(lambda scores, features: scores - scores.detach().mean(), n_classes=1), images()
    logits = model(x).detach()
    assert (logits > 0).any() and (logits < 0).any()
    config = CFCAMConfig()
    cam = CFCAM(model, [model.body], config=config)
    sides = [1.0 if logit >= 0 else -1.0 for logit in logits[:, 0].tolist()]
    chosen = cam.maps(x)
    assert torch.equal(chosen, cam.maps(x, [lambda output, side=side: side * output[0] for side in sides]))
    assert cam.classes is None
    cam.maps(x)
    assert cam.classes.tolist() == [0] * BATCH
    positive = cam.maps(x, [0] * BATCH)
    assert torch.equal(positive, cam.maps(x, [lambda output: output[0]] * BATCH))
    for image, side in enumerate(sides):
        assert torch.equal(positive[image], chosen[image]) == (side > 0) or not (positive[image].any())
    with pytest.raises(ValueError, match=r"class indices in \[0, 1\), got 1"):
        cam.maps(x, [0, 1, 0])


def test_a_single_logit_of_a_capture_is_the_logit():
    model, x = network(lambda scores, features: scores - 100, n_classes=1), images()
    capture = HeadCapture(model, [model.body])(x)
    expected = gradients_by_hand(model, x, of_class(0, 0, 0))
    torch.testing.assert_close(capture.gradients[0], expected, rtol=0, atol=1e-15)
    capture = HeadCapture(model, [model.body], chosen_side=True)(x)
    torch.testing.assert_close(capture.gradients[0], -expected, rtol=0, atol=1e-15)


def test_multi_label_heads_explain_the_plain_logit():
    model, x = network(lambda scores, features: scores), images()
    plain = CFCAM(model, [model.body], config=CFCAMConfig(margin_temperature=0))
    logit = [lambda output, index=index: output[index] for index in (2, 0, 4)]
    assert torch.equal(plain.maps(x, [2, 0, 4]), plain.maps(x, logit))
