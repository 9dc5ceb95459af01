"""Do the maps show what the network goes by? CAM methods on networks of three families and on drawn pictures.

    python benchmarks/shapes.py                               # all networks, ten classes: trains what is not cached
    python benchmarks/shapes.py --classes 2 --network resnet  # another number of classes: 2, 10 or 100
    python benchmarks/shapes.py --picture docs/shapes.jpg

A picture shows one or two objects, whose classes and masks are known, among distractors of shapes that are no class, on
a cluttered ground. The networks, a small ResNet, ConvNeXt and ViT, are trained on such pictures from random weights, in
a few minutes each on one core; their accuracy on new pictures is in the rows. One row a network, seed and method is
appended to results/shapes.jsonl, means with 95 % bootstrap intervals over the pictures; a row that is there is not made
again.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import choice
import faithfulness
import rows
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer
from tqdm import tqdm

from cfcam_gpu import CFCAMConfig, metrics
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.layers import find_target_layer

SIDE = 64
"""Height and width of a picture."""


# Pictures. A shape is a function of local coordinates (u, v), the object's circle being the unit circle: negative
# inside, and near the edge roughly the distance from it.


def _box(u, v, width, height):
    return torch.maximum(u.abs() - width, v.abs() - height)


def _polar(u, v):
    return torch.hypot(u, v), torch.atan2(v, u)


def disc(u, v):
    return torch.hypot(u, v) - 0.75


def ring(u, v):
    return (torch.hypot(u, v) - 0.7).abs() - 0.22


def square(u, v):
    return _box(u, v, 0.68, 0.68)


def frame(u, v):
    return (torch.maximum(u.abs(), v.abs()) - 0.6).abs() - 0.18


def triangle(u, v):
    r, angle = _polar(u, v)
    return r * torch.cos(angle.remainder(2 * math.pi / 3) - math.pi / 3) - 0.5


def star(u, v):
    r, angle = _polar(u, v)
    return r - 0.62 - 0.32 * torch.cos(5 * angle)


def cross(u, v):
    return torch.minimum(_box(u, v, 0.25, 0.9), _box(u, v, 0.9, 0.25))


def crescent(u, v):
    return torch.maximum(torch.hypot(u, v) - 0.9, 0.7 - torch.hypot(u - 0.5, v))


def bars(u, v):
    return _box(u.abs() - 0.5, v, 0.22, 0.85)


def half_disc(u, v):
    return torch.maximum(torch.hypot(u - 0.4, v) - 0.95, u - 0.4)


SHAPES = (disc, ring, square, frame, triangle, star, cross, crescent, bars, half_disc)
"""Of the classes, in their order."""


def ellipse(u, v):
    return torch.hypot(u, 2.2 * v) - 0.9


def corner(u, v):
    return torch.minimum(_box(u + 0.5, v, 0.22, 0.75), _box(u, v - 0.5, 0.72, 0.22))


def pebble(u, v):
    r, angle = _polar(u, v)
    return r - 0.65 - 0.15 * torch.cos(2 * angle) - 0.12 * torch.cos(3 * angle + 1)


def stick(u, v):
    return _box(u, v, 0.2, 0.9)


DISTRACTORS = (ellipse, corner, pebble, stick)
"""Shapes that are no class."""

COLOURS = (
    *((0.90, 0.10, 0.10), (0.10, 0.70, 0.15), (0.15, 0.25, 0.95), (0.95, 0.85, 0.10), (0.90, 0.20, 0.85)),
    *((0.10, 0.85, 0.90), (0.95, 0.50, 0.05), (0.95, 0.95, 0.95), (0.05, 0.05, 0.05), (0.40, 0.15, 0.60)),
)
"""RGB. With 100 classes a class is a shape and a colour; with fewer the colour says nothing."""

CLASSES = (2, 10, 100)


class Pictures(NamedTuple):
    """What `pictures` returns; K objects of different classes in each. Of volumes, three axes for 64, 64."""

    images: torch.Tensor
    """(n, 3, 64, 64) in [-1, 1]."""
    classes: torch.Tensor
    """(n, K) int64."""
    masks: torch.Tensor
    """(n, K, 64, 64) bool: where each object is seen."""


def pictures(n, n_classes, n_objects, seed):
    """n pictures of ``n_objects``, 1 or 2, of ``n_classes``, 2, 10 or 100; the same for the same seed.

    Each object has its own quarter of the picture, and so has a distractor or, more often than not, two. They have
    about the same size, the same colours and textures; all lie on coloured noise and thin lines.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape, generator=generator)
    palette = torch.tensor(COLOURS)
    classes = torch.rand(n, n_classes, generator=generator).argsort(1)[:, :n_objects]
    kinds = torch.randint(len(DISTRACTORS), (n, 2), generator=generator) + len(SHAPES)
    kinds = torch.cat((kinds, classes % len(SHAPES)), 1)  # distractors first: objects lie on top
    colours = torch.randint(len(COLOURS), kinds.shape, generator=generator)
    if n_classes > len(SHAPES):
        colours[:, 2:] = classes // len(SHAPES)
    shown = torch.ones(kinds.shape)
    shown[:, 0] = (torch.rand(n, generator=generator) < 0.7).float()

    images = _ground(n, generator)
    quarter = torch.rand(n, 4, generator=generator).argsort(1)

    def things():
        for index in range(kinds.shape[1]):
            place = torch.stack((quarter[:, index] % 2, quarter[:, index] // 2), 1)
            x, y = (SIDE / 4 + SIDE / 2 * place + uniform(-5, 5, n, 2)).T
            radius, angle = uniform(10, 15, n), uniform(-0.35, 0.35, n)
            cover = _cover(kinds[:, index], x, y, radius, angle) * shown[:, index, None, None]
            stripes = _stripes(uniform(0, 2 * math.pi, n), uniform(0.8, 1.6, n), uniform(0, 2 * math.pi, n))
            shade = uniform(0.8, 1.0, n, 1, 1) * (1 - uniform(0, 0.35, n, 1, 1) * stripes)
            paint = palette[colours[:, index], :, None, None] * shade[:, None] + uniform(-0.05, 0.05, n, 3, 1, 1)
            yield cover, paint

    return laid_over(images, things(), classes, generator)


def laid_over(images, things, classes, generator):
    """`Pictures` of things laid over the ground one after the other, and noise over all.

    Args:
        images: (n, channels, ...) in [0, 1], the ground.
        things: how much of each pixel one covers, (n, ...), and its paint, (n, channels, ...); the objects last.
        classes: (n, K) of the objects.
    """
    masks = []
    for cover, paint in things:
        masks = [mask * (1 - cover) for mask in masks] + [cover]
        images = torch.lerp(images, paint, cover[:, None])
    images = images + 0.03 * torch.randn(images.shape, generator=generator)
    masks = torch.stack(masks[-classes.shape[1] :], 1)
    return Pictures(2 * images.clamp(0, 1) - 1, classes, masks > 0.5)


def _ground(n, generator):
    """Coloured noise of several scales, and three thin lines."""
    images = torch.full((n, 3, SIDE, SIDE), 0.5)
    for cells, size in ((2, 0.15), (8, 0.1), (16, 0.08), (32, 0.06)):
        noise = torch.randn(n, 3, cells, cells, generator=generator)
        noise = 0.5 * noise + 0.5 * noise.mean(1, keepdim=True)
        images += size * F.interpolate(noise, size=(SIDE, SIDE), mode="bilinear")
    axis = torch.arange(SIDE) + 0.5
    for _ in range(3):
        angle, offset = (torch.rand(2, n, 1, 1, generator=generator) - 0.5).unbind()
        angle, offset = 2 * math.pi * angle, 0.8 * SIDE * offset
        distance = (axis - SIDE / 2) * angle.cos() + (axis[:, None] - SIDE / 2) * angle.sin() - offset
        colour = torch.tensor(COLOURS)[torch.randint(len(COLOURS), (n,), generator=generator), :, None, None]
        images = torch.lerp(images, colour, (1.2 - distance.abs()).clamp(0, 1)[:, None])
    return images


def _cover(kinds, x, y, radius, angle):
    """How much of each pixel the object covers, (n, 64, 64), from 0 to 1."""
    axis = torch.arange(SIDE) + 0.5
    x, y, radius, angle = (each[:, None, None] for each in (x, y, radius, angle))
    dx, dy = (axis - x) / radius, (axis[:, None] - y) / radius
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    cover = torch.empty_like(u)
    for kind in kinds.unique().tolist():
        chosen = kinds == kind
        cover[chosen] = (0.5 - radius[chosen] * (SHAPES + DISTRACTORS)[kind](u[chosen], v[chosen])).clamp(0, 1)
    return cover


def _stripes(angle, frequency, phase):
    axis = torch.arange(SIDE) + 0.5
    angle, frequency, phase = (each[:, None, None] for each in (angle, frequency, phase))
    return (frequency * (axis * angle.cos() + axis[:, None] * angle.sin()) + phase).sin()


# Networks


def resnet(n_classes):
    """A ResNet of basic blocks, 32 x 32 to 8 x 8 cells."""

    def stage(inputs, outputs, stride):
        if stride == 1:
            return BasicBlock(inputs, outputs)
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return BasicBlock(inputs, outputs, stride, shortcut)

    stem = nn.Sequential(nn.Conv2d(3, 24, 5, 2, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, n_classes))
    return nn.Sequential(stem, stage(24, 24, 2), stage(24, 24, 1), stage(24, 80, 2), *head)


def convnext(n_classes):
    """torchvision's ConvNeXt of two stages, 16 x 16 and 8 x 8 cells, behind a stem of two convolutions."""
    network = ConvNeXt([CNBlockConfig(32, 80, 2), CNBlockConfig(80, None, 2)], layer_scale=1.0, num_classes=n_classes)
    network.features[0] = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.GELU()),
        *(nn.Conv2d(24, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)),
    )
    return network


