"""What models take: several inputs, images of any dtype and any number of channels."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cfcam_gpu import CFCAM
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.inputs import check_inputs
from cfcam_gpu.methods import ScoreCAM

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


class Two(nn.Module):
    """Takes text before images, and a flag."""

    def __init__(self, channels=3):
        super().__init__()
        self.body, self.text = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU()), nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, input_ids, pixel_values, attention_mask=None, double=False):
        words = self.text(input_ids)
        if attention_mask is not None:
            words = words * attention_mask[..., None]
        features = self.body(pixel_values).mean((2, 3)) * words.mean(1)
        return self.fc(2 * features if double else features)


@pytest.fixture
def problem():
    model = Two().double().eval()
    return model, torch.randint(11, (2, 6)), torch.randn(2, 3, 14, 10, dtype=torch.float64)


def by_hand(model, ids, images, classes, **options):
    """d score / d body(images) by a full backward."""
    kept = []

    def keep(layer, inputs, output):
        output.retain_grad()
        kept.append(output)

    handle = model.body.register_forward_hook(keep)
    scores = model(ids, images, **options)
    handle.remove()
    sum(scores[row, index] for row, index in enumerate(classes)).backward()
    model.zero_grad()
    return kept[0].grad


class Tagged(torch.Tensor):
    """As loaders have them: all that is computed of it is of its class."""


@pytest.mark.parametrize("inplace", [False, True])
def test_a_loaders_own_class_of_tensors(problem, inplace):
    model, ids, images = problem
    model.body[1].inplace = inplace
    cam = CFCAM(model, [model.body[0]])
    expected = cam.explain((ids, images), [1, 3])
    tagged = images.as_subclass(Tagged)
    for given in ((ids, tagged), (ids.as_subclass(Tagged), tagged)):
        found = cam.explain(given, [1, 3])
        assert type(found.maps) is type(found.outputs) is torch.Tensor and type(given[1]) is Tagged
        assert torch.equal(found.maps, expected.maps) and torch.equal(found.outputs, expected.outputs)
    assert torch.equal(cam.maps(ids, pixel_values=tagged, targets=[1, 3]), expected.maps)


def test_tuple_dict_and_keywords(problem):
    model, ids, images = problem
    mask = torch.rand(2, 6) > 0.3
    mask[:, 0] = True
    cam = CFCAM(model, [model.body])
    expected = by_hand(model, ids, images, (1, 3), attention_mask=mask, double=True)
    capture = HeadCapture(model, [model.body])((ids, images, mask, True), [1, 3])
    torch.testing.assert_close(capture.gradients[0], expected, rtol=0, atol=1e-15)
    maps = cam.maps((ids, images, mask, True), [1, 3])
    assert maps.shape == (2, 14, 10)
    named = {"input_ids": ids, "pixel_values": images, "attention_mask": mask, "double": True}
    for other in (
        cam.maps(named, [1, 3]),
        cam.maps(collections.UserDict(named), targets=[1, 3]),
        cam.maps(targets=[1, 3], **named),
        cam.maps(ids, [1, 3], pixel_values=images, attention_mask=mask, double=True),
        cam.maps((ids, images), [1, 3], attention_mask=mask, double=True),
        cam.maps({"input_ids": ids, "double": True}, [1, 3], pixel_values=images, attention_mask=mask),
    ):
        assert torch.equal(other, maps)
    assert cam(named, [1, 3]).shape == (2, 14, 10)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(expected, by_hand(model, ids, images, (1, 3)))


def test_a_batch_is_its_images(problem):
    model, ids, images = problem
    cam = CFCAM(model, [model.body])
    maps = cam.maps((ids, images), [1, 3])
    for row, index in enumerate((1, 3)):
        alone = cam.maps((ids[row : row + 1], images[row : row + 1]), [index])
        torch.testing.assert_close(alone[0], maps[row], rtol=0, atol=1e-9)


def test_the_inputs_are_left_alone():
    class InPlace(Two):
        def forward(self, input_ids, pixel_values):
            return super().forward(input_ids.clamp_(max=3), pixel_values.mul_(2))

    model, ids, images = InPlace().eval(), torch.full((2, 3), 9), torch.randn(2, 3, 9, 9)
    before = images.clone()
    CFCAM(model, [model.body]).maps({"input_ids": ids, "pixel_values": images})
    assert (ids == 9).all() and torch.equal(images, before)


def test_a_model_that_takes_one_dict(problem):
    model, ids, images = problem

    class OneDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, batch):
            return self.net(batch["text"], batch["views"][0])

    outer = OneDict()
    maps = CFCAM(outer, [model.body]).maps(({"text": ids, "views": [images]},), [0, 2])
    assert torch.equal(maps, CFCAM(model, [model.body]).maps((ids, images), [0, 2]))


def test_which_input_is_the_images():
    wide, tall, video = torch.rand(2, 3, 4, 9), torch.rand(2, 3, 9, 4), torch.rand(2, 3, 5, 6, 7)
    mask, age = torch.ones(2, 1, 8, 8, dtype=torch.bool), torch.rand(2, 1)
    for inputs, keywords, images in (
        (tall, None, tall),
        (age, None, age),  # alone: the model knows
        (tall, {"view": wide}, tall),
        (video, {"view": wide}, video),
        (age, {"first": wide, "second": tall}, wide),
        ((mask, age, tall, wide), None, tall),
        ({"mask": mask, "nested": {"x": [wide]}, "later": tall}, None, wide),
        ((age, video), None, video),
    ):
        assert check_inputs(inputs, keywords).images is images


def test_integer_images():
    class Normalising(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.double() / 255 - 0.5)

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    net = net.double().eval()
    pixels = torch.randint(256, (2, 3, 12, 12), dtype=torch.uint8)
    maps = CFCAM(Normalising(net), [net[1]]).maps(pixels, [1, 2])
    assert torch.equal(maps, CFCAM(net, [net[1]]).maps(pixels.double() / 255 - 0.5, [1, 2]))


class ChannelsLast(nn.Module):
    """Takes (B, H, W, C) pixels, as many pipelines load them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixels):
        return self.net(pixels.movedim(-1, 1).double() / 255 - 0.5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_images_with_their_channels_last(channels, dtype):
    body = nn.Sequential(nn.Conv2d(channels, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.Softplus())
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double().eval()
    pixels = torch.randint(256, (2, 20, 28, channels)).to(dtype)
    images = pixels.movedim(-1, 1).double() / 255 - 0.5
    model = ChannelsLast(net)
    for options in ({}, {"target_layers": [body]}):
        cam = CFCAM(model, **options)
        assert torch.equal(cam.maps(pixels, [1, 2]), CFCAM(net, [body]).maps(images, [1, 2]))
        assert cam.target_names == ["net.0"]
    torch.testing.assert_close(ScoreCAM(model, [body]).maps(pixels, [1, 2]), _masked_by_hand(model, body, pixels))


def _masked_by_hand(model, body, pixels):
    maps = []
    for row, target in zip(pixels, (1, 2)):
        channels = body(row.movedim(-1, 0)[None].double() / 255 - 0.5)[0].detach()
        masks = F.interpolate(channels[None], row.shape[:2], mode="bilinear", align_corners=True)[0]
        low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
        masked = row * ((masks - low) / (high - low + 1e-8))[..., None]
        weights = model((masked if row.is_floating_point() else masked.round()).to(row.dtype))[:, target].softmax(0)
        grid = torch.einsum("c,chw->hw", weights.detach(), channels).relu()
        size = tuple(row.shape[:2])
        of_image = F.interpolate(grid[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        low, high = of_image.amin(), of_image.amax()
        maps.append((of_image - low) / (high - low))
    return torch.stack(maps)


def test_channels_first_of_an_image_four_pixels_wide():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    net = nn.Sequential(nn.Conv2d(9, 6, 3, 1, 1), nn.ReLU(), *head)
    images = torch.randn(2, 9, 64, 3)  # looks like (B, H, W, C)
    for options in ({}, {"target_layers": [net[1]]}):
        assert CFCAM(net.eval(), **options).maps(images, [1, 2]).shape == (2, 64, 3)


def test_another_error_of_integer_images_is_the_models_own():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4)).eval()
    model.register_forward_pre_hook(lambda layer, inputs: inputs[0].float())
    with pytest.raises(RuntimeError, match="shapes|size"):
        CFCAM(model, [model[1]]).maps(torch.randint(256, (2, 3, 12, 12), dtype=torch.uint8))


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_any_number_of_channels(channels):
    model = Two(channels).double().eval()
    ids, images = torch.randint(11, (2, 6)), torch.randn(2, channels, 9, 12, dtype=torch.float64)
    capture = HeadCapture(model, [model.body])((ids, images), [3, 0])
    torch.testing.assert_close(capture.gradients[0], by_hand(model, ids, images, (3, 0)), rtol=0, atol=1e-15)
    assert CFCAM(model, [model.body]).maps((ids, images), [3, 0]).shape == (2, 9, 12)


@pytest.mark.parametrize(
    "arguments, keywords, error, message",
    [
        ((), {}, TypeError, "input_tensor must be a torch.Tensor, or a tuple or dict .*, got NoneType"),
        (([torch.rand(2, 3, 8, 8)],), {}, TypeError, r"got list; for a model that takes one list write \(inputs,\)"),
        (({0: torch.rand(2, 3, 8, 8)},), {}, TypeError, r"names of the model's arguments, got 0; .* \(inputs,\)"),
        (({"input_ids": 1},), {"input_ids": 1}, TypeError, "not name an argument twice, got 'input_ids'"),
        (({"input_ids": torch.rand(2, 3)},), {}, ValueError, r"images, \(B, C, H, W\), got \(2, 3\) torch.float32"),
        ((("text",),), {}, ValueError, "one of the inputs must be the batch of images, .* got no tensor"),
        ((torch.rand(2, 3, 8, 8),), {"target": [1, 2]}, TypeError, r"Two.forward \(input_ids, .*\), got 'target'"),
        ((), {"pixel_values": torch.rand(0, 3, 8, 8)}, ValueError, r"B >= 1, got \(0, 3, 8, 8\)"),
    ],
)
def test_bad_inputs(problem, arguments, keywords, error, message):
    cam = CFCAM(problem[0], [problem[0].body])
    with pytest.raises(error, match=message):
        cam.maps(*arguments, **keywords)
    assert not any(module._forward_hooks for module in problem[0].modules())


def test_a_graph_takes_one_tensor(problem):
    model, ids, images = problem
    with pytest.raises(TypeError, match="example_input must be a torch.Tensor, got tuple"):
        CFCAM(model, [model.body]).capture((ids, images))
