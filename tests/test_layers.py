"""The layer to explain a model at: the default of ten networks, layers by name, and what cannot be explained."""

import pytest
import torch
from torch import nn

from cfcam_gpu import layers, models


class Spy(nn.Module):
    """A small network with what the search has to cope with: reuse, in-place changes, tuples and a dead end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16))
        self.dead_end = nn.Conv2d(16, 16, 1)
        self.identity = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        images.sub_(0.5)
        features = self.act(self.body(self.act(self.first(images))))
        self.dead_end(features)
        return self.fc(self.pool(self.identity(features)).flatten(1))


@pytest.mark.parametrize(
    "spec, name, shape",
    [
        ("demo", "_swish", (1280, 7, 7)),  # runs twice, and everything after it is a summary
        ("torchvision:resnet18:random", "layer4", (512, 7, 7)),  # four names for one tensor
        ("torchvision:densenet121:random", "features", (1024, 7, 7)),  # an in-place ReLU after it
        ("torchvision:vgg11:random", "features", (512, 7, 7)),  # an adaptive pooling that keeps the grid after it
        ("torchvision:mobilenet_v3_small:random", "features", (576, 7, 7)),
        ("torchvision:squeezenet1_1:random", "features", (512, 13, 13)),  # class scores as a map after it
        ("torchvision:swin_t:random", "permute", (768, 7, 7)),
        ("timm:vit_tiny_patch16_224:random", "blocks.11.norm1", (192, 14, 14)),
        ("timm:deit_tiny_distilled_patch16_224:random", "blocks.11.norm1", (192, 14, 14)),  # two prefix tokens
        ("timm:swin_tiny_patch4_window7_224:random", "norm", (768, 7, 7)),  # channels last
    ],
)
def test_default_target_layer(seed, spec, name, shape):
    pytest.importorskip({"demo": "efficientnet_lite_pytorch"}.get(spec, spec.partition(":")[0]))
    loaded = models.load_model(spec)
    example = torch.rand(1, 3, 224, 224)
    target = layers.inspect_target_layer(loaded.model, example)
    assert (target.name, target.shape, target.n_classes) == (name, shape, 1000)
    assert target.module is layers.get_layer(loaded.model, name)

    kept = []
    handle = target.module.register_forward_hook(lambda *args: kept.append(args[2].detach()))
    with torch.no_grad():
        loaded.model(example)
    handle.remove()
    mapped = target.reshape_transform(kept[-1]) if target.reshape_transform else kept[-1]
    assert mapped.shape == (1, *shape)
    if kept[-1].ndim == 3:  # the last token is the grid's last cell
        assert torch.equal(mapped[0, :, -1, -1], kept[-1][0, -1])


def test_the_search_leaves_the_model_and_the_input_as_they_were(seed):
    model, example = Spy().train(), torch.rand(2, 3, 32, 32)
    model.body.eval()
    model.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, kept = [module.training for module in model.modules()], example.clone()
    with torch.inference_mode():
        name, layer, reshape = layers.find_target_layer(model, example)
    assert (name, layer, reshape) == ("act", model.act, None)
    with pytest.raises(ValueError):
        layers.inspect_target_layer(model, example, "dead_end")
    with pytest.raises(RuntimeError):
        layers.find_target_layer(model, torch.rand(1, 4, 32, 32))
    assert torch.equal(example, kept)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


class NoScores(nn.Module):
    def forward(self, images):
        return {"logits": images.mean((2, 3))}


@pytest.mark.parametrize(
    "model, name, message",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), None, "no layer of Sequential keeps a map of the image"),
        (NoScores(), None, r"the model must return scores \(B, n_classes\), got dict"),
        (nn.Conv2d(3, 4, 3), None, r"the model must return scores \(B, n_classes\), got \(1, 4, 30, 30\)"),
        (Spy(), "body.2", "Spy has no layer 'body.2'; did you mean body"),
        (Spy(), "layer4", "Spy has no layer 'layer4'; it begins with first, act, body"),
        (Spy(), "dead_end", "the top score's gradient is zero at layer dead_end; choose an earlier one"),
        (Spy(), "fc", r"layer fc has no map of the image: .* got \(1, 10\)"),
    ],
)
def test_layers_that_cannot_be_explained(model, name, message):
    with pytest.raises(ValueError, match=message):
        layers.inspect_target_layer(model, torch.rand(1, 3, 32, 32), name)


def test_a_last_layer_of_zeros_is_named_as_the_cause():
    model = Spy()
    nn.init.zeros_(model.fc.weight)
    with pytest.raises(ValueError, match=r"gradient is zero at all \d+ layers of Spy .* a last layer of zeros"):
        layers.find_target_layer(model, torch.rand(1, 3, 32, 32))


def test_a_layer_that_did_not_run():
    model = Spy()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="layer spare did not run"):
        layers.inspect_target_layer(model, torch.rand(1, 3, 32, 32), "spare")


def test_a_token_layer_by_name_gets_its_reshape():
    pytest.importorskip("timm")
    loaded = models.load_model("timm:vit_tiny_patch16_224:random")
    target = layers.inspect_target_layer(loaded.model, torch.rand(1, 3, 224, 224), "blocks.5")
    assert target.shape == (192, 14, 14) and repr(target.reshape_transform) == "TokensToMap(n_prefix=1, grid=(14, 14))"
    with pytest.raises(ValueError, match="gradient is zero at layer blocks.11; choose an earlier one"):
        layers.inspect_target_layer(loaded.model, torch.rand(1, 3, 224, 224), "blocks.11")


@pytest.mark.parametrize(
    "shape, image_size, expected",
    [
        ((1, 64, 7, 7), (224, 224), (64, 7, 7)),
        ((1, 7, 7, 64), (224, 224), (64, 7, 7)),
        ((1, 64, 5, 10), (160, 320), (64, 5, 10)),
        ((1, 5, 10, 64), (160, 320), (64, 5, 10)),
        ((1, 51, 64), (160, 320), (64, 5, 10)),
        ((1, 50, 64), (160, 320), (64, 5, 10)),
        ((1, 201, 64), (224, 224), (64, 14, 14)),  # a class token and four registers
        ((1, 64, 1, 1), (224, 224), None),
        ((1, 3, 197, 64), (224, 224), None),  # the queries of three heads
        ((1, 2, 64), (224, 224), None),  # one patch
        ((1, 64), (224, 224), None),
    ],
)
def test_layouts(shape, image_size, expected):
    found, reshape = layers._layout(shape, image_size)
    assert found == (expected is not None)
    if found:
        tensor = torch.zeros(shape)
        assert (reshape(tensor) if reshape else tensor).shape[1:] == expected


def test_the_names_that_models_had_are_still_there():
    for name in ("TargetLayer", "TokensToMap", "channels_last_to_map", "find_target_layer", "get_layer"):
        assert getattr(models, name) is getattr(layers, name)
    assert models.inspect_target_layer is layers.inspect_target_layer
