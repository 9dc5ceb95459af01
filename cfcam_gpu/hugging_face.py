"""Models of the Hugging Face Hub, or of a folder that ``save_pretrained`` wrote, by transformers' Auto classes: each
with its own image processor and label names, as something that returns scores (B, n)."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cfcam_gpu import class_names
from cfcam_gpu.checks import needs

CLASSES, TEXTS, REGIONS = "classes", "texts", "regions"
"""What a model's scores are of: classes of the image, texts, classes of its pixels. See `LoadedModel`."""

CHECKED_SIZE = (96, 61)
"""(width, height) of the noise on which a processor is compared with `Preprocess`."""

SAME_PIXELS = 0.3
"""Mean difference of two preprocessings, in standard deviations of the pixels, up to which they show the same region:
another interpolation makes 0.01, a crop that is rounded to the pixel beside 0.16, and another crop 0.55 and more."""

SAME_LOGITS = 1e-4
"""Largest difference from the model's own logits, as a share of the largest."""


class Found(NamedTuple):
    """What `load` finds: the arguments of a `LoadedModel`."""

    model: nn.Module
    preprocess: "Processed"
    class_names: Any
    scores: str


def load(name: str, text: Sequence[str] = ()) -> Found:
    """A model for image classification, semantic segmentation, or image and text, in float32.

    The kind is what ``config.architectures`` says. Code that comes with a model is not run. Of a name the files are
    those in the local cache, or else downloaded.

    Args:
        name: OWNER/NAME on the Hub, or a folder; where it may be both, the folder.
        text: the texts that a model of image and text compares an image with, one or more; of others none.

    Raises:
        ValueError: the model is of another kind or has no weights for its scores, the texts do not go with it, or the
            folder is none of a model's.
        OSError: there is no such model in the cache, and it cannot be downloaded.
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(needs("transformers", "transformers")) from error
    text = _checked_text(text)
    with _quietly(transformers):
        if os.path.isdir(name):
            if not os.path.isfile(os.path.join(name, "config.json")):
                raise ValueError(f"{name}: expected a folder that save_pretrained wrote, got one without a config.json")
            try:
                return _load(transformers, name, text, local_files_only=True)
            except OSError as error:
                raise OSError(f"{name}: not all of a model and its image processor: {_first_line(error)}") from error
        try:
            return _load(transformers, name, text, local_files_only=True)
        except OSError:
            pass
        try:
            _ask_the_hub(name)
            return _load(transformers, name, text, local_files_only=False)
        except OSError as error:
            from huggingface_hub import constants

            offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _first_line(error)
            raise OSError(
                f"no model hf:{name}: not all of it is in the local cache, {constants.HF_HUB_CACHE}, and it was not"
                f" downloaded ({offline}); where there is a network, run 'hf download {name}', and bring the cache here"
                " or set HF_HOME to where it is; or name a folder that save_pretrained wrote: --model FOLDER"
            ) from error


def _ask_the_hub(name):
    """OSError where the Hub does not answer, after one try: transformers' own tries take half a minute."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except (errors.HfHubHTTPError, ValueError):  # an answer, or a name that it is not asked for: transformers says it
        pass
    except Exception as error:  # of whichever library the Hub's own sends requests by
        raise OSError(f"{constants.ENDPOINT} cannot be reached: {_first_line(error)}") from error


def _first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _checked_text(text):
    if isinstance(text, str) or not all(isinstance(each, str) for each in text):
        raise TypeError(f"text must be a list of strings, got {text!r}")
    if not all(each.strip() for each in text):
        raise ValueError("text must not be empty, got a text without a word")
    return list(dict.fromkeys(text))


