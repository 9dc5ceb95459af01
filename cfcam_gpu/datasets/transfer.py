"""Copies between the host and the model's device that the device's work hides."""

from typing import Any

import torch


class Transfer:
    """Copies to and from a device: on CUDA from pinned memory, to it on a stream of their own.

    On other devices, and on the CPU, plain copies or none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; what is computed with it waits for the copy, the host does not."""
        if self._stream is None or tensor.is_cuda:
            return tensor.to(self.device)
        with torch.cuda.stream(self._stream):
            moved = tensor.pin_memory().to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        moved.record_stream(current)  # or its memory would be given away while the current stream still reads it
        return moved

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the host, from a GPU in pinned memory; it may be read when a later `mark` is reached."""
        return tensor.to("cpu", non_blocking=self._stream is not None)

    def mark(self) -> "Mark":
        """What has been asked for so far."""
        if self._stream is None:
            return Mark(None)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return Mark(event)


class Mark:
    """A point in the device's work."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        """Wait, in any thread, until the device has come so far."""
        if self._event is not None:
            self._event.synchronize()
