"""pytorch-grad-cam's ScoreCAM, without the channels that mask every image alike and without its large arrays."""

import pytorch_grad_cam as original
import torch
import tqdm

from cfcam_gpu.adapters.ablation import _scores
from cfcam_gpu.adapters.hooked import Hooked
from cfcam_gpu.perturbed import block_size, n_masks, scores_masked

BATCH_SIZE = 16
"""The original's, for objects without a ``batch_size`` of their own."""


class ScoreCAM(Hooked, original.ScoreCAM):
    """pytorch-grad-cam's ScoreCAM.

    Channels that are 0 everywhere mask the whole image, and the score without any image is computed once for all of
    them. Masks are made one batch at a time, on the model's device (the original holds all masked images at once, 1.2
    GB for one image of 224 pixels and 2048 channels). On a CPU the batches are as small as its cache likes, at most of
    ``batch_size``, and in channels-last order, in which convolutions are faster. The scores differ from the original's
    as they do with another ``batch_size``: by the rounding of the network's sums.

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
        size = block_size(image[None], getattr(self, "batch_size", BATCH_SIZE))
        score = lambda images: torch.tensor(_scores(self.model(images), target), dtype=torch.float64)
        with tqdm.tqdm(total=-(-n_masks(channels) // size)) as bar:
            return scores_masked(image, channels, score, size=size, done=bar.update).tolist()
