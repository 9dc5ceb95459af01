"""Ray Data against a run on one machine, its memory, and kills; `python benchmarks/datasets.py PHOTOS --ray` calls it.

Both explain the same photographs into Parquet on the cores of this machine, each run in a process of its own. The clock
begins when the model is loaded and contains, of Ray, starting it and its workers. What it costs to begin does not count
among many pictures: the rate is that of the pictures between a run over all photographs and one over `TIMES` as many,
which are links to the same files.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TIMES = 3
ROWS_PER_FILE = 8
CHILD = """
import json, resource, sys, time
from cfcam_gpu import datasets, models
from cfcam_gpu.datasets import ray_data
photos, out, engine, batch, address = sys.argv[1:]
begun, load = [], models.load_model
def loaded(*args):
    model = load(*args)
    begun.append(time.perf_counter())
    return model
models.load_model = loaded
batch = int(batch)
if engine == "ray":
    ray_data.show_progress(False)
    rows = {"rows_per_file": ROWS} if address != "local" else {}
    found = ray_data.write(photos, out, "demo", batch_size=batch, address=address, **rows)
else:
    written = {"write": ["maps", "scores"], "maps_format": "parquet"}
    options = datasets.Options(datasets.running.Path(out), batch_size=batch, **written)
    found = datasets.explain(options, datasets.find_sources([photos]))
print(json.dumps({"seconds": time.perf_counter() - begun[0], "explained": found.explained, "images": found.images}))
""".replace("ROWS", str(ROWS_PER_FILE))


def started(photos, out, engine, batch_size, address="local", **streams):
    command = [sys.executable, "-c", CHILD, str(photos), str(out), engine, str(batch_size), address]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return subprocess.Popen(command, env=environment, **streams)


def run(*args):
    process = started(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(err)
    return json.loads(out.splitlines()[-1])


def rows_of(folder):
    """{path: row} of all Parquet files that have maps; a path that is there twice is an error."""
    import pyarrow.parquet as pq

    found = {}
    for file in sorted(Path(folder).glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            if "maps" in row:
                if row["path"] in found:
                    raise RuntimeError(f"{row['path']} is there twice")
                found[row["path"]] = row
    return found


def listed(photos, folder, times):
    """A list of so many links to each photograph, as an input."""
    folder.mkdir()
    for path in sorted(photos.iterdir()):
        for number in range(times):
            (folder / f"{path.stem}_{number}{path.suffix}").symlink_to(path)
    names = folder.with_suffix(".txt")
    names.write_text("".join(f"{path}\n" for path in sorted(folder.iterdir())))
    return f"@{names}"


def difference_before_float16(photos, batch_size):
    """Between the last batch as a run on one machine has it, which may be smaller than others, and as Ray has it."""
    import torch

    from cfcam_gpu import datasets, models
    from cfcam_gpu.datasets import running, writing

    sources, loaded = datasets.find_sources([str(photos)]), models.load_model("demo")
    sources = sources[-(len(sources) % batch_size or batch_size) :]
    options = datasets.Options(Path(), write=["maps"])
    pictures = [running.read(index, source, loaded, writing.Artist(options)) for index, source in enumerate(sources)]
    batch = running.Batch(pictures, torch.stack([picture.pixels for picture in pictures]))

    def fail(picture, error):
        raise error

    maps = [
        torch.cat([found[2] for _, found, _ in running.Explaining(options, loaded, fill=fill).explained(batch, fail)])
        for fill in (0, batch_size)
    ]
    return float((maps[0] - maps[1]).abs().max())


def difference(found, expected):
    """The largest difference of two runs' maps in float16, and how many pictures' maps are equal to the last bit."""
    if set(found) != set(expected):
        raise RuntimeError(f"{len(set(found) ^ set(expected))} pictures are in one run alone")
    largest, n_equal = 0.0, 0
    for path, row in found.items():
        here, there = (np.frombuffer(each["maps"], "<f2").astype(float) for each in (row, expected[path]))
        largest, n_equal = (
            max(largest, float(np.abs(here - there).max())),
            n_equal + (row["maps"] == expected[path]["maps"]),
        )
    return largest, n_equal


def row_of_overhead(photos, rounds, batch_size):
    seconds = {(engine, times): [] for times in (1, TIMES) for engine in ("local", "ray")}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        given = {times: listed(photos, folder / f"photos{times}", times) for times in (1, TIMES)}
        n_photos = len(list(photos.iterdir()))
        for number in range(rounds):
            for (engine, times), found in seconds.items():
                out = folder / f"{engine}{times}-{number}"
                said = run(given[times], out, engine, batch_size)
                found.append(said["seconds"])
                print(f"{engine}, {said['explained']} pictures: {said['seconds']:.1f} s", flush=True)
        largest, n_equal = difference(rows_of(folder / "ray1-0"), rows_of(folder / "local1-0"))
    median = {key: statistics.median(found) for key, found in seconds.items()}
    per_s = {
        engine: n_photos * (TIMES - 1) / (median[engine, TIMES] - median[engine, 1]) for engine in ("local", "ray")
    }
    print(f"{n_equal} of {n_photos} equal, largest difference {largest:.2g}; {per_s}")
    return {
        "op": "ray",
        "photos": n_photos,
        "batch": batch_size,
        "rounds": rounds,
        "local_s": round(median["local", 1], 2),
        "ray_s": round(median["ray", 1], 2),
        "local_per_s": round(per_s["local"], 2),
        "ray_per_s": round(per_s["ray"], 2),
        "begin_s": round(median["ray", 1] - n_photos / per_s["ray"], 2),
        "equal_maps": n_equal,
        "largest_difference": largest,
        "before_float16": difference_before_float16(photos, batch_size),
    }


def row_of_terms(photos, batch_size):
    """Milliseconds of the processor a picture of each part of the pipeline, one after the other in this process."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from cfcam_gpu import datasets
    from cfcam_gpu.datasets import ray_data

    paths = sorted(photos.iterdir())
    options = datasets.Options(Path(), write=["maps"], batch_size=batch_size)
    loaded = datasets.running.load(options)
    found, _ = ray_data._looked_at(options, loaded)
    explainer = ray_data._Explainer("demo", loaded.class_names, options, found)
    spent = dict.fromkeys(("read", "decode", "forward", "explain", "write"), 0.0)
    n_read = n_written = 0
    with tempfile.TemporaryDirectory() as folder:
        for start in range(-batch_size, len(paths), batch_size):
            if start <= 0:  # the first batch, which loads the last parts of torch, does not count
                spent, n_read, results = dict.fromkeys(spent, 0.0), 0, []
            batch = paths[max(start, 0) : max(start, 0) + batch_size]
            moments = [time.process_time()]
            content = [path.read_bytes() for path in batch]
            moments.append(time.process_time())
            table = ray_data._decoded(pa.table({"path": list(map(str, batch)), "bytes": content}), loaded, options)
            moments.append(time.process_time())
            shape = table["shape"][0].as_py()
            pixels = [torch.frombuffer(bytearray(each), dtype=torch.float32).view(shape) for each in
                      table["pixels"].to_pylist()]  # fmt: skip
            with torch.inference_mode():
                inputs = torch.stack(pixels)
                moments.append(time.process_time())
                loaded.model(inputs)
            moments.append(time.process_time())
            results.append(explainer(table))
            moments.append(time.process_time())
            for name, first in (("read", 0), ("decode", 1), ("forward", 3), ("explain", 4)):
                spent[name] += moments[first + 1] - moments[first]
            n_read += sum(map(len, content))
        begun = time.process_time()
        pq.write_table(pa.concat_tables(results), f"{folder}/maps.parquet", compression="zstd")
        spent["write"] = time.process_time() - begun
        n_written = os.path.getsize(f"{folder}/maps.parquet")
    spent["map"] = spent.pop("explain") - spent["forward"]
    row = {"op": "ray terms", "photos": len(paths), "batch": batch_size}
    row |= {f"{name}_ms": round(1e3 * seconds / len(paths), 3) for name, seconds in spent.items()}
    row |= {"file_bytes": round(n_read / len(paths)), "written_bytes": round(n_written / len(paths))}
    print(row)
    return row


