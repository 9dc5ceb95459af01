"""One CUDA graph for forward, head backward and pipeline: a fixed shape, replayed with a single launch."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cfcam_gpu.cam import CFCAM

WARM_UP_CALLS = 3
"""Calls on a side stream before the capture: libraries choose their algorithms, constants reach the device."""


class CapturedCFCAM:
    """What `CFCAM.capture` returns: call it with a batch of the captured shape. It does not warn of maps of zeros.

    Attributes:
        maps: (B, H, W), or (B, K, H, W), the maps of the latest call; the next call overwrites them.
        outputs: the model's outputs of the latest call, likewise.
        classes: the classes that it explained, likewise; int64 (B,) or (B, K).

    >>> replay = cam.capture(images, targets=torch.zeros(8, dtype=torch.long, device="cuda"))
    >>> replay(images, targets).shape
    torch.Size([8, 224, 224])
    """

    def __init__(
        self, cam: "CFCAM", example_input: torch.Tensor, targets: torch.Tensor | None, top: int | None
    ) -> None:
        self._input = example_input.detach().clone()
        self._targets = None if targets is None else targets.detach().clone()
        side = torch.cuda.Stream(self._input.device)
        side.wait_stream(torch.cuda.current_stream(self._input.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                cam.maps(self._input, self._targets, top)
        torch.cuda.current_stream(self._input.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.maps = cam.maps(self._input, self._targets, top)
        self._check_unchanged = cam.check_unchanged
        self.outputs: Any = cam.outputs
        self.classes = cam.classes

    def __call__(self, input_tensor: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """The maps (B, H, W) or (B, K, H, W) of a batch; the same memory every time.

        Args:
            input_tensor: of the captured shape; dtype and device are converted if they differ.
            targets: LongTensor of the captured shape, when the capture had targets; else None.

        Raises:
            ValueError: another shape than was captured, or targets where none were captured and the reverse; or, with
                ``compile``, a model that is not as it was: the programs' weights are their own.
        """
        self._check_unchanged()
        if input_tensor.shape != self._input.shape:
            expected, got = tuple(self._input.shape), tuple(input_tensor.shape)
            raise ValueError(f"input_tensor must have the captured shape {expected}, got {got}")
        if targets is None or self._targets is None:
            if targets is not self._targets:
                kind = "None" if self._targets is None else "a LongTensor"
                raise ValueError(f"targets must be {kind}, as captured, got {type(targets).__name__}")
        elif targets.shape != self._targets.shape:
            raise ValueError(f"targets must have shape {tuple(self._targets.shape)}, got {tuple(targets.shape)}")
        else:
            self._targets.copy_(targets, non_blocking=True)
        self._input.copy_(input_tensor, non_blocking=True)
        self._graph.replay()
        return self.maps


def capture(
    cam: "CFCAM", example_input: torch.Tensor, targets: torch.Tensor | None, top: int | None = None
) -> CapturedCFCAM:
    """The checks of `CFCAM.capture`, and the capture."""
    for name, value in (("example_input", example_input), ("targets", targets)):
        if name == "targets" and value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.device.type != "cuda":
            raise ValueError(f"{name} must be on a CUDA or ROCm device to be captured in a graph, got {value.device}")
    return CapturedCFCAM(cam, example_input, targets, top)
