"""`CFCAM` end to end: against pytorch-grad-cam, over layouts and layers, and what it leaves behind."""

import numpy as np
import pytest
import torch
from captured import captured_for, cf_cam_of
from compare import assert_close, averaged
from torch import nn

from cfcam_gpu import CFCAM, CFCAMConfig, cf_cam, torch_backend
from cfcam_gpu.capture import HeadCapture


@pytest.fixture
def images(seed):
    return torch.rand(3, 3, 96, 64)


def test_maps(resnet18, images):
    with CFCAM(resnet18, target_layers=[resnet18.layer4[-1]]) as cam:
        assert cam.outputs is None
        maps = cam.maps(images, targets=[3, 7, 11])
        assert maps.shape == (3, 96, 64) and maps.dtype == torch.float32
        assert 0 <= maps.min() and maps.max() <= 1 and not maps.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(cam.outputs, resnet18(images))
        captured = captured_for(resnet18, [resnet18.layer4[-1]], images, [3, 7, 11])
        assert torch.equal(maps, cf_cam_of(captured, (96, 64)).maps)
        top = cam.maps(images)
        assert torch.equal(top, cam.maps(images, targets=cam.outputs.argmax(1)))


# Some tests run the network in double precision: its own rounding, which differs by layout and batch size, would
# otherwise be stretched with the map, and now and then move a pair of channels across eps.


def test_configuration_reaches_the_pipeline(resnet18, images):
    resnet18, images = resnet18.double(), images.double()
    layers = [resnet18.layer4[-1]]
    for config in (CFCAMConfig.paper(), CFCAMConfig.stable(), CFCAMConfig(descriptor="unit", sigma=2.0)):
        captured = captured_for(resnet18, layers, images, config=config)
        expected = cf_cam_of(captured, (96, 64), config).maps
        assert torch.equal(CFCAM(resnet18, layers, config=config).maps(images), expected)
        for options in ({"backend": "reference"}, {"clustering": "sklearn"}):
            maps = CFCAM(resnet18, layers, config=config, **options).maps(images)
            assert_close(maps, expected)


def test_a_batch_is_its_images(resnet18, images):
    resnet18, images = resnet18.double(), images.double()
    cam = CFCAM(resnet18, [resnet18.layer3[-1]])
    batch = cam.maps(images, targets=[1, 2, 3])
    for index in range(3):
        assert_close(cam.maps(images[index : index + 1], targets=[index + 1])[0], batch[index])


def test_channels_last_equals_contiguous(resnet18, images):
    resnet18, images = resnet18.double(), images.double()
    expected = CFCAM(resnet18, [resnet18.layer4[-1]]).maps(images)
    resnet18.to(memory_format=torch.channels_last)
    maps = CFCAM(resnet18, [resnet18.layer4[-1]]).maps(images.to(memory_format=torch.channels_last))
    assert_close(maps, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(resnet18, images, dtype):
    resnet18.to(dtype)
    cam = CFCAM(resnet18, [resnet18.layer4[-1]])
    # Of a random network all three maps can honestly be zero; hardly so for class after class.
    for first in range(0, 99, 3):
        maps = cam.maps(images.to(dtype), targets=[first, first + 1, first + 2])
        assert maps.dtype == torch.float32 and maps.isfinite().all()
        if maps.any():
            break
    assert maps.max() == 1


def test_autocast_is_for_the_model_alone(resnet18, images):
    cam = CFCAM(resnet18, [resnet18.layer4[-1]])
    captured = captured_for(resnet18, [resnet18.layer4[-1]], images)
    expected = cf_cam_of(captured, (96, 64))
    with torch.autocast("cpu", torch.bfloat16):
        for actual, wanted in zip(cf_cam_of(captured, (96, 64)), expected):
            assert torch.equal(actual, wanted)
        maps, heatmaps = cam.maps(images), cam(images)
        captured = captured_for(resnet18, [resnet18.layer4[-1]], images)
    assert captured.activations[0].dtype == torch.bfloat16, "the model runs in the caller's precision"
    assert maps.dtype == torch.float32 and heatmaps.dtype == np.float32
    assert_close(maps, cf_cam_of(captured, (96, 64)).maps)


class Head(nn.Sequential):
    """A convolution, a ReLU after the target layer, and a classifier."""

    def __init__(self, inplace):
        super().__init__(
            nn.Conv2d(3, 24, 3, stride=4), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)
        )


def test_in_place_relu_after_the_layer(images):
    images -= 0.5  # around zero, so that the map has both signs
    models = Head(False).eval(), Head(True).eval()
    models[1].load_state_dict(models[0].state_dict())
    out_of_place, in_place = (CFCAM(model, [model[0]]).maps(images, [0, 1, 2]) for model in models)
    assert out_of_place.max() > 0
    assert torch.equal(out_of_place, in_place)


