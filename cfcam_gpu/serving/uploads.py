"""Pictures that clients send: the body within its limits, then the decoded picture."""

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch

from cfcam_gpu import images, models
from cfcam_gpu.serving.limits import Limits
from cfcam_gpu.serving.refusals import Left, Refusal

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""What is decoded, beside HEIF. Not all that Pillow reads: for EPS it starts another program."""

MOST_OVERLAY_PIXELS = 1024
"""Of an overlay's longer side; larger photographs are made smaller."""

DISCARD_S, DISCARD_BYTES = 5.0, 64 * 2**20
"""What a client that is refused still sends is read for so long, or so much of it: a connection that is closed while
its client writes is reset, and the client may lose the answer."""


class Upload:
    """The body of one request, and whether its client is still there.

    Args:
        request: Starlette's, of which nothing has been read.
        limits: of these the largest body, and how long it may take to arrive.
    """

    def __init__(self, request: Any, limits: Limits) -> None:
        self._request, self._limits = request, limits
        self.ended = False
        """Whether nothing more of the body can come."""

    async def read(self) -> bytes:
        """All of it.

        Raises:
            Refusal: 408, 413, 415 or 422.
            Left: the client has closed the connection.
        """
        headers, limits = self._request.headers, self._limits
        media_type = headers.get("content-type", "").strip().lower()
        if media_type.startswith("multipart/") or headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "the body must be the picture's file itself, as curl --data-binary @photo.jpg sends it")
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced) > limits.max_bytes:
            raise self._too_large()
        try:
            content = await asyncio.wait_for(self._joined(), limits.body_timeout_s)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body must arrive within {limits.body_timeout_s:g} s") from None
        if not content:
            raise Refusal(422, "the body must be a picture's file, it is empty")
        return content

    async def discard(self) -> None:
        """Read the rest for nothing, within bounds. Who waits for leave to send the body is not given it."""
        if "expect" in self._request.headers:
            return
        n_bytes, end = 0, time.monotonic() + DISCARD_S
        with contextlib.suppress(asyncio.TimeoutError, Left):
            while not self.ended and n_bytes < DISCARD_BYTES and (left_s := end - time.monotonic()) > 0:
                n_bytes += len(await asyncio.wait_for(self._next(), left_s))

    async def left(self) -> None:
        """Returns when the client has closed the connection; to be awaited once the body is read."""
        with contextlib.suppress(Left):
            while True:
                await self._next()

    async def _next(self):
        message = await self._request.receive()
        self.ended = self.ended or not message.get("more_body")
        if message["type"] == "http.disconnect":
            raise Left
        return message.get("body", b"")

    async def _joined(self):
        parts, n_bytes = [], 0
        while not self.ended:
            parts.append(await self._next())
            n_bytes += len(parts[-1])
            if n_bytes > self._limits.max_bytes:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self):
        return Refusal(413, f"the body must have at most {self._limits.max_bytes} bytes")


def decode(
    content: bytes, loaded: models.LoadedModel, limits: Limits, draws: bool
) -> tuple[torch.Tensor, "Image | None"]:
    """What the network takes of a picture's file, and with ``draws`` what an overlay is drawn on.

    Raises:
        Refusal: 422, with the reason.
    """
    try:
        photograph = images.read_image("the picture", content, limits.max_pixels, _known_formats())
        return loaded.preprocess(photograph), _drawn(loaded.seen(photograph)) if draws else None
    except (ImportError, ValueError, MemoryError) as error:
        raise Refusal(422, " ".join(str(error).split()) or type(error).__name__) from error


def _drawn(seen):
    """The region of the photograph that the network sees, no larger than it is drawn: it waits for its map."""
    if max(seen.size) <= MOST_OVERLAY_PIXELS:
        return seen
    scale = MOST_OVERLAY_PIXELS / max(seen.size)
    return seen.resize([max(1, round(scale * side)) for side in seen.size], reducing_gap=2.0)


def _known_formats():
    """Those of `FORMATS` that this Pillow has: it fails on others."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
