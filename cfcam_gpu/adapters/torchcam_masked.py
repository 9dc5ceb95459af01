"""torch-cam's ScoreCAM, SSCAM and ISCAM: the same masked images, fewer of them, in blocks that suit the device.

Memory is that of a block, at most ``batch_size`` images; ISCAM resizes the masks of a block at a time, where the
library holds those of all channels. SSCAM still holds its noise for all channels, as the library does.
"""

import torch
from torchcam.methods import activation as original

from cfcam_gpu.adapters.common import LOG
from cfcam_gpu.perturbed import block_size, in_fast_order
from cfcam_gpu.random_states import random_state, same_state


class _Blocks:
    """Mixin before ``ScoreCAM``: blocks of at most `block_size` masked images, halved where memory runs out.

    The network's rounding differs by their size and order. Of a model that draws random numbers every image has its
    place in their stream: it runs in the library's blocks.
    """

    _draws = False
    _fits: int | None = None  # so many images, after a block that did not

    def _get_score_weights(self, *args, **kwargs):
        asked = self.bs
        try:
            return super()._get_score_weights(*args, **kwargs)
        finally:
            self.bs, self._fits = asked, None

    def _init_score_weights(self, *args):
        before = random_state(self._input.device)
        scored = super()._init_score_weights(*args)
        self._draws = not same_state(before, random_state(self._input.device))
        if not self._draws:
            self.bs = block_size(self._input, self.bs)
        return scored

    def _score_input(self, images, sample_indices, *options):
        if not self._draws:
            images = in_fast_order(images)
        if self._fits is None or len(images) <= self._fits:
            try:
                return super()._score_input(images, sample_indices, *options)
            except torch.OutOfMemoryError:
                if len(images) == 1 or self._draws:
                    raise
                self._fits = (len(images) + 1) // 2
            LOG.warning("%s: out of memory, going on in blocks of %d images", type(self).__name__, self._fits)
        parts = zip(images.split(self._fits), sample_indices.split(self._fits))
        return torch.cat([self._score_input(*part, *options) for part in parts])


class _BlankOnce:
    """Mixin behind `_Blocks`: channels that are zero everywhere mask an image alike, and one is run for all of them."""

    def _factors(self):
        """What the masked images are multiplied by; the scores are averaged over them."""
        return [None]

    @torch.no_grad()
    def _get_score_weights(self, activations, class_idx, targets=None):
        weights, targets, baseline = self._init_score_weights(activations, class_idx, targets)
        return [
            self._softmax_of(activation, weight, baseline, class_idx, targets)
            for activation, weight in zip(activations, weights)
        ]

    def _softmax_of(self, activation, weight, baseline, class_idx, targets):
        run, place = self._distinct(activation)
        masks, weight, factors = activation.flatten(0, 1)[run].unsqueeze(1), weight[run], self._factors()
        samples = run.cpu() // activation.shape[1]  # on the host, where the library looks the targets up
        buffer = self._input.new_empty((min(self.bs, len(samples)), *self._input.shape[1:]))
        for factor in factors:
            for start in range(0, len(samples), self.bs):
                block = slice(start, min(start + self.bs, len(samples)))
                images = self._masked_input_chunk(masks, samples, buffer, block)
                images = images if factor is None else factor * images
                scores = self._score_input(images, samples[block], class_idx, targets)
                weight[block] += scores - baseline[samples[block]]
        return torch.softmax(weight.div_(len(factors))[place].view(activation.shape[:2]), -1)

    def _distinct(self, activation):
        """The masks to run, and for each of all masks its place among them; numbers of (B * C)."""
        masks = torch.arange(activation.shape[0] * activation.shape[1], device=activation.device)
        masks = masks.view(activation.shape[:2])
        if not self._draws:
            blank = ~activation.flatten(2).any(2)
            first = masks.gather(1, blank.to(torch.uint8).argmax(1, keepdim=True))
            masks = torch.where(blank, first, masks)
        return masks.flatten().unique(return_inverse=True)


class ScoreCAM(_Blocks, _BlankOnce, original.ScoreCAM):
    """torch-cam's ``ScoreCAM``, with the same arguments, call and numbers."""


class ISCAM(_Blocks, _BlankOnce, original.ISCAM):
    """torch-cam's ``ISCAM``, with the same arguments, call and numbers; masks are resized a block at a time."""

    def _factors(self):
        factors = [0.0]
        for step in range(self.num_samples):
            factors.append(factors[-1] + (step + 1) / self.num_samples)
        return factors[1:]


class SSCAM(_Blocks, original.SSCAM):
    """torch-cam's ``SSCAM``, with the same arguments, call, noise and numbers; no mask is blank under its noise."""
