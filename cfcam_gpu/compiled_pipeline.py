"""`pipeline.cf_cam` on a CPU, with all that comes behind the clustering as one compiled program.

The clustering is compiled C already, and depends on data. On other devices the pipeline is Triton's kernels.
"""

import logging
import math
import threading
from functools import partial
from typing import Any

import torch

from cfcam_gpu import pipeline, programs, torch_backend, warm_up
from cfcam_gpu.programs import NotCompiled

LOG = logging.getLogger("cfcam_gpu")

MOST_NODES = 1500
"""Operations of a graph that is compiled. Images are taken one by one, so that those of a large batch are many, and the
pipeline's share of the time is small there."""

TOLERANCE = 1e-4
"""How far a program's maps may be from those of `pipeline.cf_cam`; rounding is a hundredth of it."""


class PipelinePrograms:
    """What makes the maps of one kind of inputs: programs, made with the first tensors of each kind.

    They are compared with `pipeline.cf_cam`, in results and in time; where that is quicker, it goes on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._programs: dict[Any, _Program | None] = {}

    def cf_cam(self, activations, gradients, output_size, config, backend, clustering, check_finite, guide):
        """As `pipeline.cf_cam` of tensors."""
        options = {"backend": backend, "clustering": clustering, "check_finite": check_finite, "guide": guide}
        eager = partial(pipeline.cf_cam, activations, gradients, output_size, config, **options)
        of_one_class = isinstance(gradients, torch.Tensor) and gradients.ndim == activations.ndim
        if activations.device.type != "cpu" or not of_one_class or backend not in ("auto", "torch"):
            return eager()
        given = [activations, gradients] if guide is None else [activations, gradients, guide]
        kind = (
            tuple(output_size),
            torch.get_num_threads(),
            *((each.shape, each.stride(), each.dtype) for each in given),
        )
        if kind not in self._programs:
            with self._lock, torch.inference_mode(False), pipeline.plain_arithmetic(activations.device):
                if kind not in self._programs:
                    self._programs[kind] = _quicker(given, output_size, config, clustering, check_finite, eager)
        program = self._programs[kind]
        result = None if program is None else program(given)
        return eager() if result is None else result


def _quicker(given, output_size, config, clustering, check_finite, eager):
    """The program of tensors of this kind; None where there is none, or none that is quicker."""
    expected = eager()  # raises where the tensors are not what they should be
    try:
        given = [each.clone() if each.is_inference() else each for each in given]
        program = _Program(given, output_size, config, clustering, check_finite, expected.labels)
        found = program(given)
        if found is None:
            return None  # values of which the sum overflows
        difference = (found.maps - expected.maps).abs().max()
        if not difference <= TOLERANCE or not torch.equal(found.labels, expected.labels):
            raise NotCompiled(f"its maps differ by {float(difference):.2g}")
    except NotCompiled as error:
        LOG.info("the pipeline runs uncompiled: %s", error)
        return None
    ways = {warm_up.EAGER: eager, warm_up.COMPILED: partial(program, given)}
    best, times = warm_up.quickest(ways, expected.maps.device)
    LOG.info("the pipeline takes %.1f ms compiled, %.1f ms uncompiled", *(1e3 * times[way] for way in (*ways,)[::-1]))
    return program if best == warm_up.COMPILED else None


class _Program:
    """`pipeline.cf_cam` of one class an image: the clustering, and a program of the rest."""

    def __init__(self, given, output_size, config, clustering, check_finite, labels):
        self._config = config = config.of(given[0].ndim - 2)
        self._engine = pipeline.choose("torch", clustering, given[0])[1]
        self._checked = check_finite is not False

        def rest(labels, norms, activations, gradients, guide=None):
            activations = torch_backend.as_computed(activations)
            weights = torch_backend.channel_weights(gradients, labels, config)
            maps = torch_backend.class_map(activations, weights, tuple(output_size), config, guide)
            # Finite only if all values are: sums that are made anyway, over rows that are read once.
            of_cells = [torch_backend.as_computed(each).flatten(2) for each in (gradients, guide) if each is not None]
            total = norms.sum() + of_cells[0].mean(-1).sum()
            for cells in of_cells[1:]:
                total = total + (cells * cells).sum(1).sum()
            return maps, weights, total

        norms = torch_backend.channel_norms(torch_backend.as_computed(given[0]))
        graph, _ = programs.trace(rest, (labels, norms, *given))
        n_nodes = len(graph.graph.nodes)
        if n_nodes > MOST_NODES:
            raise NotCompiled(f"it has {n_nodes} operations for so many images, above {MOST_NODES}")
        self._rest = programs.compile_graph(graph, [labels, norms, *given])

    def __call__(self, given):
        """The `pipeline.CFCAMResult`; None of tensors that are not, or seem not to be, finite."""
        with pipeline.plain_arithmetic(given[0].device):
            activations = torch_backend.as_computed(given[0])
            norms = torch_backend.channel_norms(activations)
            labels, eps = torch_backend.cluster_computed(activations, norms, self._config, self._engine)
            maps, weights, total = self._rest(labels, norms, *given)
        if self._checked and not math.isfinite(total):
            return None
        return pipeline.CFCAMResult(maps, labels, weights, eps)