def processes_below(root):
    """{process: its command} of a process and all that descend from it."""
    children, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return {process: commands.get(process, b"") for process in found}


def memory_below(root):
    """MiB of a driver, of Ray's workers and of Ray's other processes: each page by its share, where several have it. So
    the object store, which is mapped by those that read it, is in the sum once."""
    found = dict.fromkeys(("driver", "workers", "others"), 0.0)
    for process, command in processes_below(root).items():
        try:
            said = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        who = "driver" if process == root else "workers" if command.startswith(b"ray::") else "others"
        found[who] += next(int(line.split()[1]) for line in said.splitlines() if line.startswith("Pss:")) / 1024
    return found


def rows_of_memory(photos, many, batch_size):
    """Peak memory of all processes together, over all photographs, and over so many more."""
    n_photos = len(list(photos.iterdir()))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for times in (1, max(2, round(many / n_photos))):
            given = listed(photos, folder / f"photos{times}", times)
            process = started(given, folder / f"out{times}", "ray", batch_size, stdout=subprocess.DEVNULL)
            peak = dict.fromkeys(("driver", "workers", "others", "all"), 0.0)
            while process.poll() is None:
                found = memory_below(process.pid)
                found["all"] = sum(found.values())
                peak = {name: max(peak[name], value) for name, value in found.items()}
                time.sleep(0.5)
            if process.returncode or len(rows_of(folder / f"out{times}")) != times * n_photos:
                raise RuntimeError("the run has failed")
            print(f"{times * n_photos} pictures: {peak}", flush=True)
            row = {"op": "ray memory", "photos": times * n_photos, "batch": batch_size}
            yield row | {f"{name}_mib": round(value) for name, value in peak.items()}


