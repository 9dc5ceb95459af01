"""Models of transformers by name and by folder: small ones with random weights, judged by transformers and autograd."""

import json
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

Image = pytest.importorskip("PIL.Image")
for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

import transformers

from cfcam_gpu import CFCAM, CFCAMConfig, hugging_face, models
from cfcam_gpu.layers import TokensToMap

NAMES = {0: "ox", 1: "ass", 2: "mule"}
TEXTS = ["a dog", "a cat", "the sea"]
COMMON = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}, "initializer_range": 0.3}
TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

pytestmark = pytest.mark.usefixtures("one_thread")


def vit():
    config = transformers.ViTConfig(image_size=32, patch_size=8, **TOKENS, **COMMON)
    return transformers.ViTForImageClassification(config), transformers.ViTImageProcessor(size=square(32))


def swin():
    config = transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, **COMMON
    )
    processor = transformers.ViTImageProcessor(size=square(64), image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
    return transformers.SwinForImageClassification(config), processor


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], **COMMON)
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 96}, crop_pct=0.8)
    return transformers.ConvNextForImageClassification(config), processor


def dinov2():
    config = transformers.Dinov2Config(image_size=56, patch_size=14, **TOKENS, **COMMON)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 64}, crop_size=square(56))
    return transformers.Dinov2ForImageClassification(config), processor


def segformer():
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, decoder_hidden_size=32, num_attention_heads=[1, 1, 2, 2], **COMMON
    )
    return transformers.SegformerForSemanticSegmentation(config), transformers.SegformerImageProcessor(size=square(64))


