"""The guide of a target layer: which layer it is, that it is the tensor of the same pass, and that nothing is left."""

import pytest
import torch
from torch import nn

from cfcam_gpu import guides
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.guides import Guides

IMAGES = (2, 3, 64, 64)


def outputs_of(model, module, images):
    """What the module returns in a plain forward pass, one tensor a run."""
    seen = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append(output.detach().clone()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen


def hooks_on(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Stages(nn.Module):
    """A stem, and stages that halve the grid; the last two are the head."""

    def __init__(self, *stages, classes=5):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.fc = nn.LazyLinear(classes)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def conv(c_in, c_out, stride=1):
    return nn.Conv2d(c_in, c_out, 3, stride, 1)


def initialised(model):
    model.eval()(torch.rand(IMAGES))
    return model


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_large", "swin_t", "vit"])
def test_the_automatic_guide(name, seed):
    pytest.importorskip("torchvision", reason="torchvision is not installed (extra: test)")
    import networks

    from cfcam_gpu.layers import find_target_layer

    expected = {
        "resnet18": ("layer3", 256),
        "densenet121": ("features.denseblock3", 1024),
        "mobilenet_v3_large": ("features.12", 112),
        "swin_t": ("features.5", 384),
        "vit": (None, None),  # all its grids are the same
    }[name]
    model = networks.vit(image_size=224) if name == "vit" else networks.build(name)
    nn.init.normal_(list(model.modules())[-1].weight, std=0.02)  # a ViT's head begins as zeros
    images = torch.randn(1, 3, 224, 224)
    target, layer, reshape = find_target_layer(model, images)
    capture = HeadCapture(model, [layer], reshape, guide_layer="auto")
    assert capture.guide_names is None
    for _ in range(2):  # found, and then known
        (guide,) = capture(images).guides
        assert capture.guide_names == [expected[0] or target]
        if expected[0] is None:
            assert guide is None
            continue
        assert guide.shape == (1, expected[1], 14, 14) and not guide.requires_grad
        (plain,) = outputs_of(model, model.get_submodule(expected[0]), images)
        assert torch.equal(guide, plain if name != "swin_t" else plain.permute(0, 3, 1, 2))
    assert hooks_on(model) == 0


def test_the_guide_changes_nothing_else(resnet18):
    images = torch.randn(IMAGES)
    layers = [resnet18.layer3[-1], resnet18.layer4]
    plain = HeadCapture(resnet18, layers)(images)
    guided = HeadCapture(resnet18, layers, guide_layer="auto")
    for _ in range(2):
        captured = guided(images)
        assert torch.equal(captured.outputs, plain.outputs)
        for pair in (*zip(captured.activations, plain.activations), *zip(captured.gradients, plain.gradients)):
            assert torch.equal(*pair)
    assert guided.guide_names == ["layer2", "layer3"]
    assert [tuple(guide.shape) for guide in captured.guides] == [(2, 128, 8, 8), (2, 256, 4, 4)]


def test_guides_of_ones_own(resnet18):
    images = torch.randn(IMAGES)
    layers = [resnet18.layer3, resnet18.layer4]
    capture = HeadCapture(resnet18, layers, guide_layer=[resnet18.layer1, None])
    assert capture.guide_names == ["layer1", "layer4"]
    first, second = capture(images).guides
    assert second is None and torch.equal(first, outputs_of(resnet18, resnet18.layer1, images)[0])
    both = HeadCapture(resnet18, layers, guide_layer=resnet18.layer2)
    assert both.guide_names == ["layer2"] * 2
    assert all(torch.equal(*both(images).guides) for _ in range(2))
    off = HeadCapture(resnet18, layers, guide_layer="auto", guided=False)
    assert off(images).guides == (None, None) and off.guide_names == ["layer3", "layer4"]


def test_the_last_run_before_the_target(seed):
    """A shared layer is caught as it was before the target layer, and is no automatic guide."""
    act = nn.ReLU()
    model = initialised(Stages(conv(3, 4), act, conv(4, 6, 2), act, conv(6, 8, 2), act, conv(8, 9), act))
    images = torch.rand(IMAGES)
    capture = HeadCapture(model, [model.stages[4]], guide_layer=act)
    assert torch.equal(capture(images).guides[0], outputs_of(model, act, images)[1])
    found = HeadCapture(model, [model.stages[4]], guide_layer="auto")
    assert torch.equal(found(images).guides[0], outputs_of(model, model.stages[2], images)[0])
    assert found.guide_names == ["stages.2"]


def test_changes_in_place_behind_the_guide(seed):
    """The guide is what the layer returned, also where the model changes that tensor afterwards."""
    model = initialised(Stages(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(4, 6, 2)))
    images, guide, target = torch.rand(IMAGES), model.stages[1], model.stages[3]
    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        capture = HeadCapture(model, [target], guide_layer=guide)
        with grad():
            found = [capture(images).guides[0] for _ in range(2)]
        for each in found:
            assert torch.equal(each, outputs_of(model, guide, images)[0])
            assert (each < 0).any()


def test_the_outermost_of_the_layers_with_that_grid(seed):
    block = nn.Sequential(conv(6, 12), conv(12, 8, 2))
    model = initialised(Stages(conv(3, 4), nn.Sequential(conv(4, 6, 2), nn.ReLU()), block))
    capture = HeadCapture(model, [block], guide_layer="auto")
    assert capture(torch.rand(IMAGES)).guides[0].shape == (2, 6, 32, 32)
    assert capture.guide_names == ["stages.1"]


def test_odd_and_oblong_grids(seed):
    model = initialised(Stages(conv(3, 4, 2), conv(4, 6, 2), conv(6, 8, 2)))
    capture = HeadCapture(model, [model.stages[2]], guide_layer="auto")
    for size in ((66, 130), (34, 65), (64, 40), (130, 258)):
        captured = capture(torch.rand(1, 3, *size))
        (plain,) = outputs_of(model, model.stages[1], torch.rand(1, 3, *size))
        assert captured.guides[0].shape == plain.shape
    assert capture.guide_names == ["stages.1"]


def test_a_guide_that_does_not_fit_other_inputs_is_found_again(seed):
    """A target layer with a fixed grid: what was twice its sides for large inputs is too small for others."""
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(8), conv(6, 8))
    model = initialised(Stages(conv(3, 4), conv(4, 6, 2), nn.MaxPool2d(2), pooled))
    capture = HeadCapture(model, [pooled], guide_layer="auto")
    assert capture(torch.rand(IMAGES)).guides[0].shape == (2, 6, 16, 16)
    assert capture(torch.rand(2, 3, 24, 24)).guides[0].shape == (2, 4, 24, 24)
    assert hooks_on(model) == 0


def test_one_cell_says_nothing_of_other_images(seed):
    """What guides an image does not depend on the images that came before it."""
    model = initialised(Stages(*(conv(3 if not n else 4, 4, 2) for n in range(4))))
    small, large = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 64, 64)
    expected = outputs_of(model, model.stages[2], large)[0]
    for order in ((small, large, small), (large, small, large)):
        capture = HeadCapture(model, [model.stages[3]], guide_layer="auto")
        for images in order:
            (guide,) = capture(images).guides
            if images is small:
                assert guide is None
            else:
                assert torch.equal(guide, expected) and capture.guide_names == ["stages.2"]


