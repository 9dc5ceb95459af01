"""What CF-CAM captures of a model: activations, the gradients of the configuration's score, and the guides."""

from cfcam_gpu import CFCAMConfig, cf_cam
from cfcam_gpu.capture import HeadCapture


def captured_for(model, layers, images, targets=None, config=None, reshape_transform=None, guide_layer="auto"):
    """The `Capture` that `CFCAM` makes its maps of, by a fresh `HeadCapture`."""
    config = config or CFCAMConfig()
    options = {"guided": config.averages, "margin_temperature": config.margin_temperature}
    return HeadCapture(model, layers, reshape_transform, guide_layer=guide_layer, **options)(images, targets)


def cf_cam_of(captured, output_size, config=None, layer=0, **options):
    """`cf_cam` of one layer of a `Capture`."""
    arguments = captured.activations[layer], captured.gradients[layer], output_size, config
    return cf_cam(*arguments, guide=captured.guides[layer], **options)
