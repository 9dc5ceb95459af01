"""Do the maps show what a 3-D network goes by? `shapes.py` in volumes: CAM methods on a 3-D ResNet.

    python benchmarks/volumes.py              # three networks: trains what is not cached, some minutes each on one core

A volume shows one or two bodies, whose classes and masks are known, among distractors of shapes that are no class, in
cluttered surroundings. All else is that of shapes.py: training, measures, and the rows, in results/volumes.jsonl. What
rests on the structural similarity of pictures is left out.
"""

import math
import sys

import choice
import shapes
import torch
import torch.nn.functional as F
from faithfulness import CONTROLS, from_config
from torch import nn

from cfcam_gpu import CFCAMConfig

SIDE = 24
"""Depth, height and width of a volume."""


# Bodies: as the shapes, functions of local coordinates (u, v, w); the unit ball is the body's.


def _norm(*coordinates):
    return torch.stack(coordinates).square().sum(0).sqrt()


def _box(u, v, w, *half):
    return torch.stack([axis.abs() - size for axis, size in zip((u, v, w), half)]).amax(0)


def ball(u, v, w):
    return _norm(u, v, w) - 0.75


def shell(u, v, w):
    return (_norm(u, v, w) - 0.72).abs() - 0.22


def cube(u, v, w):
    return _box(u, v, w, 0.62, 0.62, 0.62)


def torus(u, v, w):
    return _norm(_norm(u, v) - 0.68, w) - 0.28


def jack(u, v, w):
    """Three bars through the centre."""
    return torch.stack([_box(*axes, 0.24, 0.24, 0.95) for axes in ((u, v, w), (v, w, u), (w, u, v))]).amin(0)


def plates(u, v, w):
    return _box(u, v, w.abs() - 0.5, 0.75, 0.75, 0.2)


SHAPES = (ball, shell, cube, torus, jack, plates)
"""Of the classes, in their order."""


def pebble(u, v, w):
    return _norm(u, 1.2 * v, 2 * w) - 0.85


def stick(u, v, w):
    return _box(u, v, w, 0.24, 0.24, 0.95)


def corner(u, v, w):
    return torch.minimum(_box(u + 0.5, v, w, 0.22, 0.75, 0.6), _box(u, v - 0.5, w, 0.72, 0.22, 0.6))


DISTRACTORS = (pebble, stick, corner)
"""Shapes that are no class."""