def test_several_layers_are_averaged(resnet18, images):
    layers = [resnet18.layer3[-1], resnet18.layer4[-1]]
    both = CFCAM(resnet18, layers).maps(images, [1, 2, 3])
    single = [CFCAM(resnet18, [layer]).maps(images, [1, 2, 3]) for layer in layers]
    expected = torch_backend.normalize((single[0] + single[1]) / 2, CFCAMConfig())
    assert_close(both, expected)


def grad_cam_with_our_capture(model, layers, images, targets):
    """Grad-CAM by its definition, on this package's capture and with the scaling of `CFCAM.__call__`."""
    captured = HeadCapture(model, layers)(images, targets)
    grids = []
    for activations, gradients in zip(captured.activations, captured.gradients):
        grids.append(torch_backend.class_grid(activations, gradients.mean((2, 3))))
    return torch_backend.grad_cam_maps(grids, images.shape[-2:]).numpy()


@pytest.mark.parametrize("names", [["layer4"], ["layer2", "layer3", "layer4"]])
def test_grad_cam_equals_pytorch_grad_cam(resnet18, images, names):
    grad_cam = pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed (extra: test)")
    # In double precision: the sums are added in another order, and a map that is the small remainder of large terms
    # would be stretched with its rounding.
    resnet18, images = resnet18.double(), images.double()
    layers = [getattr(resnet18, name)[-1] for name in names]
    highest = 0
    for targets in (None, [3, 500, 999], [0, 1, 2]):
        theirs = targets and [grad_cam.utils.model_targets.ClassifierOutputTarget(target) for target in targets]
        expected = grad_cam.GradCAM(model=resnet18, target_layers=layers)(images, theirs)
        maps = grad_cam_with_our_capture(resnet18, layers, images, targets)
        assert np.abs(maps - expected).max() < 1e-5
        highest = max(highest, expected.max())
        if expected.any():
            assert np.abs(np.roll(maps, (7, 9), axis=(1, 2)) - expected).max() > 1e-3, "a shifted answer must not pass"
    assert highest > 0.9, "not all nine maps may be zeros"


def test_call_is_cf_cam_inside_pytorch_grad_cam(resnet18, images):
    """`CFCAM.__call__` equals pytorch-grad-cam's own pipeline fed with CF-CAM's weights."""
    grad_cam = pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed (extra: test)")

    class Theirs(grad_cam.base_cam.BaseCAM):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            return cf_cam(torch.from_numpy(activations), torch.from_numpy(grads)).weights.numpy()

        def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
            arguments = input_tensor, target_layer, targets, activations, grads, eigen_smooth
            return averaged(super().get_cam_image(*arguments), activations)

    resnet18, images = resnet18.double(), images.double()
    layers = [resnet18.layer3[-1], resnet18.layer4[-1]]
    targets = [grad_cam.utils.model_targets.ClassifierOutputTarget(target) for target in (1, 2, 3)]
    expected = Theirs(resnet18, layers)(images, targets)
    heatmaps = CFCAM(resnet18, layers, guide_layer=None)(images, targets)  # that library knows of no other layer
    assert isinstance(heatmaps, np.ndarray) and heatmaps.dtype == np.float32
    assert heatmaps.shape == (3, 96, 64) and heatmaps.flags.c_contiguous
    assert np.abs(heatmaps - expected).max() < 1e-5


def state(model):
    return [
        (name, module.training, dict(module._forward_hooks), dict(module._backward_hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"targets": [1, 2]}, ValueError, "expected 3, got 2"),
        ({"targets": [1, 2, 1000]}, ValueError, r"class indices in \[0, 1000\), got 1000"),
        ({"targets": [lambda output: output] * 3}, ValueError, r"one-element tensor, got shape \(1000,\)"),
        ({"input_tensor": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}, TypeError, "it failed on torch.uint8"),
        ({"input_tensor": torch.zeros(0, 3, 64, 64)}, ValueError, r"B >= 1, got \(0, 3, 64, 64\)"),
        ({"input_tensor": torch.full((1, 3, 64, 64), torch.nan)}, ValueError, "activations must be finite"),
        ({"input_tensor": np.zeros((1, 3, 64, 64))}, TypeError, "input_tensor must be a torch.Tensor, .* got nd"),
    ],
)
def test_nothing_is_left_behind(resnet18, images, arguments, error, message):
    resnet18.bn1.train()
    resnet18.conv1.weight.requires_grad_(False)
    resnet18.fc.weight.grad = torch.ones_like(resnet18.fc.weight)
    before = state(resnet18)
    cam = CFCAM(resnet18, [resnet18.layer4[-1]])
    cam.maps(images)
    cam(images)
    assert state(resnet18) == before
    with pytest.raises(error, match=message):
        cam.maps(**{"input_tensor": images, **arguments})
    assert state(resnet18) == before
    assert (resnet18.fc.weight.grad == 1).all()
    assert cam.maps(images).isfinite().all(), "usable after an error"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"target_layers": [nn.Conv2d(1, 1, 1)]}, ValueError, "one of the modules of ResNet, got a Conv2d that is not"),
        ({"target_layers": []}, ValueError, "at least one layer"),
        ({"config": "paper"}, TypeError, "config must be a CFCAMConfig"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"clustering": "kmeans"}, ValueError, "clustering must be one of"),
    ],
)
def test_bad_constructions(resnet18, arguments, error, message):
    with pytest.raises(error, match=message):
        CFCAM(resnet18, **{"target_layers": [resnet18.layer4], **arguments})