def workers_of(raylet):
    """The processes, of this one's Ray alone, that run tasks and actors of a data set. Not Ray's own, such as the
    agents without which a node counts as dead."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().split(b"\0")[0]
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == raylet and name.startswith((b"ray::Map", b"ray::Write")):
            found.append(int(folder.name))
    return found


def files_of(out):
    """How many files a run and those before it have written into a folder, or are writing."""
    while True:
        try:
            return len([*out.rglob("*.parquet")])
        except FileNotFoundError:  # a folder has just been removed
            continue


class Killed:
    """Runs into a folder that are to be killed, and how far undisturbed ones are when.

    Ray and its workers take most of a run to begin, so moments drawn from all of it would seldom meet a file that is
    being written: a fifth of them are before the first file, the others are drawn from what is written after it.
    """

    def __init__(self, begin_s, seconds, n_files):
        self.begin_s, self.n_files = begin_s, n_files
        self.file_s = (seconds - begin_s) / n_files

    def wait(self, process, out, n_before, moment, draw):
        """Until a moment in [-0.25, 1] of a run, or its end: from -0.25 to 0 of the time to the first file, else the
        share of the files that ``n_before`` leaves, and at random between one file and the next."""
        n_wanted = n_before + moment * (self.n_files - n_before) if moment > 0 else 0
        seconds = draw.uniform(0, self.file_s) if moment > 0 else (1 + moment / 0.25) * self.begin_s
        while process.poll() is None and files_of(out) < n_wanted:
            time.sleep(0.02)
        until = time.perf_counter() + seconds
        while process.poll() is None and time.perf_counter() < until:
            time.sleep(0.01)


def undisturbed(photos, out, batch_size, address):
    """Seconds to the first file of a run, and to its end."""
    begun, first = time.perf_counter(), None
    process = started(photos, out, "ray", batch_size, address, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        if first is None and files_of(out):
            first = time.perf_counter() - begun
        time.sleep(0.02)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise RuntimeError(process.stderr.read().decode())
    return first, seconds


def row_of_kills(photos, n_kills, seed, batch_size):
    """Kill drivers and workers at random moments, several a run; each driver's run is gone on with by the next."""
    import ray

    draw, kills, n_writing, ended_before = random.Random(seed), {"driver": 0, "worker": 0}, 0, 0
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    context = ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            address, out = context.address_info["gcs_address"], folder / "out"
            for name in ("undisturbed", "again"):  # the second one begins as those that are killed
                begin_s, seconds = undisturbed(photos, folder / name, batch_size, address)
            expected = rows_of(folder / "undisturbed")
            equal, n_runs = rows_of(folder / "again") == expected, 0
            killed = Killed(begin_s, seconds, files_of(folder / "again"))
            print(f"undisturbed: {begin_s:.1f} s to the first of {killed.n_files} files, {seconds:.1f} s", flush=True)
            while sum(kills.values()) < n_kills:
                n_before = files_of(out)
                process, n_runs = started(photos, out, "ray", batch_size, address, **silent), n_runs + 1
                kinds = ["worker"] * draw.randint(1, 4) + ["driver"] * draw.randint(0, 1)
                for kind, moment in zip(kinds, sorted(draw.uniform(-0.25, 1) for _ in kinds)):
                    if sum(kills.values()) == n_kills:
                        break
                    killed.wait(process, out, n_before, moment, draw)
                    victims = [process.pid] if kind == "driver" else workers_of(raylet)
                    if process.poll() is None and victims:
                        os.kill(draw.choice(victims), signal.SIGKILL)
                        kills[kind] += 1
                        n_files = files_of(out)
                        n_writing += n_files > n_before
                        print(f"a {kind} is killed, {n_before} + {n_files - n_before} files are written", flush=True)
                if process.wait() != -signal.SIGKILL:
                    ended_before += 1
                    equal &= process.returncode == 0 and rows_of(out) == expected
                    print(f"a run has ended: {'equal' if equal else 'DIFFERENT'}", flush=True)
                    out = folder / f"out{n_runs}"
            if not out.exists() or rows_of(out) != expected:
                run(photos, out, "ray", batch_size, address)
            equal &= rows_of(out) == expected
    finally:
        ray.shutdown()
    print(f"{kills}, {n_writing} of them while files were written: {'equal' if equal else 'DIFFERENT'}")
    return {
        "op": "ray kill",
        "way": f"seed {seed}",
        "photos": len(expected),
        "batch": batch_size,
        "killed_drivers": kills["driver"],
        "killed_workers": kills["worker"],
        "killed_while_writing": n_writing,
        "ended": ended_before,
        "files": killed.n_files,
        "undisturbed_s": round(seconds, 2),
        "first_file_s": round(begin_s, 2),
        "equal": equal,
    }
