"""The sibling classes of `CFCAM`: pytorch-grad-cam's numbers, `CFCAM`'s contract, and what a call leaves behind."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from networks import build, vit
from torch import nn

from cfcam_gpu import CFCAM, methods, perturbed, projection
from cfcam_gpu.methods import METHODS, AblationCAM, EigenCAM, GradCAM, ScoreCAM

pytestmark = [
    pytest.mark.usefixtures("one_thread", "seed"),
    pytest.mark.filterwarnings("ignore:maps are zero everywhere", "ignore:invalid value"),
]

SIBLINGS = {name: method for name, method in METHODS.items() if method is not CFCAM}
OF_SCORES = ("ablation", "score")
OF_CELLS = ("layercam", "hirescam", "elementwise", "eigencam")

TOLERANCE = 2e-6
"""Largest difference from pytorch-grad-cam's maps, which reach 1."""

SCORED_TOLERANCE = 1e-4
"""Of weights from scores, which enlarge the rounding of the network's sums: that differs by batch and by layout."""


def small(n_classes=5, activation=nn.ReLU):
    """Two layers of channels, by default none of them negative, and classes that depend on both."""
    body = nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 24, 3, 2, 1), activation()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, n_classes)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 28, 20)


def to_map(tokens):
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (2, 2))


def margin(first, output):
    return output[first] - output[0]


def subject(name):
    """model, target layers, reshape_transform, images."""
    if name == "vit":
        model = vit(32, layers=2)
        nn.init.normal_(model.heads.head.weight)  # torchvision's is zero
        return model, [model.encoder.layers[1].ln_1], to_map, torch.randn(2, 3, 32, 32)
    model = build(name)
    layers = [model.layer3, model.layer4] if name == "resnet18" else [model.features[23]]  # its last pooling but one
    return model, layers, None, torch.randn(2, 3, 48, 32)


@pytest.mark.parametrize("network", ["resnet18", "vgg16", "vit"])
def test_pytorch_grad_cams_numbers(network):
    original = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed (extra: grad-cam)")
    from pytorch_grad_cam.ablation_layer import AblationLayerVit
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, layers, reshape, images = subject(network)
    mixed = [ClassifierOutputTarget(5), partial(margin, 7)]
    kinds = (None, None), ([3, 9], [*map(ClassifierOutputTarget, (3, 9))]), (mixed, mixed)
    highest = 0
    for name, method in SIBLINGS.items():
        if name in OF_SCORES and network != "vit":
            continue  # hundreds of passes of the original's through a large network: below, with a small one
        options = {"ablation_layer": AblationLayerVit()} if name == "ablation" and reshape else {}
        slow = getattr(original, method.__name__)(model, layers, reshape, **options)
        fast = method(model, layers, reshape)
        tolerance = SCORED_TOLERANCE if name in OF_SCORES else TOLERANCE
        for ours, theirs in kinds if network == "vit" or name == "gradcam" else kinds[1:]:
            expected = slow(images, theirs)
            found = fast(images, ours)
            assert found.dtype == np.float32 and found.flags.c_contiguous
            np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0, err_msg=name)
            if ours is mixed:
                np.testing.assert_array_equal(fast.maps(images, ours).numpy(), found)
            highest = max(highest, expected.max())
            if expected.any() and name not in OF_SCORES:
                shifted = np.roll(found, (5, 7), axis=(1, 2))
                assert np.abs(shifted - expected).max() > 1e-3, "a shifted answer must not pass"
        del slow
    assert highest > 0.9
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("name", OF_SCORES)
def test_scores_in_float64(images, name, activation):
    """Where nothing is left of the network's rounding; of channels of both signs too."""
    original = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed (extra: grad-cam)")
    model, images = small(activation=activation).double(), images.double()
    method = METHODS[name]
    expected = getattr(original, method.__name__)(model, [model[3]])(images, [partial(margin, 1), partial(margin, 2)])
    cam = method(model, [model[3]])
    targets = [partial(margin, 1), partial(margin, 2)]
    np.testing.assert_allclose(cam(images, targets), expected, atol=TOLERANCE, rtol=0)
    cam.batch_size = 7  # which no number depends on, but by rounding
    np.testing.assert_allclose(cam(images, targets), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", SIBLINGS)
def test_several_targets_are_each_alone(images, name):
    model, images = small().double(), images.double()
    cam = METHODS[name](model, [model[1], model[3]])
    classes = torch.tensor([[3, 0, 4], [1, 2, 0]])
    found = cam.explain(images, classes)
    assert found.maps.shape == (2, 3, 28, 20) and torch.equal(found.targets, classes) and found.labels is None
    assert 0 <= found.maps.min() and found.maps.max() <= 1 and found.maps.dtype == torch.float64
    for k in range(3):
        alone = cam.explain(images, classes[:, k])
        torch.testing.assert_close(found.maps[:, k], alone.maps, rtol=0, atol=1e-6)
        if name in OF_CELLS:
            assert found.weights is None and alone.weights is None
        else:
            for several, one, n_channels in zip(found.weights, alone.weights, (8, 24)):
                assert several.shape == (2, 3, n_channels)
                torch.testing.assert_close(several[:, k], one)
    top = cam.maps(images, top=2)
    assert torch.equal(cam.classes, cam.outputs.topk(2).indices)
    torch.testing.assert_close(top[:, 0], cam.maps(images))
    assert torch.equal(cam.classes, cam.outputs.argmax(1))
    callables = [[lambda output, k=k: output[k] for k in row] for row in classes.tolist()]
    torch.testing.assert_close(cam.maps(images, callables), found.maps)
    assert cam.classes is None
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(cam).maps(images, classes), found.maps)