def volumes(n, n_classes, n_objects, seed):
    """n volumes, (n, 1, 24, 24, 24) in [-1, 1], of ``n_objects``, 1 or 2; the same for the same seed.

    Each body has its own octant, and so have three distractors. They have about the same size, the same brightness and
    textures, dark or bright, and are turned somewhat; all lie in noise of several scales.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape, generator=generator)
    classes = torch.rand(n, n_classes, generator=generator).argsort(1)[:, :n_objects]
    kinds = torch.randint(len(DISTRACTORS), (n, 3), generator=generator) + len(SHAPES)
    kinds = torch.cat((kinds, classes), 1)  # distractors first: objects lie on top
    octant = torch.rand(n, 8, generator=generator).argsort(1)

    def things():
        for index in range(kinds.shape[1]):
            place = torch.stack([octant[:, index] // step % 2 for step in (1, 2, 4)], 1)
            centre = SIDE / 4 + SIDE / 2 * place + uniform(-1, 1, n, 3)
            turn = _turns(uniform(-0.35, 0.35, n, 3))
            cover = _cover(kinds[:, index], centre, uniform(4.5, 5.5, n), turn)
            waves = torch.sin(_along(_turns(uniform(0, 2 * math.pi, n, 3))[:, 0] * uniform(0.8, 1.6, n, 1)))
            shade = uniform(0.8, 1.0, n, 1, 1, 1) * (1 - uniform(0, 0.35, n, 1, 1, 1) * waves)
            dark = uniform(0, 1, n, 1, 1, 1) < 0.5
            yield cover, torch.where(dark, 1 - shade, shade)[:, None]

    return shapes.laid_over(_ground(n, generator), things(), classes, generator)


def _ground(n, generator):
    """Noise of several scales."""
    grounds = torch.full((n, 1, SIDE, SIDE, SIDE), 0.5)
    for cells, size in ((2, 0.1), (4, 0.08), (8, 0.08), (12, 0.06)):
        noise = torch.randn(n, 1, cells, cells, cells, generator=generator)
        grounds += size * F.interpolate(noise, size=(SIDE, SIDE, SIDE), mode="trilinear")
    return grounds


def _turns(angles):
    """Rotations (n, 3, 3) by angles (n, 3) about the three axes, one after the other."""
    sine, cosine = angles.sin(), angles.cos()
    turn = torch.eye(3).expand(len(angles), 3, 3)
    for axis in range(3):
        of_axis = torch.eye(3).repeat(len(angles), 1, 1)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        of_axis[:, i, i] = of_axis[:, j, j] = cosine[:, axis]
        of_axis[:, i, j], of_axis[:, j, i] = -sine[:, axis], sine[:, axis]
        turn = turn @ of_axis
    return turn


def _along(directions, centre=None):
    """The voxels' coordinates (n, ..., 24, 24, 24) along directions (n, ..., 3), from the centre (n, 3) or a corner."""
    axis = torch.arange(SIDE) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    found = torch.einsum("n...k,kdhw->n...dhw", directions, grid)
    if centre is not None:
        found = found - torch.einsum("n...k,nk->n...", directions, centre)[..., None, None, None]
    return found


def _cover(kinds, centre, radius, turn):
    """How much of each voxel the body covers, (n, 24, 24, 24), from 0 to 1."""
    local = _along(turn / radius[:, None, None], centre)
    cover = torch.empty_like(local[:, 0])
    for kind in kinds.unique().tolist():
        chosen = kinds == kind
        distance = (SHAPES + DISTRACTORS)[kind](*local[chosen].unbind(1))
        cover[chosen] = (0.5 - radius[chosen, None, None, None] * distance).clamp(0, 1)
    return cover


class Block(nn.Module):
    """Of two convolutions, with a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv3d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm3d(outputs), nn.BatchNorm3d(outputs)])
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))

    def forward(self, x):
        y = self.norms[1](self.second(self.norms[0](self.first(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet(n_classes):
    """A 3-D ResNet, 12 x 12 x 12 to 6 x 6 x 6 cells."""
    stem = nn.Sequential(nn.Conv3d(1, 16, 5, 2, 2, bias=False), nn.BatchNorm3d(16), nn.ReLU())
    head = (nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, n_classes))
    return nn.Sequential(stem, Block(16, 16, 1), Block(16, 64, 2), Block(64, 64, 1), *head)


FAMILIES = {
    "resnet3d": shapes.Family(resnet, layer="3", guide="1", rate=3e-3, draw=volumes, layout=torch.channels_last_3d)
}


LEFT_OUT = ("CF-CAM 0.1", choice.RANDOM, *shapes.FROZEN)
"""The first two are of pictures; the network has batch norms alone, whose statistics are constants anyway."""

METHODS = {
    **{name: method for name, method in shapes.METHODS.items() if name not in LEFT_OUT},
    "CF-CAM, narrow": from_config(CFCAMConfig(affinity_sigma=1.0, affinity_power=4.0, affinity_range=math.inf)),
    "CF-CAM, no average": CONTROLS["CF-CAM, no average"],
}
"""The last two: of bodies of two or three cells, does it hang on the average's reach?"""


def main(argv=None):
    parser = shapes.parser_of(__doc__, FAMILIES)
    parser.set_defaults(classes=len(SHAPES))
    shapes.measure("volumes", FAMILIES, METHODS, parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
