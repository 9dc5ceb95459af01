"""What the server answers under load, beside the same server with the plain network; and what grows over time.

    python benchmarks/load.py PHOTOS                     # 32 clients, 60 s each: classes alone, then maps
    python benchmarks/load.py PHOTOS --requests 10000    # memory, threads and files over so many, with a small network
    python benchmarks/load.py PHOTOS --libraries         # the same pictures behind LitServe and Ray Serve

Clients and server share this machine. A client sends its next request when it has the answer, over a connection that
it keeps; one in `BROKEN_SHARE` of them is broken in a way of `BROKEN`, each as often as the others. Latencies are those
of sound requests, from the first byte sent to the last received. In the end the server gets SIGTERM while all clients
go on. Needs the "serve" and "demo" extras; --libraries also what `serving_libraries.py` names.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import rows

HERE = Path(__file__).resolve().parent

CLIENTS, SECONDS, WARM_S = 32, 60.0, 3.0
BROKEN_SHARE = 10
LEAVING, LEAVES_AFTER_S, FOR_ALL_S = 64, 0.3, 8.0
"""Clients that leave, after how long, and how long the network would take for all of them, at most."""

MEMORY_MARKS = 10
"""How often memory is looked at."""

TINY = "serving_libraries:tiny"

TEXT = b"This is no picture, whatever its name.\n" * 200


def bomb(side=8192):
    """A PNG file of side x side pixels in a few kilobytes."""
    rows_ = zlib.compress(bytes(side * (1 + side // 8)), 9)
    parts = [b"\x89PNG\r\n\x1a\n"]
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    for name, content in ((b"IHDR", head), (b"IDAT", rows_), (b"IEND", b"")):
        parts += [struct.pack(">I", len(content)), name, content, struct.pack(">I", zlib.crc32(name + content))]
    return b"".join(parts)


BOMB, LARGE = bomb(), bytes(11 * 2**20)

BROKEN = {
    "a text file named .png": (422, lambda photo: {"body": TEXT, "headers": "content-type: image/png\r\n"}),
    "half a photograph": (422, lambda photo: {"body": photo[: len(photo) // 2]}),
    "a picture bomb": (422, lambda photo: {"body": BOMB}),
    "no body": (422, lambda photo: {"body": b""}),
    "an unknown parameter": (422, lambda photo: {"body": photo, "query": "?fromat=png"}),
    "too many bytes": (413, lambda photo: {"body": LARGE}),
    "too many bytes, unannounced": (413, lambda photo: {"body": LARGE, "chunked": True}),
    "leaves within its body": (None, lambda photo: {"body": photo, "leaves": "body"}),
    "leaves before the answer": (None, lambda photo: {"body": photo, "leaves": "answer"}),
}
"""{what is wrong: (the status that answers it, or None where nobody waits for it; the request, of a photograph)}."""


class HalfSent(Exception):
    """An answer that begins and does not end."""


class Connection:
    """One client's, opened again when the server has closed it."""

    def __init__(self, port):
        self.port, self.streams = port, None

    def close(self):
        if self.streams is not None:
            self.streams[1].transport.abort()
        self.streams = None

    async def post(self, path, body, query="", headers="", chunked=False, leaves=None):
        """(status, body) of the answer; None of a request that leaves.

        Raises:
            ConnectionError: nothing of an answer has come.
            HalfSent: not all of it.
        """
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        reader, writer = self.streams
        length = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
        writer.write(f"POST {path}{query} HTTP/1.1\r\nhost: x\r\n{headers}{length}\r\n\r\n".encode())
        if leaves == "body":
            writer.write(body[: len(body) // 2])
            await asyncio.sleep(0.01)
            return self.close()
        answering = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
        try:
            await self._write(writer, body, chunked, answering)
            if leaves == "answer":
                await asyncio.sleep(0.05)
                return self.close()
            try:
                head = (await answering).decode()
            except (asyncio.IncompleteReadError, OSError) as error:
                if getattr(error, "partial", b""):
                    raise HalfSent from error
                raise ConnectionError from error
        finally:
            answering.cancel()
        status = int(head.split(" ", 2)[1])
        try:
            answer = await reader.readexactly(int(re.search(r"(?i)content-length: (\d+)", head)[1]))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise HalfSent from error
        if re.search(r"(?i)connection: close", head):
            self.close()
        return status, answer

    @staticmethod
    async def _write(writer, body, chunked, answering):
        """The body, until the answer is there: a server may refuse a request before it has read it all."""
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(body), 2**16):
                part = body[start : start + 2**16]
                writer.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                await writer.drain()
                if answering.done():
                    return
            if chunked:
                writer.write(b"0\r\n\r\n")


class Load:
    """Clients that go on until they are told to stop.

    Args:
        port, path: of the server.
        photos: contents of files.
        broken: whether some requests are.
        encode: makes the body and the headers of a photograph; default: the file itself.
    """

    def __init__(self, port, path, photos, broken=True, encode=lambda photo: {"body": photo}):
        self.port, self.path, self.photos, self.broken, self.encode = port, path, photos, broken, encode
        self.seconds, self.stopping, self.n_sent = [], False, 0
        self.counts, self.wrong = collections.Counter(), collections.Counter()

    def reset(self):
        self.seconds.clear()
        self.counts.clear()

    async def client(self, seed):
        draw, connection = random.Random(seed), Connection(self.port)
        try:
            while not self.stopping:
                photo, kind = draw.choice(self.photos), None
                if self.broken and draw.randrange(BROKEN_SHARE) == 0:
                    kind = draw.choice(list(BROKEN))
                await self.request(connection, photo, kind)
        finally:
            connection.close()

    async def request(self, connection, photo, kind):
        expected, request = (200, self.encode(photo)) if kind is None else (BROKEN[kind][0], BROKEN[kind][1](photo))
        begun = time.perf_counter()
        self.n_sent += 1
        try:
            answer = await connection.post(self.path, **request)
        except (ConnectionError, HalfSent, OSError) as error:
            connection.close()
            if isinstance(error, HalfSent) or not self.stopping:
                self.wrong[type(error).__name__, kind] += 1
            return
        status = None if answer is None else answer[0]
        if status != expected:
            self.wrong[status, kind] += 1
        elif kind is None:
            self.seconds.append(time.perf_counter() - begun)
        self.counts["sound" if kind is None else kind] += 1


def started(command, port):
    """A server's process, once it is ready."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), *sys.path])
    command = [*command, "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return process
            time.sleep(0.1)
        raise RuntimeError(f"the server has not started: {' '.join(command)}")
    except BaseException:
        end(process)
        raise


def end(process):
    """With what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def state_of(process):
    """Resident MiB, threads and open files of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident, threads = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads"))
    return {"mib": resident / 1024, "threads": threads, "files": len(os.listdir(f"/proc/{process.pid}/fd"))}


def metrics_of(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def cpu_seconds(*pids):
    """Of these processes, or of all where none is named."""
    if not pids:
        user, nice, system, _idle, _wait, *interrupts = Path("/proc/stat").read_text().splitlines()[0].split()[1:8]
        ticks = sum(map(int, (user, nice, system, *interrupts)))
    else:
        stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
        ticks = sum(int(stat[11]) + int(stat[12]) for stat in stats)
    return ticks / os.sysconf("SC_CLK_TCK")


async def under_load(load, process, seconds, clients=CLIENTS, warm_s=WARM_S):
    """What a row has of a load, and of SIGTERM in the end of it."""
    tasks = [asyncio.create_task(load.client(seed)) for seed in range(clients)]
    await asyncio.sleep(warm_s)
    load.reset()
    pids = process.pid, os.getpid()
    begun, spent = time.perf_counter(), cpu_seconds() - cpu_seconds(*pids)
    await asyncio.sleep(seconds)
    spent = cpu_seconds() - cpu_seconds(*pids) - spent
    took, found, counts = time.perf_counter() - begun, list(load.seconds), load.counts.copy()
    wrong = load.wrong.copy()
    load.stopping = True  # from now on a connection that is refused is no error; the requests in work go on
    load.wrong.clear()
    process.send_signal(signal.SIGTERM)
    signalled = time.perf_counter()
    await asyncio.gather(*tasks)
    status = await asyncio.to_thread(process.wait, 60)
    ended_s = time.perf_counter() - signalled
    p50, p95, p99 = (round(1e3 * float(value), 1) for value in np.percentile(found, (50, 95, 99)))
    n_sound = counts.pop("sound")
    return {
        **{"clients": clients, "seconds": round(took, 1), "answered": n_sound, "per_s": round(n_sound / took, 2)},
        **{"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "broken": dict(counts)},
        "cores_of_others": round(spent / took, 2),
        "wrong": {f"{kind or 'sound'}: {status}": count for (status, kind), count in wrong.items()},
        **{"half_sent": sum(count for (said, _), count in load.wrong.items() if said == "HalfSent")},
        **{"wrong_in_the_end": sum(load.wrong.values()), "exit": status, "ended_s": round(ended_s, 2)},
    }


def row_of_load(photos, path, model, seconds):
    port = free_port()
    process = started([sys.executable, "-m", "cfcam_gpu", "serve", model], port)
    try:
        load = Load(port, path, photos)
        mean_batch = []

        async def run():
            async def look():
                await asyncio.sleep(WARM_S + 0.95 * seconds)
                found = await asyncio.to_thread(metrics_of, port)
                mean_batch.append(found["cfcam_batch_pictures_sum"] / found["cfcam_batch_pictures_count"])

            found, _ = await asyncio.gather(under_load(load, process, seconds), look())
            return found

        found = asyncio.run(run())
    finally:
        end(process)
    makes = {"/explain": "maps", "/classify": "classes"}[path]
    row = {"op": "load", "server": "cfcam serve", "makes": makes, "model": model, "photos": len(photos)}
    row |= {**found, "mean_batch": round(mean_batch[0], 1)}
    print(json.dumps(row), flush=True)
    return row


def smaller(photo, side=128):
    """A photograph's file, of so many pixels."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert("RGB").resize((side, side)).save(file, "JPEG")
    return file.getvalue()


def row_of_memory(photos, n_requests):
    """What the process holds after each tenth of many requests, sound and broken, of a small network."""
    port = free_port()
    process = started([sys.executable, "-m", "cfcam_gpu", "serve", TINY], port)
    marks = []
    try:
        load = Load(port, "/explain", [smaller(photo) for photo in photos])

        async def run():
            tasks = [asyncio.create_task(load.client(seed)) for seed in range(CLIENTS)]
            while len(marks) <= MEMORY_MARKS:
                if load.n_sent >= len(marks) * n_requests / MEMORY_MARKS:
                    marks.append(state_of(process))
                    print(load.n_sent, marks[-1], flush=True)
                await asyncio.sleep(0.02)
            load.stopping = True
            await asyncio.gather(*tasks)
            await asyncio.sleep(6)  # longer than the server keeps a connection without requests
            marks.append(state_of(process))

        asyncio.run(run())
        measured = metrics_of(port)
        process.send_signal(signal.SIGTERM)
        status = process.wait(30)
    finally:
        end(process)
    row = {
        **{
            "op": "memory",
            "model": "tiny",
            "clients": CLIENTS,
            "requests": load.n_sent,
            "wrong": sum(load.wrong.values()),
        },
        "mib": [round(mark["mib"], 1) for mark in marks],
        "threads": [mark["threads"] for mark in marks],
        "files": [mark["files"] for mark in marks],
        "in_work": measured["cfcam_requests_in_work"] + measured["cfcam_pictures_waiting"],
        "exit": status,
    }
    print(json.dumps(row), flush=True)
    return row


def row_of_library(photos, library, seconds):
    """Sound requests alone, and the pictures that the network computes for clients that leave."""
    import serving_libraries

    row = {"op": "library", "server": library, "makes": "maps", "model": "demo", "photos": len(photos)}
    encode = (lambda photo: {"body": photo}) if library != "litserve" else in_json
    port, count = free_port(), Path(f"/tmp/serving_count_{os.getpid()}")
    count.write_bytes(b"")
    os.environ[serving_libraries.COUNT] = str(count)
    process = started([sys.executable, str(HERE / "serving_libraries.py"), library], port)
    try:
        load = Load(port, "/explain", photos, broken=False, encode=encode)
        row |= {"leaving": LEAVING, "computed_for_nobody": asyncio.run(_computed_for_nobody(load, count))}
        row |= asyncio.run(under_load(load, process, seconds))
        row.pop("cores_of_others")  # a server of several processes
    finally:
        end(process)
        count.unlink()
    print(json.dumps(row), flush=True)
    return row


async def _computed_for_nobody(load, count, n=LEAVING):
    """Of ``n`` clients that leave after `LEAVES_AFTER_S`, those whose pictures the network computes all the same."""
    before = count.stat().st_size

    async def leave(photo):
        connection = Connection(load.port)
        with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
            await asyncio.wait_for(connection.post(load.path, **load.encode(photo)), LEAVES_AFTER_S)
        connection.close()

    await asyncio.gather(*(leave(photo) for photo in (load.photos * n)[:n]))
    await asyncio.sleep(FOR_ALL_S)
    return count.stat().st_size - before


def in_json(photo):
    """For LitServe, which reads JSON or forms."""
    body = json.dumps({"image": base64.b64encode(photo).decode()}).encode()
    return {"body": body, "headers": "content-type: application/json\r\n"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--paths", nargs="+", default=["/classify", "/explain"])
    parser.add_argument("--requests", type=int, help="memory over so many, instead")
    parser.add_argument("--libraries", nargs="*", help="other servers, instead")
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    photos = [path.read_bytes() for path in sorted(args.photos.iterdir())]
    packages = ["starlette", "uvicorn", "httptools", "pillow", "prometheus_client"]
    if args.requests:
        found = (row_of_memory(photos, args.requests) for _ in range(1))
    elif args.libraries is not None:
        packages += ["litserve", "ray"]
        libraries = args.libraries or ("cfcam serve", "litserve", "ray serve")
        found = (row_of_library(photos, library, args.seconds) for library in libraries)
    else:
        found = (row_of_load(photos, path, args.model, args.seconds) for path in args.paths)
    rows.write("serving", ({**row, **rows.about(*packages)} for row in found), args.out)


if __name__ == "__main__":
    main()
