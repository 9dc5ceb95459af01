"""A server that explains pictures: ``cfcam serve MODEL``, or `application` within a server of one's own.

It needs the "serve" extra. docs/servers.md says what it answers.
"""

from typing import Any

from cfcam_gpu.serving.engine import Engine
from cfcam_gpu.serving.limits import Limits

__all__ = ["Engine", "Limits", "application", "serve"]


def application(engine: Engine, limits: Limits | None = None) -> Any:
    """The ASGI application, for any server of such, or to be mounted in another application.

    Args:
        engine: the network; one application each.
        limits: default `Limits()`.

    Returns:
        ``starlette.applications.Starlette``; its lifespan starts and ends the threads.

    Raises:
        ImportError: a package of the "serve" extra is not installed.

    >>> app = application(Engine("demo"))  # in server.py; uvicorn server:app
    """
    from cfcam_gpu.serving.app import application

    return application(engine, limits or Limits())


def serve(
    engine: Engine, limits: Limits | None = None, host: str = "127.0.0.1", port: int = 8000, grace_s: int = 30
) -> int:
    """Serve until SIGTERM or SIGINT: then nothing more is accepted, and what has begun is answered.

    The process is taken to be the server's: it keeps its memory (`cfcam_gpu.host_memory.keep`).

    Args:
        engine, limits: as for `application`.
        host, port: where; port 0 is any that is free. The address is printed.
        grace_s: whole seconds for what has begun; what then still runs is cut off.

    Returns:
        Exit status: 0, or 1 when something was cut off.

    Raises:
        ImportError: a package of the "serve" extra is not installed.
        OSError: the address is not to be had.
    """
    from cfcam_gpu.serving.process import serve

    return serve(application(engine, limits), host, port, grace_s)