@pytest.mark.parametrize("name", SIBLINGS)
def test_the_layer_is_found_and_the_model_may_have_several_inputs(name):
    class Scan(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU()), nn.Linear(9, 3)

        def forward(self, image, age):
            return {"logits": self.head(torch.cat([self.body(image).mean((2, 3)), age], 1)), "age": age}

    model, images, ages = Scan().eval(), torch.randn(3, 3, 24, 24), torch.rand(3, 1)
    with METHODS[name](model) as cam:
        assert cam.target_names is None
        maps = cam.maps(images, [1, 2, 0], age=ages)
        assert cam.target_names == ["body"] and maps.shape == (3, 24, 24) and set(cam.outputs) == {"logits", "age"}
        for inputs in ((images, ages), {"image": images, "age": ages}):
            assert torch.equal(cam.maps(inputs, [1, 2, 0]), maps)
        # Each image goes with its own age.
        alone = METHODS[name](model, [model.body]).maps((images[1:2], ages[1:2]), [2])
        torch.testing.assert_close(alone[0], maps[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SIBLINGS)
def test_of_a_single_logit_the_chosen_side_is_explained(images, name):
    model = small(1)
    cam = METHODS[name](model, [model[3]])
    with torch.no_grad():
        model[-1].bias.fill_(-30)
    found = cam.maps(images)
    sides = [lambda output: -output[0]] * 2
    torch.testing.assert_close(found, cam.maps(images, sides), rtol=0, atol=1e-4)


def test_tokens_as_their_channels_lie():
    """Channels on the last axis, after a class token, and on the first of a grid; and none that can be told apart."""
    output, grid = torch.rand(2, 5, 6), torch.rand(2, 6, 2, 2)
    assert methods._channel_axis(output, grid, to_map) == 2
    assert methods._channel_axis(torch.rand(2, 4, 2, 2), torch.rand(2, 4, 2, 2), lambda maps: maps + 0) == 1
    assert methods._channel_axis(torch.rand(2, 2, 2, 4), torch.rand(2, 4, 2, 2), lambda x: x.permute(0, 3, 1, 2)) == 3
    with pytest.raises(ValueError, match="channels on an axis of their own .* mixes them"):
        methods._channel_axis(output, grid, lambda tokens: to_map(tokens).flip(1))


def test_a_layer_that_runs_twice():
    """The last run counts, also where a channel is taken out of it; the demo's network has such a layer."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
            self.act, self.last, self.head = nn.ReLU(), nn.Identity(), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.last(self.act(self.two(self.act(self.one(x))))).mean((2, 3)))

    model, images = Twice().eval(), torch.randn(2, 3, 16, 16)
    for method in SIBLINGS.values():
        expected = method(model, [model.last]).maps(images, [1, 2])
        torch.testing.assert_close(method(model, [model.act]).maps(images, [1, 2]), expected)


@pytest.mark.parametrize("training", [False, True], ids=["values", "batch norm"])
def test_ablation_without_a_head_of_its_own(images, training):
    class Values(nn.Module):
        def forward(self, x):
            return x.relu() if x.sum().item() > -1e30 else x

    plain = small()
    model = nn.Sequential(*plain[:4], Values(), *plain[4:]).eval()
    torch.testing.assert_close(
        AblationCAM(model, [model[3]]).maps(images, [1, 2]), AblationCAM(plain, [plain[3]]).maps(images, [1, 2])
    )
    if training:
        model.insert(5, nn.BatchNorm2d(24))
        with pytest.warns(UserWarning, match="training mode"):
            assert AblationCAM(model.train(), [model[3]]).maps(images, [1, 2]).isfinite().all()


def test_blank_channels_share_a_pass_and_memory_that_runs_out_halves_the_blocks(images, caplog):
    model, images = small().double(), images.double()
    with torch.no_grad():
        model[2].weight[::3], model[2].bias[::3] = 0, -1
    expected, rows = ScoreCAM(model, [model[3]]).maps(images, [1, 2]), []
    ablated = AblationCAM(model, [model[3]]).maps(images, [1, 2])

    def full(module, args):
        rows.append(len(args[0]))
        if len(args[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(full)
    torch.testing.assert_close(ScoreCAM(model, [model[3]]).maps(images, [1, 2]), expected, rtol=0, atol=1e-6)
    assert "ScoreCAM: out of memory, goes on with batches of 4" in caplog.text
    with torch.no_grad():
        seen = model[:4](images).flatten(2).any(2)
    assert sum(n for n in rows if n <= 5) == 2 + seen.sum() + 2  # the first pass, and a blank channel of each image
    handle.remove()

    with pytest.MonkeyPatch.context() as patch:
        call = perturbed.Head.__call__

        def little(head, activations, *args):
            if len(activations) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return call(head, activations, *args)

        patch.setattr(perturbed.Head, "__call__", little)
        found = AblationCAM(model, [model[3]]).maps(images, [1, 2])
        torch.testing.assert_close(found, ablated, rtol=0, atol=1e-6)
        assert "AblationCAM: out of memory, goes on with batches of 3" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        perturbed.in_blocks("x", lambda block: (_ for _ in ()).throw(torch.OutOfMemoryError()), 4, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SIBLINGS)
def test_half_precision(images, name, dtype):
    model = small(activation=nn.Tanh).to(dtype)
    maps = METHODS[name](model, [model[3]]).maps(images.to(dtype), top=3)
    assert maps.dtype == torch.float32 and maps.isfinite().all() and maps.max() > 0.9


def state(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (name, module.training, *(dict(getattr(module, each)) for each in hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]


def fails(output):
    raise LookupError("of the target's own")


@pytest.mark.parametrize("name", SIBLINGS)
def test_bad_input_and_what_a_call_leaves_behind(images, name):
    model = small()
    model[0].weight.requires_grad_(False)
    cam, before = METHODS[name](model, [model[3]]), state(model)
    expected = cam.maps(images, [1, 2])
    bad = [
        (([1, 2, 3],), ValueError, "expected 2, got 3"),
        (([1, 5],), ValueError, r"class indices in \[0, 5\), got 5"),
        ((None, 6), ValueError, "top must be at most"),
        ((["cat", "dog"],), TypeError, "class indices"),
    ]
    if name != "eigencam":  # which calls none
        bad += [
            (([fails] * 2,), LookupError, "own"),
            (([lambda output: output] * 2,), ValueError, "one-element tensor"),
        ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            cam.maps(images, *arguments)
        assert state(model) == before
    with pytest.raises(ValueError, match="activations must be finite"):
        cam.maps(torch.full_like(images, torch.nan), [1, 2])
    assert state(model) == before and torch.equal(cam.maps(images, [1, 2]), expected)
    for arguments, error, message in (
        ({"target_layers": [nn.ReLU()]}, ValueError, "one of the modules of Sequential"),
        ({"target_layers": []}, ValueError, "at least one layer"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"reshape_transform": to_map}, ValueError, "reshape_transform is for target_layers that are given"),
    ):
        with pytest.raises(error, match=message):
            METHODS[name](model, **arguments)


@pytest.mark.parametrize("name", ["gradcam", "ablation", "score"])
def test_threads(images, name):
    model = small()
    cam = METHODS[name](model, [model[3]])
    jobs = [(images + shift, targets) for shift in (0.0, 0.5) for targets in ([1, 2], None, [[0, 3], [4, 1]])]
    expected = [cam.maps(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: cam.maps(*jobs[index % len(jobs)]), range(24)))
    assert all(torch.equal(maps, expected[index % len(jobs)]) for index, maps in enumerate(found))
    assert not any(module._forward_hooks for module in model.modules())


def test_no_gradient_is_taken_where_none_is_needed(images):
    model = small()
    grown = []
    model[-1].register_forward_hook(lambda module, args, output: grown.append(output.requires_grad))
    EigenCAM(model, [model[3]]).maps(images)
    assert grown == [False]
    GradCAM(model, [model[3]]).maps(images)
    assert grown == [False, True]


def test_no_library_is_needed(images, monkeypatch):
    """Nor threadpoolctl, which only keeps LAPACK to one thread."""
    model = small()
    expected = EigenCAM(model, [model[3]]).maps(images)
    for name in ("pytorch_grad_cam", "threadpoolctl", "sklearn", "scipy", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    projection._libraries.cache_clear()
    try:
        for method in SIBLINGS.values():
            maps = method(model, [model[3]]).maps(images)
            assert method is not EigenCAM or torch.equal(maps, expected)
    finally:
        projection._libraries.cache_clear()


def test_notices(images):
    model = small()
    with torch.no_grad():
        model[-1].weight[2] = 0
    with pytest.warns(UserWarning, match="the score's gradient is zero") as told:
        GradCAM(model, [model[3]]).maps(images, [2, 2])
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="one cell alone"):
        pooled = nn.Sequential(*model[:4], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3)).eval()
        assert not EigenCAM(pooled, [pooled[4]]).maps(images).any()


@pytest.mark.parametrize("name, targets", [("gradcam", [[1, 0], [2, 4]]), ("gradcam", [1, 2]), ("layercam", [1, 2])])
def test_the_kernels_make_the_same_maps(device_path, name, targets):
    model, images = small().to(device_path.device), torch.randn(2, 3, 14, 12).to(device_path.device)
    found = METHODS[name](model, [model[3]]).maps(images, targets)
    assert len(device_path.launched) == 2  # the sum over channels, and the resize
    expected = METHODS[name](model, [model[3]], backend="torch").maps(images, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
