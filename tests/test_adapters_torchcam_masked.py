"""torch-cam's methods that run the network many times: its own classes' numbers, noise and state, with less work."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchcam", reason="torch-cam is not installed (extra: torchcam)")
import torchcam.methods as original

from cfcam_gpu.adapters import torchcam as adapter
from cfcam_gpu.adapters import torchcam_masked as masked

METHODS = {
    "SmoothGradCAMpp": {"num_samples": 5},
    "GradCAMpp": {},
    "ScoreCAM": {},
    "ISCAM": {"num_samples": 3},
    "SSCAM": {"num_samples": 2, "std": 0.5},
}
MASKED = ("ScoreCAM", "ISCAM", "SSCAM")

pytestmark = pytest.mark.usefixtures("one_thread", "seed")


class Network(nn.Sequential):
    """Twelve channels, five of them zero for every image, and gradients that are positive whatever the weights."""

    def __init__(self, drops=False):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(12, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            self.trunk[0].weight.abs_()
            self.trunk[0].bias.abs_()
            self.trunk[0].bias[::5] = -100
            self.trunk[0].bias[7:9] = -100
            self.fc.weight.abs_().mul_(3)
            self.head[0].weight.abs_().mul_(3)
        self.drops, self.images = drops, 0

    def forward(self, x):
        self.images += len(x)
        features = self.head(self.trunk(x))
        return self.fc(nn.functional.dropout(features, 0.4, True) if self.drops else features)


@pytest.fixture
def model():
    return Network().eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 20) + 0.1


def extract(cam, images, arguments, **options):
    """The weights, signed maps and the next random number."""
    cam._relu = False
    scores = cam.model(images)
    arguments = {"class_idx": arguments} if isinstance(arguments, (int, list)) else arguments
    if cam._score_used:
        arguments = {**arguments, "scores": scores}
    torch.manual_seed(11)
    maps = cam(**arguments, normalized=False, **options)
    return maps, torch.rand(4)


def both(method, model, images, arguments, layer="trunk", **options):
    """Ours and the library's, with the images each of them ran; all have been compared."""
    found, images_run, kept = [], [], []
    for fast in (False, True):
        cam = getattr(original, method)(model, layer, **{**METHODS[method], **options})
        cam = adapter.accelerate(cam) if fast else cam
        assert isinstance(cam, getattr(original, method)) and fast == (type(cam) in adapter.ACCELERATED.values())
        with cam:
            model.images = 0
            found.append(extract(cam, images, arguments))
            images_run.append(model.images)
            kept.append((repr(cam), cam.hook_a, getattr(cam, "bs", None)))
    (theirs, their_draw), (ours, our_draw) = found
    assert torch.equal(their_draw, our_draw)
    assert kept[0][0] == kept[1][0] and kept[0][2] == kept[1][2]
    for a, b in zip(kept[0][1], kept[1][1]):
        torch.testing.assert_close(a, b)
    for a, b in zip(theirs, ours):
        assert a.shape == b.shape and a.dtype == b.dtype and a.abs().max() > 0
        assert (a - b).abs().max() <= 5e-6 * a.abs().max()  # mostly 1e-6: rounding of scores, through their softmax
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return images_run


