"""benchmarks/shapes.py and volumes.py: the pictures are what their masks say, the measures what their names say."""

import pytest
import torch

for package in ("torchvision", "tqdm", "sklearn", "pytorch_grad_cam", "matplotlib", "torchmetrics"):
    pytest.importorskip(package)


@pytest.fixture
def shapes(benchmarks):
    return benchmarks("shapes")


@pytest.fixture
def volumes(benchmarks):
    return benchmarks("volumes")


@pytest.mark.parametrize("n_objects", [1, 2])
@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_pictures_are_those_of_the_seed(shapes, n_classes, n_objects):
    made = shapes.pictures(16, n_classes, n_objects, seed=3)
    for same, again in zip(made, shapes.pictures(16, n_classes, n_objects, seed=3)):
        assert torch.equal(same, again)
    assert not torch.equal(made.images, shapes.pictures(16, n_classes, n_objects, seed=4).images)
    assert made.images.shape == (16, 3, shapes.SIDE, shapes.SIDE) and made.images.abs().amax() <= 1
    assert made.classes.shape == (16, n_objects) and 0 <= made.classes.min() <= made.classes.max() < n_classes
    assert n_objects == 1 or (made.classes[:, 0] != made.classes[:, 1]).all()


def test_masks_are_where_the_objects_are(shapes, monkeypatch):
    """White objects, and a ground and distractors of black: what is bright is the mask."""
    monkeypatch.setattr(shapes, "COLOURS", ((1.0, 1.0, 1.0),))
    monkeypatch.setattr(shapes, "_ground", lambda n, generator: torch.zeros(n, 3, shapes.SIDE, shapes.SIDE))
    monkeypatch.setattr(shapes, "DISTRACTORS", (lambda u, v: torch.ones_like(u),) * 4)  # nowhere inside
    made = shapes.pictures(64, 10, 2, seed=int(torch.randint(1000, ())))
    bright = made.images.mean(1) > -0.25
    assert not (made.masks[:, 0] & made.masks[:, 1]).any()
    assert made.masks.flatten(2).any(2).all()
    # Where a pixel is covered by half, noise and stripes decide.
    assert (bright == made.masks.any(1)).float().mean() > 0.99


def test_shapes_differ(shapes):
    axis = torch.linspace(-1, 1, 32)
    inside = torch.stack([shape(axis, axis[:, None]) < 0 for shape in shapes.SHAPES + shapes.DISTRACTORS]).flatten(1)
    both = (inside[:, None] & inside).sum(2) / (inside[:, None] | inside).sum(2)
    assert (both - torch.eye(len(inside))).max() < 0.9


def test_localisation(shapes):
    masks = shapes.pictures(8, 10, 1, seed=0).masks[:, 0]
    for values in shapes.localisation(masks.float(), masks):
        assert (values == 1).all()
    for values in shapes.localisation(1 - masks.float(), masks):
        assert (values == 0).all()
    for values in shapes.localisation(torch.zeros(masks.shape), masks):
        assert (values == 0).all()
    flat = shapes.localisation(torch.ones(masks.shape), masks)
    torch.testing.assert_close(flat.energy, masks.flatten(1).float().mean(1))
    assert (flat.hit == 0).all() and torch.equal(flat.iou, flat.energy)


@pytest.mark.parametrize("n_objects", [1, 2])
def test_bodies_are_where_their_masks_are(volumes, monkeypatch, n_objects):
    """Bodies without stripes in the grey of no noise, and no distractors: what is not grey is the mask."""
    monkeypatch.setattr(volumes, "_ground", lambda n, generator: torch.full((n, 1, *[volumes.SIDE] * 3), 0.5))
    monkeypatch.setattr(volumes, "DISTRACTORS", (lambda u, v, w: torch.ones_like(u),) * 3)
    arguments = 32, len(volumes.SHAPES), n_objects
    made, again, other = (volumes.volumes(*arguments, seed=seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, made, again)) and not torch.equal(made.images, other.images)
    assert made.images.shape == (32, 1, *[volumes.SIDE] * 3) and made.masks.shape[:2] == made.classes.shape
    seen = made.images[:, 0].abs() > 0.25  # noise reaches 0.06, and a stripe may be nearly grey
    assert (seen == made.masks.any(1)).float().mean() > 0.98
    sizes = made.masks.flatten(2).sum(2)
    assert sizes.min() > 60 and (n_objects == 1 or not (made.masks[:, 0] & made.masks[:, 1]).any())


