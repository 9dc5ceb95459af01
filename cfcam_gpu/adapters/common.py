"""What the adapters share: the log, what is said of a CAM that is not sped up, and CF-CAM's options."""

import logging

from cfcam_gpu import checks, pipeline

LOG = logging.getLogger("cfcam_gpu")


def obstacle(cam, accelerated, reasons):
    """Why ``cam`` is not sped up, by an adapter's tables, their class -> ours and their class -> why there is no other
    for it; None when its class is in the first."""
    if type(cam) in accelerated:
        return None
    if type(cam) in reasons:
        return reasons[type(cam)]
    return f"only {', '.join(cls.__name__ for cls in accelerated)} can be sped up, no subclasses"


def left_as_it_is(cam, reason):
    """``cam`` itself, and a warning that says why."""
    LOG.warning("accelerate: %s is left as it is: %s", type(cam).__name__, reason)
    return cam


class Configured:
    """Mixin of the adapters' CF-CAM classes: its options, checked once, and what they are for.

    The options are those of `cfcam_gpu.CFCAM`, ``guide_layer`` among them.
    """

    def _configure(self, config, backend, clustering, check_finite):
        self.config = checks.check_config(config)
        self._choices = pipeline.check_choices(backend, clustering, check_finite)
        self._grid_options = {"config": self.config, "backend": backend}  # of `pipeline.class_grid`

    def _weights_of(self, activations, gradients):
        """CF-CAM's weights (B, C), 0 for noise, of activations and gradients (B, C, h, w)."""
        return pipeline.channel_weights(activations, gradients, self.config, **self._choices)
