"""`CFCAM`: from a model and an input to maps, with pytorch-grad-cam's constructor and call."""

import torch

from cfcam_gpu import checks, pipeline, torch_backend
from cfcam_gpu.capture import HeadCapture


class CFCAM:
    """CF-CAM of a model's layers: one forward pass, a backward through the head only, and the pipeline.

    Args:
        model: a ``torch.nn.Module``. It runs in the mode it is in: call ``model.eval()`` first. Nothing about it is
            changed: no hook stays, no ``.grad`` is filled.
        target_layers: list of the model's modules to explain; each gives (B, C, h, w). Of a layer that runs more
            than once in a forward pass, the last run counts.
        reshape_transform: turns a layer's output into (B, C, h, w), for transformers.
        config, backend, clustering, check_finite: as for `cf_cam`.

    Attributes:
        outputs: the model's raw outputs of the latest call, detached; None before the first.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or a layer is not in the model.

    >>> with CFCAM(model, target_layers=[model.layer4[-1]]) as cam:
    ...     maps = cam.maps(images, targets=[285, 282])  # images (2, 3, 224, 224)
    >>> maps.shape
    torch.Size([2, 224, 224])
    """

    def __init__(
        self,
        model,
        target_layers,
        reshape_transform=None,
        *,
        config=None,
        backend="auto",
        clustering="auto",
        check_finite=None,
    ):
        self.config = checks.check_config(config)
        self._choices = pipeline.check_choices(backend, clustering, check_finite)
        self.outputs = None
        self._capture = HeadCapture(model, target_layers, reshape_transform)

    def maps(self, input_tensor, targets=None):
        """The maps of a batch, on the model's device, without a host copy.

        Args:
            input_tensor: (B, ..., H, W), floating point.
            targets: None (the top class of each image), a list of class indices, a LongTensor (B,), or one callable
                per image that gets the image's output and returns a scalar.

        Returns:
            (B, H, W) float32 in [0, 1] (float64 for a float64 model), scaled as ``config.normalize`` says. Several
            layers: the mean of their maps, scaled again.

        Raises:
            ValueError: a wrong number of targets, a class out of range, a layer that did not run or has no grid, NaN.
            TypeError: the input or a target is of the wrong kind.
        """
        layers = [
            pipeline.cf_cam(*layer, input_tensor.shape[-2:], self.config, **self._choices).maps
            for layer in self._run(input_tensor, targets)
        ]
        if len(layers) == 1:
            return layers[0]
        return torch_backend.normalize(torch.stack(layers).mean(0), self.config)

    def __call__(self, input_tensor, targets=None):
        """The maps as pytorch-grad-cam returns them: C-contiguous NumPy float32 (B, H, W).

        Args, Raises: as for `maps`. Each layer's map is scaled to (x - min) / (1e-7 + max) on its grid, resized and
        averaged, and the average scaled again, so that the numbers can be compared with that library's.

        Source: jacobgil/pytorch-grad-cam 1.5.7, ``BaseCAM.forward`` and ``scale_cam_image``.
        """
        grids, backend = [], self._choices["backend"]
        for activations, gradients in self._run(input_tensor, targets):
            weights = pipeline.channel_weights(activations, gradients, self.config, **self._choices)
            grids.append(pipeline.class_grid(activations, weights, config=self.config, backend=backend))
        maps = pipeline.grad_cam_maps(grids, input_tensor.shape[-2:], backend=backend)
        return maps.float().cpu().numpy()

    def capture(self, example_input, targets=None):
        """One CUDA graph of `maps` for a fixed shape, for inference where every launch counts.

        Args:
            example_input: (B, ..., H, W) on a CUDA or ROCm device.
            targets: LongTensor (B,) on that device, to give the targets at every replay; or None, for the top class.

        Returns:
            `CapturedCFCAM`: called with a batch of that shape (and targets) it replays forward, head backward and
            pipeline, and returns the maps. The weights are read in place at every replay; the mode is the capture's.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: it is not on such a device.

        >>> replay = cam.capture(images)
        >>> maps = replay(other_images)
        """
        from cfcam_gpu import cuda_graph

        return cuda_graph.capture(self, example_input, targets)

    def _run(self, input_tensor, targets):
        capture = self._capture(input_tensor, targets)
        self.outputs = capture.outputs
        return list(zip(capture.activations, capture.gradients))

    def release(self):
        """Let go of the model; a second call does nothing."""
        self._capture.release()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()