@contextmanager
def _quietly(transformers) -> Iterator[None]:
    """Without the bars and the reports of loading: what is wrong with the weights is raised here."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _load(transformers, name, text, **where):
    config = transformers.AutoConfig.from_pretrained(name, **where)
    scores, auto = _kind(transformers, name, config)
    if text and scores != TEXTS:
        raise ValueError(f"text goes with a model of image and text, such as CLIP; {name} has classes of its own")
    if scores == TEXTS and not text:
        raise ValueError(f"{name} compares images with texts: give one or more, --text 'a dog' --text 'a cat'")
    processor = transformers.AutoImageProcessor.from_pretrained(name, **where)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where) if scores == TEXTS else None
    model, info = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **where)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name} has no weights for {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}: is"
            " it a backbone without a head?"
        )
    model.eval()
    preprocess = Processed(processor)
    if scores == TEXTS:
        model = ImageText(model, _tokens(tokenizer, config, text))
        _check_scores(model, preprocess, name)
        return Found(model, preprocess, text, scores)
    names = class_names.names_in_config(model)
    if scores == REGIONS:
        if config.num_labels < 2:
            raise ValueError(f"segmentation needs a model of two labels or more, {name} has {config.num_labels}")
        model = Segmentation(model)
    return Found(model, preprocess, names, scores)


def _kind(transformers, name, config):
    """What the scores of a configuration's model are, and the Auto class that builds it."""
    from transformers.models.auto import modeling_auto as auto

    kinds = {
        CLASSES: (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, transformers.AutoModelForImageClassification),
        REGIONS: (
            auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
            transformers.AutoModelForSemanticSegmentation,
        ),
        TEXTS: (
            auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            transformers.AutoModelForZeroShotImageClassification,
        ),
    }
    architectures = config.architectures or []
    for scores, (names, build) in kinds.items():
        known = [each for value in names.values() for each in ([value] if isinstance(value, str) else value)]
        if any(each in known for each in architectures):
            return scores, build
    is_timm = config.model_type == "timm_wrapper" or name.startswith("timm/")
    hint = f"; this is timm's: --model timm:{os.path.basename(name)}" if is_timm else ""
    raise ValueError(
        "a model of transformers must be for image classification, semantic segmentation, or image and text, got"
        f" {name} with {', '.join(architectures) or 'no architecture'}{hint}"
    )


def _tokens(tokenizer, config, text):
    """The tokens of the texts, padded as the model was trained to have them."""
    longest = config.text_config.max_position_embeddings
    for each in text:
        n_tokens = len(tokenizer(each)["input_ids"])
        if n_tokens > longest:
            raise ValueError(f"text must have at most {longest} tokens, got {n_tokens}: {each!r}")
    if _by_sigmoid(config):  # trained on texts that are all of the same length, without a mask
        return {
            "input_ids": tokenizer(text, padding="max_length", max_length=longest, return_tensors="pt")["input_ids"]
        }
    return tokenizer(text, padding=True, return_tensors="pt")


def _by_sigmoid(config):
    """Whether a text's probability is a sigmoid of its own, as of SigLIP, rather than a share among the texts."""
    return config.model_type.startswith("siglip")


class ImageText(nn.Module):
    """Similarity logits of images and fixed texts, of a model such as CLIP: (B, n_texts).

    The texts are encoded once, here. A logit is the cosine of the image's and the text's features, times the model's
    scale, and plus its bias if it has one.

    Args:
        model: a transformers' model with ``get_image_features``, ``get_text_features`` and ``logit_scale``.
        tokens: what its tokenizer makes of the texts.
    """

    def __init__(self, model: Any, tokens: Any) -> None:
        super().__init__()
        for name in ("get_image_features", "get_text_features", "logit_scale"):
            if not hasattr(model, name):
                raise ValueError(f"{type(model).__name__} is no model such as CLIP: it has no {name}")
        self.model = model
        self.tokens = dict(tokens)
        self.config = {"problem_type": "multi_label_classification"} if _by_sigmoid(model.config) else {}
        with torch.no_grad():
            self.register_buffer("texts", _normalised(model.get_text_features(**self.tokens)))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        model = self.model
        logits = _normalised(model.get_image_features(pixel_values=pixel_values)) @ self.texts.T
        bias = getattr(model, "logit_bias", None)
        logits = logits * model.logit_scale.exp()
        return logits if bias is None else logits + bias

    def own_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The same by the model's own forward, which encodes the texts each time."""
        return self.model(pixel_values=pixel_values, **self.tokens).logits_per_image