def vit(n_classes):
    """torchvision's ViT, 8 x 8 tokens; its convolutional stem (Xiao et al., 2021) trains many times as fast."""
    stem = [ConvStemConfig(channels, kernel_size=3, stride=2) for channels in (24, 48, 96)]
    size = {"num_layers": 3, "num_heads": 4, "hidden_dim": 96, "mlp_dim": 192}
    return VisionTransformer(SIDE, 8, num_classes=n_classes, conv_stem_configs=stem, **size)


class Family(NamedTuple):
    """How to build a network, and where it is explained."""

    build: object
    """Number of classes -> module."""
    layer: str
    """Its last with a grid, as `cfcam_gpu.layers.find_target_layer` finds it."""
    guide: str
    """Its last with at least twice the sides; where there is none, the target layer."""
    rate: float
    """Largest learning rate."""
    patience: int = 1
    """Multiple of `STEPS`."""
    draw: Callable = pictures
    """What it sees, drawn by a function like `pictures`."""
    layout: torch.memory_format = torch.channels_last


FAMILIES = {
    "resnet": Family(resnet, "3", "2", 3e-3),
    "convnext": Family(convnext, "features", "features.1", 3e-3, patience=2),
    "vit": Family(
        vit, "encoder.layers.encoder_layer_2.ln_1", "encoder.layers.encoder_layer_2.ln_1", 1.5e-3, patience=2
    ),
}

