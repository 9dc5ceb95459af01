"""The application: which request goes where, and what limits it on the way."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from cfcam_gpu import __version__
from cfcam_gpu.checks import needs
from cfcam_gpu.serving import answers, uploads
from cfcam_gpu.serving.batching import Batcher
from cfcam_gpu.serving.engine import Engine, Work
from cfcam_gpu.serving.limits import Limits
from cfcam_gpu.serving.metrics import Metrics
from cfcam_gpu.serving.refusals import Left, Refusal

try:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(needs("starlette", "serve")) from error

LOG = logging.getLogger("cfcam_gpu")

CLIENT_LEFT = 499
"""Counted in the place of a status, of which there is none for a client that has left."""

TOO_SLOW = 408
"""Who has not sent a body in time is not waited for again."""

RETRY_AFTER_S = 1


class Service:
    """One network behind its limits. `routes` are what an application needs of it, while `running` lasts."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits, self.stopping = engine, limits, False
        self.n_in_work = 0
        self.n_cut_off = 0
        """Requests that were given up at the end of the process."""
        self.metrics = Metrics(lambda: self.n_in_work, lambda: len(self.batcher))
        self.batcher = Batcher(self._pass, limits.batch_size, limits.batch_wait_ms / 1e3, self.metrics.left_out.inc)
        self.started = False

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/", self.about),
            Route("/explain", self.explain, methods=["POST"]),
            Route("/classify", self.classify, methods=["POST"]),
            Route("/healthz", self.healthy),
            Route("/readyz", self.ready),
            Route("/metrics", self.measured),
        ]

    @asynccontextmanager
    async def running(self, _app: Any = None) -> AsyncIterator[None]:
        with ThreadPoolExecutor(self.limits.workers, "cfcam-picture") as self.workers:
            async with self.batcher:
                self.started = True
                yield
                self.stopping = True

    # What is asked about the server

    async def about(self, request: Request) -> Response:
        engine = self.engine
        said = {"model": engine.options.model, "classes": engine.n_classes, "layer": engine.target_names}
        return JSONResponse({**said, "method": engine.options.method, "version": __version__, **asdict(self.limits)})

    async def healthy(self, request: Request) -> Response:
        """Whether to be left running: 503 means that only a restart helps."""
        alive = self.started and self.batcher.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def ready(self, request: Request) -> Response:
        """Whether to be sent requests."""
        if self.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return await self.healthy(request)

    async def measured(self, request: Request) -> Response:
        content, media_type = self.metrics.text()
        return Response(content, headers={"content-type": media_type})

    # What is asked of the network

    async def explain(self, request: Request) -> Response:
        return await self._counted(request, "/explain", maps=True)

    async def classify(self, request: Request) -> Response:
        return await self._counted(request, "/classify", maps=False)

    async def _counted(self, request, path, maps):
        begun = time.perf_counter()
        response = await self._answered(request, maps)
        self.metrics.requests.labels(path, response.status_code).inc()
        if response.status_code == CLIENT_LEFT:
            self.metrics.left.inc()
        else:
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)
        return response

    async def _answered(self, request, maps):
        """The response, whatever happens."""
        upload = uploads.Upload(request, self.limits)
        try:
            if self.n_in_work >= self.limits.max_queue:
                raise Refusal(503, f"{self.n_in_work} requests are in work", **{"retry-after": str(RETRY_AFTER_S)})
            self.n_in_work += 1
            try:
                wanted = answers.wanted(request.query_params.multi_items(), self.engine.n_classes, maps)
                # The body is the coroutine's alone, so that it goes when it is decoded.
                return await self._unless_left(upload, self._explained(await upload.read(), wanted, maps))
            finally:
                self.n_in_work -= 1
        except asyncio.CancelledError:
            self.n_cut_off += 1
            raise
        except Left:
            return Response(status_code=CLIENT_LEFT)
        except Refusal as refusal:
            return _Refused(refusal, upload)
        except Exception as error:
            LOG.exception("a picture could not be explained")
            return JSONResponse({"error": f"the network failed: {type(error).__name__}"}, 500)

    async def _unless_left(self, upload, work):
        """What ``work`` gives; when the client leaves, it is cancelled where it stands, and Left is raised."""
        tasks = working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(upload.left())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Left
            return working.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _explained(self, content, wanted, maps):
        decoding = self._in_a_worker(uploads.decode, content, self.engine.loaded, self.limits, wanted.draws)
        del content
        pixels, seen = await decoding
        work = Work(pixels, maps, wanted.target)
        result = await self.batcher.submit(work.kind, work)
        body, media_type, headers = await self._in_a_worker(answers.answer, wanted, self.engine, result, seen)
        return Response(body, headers={"content-type": media_type, "cache-control": "no-store", **headers})

    def _in_a_worker(self, function, *args):
        return asyncio.get_running_loop().run_in_executor(self.workers, function, *args)

    def _pass(self, works):
        """In the network's thread."""
        begun = time.perf_counter()
        results = self.engine.run(works)
        self.metrics.batches.observe(len(works))
        makes = "maps" if works[0].maps else "classes"
        self.metrics.passes.labels(makes).observe(time.perf_counter() - begun)
        return results


class _Refused(JSONResponse):
    """Sent at once, also while the body is still coming; then the rest of that is read for nothing."""

    def __init__(self, refusal, upload):
        # What is left of a body must not be taken for the connection's next request.
        headers = refusal.headers if upload.ended else {**refusal.headers, "connection": "close"}
        super().__init__({"error": refusal.reason}, refusal.status, headers)
        self._upload = upload

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        if self.status_code != TOO_SLOW:
            await self._upload.discard()
        await send({"type": "http.response.body"})


def application(engine: Engine, limits: Limits) -> Starlette:
    """As `cfcam_gpu.serving.application`; ``app.state.service`` is its `Service`."""
    service = Service(engine, limits)
    app = Starlette(routes=service.routes, lifespan=service.running)
    app.state.service = service
    return app
