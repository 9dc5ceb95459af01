"""The same network behind three servers, for `load.py --libraries`: this package's, LitServe's, Ray Serve's.

    python benchmarks/serving_libraries.py litserve --port 8000

Each batches up to 32 pictures within 10 ms and answers the map as the others do; each decodes where its design has it
decode, and the process that has the network keeps its memory. Every picture that the network computes adds a byte to
the file named by the environment variable `COUNT`.
Needs the "serve" and "demo" extras, and litserve and ray[serve].
"""

import argparse
import asyncio
import base64
import contextlib
import os
import signal
import time

import torch
from starlette.responses import Response
from torch import nn

from cfcam_gpu import host_memory, serving
from cfcam_gpu.models import Preprocess
from cfcam_gpu.serving import answers, uploads
from cfcam_gpu.serving.engine import Work

COUNT = "CFCAM_SERVING_COUNT"
SIZE, WAIT_S = 32, 0.01


def tiny():
    """A network that takes no time."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 8, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(*layers), Preprocess((64, 64))


def counted(run, works):
    with open(os.environ[COUNT], "ab") as file:
        file.write(bytes(len(works)))
    return run(works)


def decoded(engine, content):
    return Work(uploads.decode(content, engine.loaded, serving.Limits(), False)[0])


def answered(engine, result):
    return answers.answer(answers.Wanted(), engine, result, None)[0]


def of_this_package(port):
    engine = serving.Engine("demo")
    run = engine.run
    engine.run = lambda works: counted(run, works)
    return serving.serve(engine, serving.Limits(batch_size=SIZE, batch_wait_ms=1e3 * WAIT_S), port=port)


with contextlib.suppress(ImportError):
    import litserve

    class LitServeApi(litserve.LitAPI):  # here, because the process that has the network finds it by its name
        def setup(self, device):
            host_memory.keep()
            self.engine = serving.Engine("demo")

        def decode_request(self, request):
            return decoded(self.engine, base64.b64decode(request["image"]))

        def batch(self, inputs):
            return list(inputs)

        def predict(self, works):
            return counted(self.engine.run, works)

        def unbatch(self, output):
            return list(output)

        def encode_response(self, output):
            return Response(answered(self.engine, output), media_type="application/json")


def of_litserve(port):
    api = LitServeApi(max_batch_size=SIZE, batch_timeout=WAIT_S, api_path="/explain")
    server = litserve.LitServer(api, accelerator="cpu", timeout=False, healthcheck_path="/readyz")
    server.run(port=port, host="127.0.0.1", generate_client_file=False, log_level="warning", num_api_servers=1)


def of_ray_serve(port):
    from ray import serve

    @serve.deployment(max_ongoing_requests=64, max_queued_requests=128, ray_actor_options={"num_cpus": 1})
    class Explaining:
        def __init__(self):
            host_memory.keep()
            torch.set_num_threads(os.cpu_count())
            self.engine = serving.Engine("demo")

        @serve.batch(max_batch_size=SIZE, batch_wait_timeout_s=WAIT_S)
        async def explain(self, contents):
            return await asyncio.to_thread(self.all_of, contents)

        def all_of(self, contents):
            results = counted(self.engine.run, [decoded(self.engine, content) for content in contents])
            return [answered(self.engine, result) for result in results]

        async def __call__(self, request):
            if request.url.path == "/readyz":
                return "ready"
            return Response(await self.explain(await request.body()), media_type="application/json")

    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Explaining.bind())
    while not ended:
        time.sleep(0.1)
    serve.shutdown()


SERVERS = {"cfcam serve": of_this_package, "litserve": of_litserve, "ray serve": of_ray_serve}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    SERVERS[args.server](args.port)
