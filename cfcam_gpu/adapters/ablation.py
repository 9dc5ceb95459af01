"""pytorch-grad-cam's AblationCAM, with the network's head alone run for every channel."""

import numpy as np
import pytorch_grad_cam as original
import torch
import tqdm
from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
from pytorch_grad_cam.utils.find_layers import replace_layer_recursive
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from cfcam_gpu.adapters.hooked import Hooked
from cfcam_gpu.head import Head, record_head
from cfcam_gpu.perturbed import ablated_values, scores_without


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
            return self._by_the_original(input_tensor, target_layer, targets, activations, grads)
        head = self._head_of(target_layer, input_tensor)
        if head.reason is not None:
            return self._by_the_original(input_tensor, target_layer, targets, activations, grads)
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

    def _by_the_original(self, input_tensor, target_layer, targets, activations, grads):
        try:
            return super().get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        except BaseException:  # after which the original leaves its layer and its hook on the model
            replace_layer_recursive(self.model, self.ablation_layer, target_layer)
            hooks = target_layer._forward_hooks
            for key in [key for key, hook in hooks.items() if hook == self.save_activation]:
                del hooks[key]
            raise

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
        """The target's score of the image without each of the channels, as floats."""
        activations, size = head.activations[image], self.batch_size
        channels = torch.as_tensor(np.asarray(channels, np.int64), device=activations.device)
        values = ablated_values(activations, min(size, len(channels)))
        values = values[torch.arange(len(channels), device=values.device) % size]
        axis = activations.ndim if channels_last else 1
        score = lambda outputs, n_rows: torch.tensor(_scores(outputs, target), dtype=torch.float64)
        with tqdm.tqdm(total=-(-len(channels) // size)) as bar:
            options = {"axis": axis, "size": size, "done": bar.update}
            return scores_without(head, image, channels, values, score, **options).tolist()


def _scores(outputs, target):
    """The target's score of each row of outputs, as floats."""
    if type(target) is ClassifierOutputTarget and isinstance(outputs, torch.Tensor) and outputs.ndim == 2:
        return outputs[:, target.category].tolist()
    return [target(output).cpu().item() for output in outputs]