SEEDS = (0, 1, 2)

POOL = 8192
"""Pictures of one object to train on, and as many of two; turned and mirrored at random."""

BATCH = 16
STEPS = {2: 1000, 6: 2000, 10: 2000, 100: 4000}
"""Of training, by the number of classes; six are those of volumes.py."""

FADED_IN, PAIRS_FROM = 0.4, 0.5
"""Shares of the steps."""

HELD_OUT = 1000
"""Pictures of one object, and as many of two, that the accuracy is measured on."""


@cache
def pool(n_classes, draw=pictures):
    """Pictures to train on as bytes, where the objects are, and the classes as probabilities; of one object first."""
    images, masks, targets = [], [], []
    for n_objects in (1, 2):
        for chunk in range(POOL // 256):
            made = draw(256, n_classes, n_objects, seed=1000 + 2 * chunk + n_objects)
            images.append(((made.images + 1) * 127.5).round().byte())
            masks.append(made.masks.any(1, keepdim=True))
            targets.append(F.one_hot(made.classes, n_classes).float().mean(1))
    return torch.cat(images), torch.cat(masks), torch.cat(targets)


def train(network, images, masks, targets, steps, rate, generator, layout=torch.channels_last):
    """AdamW on the cross-entropy, from easy to hard: one object without its surroundings, these fading in, then two."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(steps):
        among = len(images) if step >= PAIRS_FROM * steps else len(images) // 2
        chosen = torch.randint(among, (BATCH,), generator=generator)
        seen = masks[chosen].float().clamp_min(step / (FADED_IN * steps)).clamp_max(1)
        batch = (images[chosen].float() / 127.5 - 1) * seen
        loss = F.cross_entropy(network(batch.contiguous(memory_format=layout)), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def accuracy(network, n_classes, draw=pictures):
    """Share of held-out pictures whose one object's class is the top class; whose two objects' are the top two."""
    shares = []
    for n_objects in (1, 2):
        made = draw(HELD_OUT, n_classes, n_objects, seed=n_objects)
        found = torch.cat([network(batch).topk(n_objects, 1).indices for batch in made.images.split(100)])
        shares.append((found.sort(1).values == made.classes.sort(1).values).all(1).float().mean().item())
    return shares


def trained(name, family, n_classes, seed, folder):
    """(network, accuracy), from the folder where it is there, else trained and put there."""
    file = folder / f"{name}-{n_classes}-{seed}.pt"
    torch.manual_seed(seed)
    network = family.build(n_classes).to(memory_format=family.layout)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # torchvision's small weights take a while to get going
            module.reset_parameters()
    if file.exists():
        state, shares = torch.load(file, weights_only=True)
        network.load_state_dict(state)
        return network.eval(), shares
    generator = torch.Generator().manual_seed(seed)
    steps = STEPS[n_classes] * family.patience
    train(network, *pool(n_classes, family.draw), steps, family.rate, generator, family.layout)
    with torch.no_grad():
        shares = accuracy(network, n_classes, family.draw)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save((network.state_dict(), shares), file)
    return network, shares


# Methods: faithfulness.py's, by the same functions; and the parts that count where features are normalised.

MASK = "the mask itself"
"""A control: what the measures give the truth."""


def another_random_grid(activations, gradients):
    """Another for other gradients, unlike `faithfulness.random_grid`: that of another class has nothing of it."""
    generator = torch.Generator().manual_seed(int(gradients.abs().sum().view(torch.int32)))
    return torch.rand(activations[:, 0].shape, generator=generator)


FROZEN = {
    "Grad-CAM, frozen norms": faithfulness.from_grid(
        faithfulness.from_weights(faithfulness.WEIGHTS["Grad-CAM"]), frozen_norms=True
    ),
    "CF-CAM, plain gradient": faithfulness.from_config(CFCAMConfig(frozen_norms=False)),
}

METHODS = {
    name: faithfulness.METHODS[name]
    for name in (
        *("Grad-CAM", "Grad-CAM++", "LayerCAM", "HiResCAM", "CF-CAM, published"),
        *("CF-CAM 0.1", "CF-CAM, stable", "CF-CAM"),
    )
}
METHODS.update(FROZEN)
METHODS[MASK] = faithfulness.Method(None)
METHODS[choice.RANDOM] = faithfulness.from_grid(another_random_grid)


# Measures


class Localisation(NamedTuple):
    """What `localisation` returns, (B,) each; a map of zeros has 0 in all."""

    energy: torch.Tensor
    """Share of the map's sum that lies in the mask."""
    hit: torch.Tensor
    """1 where the map's peak lies in the mask, and nowhere else."""
    iou: torch.Tensor
    """Intersection over union of the mask and the map above a threshold, at the best of 19 thresholds."""


def localisation(maps, masks):
    """How well maps (B, H, W) in [0, 1] show masks (B, H, W); of volumes likewise."""
    maps, masks = maps.flatten(1), masks.flatten(1)
    energy = (maps * masks).sum(1) / maps.sum(1).clamp_min(1e-20)
    hit = (maps * masks).amax(1) > (maps * ~masks).amax(1)
    thresholds = torch.arange(1, 20) / 20
    above = maps[:, None] > thresholds[:, None]  # B, thresholds, pixels
    both, either = ((above & masks[:, None]).sum(2), (above | masks[:, None]).sum(2))
    return Localisation(energy, hit.float(), (both / either.clamp_min(1)).amax(1))


class Subject:
    """What all methods are measured on: a network, and what it sees in pictures of one object and of two."""

    def __init__(self, network, family, n_classes, n, seed=100):
        self.network = network
        self.single, self.pair = (family.draw(n, n_classes, n_objects, seed=seed + n_objects) for n_objects in (1, 2))
        generator, images = torch.Generator().manual_seed(0), self.single.images
        scale = faithfulness.INPUT_NOISE * images.flatten(1).std(1).view(-1, *[1] * (images.ndim - 1))
        self.noisy = images + scale * torch.randn(images.shape, generator=generator)
        _, self.layer, self.reshape = find_target_layer(network, self.single.images[:1])
        self.seen = {}

    def sees(self, method):
        """`faithfulness.Captured` with the method's gradients: of the single pictures, of their noisy form, and of
        either object of the pairs."""
        gradients = method.score, method.frozen_norms
        if gradients not in self.seen:
            capture = HeadCapture(
                self.network,
                [self.layer],
                self.reshape,
                guide_layer="auto",
                margin_temperature=method.score,
                frozen_norms=method.frozen_norms,
            )
            single, pair = self.single.classes, self.pair.classes
            self.seen[gradients] = [
                seen
                for images, classes in ((self.single.images, single), (self.noisy, single), (self.pair.images, pair))
                for seen in self._seen(capture, images, classes)
            ]
        return self.seen[gradients]

    @staticmethod
    def _seen(capture, images, classes):
        captured = capture(images, classes, several=True)
        activations, guide, gradients = captured.activations[0], captured.guides[0], captured.gradients[0]
        return [faithfulness.Captured(activations, guide, of_class) for of_class in gradients.unbind(1)]


def measured(subject, method):
    """Per-picture values of every measure, {name: (N,)}, and how many maps are zero."""
    size = subject.single.images.shape[2:]
    images, classes = subject.single.images, subject.single.classes[:, 0]
    if method.make is None:
        maps, *pair_maps = subject.single.masks[:, 0].float(), *subject.pair.masks.float().unbind(1)
    else:
        single, noisy, *pair = subject.sees(method)
        maps, noisy_maps, *pair_maps = (seen.maps(method, size) for seen in (single, noisy, *pair))
    arguments = subject.network, images, maps, classes
    # From grey: what the surroundings faded in from in training, so that the network knows such pictures.
    baselines = {"insertion_baseline": "zero", "deletion_baseline": "zero"}
    curves = metrics.insertion_deletion(*arguments, steps=faithfulness.STEPS, **baselines)
    found = [localisation(of_one, subject.pair.masks[:, index]) for index, of_one in enumerate(pair_maps)]
    values = {
        "insertion": curves.insertion,
        "deletion": curves.deletion,
        "insertion_minus_deletion": curves.insertion - curves.deletion,
        "average_drop": metrics.average_drop(*arguments),
        **{name: torch.stack(each).mean(0) for name, each in zip(Localisation._fields, zip(*found))},
    }
    if len(size) == 2:  # structural similarity is of pictures
        values["class_sensitivity"] = metrics.class_sensitivity(*pair_maps).ssim_distance
    if len(size) == 2 and method.make is not None:
        stability = metrics.gradient_noise_stability(
            single.activations,
            single.gradients,
            lambda activations, gradients: method.make(activations, gradients, single.guide, size),
            faithfulness.NOISE[:1],
            draws=1,
            generator=torch.Generator().manual_seed(0),
        )
        values["gradient_noise_10"] = stability.ssim[:, 0]
        values["input_noise"] = metrics.ssim(maps, noisy_maps)
    return values, sum(int((of_one.flatten(1).amax(1) == 0).sum()) for of_one in (maps, *pair_maps))


# The run


def row_of(values, zero, grad_cam):
    """As faithfulness.row_of; ``zero`` counts maps."""
    return faithfulness.row_of(values, {"zero_maps": zero}, grad_cam)


def picture(subjects, path, n=2):
    """Maps of either object of n pictures a network, a column a method."""
    from matplotlib.figure import Figure

    from cfcam_gpu.images import overlay

    lines = [(name, index, side) for name in subjects for index in range(n) for side in (0, 1)]
    methods = {name: method for name, method in METHODS.items() if name not in (MASK, choice.RANDOM)}
    figure = Figure(figsize=(1.25 * (len(methods) + 1), 1.3 * len(lines)))
    axes = figure.subplots(len(lines), len(methods) + 1)
    for axis, title in zip(axes[0], ("", *methods)):
        axis.set_title(title, fontsize=7)
    for line, (name, index, side) in zip(axes, lines):
        subject = subjects[name]
        shown = Image.fromarray(((subject.pair.images[index].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
        mask = subject.pair.masks[index, side]
        line[0].imshow(shown)
        line[0].set_ylabel(name, fontsize=7)
        for axis, method in zip(line[1:], methods.values()):
            maps = subject.sees(method)[2 + side].maps(method, (SIDE, SIDE))
            axis.imshow(overlay(shown, maps[index]))
        for axis in line:
            axis.contour(mask, levels=[0.5], colors="white", linewidths=0.8)
            axis.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})


def parser_of(doc, families):
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--network", nargs="*", choices=families, default=list(families), help="default: all")
    parser.add_argument("--seed", type=int, nargs="*", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("-n", type=int, default=128, help="pictures of one object, and of two; default: 128")
    parser.add_argument("--only", nargs="*", help="only the methods with these names")
    parser.add_argument("--again", action="store_true", help="make rows that are there already")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "cfcam_shapes", help="of weights")
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    return parser


def measure(table, families, methods, args):
    """Append the rows of a table that are not there yet, of these families and methods."""
    here = rows.about("cfcam_gpu", "torchvision", "grad-cam", "torchmetrics", device="cpu")
    done = {tuple(row[field] for field in POINT) for row in rows.read(args.out / f"{table}.jsonl")}
    methods = {name: method for name, method in methods.items() if not args.only or name in (*args.only, "Grad-CAM")}
    for name in args.network:
        family = families[name]
        for seed in args.seed:
            network, shares = trained(name, family, args.classes, seed, args.cache)
            subject = Subject(network, family, args.classes, args.n)
            of_network = {"network": name, "classes": args.classes, "seed": seed}
            of_network["accuracy"] = [round(share, 5) for share in shares]
            of_network.update(layer=family.layer, guide=family.guide)
            grad_cam = None
            for method in tqdm(methods, desc=f"{name}, {args.classes} classes, seed {seed}"):
                point = {**of_network, "method": method}
                known = tuple(point[field] for field in POINT) in done and not args.again
                if known and method != "Grad-CAM":
                    continue
                values, zero = measured(subject, methods[method])
                grad_cam = values if grad_cam is None else grad_cam
                if not known:
                    rows.write(table, [{**point, **row_of(values, zero, grad_cam), **here}], args.out)


def main(argv=None):
    parser = parser_of(__doc__, FAMILIES)
    parser.add_argument("--classes", type=int, choices=CLASSES, default=10, help="default: 10")
    parser.add_argument("--picture", type=Path, help="draw maps of the first seed's networks instead, into this file")
    args = parser.parse_args(argv)
    if not args.picture:
        # Of the candidates those that are named.
        measure("shapes", FAMILIES, {**METHODS, **(faithfulness.CANDIDATES if args.only else {})}, args)
        return 0
    subjects = {}
    for name in args.network:
        network, _ = trained(name, FAMILIES[name], args.classes, args.seed[0], args.cache)
        subjects[name] = Subject(network, FAMILIES[name], args.classes, args.n)
    picture(subjects, args.picture)
    return 0


POINT = ("network", "classes", "seed", "method")
"""Fields of a row that make it another than its neighbours."""

if __name__ == "__main__":
    sys.exit(main())
