"""The server: what it answers, refuses and survives; in this process, and for its signals in one of its own."""

import asyncio
import base64
import http.client
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from pictures import bomb

Image = pytest.importorskip("PIL.Image")
for package in ("matplotlib", "starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra: serve)")

from prometheus_client.parser import text_string_to_metric_families

from cfcam_gpu import CFCAM, images, serving
from cfcam_gpu.datasets import Refused
from cfcam_gpu.serving import batching

ROOT = Path(__file__).resolve().parent.parent
SIDE = 64

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:maps are zero everywhere"),
]

NETWORK = f"""
import time
import torch
from torch import nn
from cfcam_gpu.models import Preprocess

PREPROCESS = Preprocess(({SIDE}, {SIDE}))

class Slow(nn.Identity):
    def forward(self, images):
        time.sleep(0.1)
        return images

def layers(n):
    torch.manual_seed(0)
    return nn.Conv2d(3, 16, 8, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n)

def build():
    return nn.Sequential(*layers(3)), PREPROCESS, ["cat", "caf\\u00e9", "cup"]

def one_output():
    return nn.Sequential(*layers(1)), PREPROCESS, ["healthy", "ill"]

def slow():
    return nn.Sequential(Slow(), *layers(3)), PREPROCESS

def volumes():
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the networks are."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "served_networks.py").write_text(NETWORK, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("served_networks", None)


@pytest.fixture(scope="module")
def loaded_engine(folder):
    return serving.Engine("served_networks:build", device=torch.device("cpu"))


@pytest.fixture
def engine(loaded_engine, monkeypatch):
    """The same network for all tests, each of which may replace a method."""
    monkeypatch.setattr(loaded_engine, "run", loaded_engine.run)
    return loaded_engine


def photograph(seed=0, size=(90, 70)):
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def file_of(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def said(self):
        return json.loads(self.body)


class Client:
    """Calls an ASGI application as a server of such does."""

    def __init__(self, app):
        self.app, self.service = app, getattr(app.state, "service", None)

    async def get(self, path):
        return await self.send("GET", path, [b""])

    async def post(self, path, body, **how):
        return await self.send("POST", path, [body], **how)

    async def send(self, method, path, chunks, headers=(), leaves=None, ends=True):
        """``leaves`` is an event at which the client closes the connection; without ``ends`` the body never does."""
        path, _, query = path.partition("?")
        messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        if ends:
            messages[-1]["more_body"] = False
        sent = []

        async def receive():
            if messages:
                return messages.pop(0)
            await (leaves or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            **{"type": "http", "http_version": "1.1", "method": method, "path": path, "root_path": ""},
            **{"raw_path": path.encode(), "query_string": query.encode(), "scheme": "http", "server": ("test", 80)},
            "headers": [(name.encode(), value.encode()) for name, value in headers],
        }
        await self.app(scope, receive, send)
        begin, *rest = sent
        found = {name.decode(): value.decode() for name, value in begin["headers"]}
        return Answer(begin["status"], found, b"".join(part.get("body", b"") for part in rest))

    async def measured(self):
        """{(name, *values of labels): number}."""
        text = (await self.get("/metrics")).body.decode()
        families = text_string_to_metric_families(text)
        return {(each.name, *each.labels.values()): each.value for one in families for each in one.samples}


def talk(engine, scenario, **limits):
    """What ``await scenario(client)`` gives, while an application of its own runs."""

    async def run():
        app = serving.application(engine, serving.Limits(**limits))
        client = Client(app)
        async with app.state.service.running():
            found = await asyncio.wait_for(scenario(client), 30)
        assert client.service.n_in_work == 0 and len(client.service.batcher) == 0
        return found

    return asyncio.run(run())


def ask(engine, path, body=None, headers=(), **limits):
    body = file_of(photograph()) if body is None else body
    return talk(engine, lambda client: client.post(path, body, headers=headers), **limits)


def expected(engine, picture, target=None):
    """Probabilities and map as the library makes them of one picture, without a server."""
    inputs = engine.loaded.preprocess(picture)[None]
    model = engine.loaded.model
    with torch.no_grad():
        probabilities = model(inputs).softmax(1)[0]
    maps = CFCAM(model, [model[1]]).maps(inputs, None if target is None else [target])
    return probabilities.numpy(), maps[0].numpy()


def map_of(said):
    return np.frombuffer(base64.b64decode(said["map"]["base64"]), "<f2").reshape(said["map"]["shape"])


# What is answered


@pytest.mark.parametrize("target", [None, 0, 2])
def test_json_has_the_classes_and_the_map(engine, target):
    probabilities, heat = expected(engine, photograph(), target)
    said = ask(engine, "/explain" + ("" if target is None else f"?class={target}")).said
    best = np.argsort(-probabilities)
    assert [each["index"] for each in said["classes"]] == best.tolist()
    np.testing.assert_allclose([each["probability"] for each in said["classes"]], probabilities[best], atol=2e-6)
    assert [each["name"] for each in said["classes"]] == [["cat", "café", "cup"][index] for index in best]
    index = best[0] if target is None else target
    assert said["explained"] == next(each for each in said["classes"] if each["index"] == index)
    assert said["map"]["dtype"] == "float16" and heat.max() > 0.9
    np.testing.assert_allclose(map_of(said), heat, atol=1e-3)
    assert "overlay" not in said


def test_the_same_map_in_every_form(engine):
    _, heat = expected(engine, photograph())
    answer = ask(engine, "/explain?format=npy")
    found = np.load(io.BytesIO(answer.body))
    assert found.dtype == np.float16 and found.shape == (SIDE, SIDE)
    np.testing.assert_allclose(found, heat, atol=1e-3)
    said = ask(engine, "/explain?map=list&overlay=true&top=1").said
    np.testing.assert_array_equal(np.array(said["map"]["values"], np.float16), found)
    drawn = ask(engine, "/explain?format=png")
    assert drawn.headers["content-type"] == "image/png" and base64.b64decode(said["overlay"]) == drawn.body
    seen = engine.loaded.seen(photograph())
    np.testing.assert_allclose(  # the map that is drawn has not been rounded to float16
        np.asarray(Image.open(io.BytesIO(drawn.body))).astype(int), np.asarray(images.overlay(seen, heat)), atol=1
    )
    for headers in (answer.headers, drawn.headers):
        told = headers["x-class-index"], unquote(headers["x-class-name"]), headers["x-class-probability"]
        best = said["classes"][0]
        assert told == (str(best["index"]), best["name"], f"{best['probability']:.6f}")
    assert "map" not in ask(engine, "/explain?map=none").said


def test_opacity_and_colours(engine):
    bare = Image.open(io.BytesIO(ask(engine, "/explain?format=png&opacity=0").body))
    np.testing.assert_array_equal(np.asarray(bare), np.asarray(engine.loaded.seen(photograph())))
    jet = ask(engine, "/explain?format=png&colormap=jet&opacity=1").body
    assert jet != ask(engine, "/explain?format=png&opacity=1").body


def test_classes_alone(engine):
    probabilities, _ = expected(engine, photograph())
    said = ask(engine, "/classify?top=2").said
    assert list(said) == ["classes"] and len(said["classes"]) == 2
    assert said["classes"] == ask(engine, "/explain?top=2").said["classes"]
    assert said["classes"][0]["index"] == probabilities.argmax()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_kinds_of_files(engine, kind):
    answer = ask(engine, "/explain?map=none", file_of(photograph(), kind))
    assert answer.status == 200, answer


def test_a_large_photograph_is_drawn_smaller(engine):
    answer = ask(engine, "/explain?format=png", file_of(photograph(size=(3000, 2000)), "JPEG"))
    assert max(Image.open(io.BytesIO(answer.body)).size) == 1024


def test_one_output_has_two_sides(folder):
    engine = serving.Engine("served_networks:one_output", device=torch.device("cpu"))
    inputs = engine.loaded.preprocess(photograph())[None]
    ill = engine.loaded.model(inputs).sigmoid().item()
    said, given = ask(engine, "/explain").said, ask(engine, "/explain?class=0").said
    sides = {each["name"]: (each["index"], each["probability"]) for each in said["classes"]}
    assert sides == {"ill": (0, pytest.approx(ill, abs=2e-6)), "healthy": (None, pytest.approx(1 - ill, abs=2e-6))}
    assert said["explained"]["name"] == ("ill" if ill >= 0.5 else "healthy") and given["explained"]["name"] == "ill"
    assert ask(engine, "/explain?class=1").status == 422


def test_engines_that_are_refused(folder):
    with pytest.raises(Refused, match="takes scans and videos"):
        serving.Engine("served_networks:volumes")
    with pytest.raises(ValueError, match="no layer|nothing"):
        serving.Engine("served_networks:build", layer="nothing")


def test_a_module_of_ones_own_stays_as_it_is(folder, engine):
    module, *rest = __import__("served_networks").build()
    ends = torch.nn.Sequential(module, torch.nn.Softmax(1)).train()
    inputs = engine.loaded.preprocess(photograph())[None]
    before = ends(inputs)
    own = serving.Engine((ends, *rest))
    assert own.options.model == "Sequential" and any("softmax" in note for note in own.notes)
    said, expected = ask(own, "/explain").said, ask(engine, "/explain").said
    np.testing.assert_allclose(map_of(said), map_of(expected), atol=2e-3)
    assert [each["name"] for each in said["classes"]] == [each["name"] for each in expected["classes"]]
    assert ends.training and not ends._forward_hooks and torch.equal(ends(inputs), before)
    with pytest.raises(TypeError, match="a module serves where it is"):
        serving.Engine(module, device=torch.device("cpu"))
    with pytest.raises(TypeError, match="model must be a spec, or a torch.nn.Module"):
        serving.Engine(7)


def test_the_example_of_an_application(monkeypatch):
    pytest.importorskip("torchvision")
    found = runpy.run_path(str(ROOT / "examples" / "serve" / "server.py"))
    app = found["app"]
    client = Client(app)

    async def scenario():
        async with app.router.lifespan_context(app):
            return await client.get("/"), await client.post("/cam/explain?top=1", file_of(photograph()))

    hello, explained = asyncio.run(scenario())
    assert hello.body == b"POST a photograph to /cam/explain\n"
    assert explained.status == 200 and explained.said["map"]["shape"] == [224, 224]


# Batches


def test_batches_give_each_picture_its_own_result(engine, monkeypatch):
    sizes, run = [], engine.run
    monkeypatch.setattr(engine, "run", lambda works: sizes.append(len(works)) or run(works))
    pictures = [photograph(seed) for seed in range(12)]

    async def scenario(client):
        paths = ["/explain" + (f"?class={seed % 3}" if seed % 2 else "") for seed in range(12)]
        posts = [client.post(path, file_of(picture)) for path, picture in zip(paths, pictures)]
        return await asyncio.gather(*posts), await client.measured()

    found, measured = talk(engine, scenario, batch_wait_ms=400, batch_size=5)
    assert sorted(sizes) == [1, 1, 5, 5], "classes that are given and top ones go apart, five at a time"
    assert measured["cfcam_batch_pictures_count",] == 4 and measured["cfcam_batch_pictures_sum",] == 12
    for seed, (picture, answer) in enumerate(zip(pictures, found)):
        probabilities, heat = expected(engine, picture, seed % 3 if seed % 2 else None)
        np.testing.assert_allclose(answer.said["classes"][0]["probability"], probabilities.max(), atol=2e-6)
        np.testing.assert_allclose(map_of(answer.said), heat, atol=1e-3)
        assert np.abs(heat - map_of(found[seed - 2].said)).max() > 0.1, "a result that is another's would show"


def test_a_picture_on_which_the_network_fails_leaves_the_others_alone(engine, monkeypatch, caplog):
    bad, run = engine.loaded.preprocess(photograph(1)), engine._run

    def fails(works):
        if any(torch.equal(work.pixels, bad) for work in works):
            raise RuntimeError("secret of the network")
        return run(works)

    monkeypatch.setattr(engine, "_run", fails)

    async def scenario(client):
        return await asyncio.gather(*(client.post("/explain", file_of(photograph(seed))) for seed in range(3)))

    found = talk(engine, scenario, batch_wait_ms=300)
    assert [answer.status for answer in found] == [200, 500, 200]
    assert found[1].said == {"error": "the network failed: RuntimeError"} and "secret of the network" in caplog.text


def test_batcher_waits_no_longer_than_it_says():
    async def scenario():
        async with batching.Batcher(lambda items: [-item for item in items], 3, 0.15) as batcher:
            moments = []

            async def submit(key, item):
                result = await batcher.submit(key, item)
                moments.append(time.monotonic() - begun)
                return result

            begun = time.monotonic()
            found = await asyncio.gather(*(submit("a", item) for item in range(3)), submit("b", 9))
        return found, moments

    found, moments = asyncio.run(scenario())
    assert found == [0, -1, -2, -9]
    assert max(moments[:3]) < 0.1, "a full batch does not wait"
    assert 0.1 < moments[3] < 0.4, "and one that does not fill waits for its time alone"


# What is refused

TEXT = b"This is no picture.\n" * 50


def refused(engine, path="/explain", body=None, headers=(), **limits):
    answer = ask(engine, path, body, headers, **limits)
    assert list(answer.said) == ["error"] and "\n" not in answer.said["error"]
    return answer.status, answer.said["error"]


def test_what_is_no_picture(engine):
    picture = file_of(photograph(), "JPEG")
    assert refused(engine, body=TEXT, headers=[("content-type", "image/png")]) == (
        422,
        "the picture: not an image in a known format",
    )
    assert refused(engine, body=picture[: len(picture) // 2])[0] == 422
    assert "connection" not in ask(engine, "/explain", TEXT).headers, "all has come, and the connection may go on"
    assert refused(engine, body=b"") == (422, "the body must be a picture's file, it is empty")
    assert refused(engine, body=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF")[0] == 422
    status, error = refused(engine, headers=[("content-type", "multipart/form-data; boundary=x")])
    assert status == 415 and "--data-binary" in error


@pytest.mark.parametrize("side", [8192, 40000], ids=["beyond our limit", "beyond Pillow's too"])
def test_a_bomb_is_not_decoded(engine, monkeypatch, side):
    body = bomb(side, bits=1, rows=side * (1 + side // 8))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    status, error = refused(engine, body=body)
    assert status == 422 and "too many pixels" in error and len(body) < 300_000
    monkeypatch.undo()
    if side == 8192:
        assert ask(engine, "/explain", body, max_pixels=side * side).status == 200, "the limit alone refuses it"


def test_a_bomb_that_pillow_does_not_read(engine):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((100, 101), np.float16))
    assert ask(engine, "/explain", file.getvalue()).status == 200
    assert refused(engine, body=file.getvalue(), max_pixels=10_000) == (
        422,
        "the picture: cannot be decoded: too many pixels: 101 x 100, at most 10000 are taken",
    )


def test_bodies_that_are_too_large(engine):
    error = "the body must have at most 1000 bytes"
    announced = ("content-length", "1001")
    assert refused(engine, body=b"0" * 1001, headers=[announced], max_bytes=1000) == (413, error)

    async def scenario(client):
        chunks = [bytes(400)] * 10
        answer = await client.send("POST", "/explain", chunks)
        waits = await client.send("POST", "/explain", [b""], [announced, ("expect", "100-continue")], ends=False)
        return answer, waits

    answer, waits = talk(engine, scenario, max_bytes=1000)
    assert (answer.status, answer.said["error"]) == (413, error)
    assert answer.headers["connection"] == "close", "its rest must not be taken for another request"
    assert (waits.status, waits.headers["connection"]) == (413, "close")


def test_a_body_that_does_not_arrive(engine):
    scenario = lambda client: client.send("POST", "/explain", [b"begin"], ends=False)
    answer = talk(engine, scenario, body_timeout_s=0.05)
    assert answer.status == 408 and answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("formt=png", "no parameter 'formt'"),
        ("format=gif", "format must be one of json, png, npy, got 'gif'"),
        ("class=3", "class must be an integer from 0 to 2, got '3'"),
        ("class=-1", "class must be an integer from 0 to 2, got '-1'"),
        ("class=%C2%B2", "class must be an integer from 0 to 2, got '²'"),
        ("class=1&class=2", "class is given twice"),
        ("top=0", "top must be an integer from 1 to 3, got '0'"),
        ("opacity=nan", "opacity must be a number from 0 to 1, got 'nan'"),
        ("colormap=mud", "colormap must be one of matplotlib's colour maps, got 'mud'"),
        ("overlay=1", "overlay must be one of true, false, got '1'"),
    ],
)
def test_parameters(engine, query, error):
    status, said = refused(engine, f"/explain?{query}")
    assert status == 422 and said.startswith(error)


def test_paths_and_methods(engine):
    assert refused(engine, "/classify?format=png")[0] == 422
    assert ask(engine, "/nothing").status == 404
    assert talk(engine, lambda client: client.get("/explain")).status == 405


def test_a_full_queue(engine, monkeypatch):
    run, begun, go_on = engine.run, threading.Event(), threading.Event()
    monkeypatch.setattr(engine, "run", lambda works: begun.set() or go_on.wait(20) and run(works))

    async def scenario(client):
        picture = file_of(photograph())
        first = [asyncio.create_task(client.post("/explain", picture)) for _ in range(2)]
        await asyncio.to_thread(begun.wait, 20)
        more = await client.post("/explain", picture)
        ready = await client.get("/readyz")
        go_on.set()
        return await asyncio.gather(*first), more, ready, await client.post("/explain", picture)

    first, more, ready, after = talk(engine, scenario, max_queue=2, batch_size=1)
    assert more.status == 503 and more.headers["retry-after"] == "1" and "2 requests" in more.said["error"]
    assert ready.status == 200
    assert [answer.status for answer in (*first, after)] == [200, 200, 200]


# Clients that leave


def test_a_client_that_leaves_costs_nothing(engine, monkeypatch):
    run, begun, go_on, seen = engine.run, threading.Event(), threading.Event(), []

    def slow(works):
        begun.set()
        go_on.wait(20)
        seen.extend(works)
        return run(works)

    monkeypatch.setattr(engine, "run", slow)

    async def scenario(client):
        leaves, post = asyncio.Event(), lambda seed, **how: client.post("/explain", file_of(photograph(seed)), **how)
        first = asyncio.create_task(post(0))
        await asyncio.to_thread(begun.wait, 20)
        leaving = [asyncio.create_task(post(seed, leaves=leaves)) for seed in (1, 2)]
        while len(client.service.batcher) < 2:
            await asyncio.sleep(0.01)
        leaves.set()
        await asyncio.gather(*leaving)
        in_work = client.service.n_in_work
        stays = asyncio.create_task(post(3))
        while len(client.service.batcher) < 3:
            await asyncio.sleep(0.01)
        go_on.set()
        return in_work, [await first, await stays], await client.measured()

    in_work, stayed, measured = talk(engine, scenario)
    assert in_work == 1, "their places are free at once"
    assert [answer.status for answer in stayed] == [200, 200]
    assert [int(work.pixels[0, 0, 0] * 1e6) for work in seen] == [
        int(engine.loaded.preprocess(photograph(seed))[0, 0, 0] * 1e6) for seed in (0, 3)
    ], "the network never saw theirs"
    assert measured["cfcam_clients_left_total",] == 2 and measured["cfcam_pictures_left_out_total",] == 2


def test_a_client_that_leaves_within_its_body(engine, monkeypatch):
    monkeypatch.setattr(engine, "run", lambda works: pytest.fail("the network ran"))

    async def scenario(client):
        leaves = asyncio.Event()
        leaves.set()
        await client.send("POST", "/explain", [file_of(photograph())[:100]], leaves=leaves, ends=False)
        return await client.measured()

    measured = talk(engine, scenario)
    assert measured["cfcam_requests_total", "/explain", "499"] == 1 and measured["cfcam_clients_left_total",] == 1


# What is told of the server


def test_health_and_metrics(engine):
    async def scenario(client):
        before = await client.measured()
        await client.post("/explain", file_of(photograph()))
        await client.post("/explain", TEXT)
        told = [await client.get(path) for path in ("/healthz", "/readyz", "/")]
        client.service.stopping = True
        return before, await client.measured(), told, await client.get("/readyz"), await client.get("/healthz")

    before, after, (healthy, ready, about), stopping, alive = talk(engine, scenario)
    assert (healthy.status, ready.status, stopping.status, alive.status) == (200, 200, 503, 200)
    assert about.said["classes"] == 3 and about.said["layer"] == ["1"] and about.said["max_queue"] == 128
    assert ("cfcam_requests_total", "/explain", "200") not in before
    assert after["cfcam_requests_total", "/explain", "200"] == after["cfcam_requests_total", "/explain", "422"] == 1
    assert after["cfcam_request_seconds_count", "/explain"] == 2 and after["cfcam_pass_seconds_count", "maps"] == 1
    assert after["cfcam_requests_in_work",] == after["cfcam_pictures_waiting",] == 0


def test_a_batcher_that_has_died_is_not_healthy(engine):
    async def scenario(client):
        client.service.batcher._task.cancel()
        await asyncio.sleep(0.01)
        return await client.get("/healthz")

    assert talk(engine, scenario).status == 503


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
        ({"batch_wait_ms": float("nan")}, "batch_wait_ms must be at least 0 and finite, got nan"),
        ({"batch_size": 2.0}, "batch_size must be an integer, got float"),
        ({"max_queue": True}, "max_queue must be an integer, got bool"),
    ],
)
def test_limits(limit, error):
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        serving.Limits(**limit)


def test_the_command_refuses_in_one_line(run, folder):
    status, out, err = run("serve", "served_networks:build", "--max-queue", "0")
    assert (status, out) == (2, "") and err == "cfcam: error: max_queue must be at least 1 and finite, got 0\n"
    status, _, err = run("serve", "served_networks:build", "--port", "99999")
    assert status == 2 and "cannot listen at 127.0.0.1, port 99999" in err


# A process of its own


@pytest.fixture
def process(folder):
    """Starts ``cfcam serve``; gives the process and its port."""
    started = []

    def start(network, *options):
        command = [sys.executable, "-m", "cfcam_gpu", "serve", f"served_networks:{network}", "--port", "0", *options]
        path = os.pathsep.join([str(ROOT), str(folder), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        one = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started.append(one)
        for line in iter(one.stdout.readline, b""):
            if match := re.match(rb"serving .* at http://127.0.0.1:(\d+)", line):
                return one, int(match[1])
        raise RuntimeError("it did not start")

    yield start
    for one in started:
        one.kill()
        one.wait()
        one.stdout.close()


def test_sigterm_under_load_leaves_no_answer_half_sent(process, tmp_path, monkeypatch, capsys):
    server, port = process("slow", "--batch-size", "4")
    (tmp_path / "cat.png").write_bytes(file_of(photograph()))
    arguments = ["client.py", f"http://127.0.0.1:{port}", "cat.png", "overlay.png"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "serve" / "client.py"), run_name="__main__")
    assert "class " in capsys.readouterr().out and Image.open("overlay.png").size == (70, 70)

    picture, found, stop = file_of(photograph()), [], threading.Event()

    def load():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        while True:
            try:
                connection.request("POST", "/explain?map=list", picture)
                begun = time.monotonic()
                response = connection.getresponse()
            except OSError as error:  # nothing of an answer has come: refused, or closed between two requests
                connection.close()
                found.append((time.monotonic(), type(error).__name__))
                time.sleep(0.02)  # or the server would hardly get a core
                if stop.is_set():
                    return
                continue
            body = response.read()  # http.client raises IncompleteRead of an answer that is cut short
            said = json.loads(body)
            assert len(said["map"]["values"]) == SIDE
            found.append((begun, response.status))

    threads = [threading.Thread(target=load) for _ in range(8)]
    failed = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failed.append(args.exc_value))
    for thread in threads:
        thread.start()
    time.sleep(0.8)
    ended = time.monotonic()
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not failed
    before = [said for begun, said in found if begun < ended]
    assert len(before) > 8 and set(before) == {200}, "all that began before the signal were answered in full"
    assert any(said != 200 for _, said in found), "and after it nobody is"


def test_a_client_that_hangs_does_not_hold_up_the_end(process):
    server, port = process("build", "--grace-s", "1")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("POST", "/explain")
    connection.putheader("content-length", "1000")
    connection.endheaders(b"begin")
    time.sleep(0.3)
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 1, "what was cut off shows in the status"