def test_bodies_differ(volumes):
    axis = torch.linspace(-1, 1, 20)
    grid = torch.meshgrid(axis, axis, axis, indexing="ij")
    inside = torch.stack([body(*grid) < 0 for body in volumes.SHAPES + volumes.DISTRACTORS]).flatten(1)
    both = (inside[:, None] & inside).sum(2) / (inside[:, None] | inside).sum(2)
    assert (both - torch.eye(len(inside))).max() < 0.9


@pytest.mark.parametrize("name", ["resnet", "convnext", "vit", "resnet3d"])
def test_a_network_trains_and_is_explained(shapes, volumes, name, tmp_path, monkeypatch):
    family = {**shapes.FAMILIES, **volumes.FAMILIES}[name]
    made = family.draw(8, 2, 1, seed=0)
    pool = (made.images.byte(), made.masks, torch.eye(2)[made.classes[:, 0]])
    monkeypatch.setattr(shapes, "pool", lambda n_classes, draw: pool)
    monkeypatch.setattr(shapes, "HELD_OUT", 4)
    monkeypatch.setattr(shapes, "STEPS", {2: 1})
    fresh = family.build(2)
    network, shares = shapes.trained(name, family, 2, seed=0, folder=tmp_path)
    assert all(0 <= share <= 1 for share in shares)
    assert any(not torch.equal(*pair) for pair in zip(fresh.parameters(), network.parameters()))
    monkeypatch.setattr(shapes, "train", None)  # the second time it comes from the folder
    images = family.draw(2, 2, 2, seed=0).images
    assert torch.equal(network(images), shapes.trained(name, family, 2, seed=0, folder=tmp_path)[0](images))

    subject = shapes.Subject(network, family, 2, n=2)
    seen = subject.sees(shapes.METHODS["Grad-CAM"])[0]
    sides = (8, 8) if images.ndim == 4 else (6, 6, 6)
    assert seen.activations.shape == seen.gradients.shape and seen.activations.shape[2:] == sides
    assert shapes.find_target_layer(network, images)[0] == family.layer
    for method in ("Grad-CAM", "CF-CAM"):
        values, zero = shapes.measured(subject, shapes.METHODS[method])
        assert all(of_pictures.shape == (2,) for of_pictures in values.values()) and zero >= 0


@pytest.mark.parametrize("drawn", ["shapes", "volumes"])
def test_table(shapes, benchmarks, tmp_path, drawn):
    """A line a method, the mean over the seeds; bold only where every network says so."""
    report, faithful = benchmarks("report"), benchmarks("report_faithfulness")
    assert faithful.TABLES[drawn](report.Results(tmp_path)) == "not measured"
    for seed, difference in ((0, 0.1), (1, -0.1)):
        for method, sign in (("Grad-CAM", 0), ("mine", 1)):
            values = {
                **{measure: torch.full((4,), 0.5 + sign * difference) for measure in faithful.SHAPES},
                "energy": torch.full((4,), 0.5 + sign * 0.2),
            }
            base = {measure: torch.full((4,), 0.5) for measure in ("insertion", *faithful.SHAPES)}
            row = {"network": "resnet", "classes": 10, "seed": seed, "method": method, "accuracy": [0.9, 0.8]}
            row.update(device="CPU", date="today", commit="", **shapes.row_of({**base, **values}, seed, base))
            shapes.rows.write(drawn, [row], tmp_path)
    table = faithful.TABLES[drawn](report.Results(tmp_path))
    grad_cam, mine = table.splitlines()[2:4]
    assert grad_cam.startswith("| resnet, 10 classes, 2 seeds; 90% to 90%, 80% to 80% | Grad-CAM | 0.500 |")
    assert grad_cam.endswith("| 1 |") and mine.startswith("|  | mine | 0.500 | 0.500 |")
    assert "**0.700 +**" in mine and mine.count("**") == 2
