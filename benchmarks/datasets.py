"""Pictures a second of a run over photographs: the network alone, and what is written beside it; memory; and kills.

    python benchmarks/datasets.py PHOTOS                  # every way, in turns, each run in a process of its own
    python benchmarks/datasets.py PHOTOS --many 5000      # and the memory over so many, from a list that repeats PHOTOS
    python benchmarks/datasets.py PHOTOS --kills 20       # and that runs which are killed end as if they were not
    python benchmarks/datasets.py PHOTOS --ray --kills 20 # Ray Data instead: the same maps, what it costs, and kills
    python benchmarks/datasets.py PHOTOS --ray --rounds 0 --many 1000  # its memory alone
    python benchmarks/datasets.py PHOTOS --ray --rounds 0 --kills 20 --photos 100 --batch-size 2  # its kills alone

The clock begins when the model is there and ends when the command does: it contains finding the layer, reading,
computing and writing. Of the network alone it contains the forward passes of pictures that were read before. Each
process explains one picture first, or makes one forward pass. Ways are
run in turns, and a row has the median of the rounds. "before" is `cfcam explain` of the commit `BEFORE`, which read,
computed and wrote one picture after the other; it needs a checkout with its history, and runs in the first round alone,
since it takes as long as all others. The network alone runs as torch has it, and once more in a process that keeps its
memory, as `cfcam explain` does. Needs the "demo" and "datasets" extras.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

BEFORE = "6e8122d"
"""The last commit whose `cfcam explain` went file by file."""

WAYS = {
    "network": None,
    "network, memory kept": None,
    "before": [],
    "maps": ["--write", "maps"],
    "maps, channels first": ["--write", "maps"],
    "maps, one part": ["--write", "maps"],
    "maps as zarr": ["--write", "maps", "--maps-format", "zarr"],
    "maps as parquet": ["--write", "maps", "--maps-format", "parquet"],
    "scores": ["--write", "scores"],
    "overlays as png": ["--write", "overlay"],
    "overlays as webp": ["--write", "overlay", "--overlay-format", "webp"],
    "overlays as jpeg": ["--write", "overlay", "--overlay-format", "jpeg"],
    "everything": ["--write", "overlay,maps,scores", "--overlay-format", "jpeg", "--maps-format", "parquet"],
}
"""{way: options of `cfcam explain`}; None is the network alone. The first is what the others are compared with. What is
behind a comma switches off one of the command's means (`without`)."""


def peak_mib():
    """Of this process. Not ru_maxrss: a child's starts at its parent's peak."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def clock():
    """Seconds that have passed, and of the processor."""
    return time.perf_counter(), time.process_time()


def since(begun):
    return dict(zip(("seconds", "cpu_s"), (now - then for now, then in zip(clock(), begun))))


def run_network(paths, batch_size):
    """Seconds of the forward passes alone."""
    import torch

    from cfcam_gpu import images, models

    loaded = models.load_model("demo")
    pixels = [loaded.preprocess(images.load_image(path)) for path in paths]
    batches = [torch.stack(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]
    with torch.inference_mode():
        loaded.model(batches[0])
        begun = clock()
        for batch in batches:
            loaded.model(batch).topk(2)
        return since(begun)


def run_command(args, first):
    """Seconds from when the model is loaded, after a run over one picture, with which torch loads its last parts."""
    from cfcam_gpu import cli, models

    begun, load = [], models.load_model

    def loaded(*args):
        model = load(*args)
        begun.append(clock())
        return model

    with contextlib.redirect_stdout(io.StringIO()):
        with tempfile.TemporaryDirectory() as folder:
            cli.main(["explain", first, "--out", folder])
        models.load_model = loaded
        status = cli.main(args)
    if status:
        raise SystemExit(status)
    return since(begun[0])


def measure(way, inputs, first, batch_size, checkout=ROOT):
    """One run in a process of its own: seconds, and its peak memory."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, *inputs, "--way", way, "--out", out, "--batch-size", str(batch_size)]
        command += ["--first", str(first)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out)
        if process.returncode:
            raise RuntimeError(f"{way}: {process.stderr}")
        return json.loads(process.stdout.splitlines()[-1])


def without(mean):
    """Switch off a mean of the command: images that are channels last, or parts of a batch side by side."""
    import torch

    from cfcam_gpu import memory_format
    from cfcam_gpu.datasets import running

    if mean == "channels first":
        memory_format.of_images = lambda model, image: torch.contiguous_format
    elif mean == "one part":
        running.ROWS_OF_PART = sys.maxsize


def child(args):
    if args.way not in ("network", "before"):  # by itself the command does; here main() is called
        from cfcam_gpu import host_memory

        host_memory.keep()
    if WAYS[args.way] is not None and args.way != "before":
        without(args.way.partition(", ")[2])
    if WAYS[args.way] is None:
        found = run_network(sorted(Path(args.inputs[0]).iterdir()), args.batch_size)
    else:
        options = WAYS[args.way]
        common = ["explain", *args.inputs, "--out", str(args.out), "--batch-size", str(args.batch_size)]
        found = run_command([*common, *options], args.first)
    print(json.dumps(found | {"peak_mib": peak_mib()}))


