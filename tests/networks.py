"""torchvision's networks with random weights, where their own constructors take longer than what is tested."""

from collections import OrderedDict

from torch import nn
from torchvision import models


def build(name):
    """A network of that name in eval mode; a VGG-16 has a head without the 120 million weights of its own."""
    if name != "vgg16":
        return models.get_model(name, weights=None).eval()
    features = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=False)
    head = {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(512, 1000)}
    return nn.Sequential(OrderedDict(features=features, **head)).eval()


def vit(image_size, layers=4):
    """A ViT with patches of 16 pixels, a sixth as wide as ViT-B."""
    size = {"num_layers": layers, "num_heads": 4, "hidden_dim": 128, "mlp_dim": 256}
    return models.VisionTransformer(image_size=image_size, patch_size=16, **size).eval()


def whole_network(model, layer, images, activations):
    """The outputs of the whole network, whose layer gives these activations."""
    handle = layer.register_forward_hook(lambda *_: activations)
    try:
        return model(images)
    finally:
        handle.remove()
