"""What CF-CAM captures of a model: activations, the gradients of the configuration's score, and the guides."""

import torch

from cfcam_gpu import CFCAMConfig, cf_cam
from cfcam_gpu.capture import HeadCapture


def captured_for(model, layers, images, targets=None, config=None, reshape_transform=None, guide_layer="auto"):
    """The `Capture` that `CFCAM` makes its maps of, by a fresh `HeadCapture`."""
    config = config or CFCAMConfig()
    options = {"guided": config.averages, "margin_temperature": config.margin_temperature}
    return HeadCapture(model, layers, reshape_transform, guide_layer=guide_layer, **options)(images, targets)


def margins(logits, classes, temperature):
    """z_c - T logsumexp_{k != c}(z_k / T) of every row, T a constant: by the formula, class by class."""
    rows = []
    for row, chosen in zip(logits, torch.as_tensor(classes).tolist()):
        others = torch.stack([row[k] for k in range(len(row)) if k != chosen])
        # Of one other class any T gives the same.
        scale = temperature * others.detach().std(correction=0) if len(others) > 1 else 1.0
        rows.append(row[chosen] - scale * torch.logsumexp(others / scale, 0))
    return torch.stack(rows)


def margin_targets(classes, config):
    """The configuration's score of each class as a callable of the image's logits."""
    if not config.margin_temperature:
        return [lambda row, index=index: row[index] for index in classes]
    return [lambda row, index=index: margins(row[None], [index], config.margin_temperature)[0] for index in classes]


def cf_cam_of(captured, output_size, config=None, layer=0, **options):
    """`cf_cam` of one layer of a `Capture`."""
    arguments = captured.activations[layer], captured.gradients[layer], output_size, config
    return cf_cam(*arguments, guide=captured.guides[layer], **options)