@contextlib.contextmanager
def before():
    """A checkout of the commit `BEFORE`, with this one's compiled clustering."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", BEFORE], capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        # Installed, `cfcam_gpu.kernels` is a part of the package; in a checkout it lies beside it.
        for library in (ROOT / "cfcam_gpu" / "clustering").glob("*.so"):
            shutil.copy(library, Path(folder) / "cfcam_gpu" / "clustering")
        yield Path(folder)


def rows_of_ways(photos, ways, rounds, batch_size):
    """A row for each way."""
    first, n_photos = min(photos.iterdir()), len(list(photos.iterdir()))
    with before() if "before" in ways else contextlib.nullcontext() as checkout:
        measured = {way: [] for way in ways}
        for number in range(rounds):
            for way in ways:
                if way == "before" and number:
                    continue
                found = measure(way, [str(photos)], first, batch_size, checkout if way == "before" else ROOT)
                measured[way].append(found)
                print(
                    f"{way}: {n_photos / found['seconds']:.1f} a second, {found['peak_mib']:.0f} MiB, "
                    f"{1000 * found['cpu_s'] / n_photos:.1f} ms of the processor",
                    flush=True,
                )
    rates = {way: statistics.median(n_photos / each["seconds"] for each in found) for way, found in measured.items()}
    for way, found in measured.items():
        yield {
            "op": "explain",
            "way": way,
            "photos": n_photos,
            "batch": batch_size,
            "rounds": len(found),
            "per_s": round(rates[way], 2),
            "lowest_per_s": round(min(n_photos / each["seconds"] for each in found), 2),
            "highest_per_s": round(max(n_photos / each["seconds"] for each in found), 2),
            "of_network": round(rates[way] / rates["network"], 3) if "network" in rates else None,
            "cpu_ms": round(statistics.median(1000 * each["cpu_s"] / n_photos for each in found), 2),
            "peak_mib": round(statistics.median(each["peak_mib"] for each in found)),
        }


def rows_of_memory(photos, many, batch_size):
    """Peak memory over all photographs, and over so many more."""
    paths = sorted(photos.iterdir())
    for n in (len(paths), many):
        with tempfile.TemporaryDirectory() as folder:
            listed = Path(folder) / "list.txt"
            listed.write_text("".join(f"{paths[index % len(paths)]}\n" for index in range(n)))
            found = measure("everything", [f"@{listed}"], paths[0], batch_size)
            print(f"{n} pictures: {found['peak_mib']:.0f} MiB, {n / found['seconds']:.1f} a second", flush=True)
            yield {
                "op": "memory",
                "way": "everything",
                "photos": n,
                "batch": batch_size,
                "peak_mib": round(found["peak_mib"]),
            }


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def row_of_kills(photos, n_kills, seed, batch_size):
    """Kill a run at random moments and compare what it leaves in the end with an undisturbed run's."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        args = ["explain", str(photos), "--out", str(out), "--batch-size", str(batch_size), *WAYS["everything"]]
        command = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), str(n_kills), str(seed), *args]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(process.stderr)
        said = json.loads(process.stdout)
        found, expected = tree(out), tree(f"{out}-undisturbed")
        print(f"{len(said['kills'])} kills: {'equal' if found == expected else 'DIFFERENT'}, {len(found)} files")
        return {
            "op": "kill",
            "photos": len(list(photos.iterdir())),
            "batch": batch_size,
            "kills": len(said["kills"]),
            "ended_before": said["ended_before"],
            "undisturbed_s": round(said["seconds"], 2),
            "files": len(found),
            "equal": found == expected and said["statuses"] == [0, 0],
        }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("inputs", nargs="+", metavar="PHOTOS", help="a folder of photographs")
    add("--ways", nargs="*", default=list(WAYS), choices=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)}")
    add("--rounds", type=int, default=3)
    add("--batch-size", type=int, default=16)
    add("--many", type=int, help="pictures over which the memory is measured too")
    add("--photos", type=int, metavar="N", help="the first N photographs alone")
    add("--kills", type=int, help="kills of a run that is to end as if there were none")
    add("--ray", action="store_true", help="measure Ray Data against a run on one machine, not the ways")
    add("--seed", type=int, default=0, help="of the moments of the kills")
    add("--out", type=Path, help="folder of the rows; default: that of the committed ones")
    add("--way", help=argparse.SUPPRESS)
    add("--first", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.way:
        return child(args)
    with of_photos(Path(args.inputs[0]).resolve(), args.photos) as photos:
        measured(photos, args)


@contextlib.contextmanager
def of_photos(photos, n):
    """The folder, or one with links to the first so many of its files."""
    if n is None:
        yield photos
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(photos.iterdir())[:n]:
            (Path(folder) / path.name).symlink_to(path)
        yield Path(folder)


def measured(photos, args):
    """What the arguments ask for, into rows."""
    import rows

    about = rows.about("numpy", "pillow", "pyarrow", "zarr", *(["ray"] if args.ray else []), device="cpu")
    out, size = args.out or rows.RESULTS, args.batch_size
    write = lambda found: rows.write("datasets", (row | about for row in found), out)
    if args.ray:
        import datasets_ray

        if args.rounds:
            write([datasets_ray.row_of_terms(photos, size)])
            write([datasets_ray.row_of_overhead(photos, args.rounds, size)])
        if args.many:
            write(datasets_ray.rows_of_memory(photos, args.many, size))
        if args.kills:
            write([datasets_ray.row_of_kills(photos, args.kills, args.seed, size)])
        return
    if args.rounds:
        write(rows_of_ways(photos, args.ways, args.rounds, size))
    if args.many:
        write(rows_of_memory(photos, args.many, size))
    if args.kills:
        write([row_of_kills(photos, args.kills, args.seed, size)])


if __name__ == "__main__":
    # This file's folder would make it the package "datasets" for whoever imports that.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry).resolve() != here), str(here)]
    if "--way" in sys.argv and os.environ.get("PYTHONPATH"):
        sys.path[:] = [os.environ["PYTHONPATH"], *(entry for entry in sys.path if entry not in (str(ROOT), str(here)))]
    sys.exit(main())
