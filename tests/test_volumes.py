"""Volumes (B, C, d, h, w) and series (B, C, t): the same pipeline on grids of three axes and of one."""

import warnings

import numpy as np
import pytest
import torch
from compare import assert_close, stretch_of_map
from device import DEVICE
from problems import activations_like
from torch import nn

from cfcam_gpu import CFCAM, CFCAMConfig, cf_cam, cluster_channels, pipeline, reference, torch_backend
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.gaussian import filter_matrices, pooling_weights
from cfcam_gpu.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread", "seed")

GRIDS = {
    "volume": ((3, 4, 5), (6, 8, 10), (9, 17, 20)),
    "of prime sides": ((2, 3, 5), (5, 7, 11), (7, 13, 17)),
    "one slice": ((1, 4, 4), (2, 8, 8), (1, 16, 16)),
    "anisotropic": ((2, 7, 6), (2, 14, 12), (16, 56, 48)),
    "one cell": ((1, 1, 1), None, (4, 4, 4)),
    "series": ((9,), (20,), (64,)),
}
"""The target layer's grid, the guide's, and the size of the maps."""


def needs(backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    elif backend == "reference" and pipeline.unavailable(backend):
        pytest.skip(f"the reference cannot run: {pipeline.unavailable(backend)}")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("config", [CFCAMConfig(), CFCAMConfig.paper()], ids=["default", "paper"])
def test_against_the_reference(backend, grids, config):
    needs(backend), needs("reference")
    shape, of_guide, size = grids
    activations = activations_like((2, 40, *shape), dead=0.3).to(DEVICE)
    gradients = torch.randn(2, 40, *shape, device=DEVICE) * 1e-3
    guide = None if of_guide is None else activations_like((2, 12, *of_guide)).to(DEVICE)
    result = cf_cam(activations, gradients, size, config, backend, guide=guide)
    expected = cf_cam(activations, gradients, size, config, "reference", guide=guide)
    assert result.maps.shape == (2, *size) and torch.equal(result.labels, expected.labels)
    assert_close(result.weights, expected.weights)
    for image in range(2):
        features = None if guide is None else guide[image]
        stretch = stretch_of_map(activations[image], expected.weights[image], size, config, features)
        assert_close(result.maps[image], expected.maps[image], stretch=stretch)


@pytest.mark.parametrize("grids", [GRIDS["volume"], GRIDS["series"]], ids=["volume", "series"])
def test_several_classes_in_one_pass(grids):
    shape, of_guide, size = grids
    activations, gradients = activations_like((2, 30, *shape)), torch.randn(2, 3, 30, *shape)
    guide = activations_like((2, 8, *of_guide))
    result = cf_cam(activations, gradients, size, guide=guide)
    assert result.maps.shape == (2, 3, *size) and result.weights.shape == (2, 3, 30)
    for k in range(3):
        one = cf_cam(activations, gradients[:, k], size, guide=guide)
        assert torch.equal(result.weights[:, k], one.weights)
        torch.testing.assert_close(result.maps[:, k], one.maps, rtol=0, atol=2e-6)


def test_a_slice_is_an_image():
    activations, gradients = activations_like((2, 30, 5, 6)), torch.randn(2, 30, 5, 6)
    guide = activations_like((2, 8, 10, 12))
    config = CFCAMConfig(boundary="reflect")  # zeros outside would be seen in front of the slice and behind it
    plane = cf_cam(activations, gradients, (20, 24), config, guide=guide)
    volume = cf_cam(activations[:, :, None], gradients[:, :, None], (1, 20, 24), config, guide=guide[:, :, None])
    assert torch.equal(plane.labels, volume.labels)
    torch.testing.assert_close(volume.maps[:, 0], plane.maps, rtol=0, atol=2e-6)


def test_labels_are_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed (extra: reference)")
    activations = activations_like((1, 60, 3, 4, 5))
    config = CFCAMConfig(dominant_percentile=100.0)
    labels, eps = cluster_channels(activations, config)
    rows = activations[0].flatten(1).double().numpy()
    found = cluster.DBSCAN(eps=float(eps[0]), min_samples=config.min_samples(60)).fit(rows).labels_
    np.testing.assert_array_equal(labels[0], found)


@pytest.mark.parametrize("boundary", ["constant", "reflect", "nearest"])
@pytest.mark.parametrize("shape, sigmas", [((3, 4, 5), (0.7, 1.5, 1.0)), ((1, 2, 9), (2.0, 2.0, 2.0)), ((8,), (1.3,))])
def test_the_gaussian_is_scipys(shape, sigmas, boundary, rng):
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed (extra: reference)")
    grid = rng.standard_normal(shape)
    expected = ndimage.gaussian_filter(grid, sigmas, mode=boundary, truncate=4.0)
    rows, columns = filter_matrices(shape, sigmas, boundary)
    filtered = rows @ grid.reshape(-1, shape[-1]) @ columns.T
    np.testing.assert_allclose(filtered.reshape(shape), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((grid * pooling_weights(shape, sigmas, boundary)).sum(), expected.mean(), atol=1e-12)


def test_the_resize_is_torchs(rng):
    for shape, size in (((3, 4, 5), (7, 9, 5)), ((5,), (12,))):
        grid = torch.from_numpy(rng.standard_normal((2, *shape)))
        expected = [reference.resize(of_image.numpy(), size) for of_image in grid]
        np.testing.assert_allclose(torch_backend.resize(grid, size), expected, rtol=0, atol=1e-12)


VOLUME = torch.rand(2, 8, 2, 3, 4)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((VOLUME, VOLUME, (8, 8)), {}, TypeError, r"output_size must be \(D, H, W\), got \(8, 8\)"),
        ((VOLUME, VOLUME[:, :, 0]), {}, ValueError, r"gradients must match activations \(2, 8, 2, 3, 4\)"),
        ((VOLUME[:, :, :0], VOLUME[:, :, :0]), {}, ValueError, r"must not be empty, got \(2, 8, 0, 3, 4\)"),
        ((VOLUME[None], VOLUME[None]), {}, ValueError, r"activations must have shape \(B, C, h, w\), of volumes"),
        ((VOLUME, VOLUME), {"config": CFCAMConfig(sigma=(1.0, 2.0))}, ValueError, "one for each of 3 axes, got 2"),
        ((VOLUME, VOLUME), {"guide": VOLUME[:, :, 0]}, ValueError, "guide must have a grid of as many axes"),
        ((VOLUME, VOLUME), {"guide": VOLUME[:, :, :1]}, ValueError, r"at least the activations' \(2, 3, 4\)"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        cf_cam(*arguments, **options)


def test_bad_sigmas():
    assert CFCAMConfig(sigma=[1, 2.0]).sigma == (1, 2.0)
    for sigma, error in (((1.0, 0.0), ValueError), ((1.0, "2"), TypeError), ((1.0, float("nan")), ValueError)):
        with pytest.raises(error, match="sigma must be"):
            CFCAMConfig(sigma=sigma)


# From a model.


class Video(nn.Module):
    """(B, 2, D, H, W) to 5 logits."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(2, 8, 3, stride=(1, 2, 2), padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv3d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3, 4)))


class Series(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 8, 5, stride=2, padding=2), nn.ReLU())
        self.second = nn.Sequential(nn.Conv1d(8, 16, 5, stride=2, padding=2), nn.ReLU())
        self.tokens, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.tokens(self.second(self.first(x)).transpose(1, 2)).mean(1))


def test_a_video_from_the_model_to_the_maps():
    torch.manual_seed(1)  # of some random networks everything speaks against the class, and the map is zero
    model, clips = Video().eval(), torch.rand(2, 2, 6, 20, 24)
    config = CFCAMConfig()
    cam = CFCAM(model, config=config)
    maps = cam.maps(clips, targets=[1, 2])
    assert cam.target_names == ["second"] and cam.guide_names == ["first"]
    assert maps.shape == (2, 6, 20, 24) and maps.amax() == 1 and maps.amin() == 0
    capture = HeadCapture(
        model, [model.second], guide_layer=model.first, margin_temperature=CFCAMConfig().margin_temperature
    )(clips, [1, 2])
    expected = cf_cam(capture.activations[0], capture.gradients[0], (6, 20, 24), config, guide=capture.guides[0])
    torch.testing.assert_close(maps, expected.maps, rtol=0, atol=2e-6)
    several = cam.explain(clips, top=3)
    assert several.maps.shape == (2, 3, 6, 20, 24) and several.weights.shape == (2, 3, 16)
    assert cam(clips).shape == (2, 6, 20, 24)
    both = CFCAM(model, [model.first, model.second])
    assert both.maps(clips).shape == (2, 6, 20, 24) and both(clips).max() == pytest.approx(1, abs=1e-6)


def test_the_default_of_volumes_is_without_the_average():
    torch.manual_seed(1)
    model, clips = Video().eval(), torch.rand(2, 2, 6, 20, 24)
    cam = CFCAM(model, [model.second])
    maps = cam.maps(clips, targets=[1, 2])
    assert cam.guide_names == ["second"] and cam.config == CFCAMConfig()
    config = CFCAMConfig.volumes()
    assert not config.averages and config.margin_temperature == CFCAMConfig().margin_temperature
    assert torch.equal(maps, CFCAM(model, [model.second], config=config).maps(clips, targets=[1, 2]))
    averaged = CFCAM(model, [model.second], config=CFCAMConfig()).maps(clips, targets=[1, 2])
    assert not torch.allclose(maps, averaged, rtol=0, atol=0.05)
    activations, gradients = torch.rand(2, 8, 3, 4, 5), torch.randn(2, 8, 3, 4, 5)
    for backend in ("torch", "reference"):
        if not pipeline.unavailable(backend):
            of_default, of_volumes = (
                cf_cam(activations, gradients, config=each, backend=backend).maps for each in (None, config)
            )
            assert torch.equal(of_default, of_volumes)
    # Neither images nor series.
    for shape in ((2, 8, 4, 5), (2, 8, 9)):
        activations, gradients = torch.rand(shape), torch.randn(shape)
        expected = cf_cam(activations, gradients, config=CFCAMConfig()).maps
        assert torch.equal(cf_cam(activations, gradients).maps, expected)


@pytest.mark.parametrize("name", ["gradcam", "layercam", "eigencam", "ablation"])
def test_other_methods_of_a_video(name):
    model, clips = Video().eval(), torch.rand(2, 2, 6, 20, 24)
    cam = METHODS[name](model, [model.second])
    maps = cam.maps(clips, targets=[1, 2])
    assert maps.shape == (2, 6, 20, 24) and cam.maps(clips, top=2).shape == (2, 2, 6, 20, 24)
    if name == "gradcam":
        capture = HeadCapture(model, [model.second])(clips, [1, 2])
        weights = capture.gradients[0].mean((2, 3, 4), keepdim=True)
        grid = (weights * capture.activations[0]).sum(1).relu()
        torch.testing.assert_close(maps, torch_backend.grad_cam_maps([grid], (6, 20, 24)), rtol=0, atol=2e-6)


def test_a_series_from_the_model_to_the_maps():
    model, series = Series().eval(), torch.rand(3, 2, 40)
    cam = CFCAM(model, [model.second])
    assert cam.maps(series, targets=[0, 1, 2]).shape == (3, 40) and cam.guide_names == ["first"]
    assert cam(series).shape == (3, 40)
    with pytest.raises(ValueError, match="'tokens' returns .* mostly has the channels last; pass a reshape_transform"):
        CFCAM(model, [model.tokens]).maps(series)
    tokens = CFCAM(model, [model.tokens], lambda tokens: tokens.transpose(1, 2))
    assert tokens.maps(series).shape == (3, 40)


@pytest.mark.parametrize("name", ["r3d_18", "s3d", "swin3d_t", "mvit_v2_s"])
def test_torchvisions_video_models_by_name(name, recwarn):
    pytest.importorskip("torchvision", reason="torchvision is not installed (extra: test)")
    frames, side = (16, 224) if name == "s3d" else (4, 64)
    model, clip = video_model(name), torch.rand(1, 3, frames, side, side)
    target, guide = {
        "r3d_18": ("layer4", "layer3"),
        "s3d": ("features", "features.12"),
        "swin3d_t": ("norm", "features.4"),
        "mvit_v2_s": ("blocks.2.norm1", None),
    }[name]
    cam = CFCAM(model, config=CFCAMConfig())
    maps = cam.maps(clip)
    assert cam.target_names == [target] and (guide is None or cam.guide_names == [guide])
    assert maps.shape == (1, frames, side, side) and maps.isfinite().all()
    assert maps.max() == 1 or any("maps are zero" in str(each.message) for each in recwarn)


def video_model(name):
    """torchvision's, untrained; of an MViT v2 three of the blocks, for small clips."""
    from torchvision.models import get_model
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    if name != "mvit_v2_s":
        return get_model(name, weights=None).eval()
    three = [3, 3, 3]
    blocks = [
        MSBlockConfig(1, 96, 96, three, three, [1, 1, 1], [1, 8, 8]),
        MSBlockConfig(2, 96, 192, three, three, [1, 2, 2], [1, 4, 4]),
        MSBlockConfig(2, 192, 192, three, three, [1, 1, 1], [1, 4, 4]),
    ]
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return MViT(spatial_size=(64, 64), temporal_size=4, block_setting=blocks, **options).eval()


class MeanLogits(nn.Module):
    """A segmentation network's classes as scores of the volume."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).mean((2, 3, 4))


@pytest.mark.parametrize("name", ["densenet", "resnet", "segresnet", "unet"])
def test_monais_networks(name):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    torch.manual_seed(0)
    options = {"spatial_dims": 3, "in_channels": 1}
    if name == "densenet":
        sizes = {"init_features": 8, "growth_rate": 4, "block_config": (2, 2, 2)}
        model, target = nets.DenseNet(**options, out_channels=3, **sizes), "class_layers.relu"
    elif name == "resnet":
        sizes = {"block_inplanes": [8, 16, 16, 32], "layers": [1, 1, 1, 1], "conv1_t_stride": 2}
        model = nets.ResNet("basic", spatial_dims=3, n_input_channels=1, num_classes=3, **sizes)
        target = "layer4"
    elif name == "segresnet":
        sizes = {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)}
        model, target = MeanLogits(nets.SegResNet(**options, out_channels=3, **sizes)), "network.act_mod"
    else:
        model = MeanLogits(nets.UNet(**options, out_channels=3, channels=(8, 16, 16), strides=(2, 2)))
        target = "network.model.1"
    model, volumes = model.eval(), torch.randn(2, 1, 24, 32, 40)
    cam = CFCAM(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*channels first or last")
        maps = cam.maps(volumes, top=3)
    assert maps.shape == (2, 3, 24, 32, 40) and maps.isfinite().all()
    assert (maps.flatten(2).amax(2) == 1).any(1).all(), "something speaks for one of the classes"
    assert cam.target_names == [target]


def test_layers_of_images_and_of_volumes_together():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.volume, self.plane, self.head = nn.Conv3d(2, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.plane(self.volume(x).mean(2)).mean((2, 3)))

    model, clips = Mixed().eval(), torch.rand(2, 2, 5, 12, 12)
    assert CFCAM(model, [model.plane]).maps(clips).shape == (2, 12, 12)
    assert CFCAM(model, [model.volume]).maps(clips).shape == (2, 5, 12, 12)
    with pytest.raises(ValueError, match=r"grids of equally many axes, got \(3, 10, 10\), \(8, 8\)"):
        CFCAM(model, [model.volume, model.plane], guide_layer=None).maps(clips)
    assert not any(module._forward_hooks for module in model.modules())


class SlowFast(nn.Module):
    """Two pathways: one sees every fourth frame, the other all of them."""

    def __init__(self):
        super().__init__()
        self.slow = nn.Sequential(nn.Conv3d(2, 16, (1, 3, 3), (1, 4, 4), (0, 1, 1)), nn.ReLU())
        self.fast = nn.Sequential(nn.Conv3d(2, 4, 3, (1, 4, 4), 1), nn.ReLU())
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        return self.head(torch.cat((self.slow(x[:, :, ::4]).mean((2, 3, 4)), self.fast(x).mean((2, 3, 4))), 1))


def test_pathways_of_other_frames_than_the_clip():
    torch.manual_seed(2)  # each pathway has a map of both clips
    model, clips = SlowFast().eval(), torch.rand(2, 2, 8, 16, 24)
    pathways = [model.slow, model.fast]
    maps = [CFCAM(model, [pathway]).maps(clips, [1, 2]) for pathway in pathways]
    for pathway, frames, of_pathway in zip(pathways, (2, 8), maps):
        capture = HeadCapture(model, [pathway], margin_temperature=CFCAMConfig().margin_temperature)(clips, [1, 2])
        assert capture.activations[0].shape[2:] == (frames, 4, 6)
        assert of_pathway.flatten(1).amax(1).tolist() == [1, 1]
        expected = cf_cam(capture.activations[0], capture.gradients[0], (8, 16, 24)).maps
        torch.testing.assert_close(of_pathway, expected, rtol=0, atol=2e-6)
    # Every slow frame stands for four: its middle lies between the second and the third of them.
    assert torch.equal(maps[0][:, 0], maps[0][:, 1]) and not torch.equal(maps[0][:, 3], maps[0][:, 4])
    both = CFCAM(model, pathways).maps(clips, [1, 2])
    mean = torch.stack(maps).mean(0)
    expected = torch_backend.normalize(mean, CFCAMConfig())
    torch.testing.assert_close(both, expected, rtol=0, atol=2e-6)


def test_what_a_model_of_volumes_is_refused():
    model, clips = Video().eval(), torch.rand(2, 2, 6, 20, 24)
    with pytest.raises(ValueError, match="one for each of 3 axes, got 2"):
        CFCAM(model, [model.second], config=CFCAMConfig(sigma=(1.0, 2.0))).maps(clips)
    for empty in (clips[:, :, :0], clips[..., :0]):
        for layers in ([model.second], None):
            with pytest.raises(ValueError, match=r"input_tensor must not be empty, got \(2, 2, "):
                CFCAM(model, layers).maps(empty)
