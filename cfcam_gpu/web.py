"""``cfcam demo --web``: a page in the browser that explains dropped pictures, on this machine alone."""

import io
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cfcam_gpu import images, layers
from cfcam_gpu.checks import needs
from cfcam_gpu.datasets import reading, running, scans, writing
from cfcam_gpu.methods import METHODS

HOST, PORT = "127.0.0.1", 7860
"""Where the page is: this machine only."""

MOST_BYTES, MOST_PIXELS = 100 * 2**20, 100 * 10**6
"""Of a picture that is taken. A file of a few kilobytes may hold more pixels than fit in memory."""

KEPT_S = 3600
"""Seconds after which pictures that were dropped, or made for a download, are removed."""

MOST_CLASSES = 5
"""Classes that may be chosen at once."""

AUTOMATIC = "automatic"


class Shown(NamedTuple):
    """What is known of a picture."""

    panels: list[Any]
    """PIL images: the photograph as the network saw it, each map over it, and the difference of two over it."""
    captions: list[str]
    """Of the panels but the first."""
    said: str
    """What is said of it: its classes, and what the model was noted to be."""
    name: str
    """Of the file with all panels beside each other."""
    content: bytes


class Demo:
    """A model that explains one picture after the other, as a page asks for them. Calls wait for each other.

    Args:
        options: of `cfcam demo`; classes, layer, method and comparison are asked for in each call instead.

    Raises:
        ValueError: the model cannot be explained, or takes volumes.
        As `running.load`.
    """

    def __init__(self, options: running.Options) -> None:
        options = replace(options, write=("overlay",), overlay_format="png", html=False, raw=False)
        self.options = replace(running.check(options), classes=None, top=None, versus=False)
        self.loaded = running.load(self.options)
        if self.loaded.n_axes != 2:
            raise running.Refused(f"--web explains pictures alone, {options.model} takes scans and videos")
        self._turn = threading.Lock()
        noise = _noise()
        found = self._explain(reading.Source("a picture of noise", lambda: noise, "noise"), (), None, "gradcam")
        self.n_classes = found.n_classes
        self.class_names = [self.loaded.class_name(index, self.n_classes) for index in range(self.n_classes)]
        self.layer_names = [layer.name for layer in found.candidates() if layer.grid is not None]

    def explain(self, path: str | None, classes: Sequence[int] = (), layer: str | None = None, method: str = "cfcam",
                versus: bool = False) -> Shown:  # fmt: skip
        """Explain a picture.

        Args:
            path: its file.
            classes: indices of what to explain, at most `MOST_CLASSES`; none: the two best, or all texts.
            layer: a target layer's name; None: the automatic choice.
            method: one of `METHODS`.
            versus: also the difference of the first two.

        Raises:
            ValueError: it is no picture, or too large; or cannot be explained so. The message is for the user.
        """
        if not path:
            raise ValueError("drop a picture first")
        name = Path(path).name
        content = Path(path).read_bytes()
        _check_size(name, content)
        source = reading.Source(name, lambda: images.read_image(name, content), Path(name).stem)
        if versus and len(classes) == 1:
            raise ValueError("comparing needs two classes, got one: choose another, or none for the two best")
        return self._explain(source, classes, layer, method, versus).shown

    def _explain(self, source, classes, layer, method, versus=False):
        chosen = {"classes": list(classes) or None, "layer": layer or None, "method": method, "versus": versus}
        options = running.check(replace(self.options, **chosen))
        with self._turn, warnings.catch_warnings(record=True) as caught, images.any_size():
            warnings.simplefilter("always", UserWarning)
            artist = writing.Artist(options)
            picture = running.read(0, source, self.loaded, artist)
            if isinstance(picture, running.Failure):
                raise ValueError(picture.reason)
            return _Answer(options, self.loaded, artist, picture, caught)


class _Answer(running.Explaining):
    """What was found of one picture, and of the model."""

    def __init__(self, options, loaded, artist, picture, caught):
        super().__init__(options, loaded)
        self.notes: list[str] = []
        pixels = self.transfer.to_device(picture.pixels[None])
        (part,) = self.explained(running.Batch([picture], pixels), _refuse)
        _, (classes, scores, maps), mark = part
        mark.wait()
        found, captions, said, compared = self.named(classes[0].tolist(), scores[0].tolist(), maps[0].numpy())
        artist.versus = self.versus
        difference = artist.difference(found.maps)
        drawn = None if difference is None else writing.drawn_difference(difference)
        panels = scans.panels(picture.panel, found.maps, drawn, options.colormap)
        name, content = artist.picture(picture.source.stem, picture.panel, found.maps, captions, compared)
        captions = [*captions, *([compared] if difference is not None else [])]
        lines = [said, *self.notes, *(f"warning: {' '.join(str(each.message).split())}" for each in caught)]
        self.shown = Shown(panels, captions, "\n".join(dict.fromkeys(lines)), name, content)
        self._pixels = pixels

    def note(self, text):
        self.notes.append(text)

    def find_memory_format(self, image):
        return self.memory_format  # the first: of one picture the look would take longer than what it saves

    def candidates(self):
        """What there was to choose the layer from."""
        return layers.choose_target_layer(self.loaded.model, self._pixels, self.cam.target_names[0])[1]


def _refuse(_picture, error):
    raise ValueError(running.reason_of(error)) from error