@pytest.mark.parametrize("method", METHODS)
def test_no_images(model, images, method):
    """As many maps as there are images."""
    for make in (lambda cam: cam, adapter.accelerate):
        with make(getattr(original, method)(model, "trunk", **METHODS[method])) as cam:
            (maps,), _ = extract(cam, images[:0], 3)
            assert maps.shape == (0, images.shape[2] // 2, images.shape[3] // 2)


@pytest.mark.parametrize("method", METHODS)
def test_same_numbers(model, images, method):
    for arguments in (
        3,
        [1, 4],
        {"targets": lambda row: row[2] + 0.5 * row[0]},
        {"targets": [lambda row: row[1], lambda row: row[0]]},
    ):
        both(method, model, images, arguments)
        both(method, model, images[:1], 3 if isinstance(arguments, list) else {"targets": torch.sum})
    both(method, model, images, [1, 4], layer=["trunk", "head.0"])


@pytest.mark.parametrize("method", MASKED)
def test_blank_channels_are_run_once(model, images, method):
    theirs, ours = both(method, model, images, 2)
    rounds = {"ScoreCAM": 1, "ISCAM": 3, "SSCAM": 2}[method]
    blank = 5
    saved = 0 if method == "SSCAM" else 2 * (blank - 1) * rounds
    assert ours == theirs - saved


def test_every_channel_blank(images):
    model = Network().eval()
    with torch.no_grad():
        model.trunk[0].bias.fill_(-100)
    for make in (original.ScoreCAM, original.ISCAM):
        with make(model, "trunk") as cam:
            model(images)
            expected = cam._get_weights([1, 2])[0]
            torch.testing.assert_close(adapter.accelerate(cam)._get_weights([1, 2])[0], expected)


@pytest.mark.parametrize("method", [*MASKED, "SmoothGradCAMpp"])
def test_a_model_that_draws_keeps_the_librarys_stream(images, method):
    theirs, ours = both(method, Network(drops=True).eval(), images, [1, 2])
    # One pass is lost on finding out.
    assert theirs <= ours <= theirs + (32 if method == "SmoothGradCAMpp" else 0)


@pytest.mark.parametrize("method", METHODS)
def test_train_mode_and_the_callers_modes(model, images, method):
    model.train()
    both(method, model, images, 1)
    assert all(module.training for module in model.modules())
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with getattr(original, method)(model, "trunk", **METHODS[method]) as cam:
            expected = extract(cam, images, 1)[0][0]
        with mode(), getattr(original, method)(model, "trunk", **METHODS[method]) as cam:
            ours = extract(adapter.accelerate(cam), images.clone(), 1)[0][0]
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("method", METHODS)
def test_errors_leave_things_as_they_were(model, images, method):
    class Fault(Exception):
        pass

    def fail(row):
        raise Fault

    with getattr(original, method)(model, "trunk", **METHODS[method]) as cam:
        expected = extract(cam, images, 1)[0][0]
        fast = adapter.accelerate(cam)
        hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
        with pytest.raises(Fault):
            extract(fast, images, {"targets": fail})
        with pytest.raises(ValueError, match="batch size"):
            fast([1], scores=model(images))
        after = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
        assert after == hooks and fast._hooks_enabled and torch.is_grad_enabled() and not model.training
        assert getattr(fast, "bs", 32) == 32 and getattr(fast, "_ihook_enabled", True)
        torch.testing.assert_close(extract(fast, images, 1)[0][0], expected)


@pytest.mark.parametrize("method", [*MASKED, "SmoothGradCAMpp"])
def test_out_of_memory_makes_smaller_blocks(model, images, method, caplog):
    with getattr(original, method)(model, "trunk", **METHODS[method]) as cam:
        expected = extract(cam, images, 1)[0][0]
        fast, forward, sizes = adapter.accelerate(cam), model.forward, []

        def little_memory(x):
            sizes.append(len(x))
            if len(x) > 5:
                raise torch.OutOfMemoryError("out of memory")
            return forward(x)

        model.forward = little_memory
        torch.testing.assert_close(extract(fast, images, 1)[0][0], expected)
        assert max(sizes) > 5 and "out of memory, going on" in caplog.text and getattr(fast, "bs", 32) == 32


def test_blocks_that_a_cpu_caches():
    for shape, limit, size in (
        ((1, 3, 224, 224), 32, 4),
        ((3, 3, 1000, 1000), 32, 4),
        ((1, 3, 224, 224), 2, 2),
        ((1, 3, 32, 32), 32, 32),
        ((1, 3, 112, 112), 64, 16),
    ):
        assert masked.block_size(torch.empty(shape), limit) == size
        assert masked.block_size(torch.empty(shape, device="meta"), limit) == limit
