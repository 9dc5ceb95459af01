"""What the sped-up classes share that keep pytorch-grad-cam's own pass: hooks of their own, and eigen_smooth."""

import torch
from pytorch_grad_cam.activations_and_gradients import ActivationsAndGradients
from torch.autograd.graph import get_gradient_edge

from cfcam_gpu.adapters.pytorch_grad_cam import _off_the_model
from cfcam_gpu.projection import first_component


class CallHooks(ActivationsAndGradients):
    """The original's hooks, on the model for the length of a call, so that passes in between are not recorded.

    Args:
        model, target_layers, reshape_transform, detach: as for the original.

    Attributes:
        edges: where autograd's gradient of each activation arrives, in the layers' order of execution.
    """

    def __init__(self, model, target_layers, reshape_transform=None, detach=True):
        super().__init__(model, [], reshape_transform, detach)
        self._target_layers = target_layers

    def __call__(self, x):
        self.edges = []
        hooks = (self.save_activation, self.save_gradient)
        handles = [layer.register_forward_hook(hook) for layer in self._target_layers for hook in hooks]
        try:
            return super().__call__(x)
        finally:
            for handle in handles:
                handle.remove()

    def save_gradient(self, module, input, output):
        """The original's hook; also notes the edge, which an in-place operation behind the layer leaves as it is."""
        super().save_gradient(module, input, output)
        if getattr(output, "requires_grad", False):
            self.edges.append(get_gradient_edge(output))


class Hooked:
    """Mixin before a class of pytorch-grad-cam: `CallHooks`, and a thin decomposition in eigen_smooth."""

    _foreign_hooks = ()
    """Hooks of the object that this one was made from, off the model during a call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        hooks = self.activations_and_grads
        hooks.release()
        self.activations_and_grads = CallHooks(self.model, self.target_layers, hooks.reshape_transform, self.detach)

    def forward(self, *args, **kwargs):
        """The maps as NumPy float32, without augmentation; as the original."""
        with _off_the_model(self._foreign_hooks):
            return super().forward(*args, **kwargs)

    def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
        """The layer's map on its own grid: NumPy (B, h, w) or (B, d, h, w)."""
        if not eigen_smooth or activations.ndim not in (4, 5):
            return super().get_cam_image(input_tensor, target_layer, targets, activations, grads)
        of_channels = self.get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        if isinstance(activations, torch.Tensor):
            activations = activations.cpu().detach().numpy()
        return first_component(of_channels.reshape(*of_channels.shape, *[1] * (activations.ndim - 2)) * activations)