def _check_size(name, content):
    """ValueError for what would not fit into memory, as far as Pillow can tell before it decodes."""
    from PIL import Image

    if len(content) > MOST_BYTES:
        raise ValueError(f"{name}: expected at most {MOST_BYTES >> 20} MB, got {len(content) >> 20}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(content)).size
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: too many pixels") from error
    except Exception:  # the reader knows more formats, and says what is wrong
        return
    if width * height > MOST_PIXELS:
        raise ValueError(f"{name}: expected at most {MOST_PIXELS // 10**6} megapixels, got {width} x {height}")


def _noise():
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))


def gradio_package() -> Any:
    """Gradio, with its telemetry off; ImportError that names the extra without."""
    # Read when it is imported, and in each launch.
    for name, value in (("GRADIO_ANALYTICS_ENABLED", "False"), ("HF_HUB_DISABLE_TELEMETRY", "1")):
        os.environ[name] = value
    try:
        import gradio
    except ImportError as error:
        raise ImportError(needs("gradio", "web")) from error
    return gradio


def page(demo: Demo) -> Any:
    """The page, a ``gradio.Blocks`` that is not launched."""
    gr = gradio_package()
    folder = tempfile.TemporaryDirectory(prefix="cfcam-web-")

    def explain(path, classes, layer, method, versus):
        """Updates of the slider, what is shown, what is said, the download, and the panels."""
        try:
            shown = demo.explain(path, classes or (), None if layer == AUTOMATIC else layer, method, versus)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError, MemoryError) as error:
            nothing = gr.update(choices=[], value=None)
            return None, nothing, running.reason_of(error), gr.update(value=None, interactive=False), []
        file = _written(Path(folder.name), shown)
        choices = [(caption, index) for index, caption in enumerate(shown.captions, 1)]
        # The latest panel is the difference, where it was asked for.
        first = len(shown.captions) if versus else 1
        download = gr.update(value=str(file), interactive=True)
        slider = shown.panels[0], shown.panels[first]
        return slider, gr.update(choices=choices, value=first), shown.said, download, shown.panels

    def show(which, panels):
        return (panels[0], panels[which]) if panels and which else None

    title = "CF-CAM: where a network looked"
    with gr.Blocks(analytics_enabled=False, title=title, delete_cache=(KEPT_S, KEPT_S)) as blocks:
        gr.Markdown(f"# {title}")
        panels = gr.State([], time_to_live=KEPT_S)
        with gr.Row():
            with gr.Column(scale=1):
                file = gr.File(label="picture", type="filepath", elem_id="picture")
                choices = [(name, index) for index, name in enumerate(demo.class_names)]
                classes = gr.Dropdown(
                    choices,
                    value=[],
                    multiselect=True,
                    max_choices=MOST_CLASSES,
                    label="classes" if demo.n_classes > 1 else "class",
                    info="none: the two best",
                    elem_id="classes",
                )
                layer = gr.Dropdown([AUTOMATIC, *demo.layer_names], value=AUTOMATIC, label="layer", elem_id="layer")
                method = gr.Dropdown(list(METHODS), value=demo.options.method, label="method", elem_id="method")
                versus = gr.Checkbox(
                    label="compare the first two classes",
                    info="red where the first is hotter, blue where the second is",
                    interactive=demo.n_classes > 1,
                    elem_id="versus",
                )
                button = gr.Button("explain", variant="primary", elem_id="explain")
            with gr.Column(scale=2):
                which = gr.Radio([], label="map", elem_id="which")
                slider = gr.ImageSlider(
                    label="photograph | map", type="pil", format="png", interactive=False, buttons=[], elem_id="slider"
                )
                said = gr.Textbox(label="what was found", lines=3, interactive=False, elem_id="said")
                download = gr.DownloadButton("download", interactive=False, elem_id="download")
        inputs = [file, classes, layer, method, versus]
        outputs = [slider, which, said, download, panels]
        hidden = {"api_visibility": "private", "show_progress": "minimal"}
        gr.on([button.click, file.upload], explain, inputs, outputs, concurrency_limit=1, **hidden)
        which.input(show, [which, panels], slider, **hidden)
    return blocks


def _written(folder, shown):
    """The file with the panels of a picture; those that are old are removed."""
    for each in folder.iterdir():
        if each.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(each, ignore_errors=True)
    file = Path(tempfile.mkdtemp(dir=folder)) / shown.name
    file.write_bytes(shown.content)
    return file


def launch(demo: Demo, port: int | None = PORT, wait: bool = True) -> tuple[Any, str]:
    """Serve the page on this machine; returns what is served, which has ``close()``, and its address.

    Args:
        port: of 127.0.0.1; None: any that is free.
        wait: whether to return when it is interrupted, or at once.

    Raises:
        OSError: the port is in use.
        ImportError: Gradio is not installed.
    """
    gr = gradio_package()
    blocks = page(demo)
    _, address, _ = blocks.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        run_history=False,  # nor do pictures stay in the browser
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    if wait:
        print(f"open {address} in a browser; Ctrl+C ends it", flush=True)
        blocks.block_thread()
    return blocks, address


def serve(options: running.Options, port: int | None = PORT) -> int:
    """``cfcam demo --web``; returns 0 when it is interrupted."""
    gradio_package()  # what is missing is better known before the model is loaded
    launch(Demo(options), port)
    return 0
