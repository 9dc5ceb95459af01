"""A server's process: its socket, its signals and its end."""

import asyncio
import contextlib
import signal
import socket
from typing import Any

from cfcam_gpu import host_memory
from cfcam_gpu.checks import needs

try:
    import uvicorn
except ImportError as error:
    raise ImportError(needs("uvicorn", "serve")) from error

MOST_CONNECTIONS = 2048
"""Further ones are answered with 503 by the HTTP server itself, so that the process does not run out of files."""

IDLE_S = 5
"""How long a connection is kept without a request."""


class _Server(uvicorn.Server):
    """Ends with the exit status of whoever started it: uvicorn's own raises the signal again, which ends in 143."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def serve(app: Any, host: str, port: int, grace_s: int) -> int:
    """As `cfcam_gpu.serving.serve`, of what `application` returns."""
    host_memory.keep()
    with contextlib.closing(_listening(host, port)) as listener:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=grace_s,
            server_header=False,
            ws="none",
        )
        return asyncio.run(_serve(_Server(config), app.state.service, listener))


async def _serve(server, service, listener):
    loop = asyncio.get_running_loop()

    def stop():
        server.force_exit = service.stopping  # asked for twice
        service.stopping = server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    host, port = listener.getsockname()[:2]
    print(f"serving {service.engine.options.model} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await server.serve([listener])
    return int(service.n_cut_off + service.n_in_work > 0)


def _listening(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MOST_CONNECTIONS)
    except BaseException as error:
        listener.close()
        if isinstance(error, (OSError, OverflowError)):
            raise OSError(f"cannot listen at {host}, port {port}: {error}") from error
        raise
    return listener
