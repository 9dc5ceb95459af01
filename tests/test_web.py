"""The demo in a browser: what it answers, and, where Gradio and Chromium are installed, what the page does."""

import io
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import bomb, network_source

Image = pytest.importorskip("PIL.Image")
for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

from cfcam_gpu import images, web
from cfcam_gpu.datasets import running, writing

NETWORK = (
    network_source(["ox", "ass", "<b>mule", "hinny"])
    + """
def build_labels():
    network, *others = build()
    return nn.Sequential(network, nn.Sigmoid()), *others
"""
)


@pytest.fixture
def options(tmp_path, monkeypatch, one_thread):
    (tmp_path / "web_net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(writing, "PANEL_PIXELS", 64)
    yield running.Options(tmp_path / "out", model="web_net:build", device=torch.device("cpu"))
    sys.modules.pop("web_net", None)


@pytest.fixture
def photograph(rng, tmp_path):
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    small.resize((90, 70), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def bad(tmp_path):
    """{what is said of it: the file}."""
    contents = {
        "text.png": (b"no picture", "text.png: not an image in a known format"),
        "empty.png": (b"", "empty.png: the file is empty"),
        "bomb.png": (bomb(20_000), "bomb.png: too many pixels"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    return {said: tmp_path / name for name, (_, said) in contents.items()}


def test_it_shows_what_the_command_line_writes(options, photograph, run, tmp_path):
    demo = web.Demo(options)
    assert demo.class_names == ["ox", "ass", "<b>mule", "hinny"] and demo.layer_names == ["0", "1"]
    for method, layer, versus in (("cfcam", None, True), ("layercam", "0", False)):
        shown = demo.explain(str(photograph), [3, 1], layer, method, versus)
        said = ["--layer", layer] if layer else []
        said += ["--versus"] if versus else []
        command = ["explain", photograph, "--model", "web_net:build", "--classes", "3,1", "--method", method, "--raw"]
        assert run(*command, "--out", tmp_path / method, "--overwrite", *said)[0] == 0
        assert shown.name == "photo.png" and shown.content == (tmp_path / method / "photo.png").read_bytes()
        heat = np.load(tmp_path / method / "photo_3.npy")
        assert np.array_equal(shown.panels[1], images.overlay(shown.panels[0], heat))
        assert len(shown.panels) == len(shown.captions) + 1 == 3 + versus
        assert shown.captions[0].startswith("hinny 0.") and f"target layer: {layer or 1}" in shown.said


def test_several_labels_are_so_in_every_picture(options, photograph):
    demo = web.Demo(replace(options, model="web_net:build_labels"))
    logits = demo.loaded.model(demo.loaded.preprocess(Image.open(photograph))[None])[0]
    shares = [f"{name} {share:.2f}" for name, share in zip(demo.class_names, logits.sigmoid().tolist())]
    for _ in range(2):
        shown = demo.explain(str(photograph), [2, 0])
        assert shown.captions == [shares[2], shares[0]]
        assert "by a sigmoid of the model's own" in shown.said and "several labels an image" in shown.said


def test_what_cannot_be_explained_is_said(options, photograph, bad):
    demo = web.Demo(options)
    for said, path in bad.items():
        with pytest.raises(ValueError, match=f"^{said}"):
            demo.explain(str(path))
    for arguments, said in (
        ((None,), "drop a picture first"),
        ((str(photograph), [1], None, "cfcam", True), "comparing needs two classes, got one"),
        ((str(photograph), [], "9"), "has no layer '9'"),
    ):
        with pytest.raises(ValueError, match=said):
            demo.explain(*arguments)
    # As a picture that Pillow would take, and that would fill the memory.
    monkey = Image.new("1", (12_000, 9_000))
    buffer = io.BytesIO()
    monkey.save(buffer, "PNG")
    bad_path = photograph.with_name("large.png")
    bad_path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="large.png: expected at most 100 megapixels, got 12000 x 9000"):
        demo.explain(str(bad_path))


def test_without_gradio(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, err = run("demo", "--web")
    assert status == 2 and 'gradio is not installed; it comes with the "web" extra: pip install "cfcam_gpu[web]"' in err


# In a browser


@pytest.fixture
def visited(chromium, options, monkeypatch):
    """The page; what goes wrong in it, or is asked of another host by it or by the server, is an error in the end."""
    pytest.importorskip("gradio", reason="gradio is not installed (extra: web)")
    wrong, look_up = [], socket.getaddrinfo

    def local(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost", "::1", None):
            wrong.append(f"look-up of {host}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    demo = web.Demo(options)
    blocks, address = web.launch(demo, port=None, wait=False)
    context = chromium.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith((address, "data:", "blob:")) or wrong.append(request.url))
    try:
        page.goto(address)
        yield page, demo
    finally:
        context.close()
        blocks.close()
    assert not wrong


def upload(page, path):
    page.locator("#picture input[type=file]").set_input_files(path)


def said(page, text):
    page.wait_for_function("text => document.querySelector('#said textarea').value.includes(text)", arg=text)


def beside(page, expected):
    """Whether the slider comes to have these two pictures."""
    found, deadline = page.locator("#slider img"), time.monotonic() + 20
    while time.monotonic() < deadline:
        sources = {found.nth(index).get_attribute("src") for index in range(found.count())}
        contents = [page.request.get(source).body() for source in sources if source]
        shown = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents]
        if len(shown) == 2 and all(any(np.array_equal(one, each) for one in shown) for each in expected):
            return True
        page.wait_for_timeout(200)
    return False


def choose(page, name, *texts):
    for text in texts:
        page.locator(f"#{name} input").first.click()
        page.get_by_role("option", name=text, exact=True).click()
    page.keyboard.press("Escape")


def test_the_page(visited, photograph):
    page, demo = visited
    upload(page, photograph)
    said(page, "target layer: 1")
    expected = demo.explain(str(photograph))
    assert beside(page, expected.panels[:2])

    choose(page, "classes", "hinny", "<b>mule")
    choose(page, "layer", "0")
    choose(page, "method", "gradcam")
    page.locator("#versus input").check()
    page.locator("#explain").click()
    said(page, "method: Grad-CAM")
    expected = demo.explain(str(photograph), [3, 2], "0", "gradcam", True)
    assert len(expected.panels) == 4 and beside(page, [expected.panels[0], expected.panels[3]])
    assert page.locator("#which label").all_inner_texts() == expected.captions  # as text, not as markup
    page.locator("#which label").nth(1).click()
    assert beside(page, [expected.panels[0], expected.panels[2]])
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "photo.png"
    assert Path(download.value.path()).read_bytes() == expected.content


def test_bad_files_give_a_message(visited, bad, capfd):
    page, _ = visited
    for text, path in bad.items():
        page.reload()
        upload(page, path)
        said(page, text)
        assert page.locator("#slider img").count() == 0
    page.reload()
    page.locator("#explain").click()
    said(page, "drop a picture first")
    assert "Traceback" not in "".join(capfd.readouterr())