def test_layers_without_a_grid(resnet18, images):
    for layer, message in ((resnet18.fc, r"must return \(B, C, h, w\), got \(3, 1000\); pass a reshape_transform"),):
        with pytest.raises(ValueError, match=message):
            CFCAM(resnet18, [layer]).maps(images)


def test_transformer_tokens(images):
    timm = pytest.importorskip("timm", reason="timm is not installed (extra: test)")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64).eval()

    def to_grid(tokens):
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    with CFCAM(model, [model.blocks[-1].norm1], reshape_transform=to_grid) as cam:
        maps = cam.maps(images[:, :, :64])
    assert maps.shape == (3, 64, 64) and maps.isfinite().all()


def test_callable_targets_on_dictionaries(images):
    class Dictionary(Head):
        def forward(self, x):
            return {"logits": super().forward(x), "scale": 2.0}

    model = Dictionary(False).eval()
    cam = CFCAM(model, [model[0]])
    maps = cam.maps(images, targets=[lambda output: output["logits"][2]] * 3)
    assert maps.shape == (3, 96, 64) and cam.outputs["logits"].shape == (3, 5)
    plain = CFCAMConfig(margin_temperature=0)
    assert torch.equal(CFCAM(model, [model[0]], config=plain).maps(images, targets=[2, 2, 2]), maps)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(1, 3, 64, 64),), ValueError, "example_input must be on a CUDA or ROCm device .* got cpu"),
        ((np.zeros(1),), TypeError, "example_input must be a torch.Tensor, got ndarray"),
        ((torch.zeros(1, 3, 64, 64, device="meta"),), ValueError, "got meta"),
    ],
)
def test_capture_needs_a_device(resnet18, arguments, error, message):
    with pytest.raises(error, match=message):
        CFCAM(resnet18, [resnet18.layer4[-1]]).capture(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    "targets, top", [(None, None), (None, 4), ([3, 7, 11], None), ([[3, 7], [11, 2], [5, 999]], None)]
)
def test_capture_replays(resnet18, images, targets, top):
    resnet18.cuda()
    images = images.cuda()
    with_targets = targets is not None
    targets = torch.tensor(targets, device="cuda") if with_targets else None
    cam = CFCAM(resnet18, [resnet18.layer4[-1]])
    replay = cam.capture(images, targets, top)
    for _ in range(3):
        images = torch.rand_like(images)
        targets = targets.roll(1) if with_targets else None
        maps = replay(images, targets).clone()
        assert_close(maps.cpu(), cam.maps(images, targets, top).cpu())
        torch.testing.assert_close(replay.outputs, cam.outputs)
        assert torch.equal(replay.classes, cam.classes)
    with pytest.raises(ValueError, match="captured shape"):
        replay(images[:2], targets)
    with pytest.raises(ValueError, match="targets must be"):
        replay(images, None if with_targets else torch.tensor([3, 7, 11]))


@pytest.mark.parametrize("config", [CFCAMConfig(), CFCAMConfig.paper()], ids=["default", "paper"])
def test_a_grid_of_one_cell_gives_a_flat_map(resnet18, images, config):
    cam = CFCAM(resnet18, [resnet18.avgpool], config=config)
    with pytest.warns(UserWarning, match="no spatial grid, one cell alone: its map is flat") as told:
        maps = cam.maps(images, top=2)
        assert maps.shape == (3, 2, *images.shape[2:]) and torch.equal(maps, maps[..., :1, :1].expand_as(maps))
        cam.maps(images)
    assert len(told) == 1
    assert cam(images).max() == 0