def test_a_guide_that_was_not_held(seed, monkeypatch):
    """The pass is repeated for it, once in the object's life, with the same result."""
    model = initialised(Stages(conv(3, 4), conv(4, 8), conv(8, 8, 2), conv(8, 8, 2), conv(8, 8, 2)))
    images, passes = torch.rand(IMAGES), []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    for held, n_passes in ((1, [1, 1]), (0, [2, 1])):
        monkeypatch.setattr(guides, "HELD_BYTES", 0)
        monkeypatch.setattr(guides, "HELD_OF_LARGEST", held)
        capture = HeadCapture(model, [model.stages[2], model.stages[4]], guide_layer="auto")
        for expected in n_passes:
            passes.clear()
            found = capture(images, targets=[lambda output: output[1]] * 2).guides
            assert len(passes) == expected
            assert capture.guide_names == ["stages.1", "stages.3"]
            for guide, stage in zip(found, (1, 3)):
                assert torch.equal(guide, outputs_of(model, model.stages[stage], images)[0])
    handle.remove()
    assert hooks_on(model) == 0


def test_few_outputs_are_held(seed):
    """Of all that a pass looks at, as many bytes at once as there is room for, and of a block its end."""
    block = lambda c_in, c_out: nn.Sequential(nn.Sequential(conv(c_in, c_out, 2), nn.Tanh()), nn.Sequential(nn.Tanh()))
    model = initialised(Stages(conv(3, 8), block(8, 16), block(16, 32), block(32, 64), conv(64, 8, 2)))
    known = Guides(["auto"], {}, None)
    within = known.begin()
    handles, most = within.register([(name, module) for name, module in model.named_modules() if name]), []

    def count(*_):
        most.append(sum(kept.tensor.nbytes for kept in within._held.values()))

    handles += [module.register_forward_hook(count) for module in model.modules()]
    images = torch.rand(1, 3, 512, 512)
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    largest = 8 * 512 * 512 * 4
    assert largest / 2 < max(most) <= guides.HELD_OF_LARGEST * largest
    assert {known._names[module] for module in within._held} >= {"stages.2", "stages.3"}


