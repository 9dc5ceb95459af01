"""The float64 reference behind the backends' interface: tensors in, tensors out, on the device they came from."""

import torch

from cfcam_gpu import reference


def cf_cam(activations, gradients, output_size, config, engine, guide=None):
    """All stages for a batch; see `reference.cf_cam`. Maps, weights and eps are float64."""
    guide = None if guide is None else _float64(guide)
    result = reference.cf_cam(_float64(activations), _float64(gradients), output_size, config, guide)
    return tuple(torch.from_numpy(array).to(activations.device) for array in result)


def cluster_and_weigh(activations, gradients, config, engine):
    """Labels int32 (B, C), weights and eps float64 (B, C) and (B,)."""
    return cf_cam(activations, gradients, activations.shape[2:], config, engine)[1:]


def cluster_channels(activations, config, engine):
    """Labels int32 (B, C) and eps float64 (B,)."""
    images = [reference.cluster_channels(image, config) for image in _float64(activations)]
    labels = torch.stack([torch.from_numpy(labels) for labels, _ in images])
    eps = torch.tensor([eps for _, eps in images], dtype=torch.float64)
    return labels.to(activations.device), eps.to(activations.device)


def pool_gradients(gradients, config):
    """The gradients themselves: the reference filters them whole."""
    return gradients


def _float64(tensor):
    return tensor.detach().double().cpu().numpy()