def clip():
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocabulary[letter] = len(vocabulary)
        vocabulary[f"{letter}</w>"] = len(vocabulary)
    tokenizer = transformers.CLIPTokenizer(vocabulary, [])
    of_text = {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    of_text["pad_token_id"] = 1
    config = transformers.CLIPConfig(
        text_config={**TOKENS, **of_text},
        vision_config={**TOKENS, "image_size": 48, "patch_size": 12},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=square(48))
    return model, processor, tokenizer


def square(side):
    return {"height": side, "width": side}


MODELS = {"vit": vit, "swin": swin, "convnext": convnext, "dinov2": dinov2, "clip": clip, "segformer": segformer}


@pytest.fixture
def saved(seed, tmp_path):
    """Saves a model with what belongs to it, and returns the folder."""

    def save(name, folder=None):
        folder = folder or tmp_path / name
        for part in MODELS[name]():
            part.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def photograph(rng, tmp_path):
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    small.resize((131, 90), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# Maps


def pixels_of(folder, photograph, **processing):
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return processor(images=Image.open(photograph).convert("RGB"), return_tensors="pt", **processing)["pixel_values"]


def by_hand(name, folder, photograph, index, **processing):
    """Grad-CAM (H, W) in [0, 1] of a class or text, by transformers' own parts and autograd: without this package."""
    pixels = pixels_of(folder, photograph, **processing)
    if name == "clip":
        model = transformers.CLIPModel.from_pretrained(folder).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
        forward = lambda: model(pixel_values=pixels, **tokens).logits_per_image[0, index]
        layer, n_prefix = model.vision_model.encoder.layers[-1].layer_norm1, 1
    elif name == "segformer":
        model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder).eval()
        layer, n_prefix = model.decode_head.activation, None

        def forward():
            logits = model(pixels).logits[0]
            return logits[index][logits.argmax(0) == index].sum()
    else:
        model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        forward = lambda: model(pixels).logits[0, index]
        layer, n_prefix = {
            "vit": lambda: (model.vit.layers[-1].layernorm_before, 1),
            "swin": lambda: (model.swin.layernorm, 0),
            "convnext": lambda: (model.convnext.encoder.stages[-1], None),
            "dinov2": lambda: (model.dinov2.layernorm, 1),
        }[name]()
    kept = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    score = forward()
    handle.remove()
    gradient = torch.autograd.grad(score, kept[0])[0][0]
    activations = kept[0][0].detach()
    if n_prefix is not None:
        n = round((len(activations) - n_prefix) ** 0.5)
        activations, gradient = (each[n_prefix:].T.reshape(-1, n, n) for each in (activations, gradient))
    heat = (activations * gradient.mean((1, 2), keepdim=True)).sum(0).clamp_min(0)
    heat = F.interpolate(heat[None, None], tuple(pixels.shape[2:]), mode="bilinear", align_corners=False)[0, 0]
    return ((heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-12)).numpy()  # 0 where nothing speaks for it


def but_for_zero_maps(err):
    """The lines of stderr, without those that a network with random weights brings about."""
    return [line for line in err.splitlines() if "maps are zero everywhere" not in line]


def explained(run, photograph, folder, out, *options, texts=()):
    """{index: map} of a run of the command line, and what it said."""
    text = [word for text in texts for word in ("--text", text)]
    status, said, err = run("explain", photograph, "--model", folder, "--out", out, "--raw", *text, *options)
    assert (status, but_for_zero_maps(err)) == (0, []), err
    assert "warning" not in said
    return {int(path.stem.rpartition("_")[2]): np.load(path) for path in out.glob("*.npy")}, said


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_those_made_by_hand(saved, run, photograph, tmp_path, capfd, name):
    folder, texts = saved(name), TEXTS if name == "clip" else ()
    capfd.readouterr()
    maps, said = explained(run, photograph, folder, tmp_path / "out", "--method", "gradcam", texts=texts)
    assert sorted(maps) == [0, 1, 2] if texts else len(maps) == 2
    for index, heat in maps.items():
        assert f"{(TEXTS if texts else NAMES)[index]} 0." in said or f"{(TEXTS if texts else NAMES)[index]} 1." in said
        assert np.abs(heat - by_hand(name, folder, photograph, index)).max() < 1e-4
    assert max(heat.std() for heat in maps.values()) > 0.05
    wrong = [by_hand(name, folder, photograph, index, image_mean=[0.2, 0.5, 0.8]) for index in maps]
    assert not all(np.abs(heat - other).max() < 0.01 for heat, other in zip(maps.values(), wrong))


def test_cf_cam_is_that_of_the_bare_model(saved, run, photograph, tmp_path, capfd):
    """Of texts and of regions each score is its own: no margin over the others."""
    folder = saved("clip")
    capfd.readouterr()
    maps, _ = explained(run, photograph, folder, tmp_path / "clip-out", texts=TEXTS)
    model, pixels = transformers.CLIPModel.from_pretrained(folder).eval(), pixels_of(folder, photograph)
    tokens = dict(transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt"))
    layer, reshape = model.vision_model.encoder.layers[-1].layer_norm1, TokensToMap(1, (4, 4))
    cam = CFCAM(model, [layer], reshape, guide_layer=None, config=CFCAMConfig(margin_temperature=0))
    for index, heat in maps.items():
        similarity = lambda output, index=index: output.logits_per_image.flatten()[index]
        expected = cam.maps({"pixel_values": pixels, **tokens}, [similarity])[0].numpy()
        assert np.abs(heat - expected).max() < 1e-4

    folder = saved("vit")
    capfd.readouterr()
    maps, _ = explained(run, photograph, folder, tmp_path / "vit-out", "--classes", "1")
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    cam = CFCAM(model, [model.vit.layers[-1].layernorm_before], reshape)
    assert np.abs(maps[1] - cam.maps(pixels_of(folder, photograph), [1])[0].numpy()).max() < 1e-4


def test_the_texts_are_encoded_once(saved, photograph, monkeypatch):
    loaded = models.load_model(f"hf:{saved('clip')}", text=TEXTS)
    monkeypatch.setattr(type(loaded.model.model), "get_text_features", None)
    pixels = loaded.preprocess(Image.open(photograph))[None].repeat(2, 1, 1, 1)
    assert CFCAM(loaded.model).maps(pixels, [[0, 1, 2]] * 2).shape == (2, 3, 48, 48)


def test_siglip_texts_do_not_compete(seed, run, photograph, tmp_path, capfd):
    """Its probabilities are sigmoids with a bias, and a text is explained itself, however improbable."""
    _, processor, tokenizer = clip()
    of_text = {**TOKENS, "vocab_size": 60, "max_position_embeddings": 9, "pad_token_id": 1}
    config = transformers.SiglipConfig(
        text_config=of_text, vision_config={**TOKENS, "image_size": 48, "patch_size": 12}
    )
    model, folder = transformers.SiglipModel(config).eval(), tmp_path / "siglip"
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.logit_bias.data.fill_(-4.0)
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    pixels = pixels_of(folder, photograph)
    for texts in (TEXTS[:1], TEXTS[:2]):
        loaded = models.load_model(str(folder), text=texts)
        tokens = tokenizer(texts, padding="max_length", max_length=9, return_tensors="pt")
        with torch.no_grad():
            expected = model(pixel_values=pixels, input_ids=tokens["input_ids"]).logits_per_image
            assert torch.allclose(loaded.model(pixels), expected, rtol=1e-4, atol=1e-4)
        capfd.readouterr()
        out = tmp_path / f"out{len(texts)}"
        words = [word for text in texts for word in ("--text", text)]
        status, said, err = run("explain", photograph, "--model", folder, "--out", out, "--raw", *words)
        assert (status, but_for_zero_maps(err)) == (0, [])
        for text, probability in zip(texts, expected[0].sigmoid().tolist()):
            assert f"{text} {probability:.2f}" in said
    assert sorted(path.name for path in (tmp_path / "out1").glob("*.npy")) == ["photo_positive.npy"]


# Segmentation


def test_the_score_of_a_region(seed):
    """Its softmax is the share of the pixels, and its gradient that of the mean over them; of none, over all."""
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    logits.data[:, 3] -= 100
    network = torch.nn.Identity()
    network.forward = lambda pixels: SimpleNamespace(logits=pixels)
    scores = hugging_face.Segmentation(network)(logits)
    labels = logits.detach().argmax(1)
    shares = torch.stack([(labels == index).double().mean((1, 2)) for index in range(4)], 1)
    assert torch.allclose(scores.softmax(1).double(), shares, atol=1e-6) and (shares[:, 3] == 0).all()
    for index in range(4):
        (gradient,) = torch.autograd.grad(scores[1, index], logits, retain_graph=True)
        expected = torch.zeros_like(gradient)
        where = labels[1] == index if index < 3 else torch.ones(5, 6, dtype=torch.bool)
        expected[1, index][where] = 1 / where.sum()
        assert torch.allclose(gradient, expected)


# Preprocessing


@pytest.mark.parametrize("name", ["vit", "convnext", "dinov2", "clip"])
def test_seen_is_what_the_processor_leaves(seed, photograph, name):
    processor = MODELS[name]()[1]
    preprocess, image = hugging_face.Processed(processor), Image.open(photograph).convert("RGB")
    size = preprocess(image).shape[1:]
    seen = preprocess.seen(image).resize(tuple(size)[::-1], Image.Resampling.BICUBIC)
    seen = torch.from_numpy(np.array(seen)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
    pixels = preprocess(image) * std + mean
    assert (seen - pixels).abs().mean() < 0.02 < 0.05 < (seen.flip(2) - pixels).abs().mean()


def test_of_an_unknown_processor_the_pixels_are_seen(seed, photograph, tmp_path):
    """One that pads is no resize and crop: what is drawn is made of the pixels."""
    model, _ = vit()
    model.save_pretrained(tmp_path / "padded")
    processor = transformers.ViTImageProcessor(size=square(24), do_center_crop=True, crop_size=square(32))
    processor.save_pretrained(tmp_path / "padded")
    loaded = models.load_model(str(tmp_path / "padded"))
    assert loaded.preprocess(Image.open(photograph)).shape == (3, 32, 32)
    seen = np.asarray(loaded.seen(Image.open(photograph)))
    assert seen.shape == (32, 32, 3) and (seen[:3] == seen[0, 0]).all() and seen.std() > 10


# By name


def test_a_name_comes_from_the_local_cache(saved, run, photograph, tmp_path, capfd, monkeypatch):
    from huggingface_hub import constants

    # As HF_HOME and HF_HUB_OFFLINE=1 set them when a process begins.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub" / "models--owner--tiny"
    folder = saved("dinov2", cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    capfd.readouterr()
    by_name, by_folder = (
        explained(run, photograph, spec, tmp_path / out, "--classes", "1")[0][1]
        for spec, out in (("hf:owner/tiny", "by_name"), (folder, "by_folder"))
    )
    assert np.array_equal(by_name, by_folder)
    (cache / "snapshots" / ("0" * 40) / "preprocessor_config.json").unlink()
    for name in ("owner/absent", "owner/tiny"):
        status, _, err = run("explain", photograph, "--model", f"hf:{name}", "--out", tmp_path / "none")
        assert status == 2 and len(err.splitlines()) == 1
        for part in (f"no model hf:{name}", str(tmp_path / "hub"), "HF_HUB_OFFLINE is set", f"'hf download {name}'"):
            assert part in err


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked, waits = [], []

    def nobody(*address, **options):
        asked.append(address)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr("time.sleep", waits.append)  # between one try and the next
    with pytest.raises(OSError, match=r"no model hf:owner/absent: .* cannot be reached: .*no such host\)"):
        models.load_model("hf:owner/absent")
    assert len(asked) == 1 and not waits


# What is refused


def remove_head(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "classifier" not in name}, folder / "model.safetensors"
    )


def as_backbone(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (remove_head, ValueError, "no weights for 2 parameters of ViTForImageClassification, such as classifier.bias"),
        (as_backbone, ValueError, "must be for image classification, .* got .*vit with ViTModel"),
        (remove("config.json"), ValueError, "expected a folder that save_pretrained wrote, got one without"),
        (remove("preprocessor_config.json"), OSError, "vit: not all of a model and its image processor: .*processor"),
        (remove("model.safetensors"), OSError, "vit: not all of a model and its image processor: .*model.safetensors"),
    ],
)  # fmt: skip
def test_folders_that_are_not_a_whole_model(saved, change, error, message):
    folder = saved("vit")
    change(folder)
    verbosity = transformers.utils.logging.get_verbosity()
    with pytest.raises(error, match=message):
        models.load_model(f"hf:{folder}")
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_texts_that_do_not_go_with_the_model(saved, run, photograph, tmp_path):
    folder = saved("clip")
    for spec, text, message in (
        (
            saved("vit"),
            ["a dog"],
            "text goes with a model of image and text, such as CLIP; .*vit has classes of its own",
        ),
        ("demo", ["a dog"], "text goes with a model of image and text, such as hf:.*, not demo"),
        (folder, [], "compares images with texts: give one or more, --text 'a dog'"),
        (folder, ["a dog", " "], "text must not be empty"),
        (folder, ["a very long text"], "text must have at most 12 tokens, got 15: 'a very long text'"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load_model(str(spec), text=text)
    with pytest.raises(TypeError, match="text must be a list of strings, got 'a dog'"):
        models.load_model(str(folder), text="a dog")
    status, _, err = run(
        "explain", photograph, "--model", folder, "--text", "a dog", "--versus", "--out", tmp_path / "o"
    )
    assert status == 2 and "--versus needs two classes or more" in err


def test_what_is_not_for_regions(saved, run, photograph, tmp_path):
    folder = saved("segformer")
    for options, said in (
        (["--method", "score"], "--method score changes the picture, and with it the pixels"),
        (["--multilabel"], "--multilabel is for classes of the image"),
    ):
        status, _, err = run("explain", photograph, "--model", folder, *options, "--out", tmp_path / "out")
        assert status == 2 and said in err


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers is not installed.*pip install "cfcam_gpu\[transformers\]"'):
        models.load_model("hf:owner/name")
