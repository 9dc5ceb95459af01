"""pytorch-grad-cam's AblationCAM, with the network's head alone run for every channel."""

from itertools import chain

import numpy as np
import pytorch_grad_cam as original
import torch
import tqdm
from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from cfcam_gpu.adapters.common import in_blocks
from cfcam_gpu.adapters.hooked import Hooked
from cfcam_gpu.head import Head, record_head

ABLATION_VALUE = 1e7
"""What the original takes off the smallest activation where that is not 0."""


class AblationCAM(Hooked, original.AblationCAM):
    """pytorch-grad-cam's AblationCAM on the recorded head.

    The weights are those of the original, in batches of its ``batch_size``, but only the part of the network behind the
    target layer runs for them (`cfcam_gpu.head`). Where that cannot be recorded, and for ablation layers other than the
    library's for grids and for transformers, the original's code runs.

    Source: jacobgil/pytorch-grad-cam 1.5.7, ``AblationCAM`` and ``AblationLayer``.
    """

    _heads: dict[torch.nn.Module, Head] | None = None

    def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
        """The weights as NumPy float32 (B, C): what the score loses without a channel, as a part of it."""
        channels_last = type(self.ablation_layer) is AblationLayerVit
        if not channels_last and type(self.ablation_layer) is not AblationLayer:
            return super().get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        head = self._head_of(target_layer, input_tensor)
        if head.reason is not None:
            return super().get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        self.activations = head.activations
        original_scores = np.float32([target(output).cpu().item() for target, output in zip(targets, head.outputs)])
        weights = []
        with torch.no_grad():
            for image, (target, _) in enumerate(zip(targets, input_tensor)):
                channels = self.ablation_layer.activations_to_be_ablated(
                    activations[image, :], self.ratio_channels_to_ablate
                )
                scores = self._scores_without(head, image, channels, target, channels_last)
                weights += self.assemble_ablation_scores(scores, original_scores[image], channels, activations.shape[1])
        weights = np.float32(weights).reshape(activations.shape[:2])
        return (original_scores[:, None] - weights) / original_scores[:, None]

    def _head_of(self, layer, input_tensor):
        """The head behind the layer, with the activations and outputs of these images."""
        heads = self._heads = {} if self._heads is None else self._heads
        head = heads.get(layer)
        if head is not None and head.reason is None:
            head = head.renewed(self.model, input_tensor)
        if head is None or head.reason is not None:
            head = record_head(self.model, layer, input_tensor)
        heads[layer] = head
        return head

    def _scores_without(self, head, image, channels, target, channels_last):
        """The target's score of the image without each of the channels."""
        activations = head.activations[image]
        smallest = activations.amin()
        # The original sets one channel of a batch after the other, each below the smallest value that it then finds.
        ablated = [smallest]
        for _ in range(min(self.batch_size, len(channels))):
            ablated.append(ablated[-1] - ABLATION_VALUE)
        values = torch.stack(ablated[1:]).where(smallest != 0, torch.zeros_like(smallest))
        batch = activations[None].repeat(len(values), *[1] * activations.ndim)
        of_channels = batch.movedim(-1, 1) if channels_last else batch
        whole = activations.movedim(-1, 0) if channels_last else activations
        channels = torch.as_tensor(np.asarray(channels, np.int64), device=batch.device)

        def run(rows):
            return _scores(head(batch[rows], image), target)

        scores = []
        for start in tqdm.tqdm(range(0, len(channels), self.batch_size)):
            without = channels[start : start + self.batch_size]
            rows = torch.arange(len(without), device=batch.device)
            of_channels[rows, without] = values[: len(without)].reshape(-1, *[1] * (of_channels.ndim - 2))
            scores += chain.from_iterable(in_blocks(run, len(without), "AblationCAM"))
            of_channels[rows, without] = whole[without]
        return scores


def _scores(outputs, target):
    """The target's score of each row of outputs, as floats."""
    if type(target) is ClassifierOutputTarget and isinstance(outputs, torch.Tensor) and outputs.ndim == 2:
        return outputs[:, target.category].tolist()
    return [target(output).cpu().item() for output in outputs]