def test_rows_that_are_not_the_images_are_no_guide(seed):
    class Views(Stages):
        def forward(self, x):
            straight, flipped = self.stages[0](torch.cat([x, x.flip(-1)])).chunk(2)
            return self.fc(self.stages[1](straight + flipped).mean((2, 3)))

    model = initialised(Views(conv(3, 4), conv(4, 6, 2)))
    capture = HeadCapture(model, [model.stages[1]], guide_layer="auto")
    assert capture(torch.rand(IMAGES)).guides == (None,) and capture.guide_names == ["stages.1"]


def test_frozen_and_captured_without_autograd(resnet18):
    images = torch.randn(IMAGES)
    expected = HeadCapture(resnet18, [resnet18.layer4], guide_layer="auto")(images)
    resnet18.requires_grad_(False)
    with torch.inference_mode():
        captured = HeadCapture(resnet18, [resnet18.layer4], guide_layer="auto")(images)
    assert torch.equal(captured.guides[0], expected.guides[0])
    assert torch.equal(captured.gradients[0], expected.gradients[0])


def test_half_precision_and_channels_last(resnet18):
    images = torch.randn(IMAGES)
    model = resnet18.to(torch.bfloat16, memory_format=torch.channels_last)
    (guide,) = HeadCapture(model, [model.layer4], guide_layer="auto")(images.bfloat16()).guides
    assert guide.dtype == torch.bfloat16 and torch.equal(guide, outputs_of(model, model.layer3, images.bfloat16())[0])


def test_checkpointed_heads(seed):
    """Parts of the forward run again in the backward; the guide stays that of the forward."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Stages):
        def forward(self, x):
            x = self.stages[0](x)
            x = checkpoint(lambda y: self.stages[2](self.stages[1](y)), x, use_reentrant=False)
            return self.fc(x.mean((2, 3)))

    model = initialised(Checkpointed(conv(3, 4), conv(4, 6, 2), conv(6, 8, 2)))
    images = torch.rand(IMAGES)
    capture = HeadCapture(model, [model.stages[2]], guide_layer="auto")
    for _ in range(2):
        assert torch.equal(capture(images).guides[0], outputs_of(model, model.stages[1], images)[0])


@pytest.mark.parametrize(
    "guide, error, message",
    [
        ("layer3", TypeError, r"guide_layer must be a module of the model, \"auto\" or None, got 'layer3' at \[0\]"),
        (3, TypeError, r"guide_layer must be .* got int at \[0\]"),
        ([None, None], ValueError, "guide_layer must hold one guide per target layer: 1, got 2"),
        (nn.ReLU(), ValueError, "guide layer must be one of the modules of ResNet, got a ReLU that is not"),
    ],
)
def test_bad_guides(guide, error, message, resnet18):
    with pytest.raises(error, match=message):
        HeadCapture(resnet18, [resnet18.layer4], guide_layer=guide)


@pytest.mark.parametrize(
    "guide, target, message",
    [
        ("avgpool", "layer3", "guide layer 'avgpool' must return a floating-point tensor before target layer 'layer3'"),
        ("layer4", "layer3", "guide layer 'layer4' must return .* before target layer 'layer3' runs; it did not"),
        ("aux", "layer4", "guide layer 'aux' must return .* before target layer 'layer4' runs"),
        ("avgpool", "fc4", r"grid of at least the size \(2, 2\) of target layer 'fc.2', got \(1, 1\)"),
    ],
)
def test_guides_that_do_not_serve(guide, target, message, resnet18):
    resnet18.aux = nn.Conv2d(3, 3, 1)  # never runs
    if target == "fc4":
        resnet18.fc = nn.Sequential(nn.Linear(512, 16), nn.Unflatten(1, (4, 2, 2)), conv(4, 4), nn.Flatten(1))
        resnet18.fc4 = resnet18.fc[2]
    capture = HeadCapture(resnet18, [getattr(resnet18, target)], guide_layer=getattr(resnet18, guide))
    with pytest.raises(ValueError, match=message):
        capture(torch.randn(IMAGES))
    assert hooks_on(resnet18) == 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in resnet18.parameters())
