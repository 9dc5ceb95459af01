"""pytorch-grad-cam's ScoreCAM, without the channels that mask every image alike and without its large arrays."""

import pytorch_grad_cam as original
import torch
import tqdm

from cfcam_gpu.adapters.ablation import _scores
from cfcam_gpu.adapters.common import LOG
from cfcam_gpu.adapters.hooked import Hooked

BATCH_SIZE = 16
"""The original's, for objects without a ``batch_size`` of their own."""


class ScoreCAM(Hooked, original.ScoreCAM):
    """pytorch-grad-cam's ScoreCAM.

    Channels that are 0 everywhere mask the whole image, and the score without any image is computed once for all of
    them. Masks are made one batch at a time, on the model's device (the original holds all masked images at once, 1.2
    GB for one image of 224 pixels and 2048 channels). On a CPU the masked images are in channels-last order, in which
    convolutions are faster. The scores differ from the original's as they do with another ``batch_size``: by the
    rounding of the network's sums.

    Where memory for a batch runs out on a device, the batch is halved, and a log line says so.

    Source: jacobgil/pytorch-grad-cam 1.5.7, ``ScoreCAM``.
    """

    def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
        """The weights as NumPy float32 (B, C): the softmax of the scores of the image masked with each channel."""
        if any(module.training for module in self.model.modules()):  # scores may depend on what else is in the batch
            return super().get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        channels = torch.from_numpy(activations).to(self.device)
        scores = []
        with torch.no_grad():
            for target, image, of_image in zip(targets, input_tensor, channels):
                scores += self._scores_of(image, of_image, target)
        scores = torch.Tensor(scores).view(activations.shape[:2])
        return torch.nn.Softmax(dim=-1)(scores).numpy()

    def _scores_of(self, image, channels, target):
        """The target's score of the image (C, H, W) masked with each of the channels (n, h, w), as floats."""
        blank = ~channels.flatten(1).any(1)
        run = ~blank | (blank.cumsum(0) == 1)  # of the blank ones the first
        channels = channels[run]
        scores = []
        size = getattr(self, "batch_size", BATCH_SIZE)
        with tqdm.tqdm(total=-(-len(channels) // size)) as bar:
            while len(scores) < len(channels):
                part = channels[len(scores) : len(scores) + size]
                try:
                    scores += _scores(self.model(_masked(image, part)), target)
                except torch.cuda.OutOfMemoryError:
                    if size == 1:
                        raise
                    size //= 2
                    LOG.warning("ScoreCAM: out of memory, goes on with batches of %d", size)
                else:
                    bar.update()
        found = torch.tensor(scores, dtype=torch.float64)
        # Each channel's place among those that were run; the blank ones have the first blank one's.
        places = run.cumsum(0).sub_(1).cpu()
        blank = blank.cpu()
        if blank.any():
            places[blank] = places[blank.nonzero()[0, 0]]
        return found[places].tolist()


def _masked(image, channels):
    """The image (C, H, W) times each of the channels (n, h, w), resized and scaled to [0, 1]: (n, C, H, W)."""
    masks = torch.nn.UpsamplingBilinear2d(size=image.shape[-2:])(channels[None])[0]
    low, high = masks.flatten(1).aminmax(dim=1)
    masks = (masks - low[:, None, None]) / (high - low + 1e-8)[:, None, None]
    masked = image * masks[:, None]
    return masked.contiguous(memory_format=torch.channels_last) if masked.device.type == "cpu" else masked