def _normalised(features):
    features = getattr(features, "pooler_output", features)
    return features / features.norm(dim=-1, keepdim=True)


def _check_scores(model, preprocess, name):
    """ValueError unless the similarities are the model's own, on a picture of noise."""
    pixels = preprocess(_noise(256, 256))[None]
    with torch.no_grad():
        logits, expected = model(pixels), model.own_logits(pixels)
    if logits.shape != expected.shape or (logits - expected).abs().max() > SAME_LOGITS * expected.abs().max():
        raise ValueError(f"{name} does not compare images and texts as CLIP does: {type(model.model).__name__}")


class Segmentation(nn.Module):
    """A score (B, n) for each class of a model that labels pixels.

    Its value is the logarithm of the share of the pixels where the class is predicted, so that a softmax gives that
    share, and the classes with most pixels are the best. Its gradient is that of the mean of the class's logits over
    these pixels, which are held fixed, and of a class without pixels over all. A mean rather than a sum, so that it
    does not grow with the resolution; a map is the same by either. The pixels are those of the model's output, which
    may be fewer than the picture's.

    Source: the target of Seg-Grad-CAM, arXiv 2002.11434, equation 3.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits = self.model(pixel_values).logits
        predicted = torch.zeros_like(logits).scatter_(1, logits.detach().argmax(1, keepdim=True), 1)
        counts = predicted.sum((2, 3), keepdim=True)
        n_pixels = logits[0, 0].numel()
        weights = torch.where(counts > 0, predicted / counts.clamp_min(1), 1 / n_pixels)
        means = (logits * weights).sum((2, 3))
        shares = counts.flatten(1) / n_pixels
        return shares.clamp_min(torch.finfo(shares.dtype).tiny).log() + (means - means.detach())


class Processed:
    """transformers' image processor as a preprocess: PIL image -> (C, H, W) float32 tensor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._same = self._as_preprocess()
        if self._same is not None:
            self.seen = self._same.seen

    def __call__(self, image: Any) -> torch.Tensor:
        found = self.processor(images=image, return_tensors="pt")
        if set(found) != {"pixel_values"} or found["pixel_values"].ndim != 4:
            what = ", ".join(f"{name} {tuple(value.shape)}" for name, value in found.items())
            raise ValueError(
                f"the image processor must make pixel_values (1, C, H, W) and nothing else, got {what} from"
                f" {type(self.processor).__name__}"
            )
        return found["pixel_values"][0]

    def _as_preprocess(self):
        """The `Preprocess` that crops as the processor does, which can tell what of a photograph is seen; None where
        that is another one, as a picture of noise shows."""
        from cfcam_gpu.models import Preprocess

        try:
            image = _noise(*CHECKED_SIZE)
            pixels = self(image)
            size = tuple(pixels.shape[1:])
            guesses = [Preprocess(size, squash=True), *(Preprocess(size, resize) for resize in self._resizes(size))]
            for guess in guesses:
                if _same_picture(guess(image), pixels):
                    return guess
        except (TypeError, ValueError):
            pass
        return None

    def _resizes(self, size):
        """The resizes, (H, W), that the processor's configuration may mean."""
        shortest = (getattr(self.processor, "size", None) or {}).get("shortest_edge")
        if shortest:
            share = getattr(self.processor, "crop_pct", None)
            for side in (shortest, *([int(shortest / share)] if share else [])):
                if side >= max(size):
                    yield side, side


def _same_picture(one, other):
    """Whether two (C, H, W) are the same picture but for brightness and contrast."""
    if one.shape != other.shape:
        return False
    one, other = ((each - each.mean((1, 2), keepdim=True)) / each.std((1, 2), keepdim=True) for each in (one, other))
    return bool((one - other).abs().mean() < SAME_PIXELS)


def _noise(width, height):
    from PIL import Image

    small = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
