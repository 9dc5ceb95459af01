"""A network of your own behind the server, beside what else your application answers.

    cd examples/serve && uvicorn server:app --timeout-graceful-shutdown 30

Needs the "serve" extra, and torchvision.
"""

import torchvision
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from cfcam_gpu import serving

network = torchvision.models.resnet18(weights=None)  # or (network, preprocess, class_names)
explaining = serving.application(serving.Engine(network), serving.Limits(max_queue=64, batch_size=16))


async def hello(request):
    return PlainTextResponse("POST a photograph to /cam/explain\n")


app = Starlette(
    routes=[Route("/", hello), Mount("/cam", explaining)],
    lifespan=lambda app: explaining.router.lifespan_context(explaining),  # starts and ends its threads
)
