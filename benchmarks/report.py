"""The tables of the pages and the plots of docs/, from the rows: the latest of every point on the latest device.

    python benchmarks/report.py            # rewrites both
    python benchmarks/report.py --check    # exit status 1 when the tables of a page are not what the rows give

`PAGES` says which table stands in which page, `tables` what a table's markers are. Running it twice changes nothing.
It needs the "bench" extra.
"""

import argparse
import os
import sys
from pathlib import Path

import export
import growth
import report_faithfulness
import report_scale
import report_serving
import rows
from tables import NOT_MEASURED, fill, markdown, names, number

from cfcam_gpu import adapters, bench

ROOT = Path(__file__).resolve().parent.parent

KINDS = {"cpu": "CPU", "cuda": "GPU"}

COMPARED = (
    *("forward", "cfcam", "cfcam:capture", "pytorch-grad-cam", "pytorch-grad-cam:accelerated"),
    *("torch-cam", "captum", "pipeline"),
)
"""The providers in the compact table: those of them that were measured."""

PEERS = ("cfcam", "pytorch-grad-cam", "pytorch-grad-cam:accelerated", "torch-cam", "captum")

GPU_PEERS = ("cfcam", "pytorch-grad-cam")
"""Of these the tables of all models have columns for a GPU."""

GATES = {
    "test_end_to_end[1]": "`cam.maps` over the plain forward, ResNet-50, batch 1",
    "test_end_to_end[8]": "`cam.maps` over the plain forward, ResNet-50, batch 8",
    "test_video": "`cam.maps` over the plain forward, R3D-18, a clip of 16 frames",
    "test_several_classes[1-10]": "ten classes in one pass over the plain forward, batch 1",
    "test_several_classes[8-10]": "ten classes in one pass over the plain forward, batch 8",
    "test_several_classes[1-100]": "a hundred classes in one pass over the plain forward, batch 1",
    "test_ten_classes_against_ten_calls[pytorch-grad-cam:accelerated]": (
        "ten classes in one pass over ten calls of accelerated pytorch-grad-cam, batch 1"
    ),
    "test_ten_classes_against_ten_calls[torch-cam]": "ten classes in one pass over ten calls of torch-cam, batch 1",
    "test_ten_classes_against_ten_calls[captum]": "ten classes in one pass over ten calls of captum, batch 1",
    "test_grad_cam[1]": "accelerated GradCAM over pytorch-grad-cam's, batch 1",
    "test_grad_cam[8]": "accelerated GradCAM over pytorch-grad-cam's, batch 8",
    "test_pipeline_against_the_authors_approach": "pipeline over the authors' approach, 2048 channels, 7 x 7",
}

POINT = ("model", "size", "batch", "provider")


class Results:
    """The rows, by kind of device: of each kind only the device that was measured last."""

    def __init__(self, folder=rows.RESULTS):
        bench_rows, growth_rows = rows.read(folder / "bench.jsonl"), rows.read(folder / "growth.jsonl")
        self.bench = {kind: rows.latest(_of_last_device(bench_rows, kind), *POINT) for kind in KINDS}
        self.growth = {
            kind: rows.latest(_of_last_device(growth_rows, kind), "along", "provider", "x") for kind in KINDS
        }
        self.compiled = rows.latest(rows.read(folder / "compiled.jsonl"), "op", "model", "batch", "provider")
        self.memory = rows.latest(rows.read(folder / "memory.jsonl"), "model")
        self.export = rows.latest(rows.read(folder / "export.jsonl"), "model")
        self.gates = rows.latest(rows.read(folder / "gates.jsonl"), "op")
        point = ("network", "layer", "half", "method")
        self.faithfulness = rows.latest(rows.read(folder / "faithfulness.jsonl"), *point)
        self.curves = rows.latest(rows.read(folder / "curves.jsonl"), *point, "baseline", "steps")
        self.randomization = rows.latest(rows.read(folder / "randomization.jsonl"), *point)
        self.outsiders = rows.latest(rows.read(folder / "outsiders.jsonl"), *point)
        self.architectures = rows.latest(rows.read(folder / "architectures.jsonl"), "model")
        self.methods = rows.latest(rows.read(folder / "methods.jsonl"), "library", "method", "model")
        self.shapes, self.volumes = (
            rows.latest(rows.read(folder / f"{name}.jsonl"), "network", "classes", "seed", "method")
            for name in ("shapes", "volumes")
        )
        self.datasets = rows.latest(rows.read(folder / "datasets.jsonl"), "op", "way", "photos")
        self.serving = rows.latest(rows.read(folder / "serving.jsonl"), "op", "server", "makes")

    def row(self, kind, model, batch, provider, size=224):
        """The row of a point, empty where there is none."""
        return self.bench[kind].get((model, size, batch, provider), {})

    def series(self, kind, along, provider):
        """The measured rows of what grows, in order of its value."""
        found = (row for key, row in self.growth[kind].items() if key[:2] == (along, provider))
        return sorted((row for row in found if "median_ms" in row), key=lambda row: row["x"])


def _of_last_device(some_rows, kind):
    some_rows = [row for row in some_rows if row["device_type"] == kind]
    return [row for row in some_rows if row["device"] == some_rows[-1]["device"]]


# Tables


def about(some_rows):
    """A line for each kind of device that was measured: device, versions, commit and date of its newest row."""
    lines = []
    for kind in _kinds(some_rows):
        row = list(some_rows[kind].values())[-1]
        versions = ", ".join(f"{package} {row[package]}" for package in ("torch", *bench.PACKAGES) if package in row)
        lines.append(f"{KINDS[kind]}: {row['device']}; {versions}; {row['date']}, commit {row['commit'] or 'unknown'}.")
    return "  \n".join(lines)


def _kinds(some_rows):
    """The kinds of device that there are rows of: no table has columns for others."""
    return [kind for kind in KINDS if some_rows[kind]]


def times(row):
    """ "62.7 (60.1 to 64.2)", or why there is no number."""
    if "median_ms" not in row:
        return row.get("not_measured", NOT_MEASURED).partition(":")[0]
    return f"{number(row['median_ms'])} ({number(row['p20_ms'])} to {number(row['p80_ms'])})"


def ratio(row):
    return f"{row['ratio']:.2f}" if "ratio" in row else times(row)


def value(row, field):
    return number(row.get(field)) if "median_ms" in row else ""


def resnet50_table(results, providers):
    kinds = _kinds(results.bench)
    if not kinds:
        return NOT_MEASURED
    header, body = ["ResNet-50, 224 pixels"], [[f"`{provider}`"] for provider in providers]
    for kind in kinds:
        for batch in (1, 8):
            header += [f"{KINDS[kind]}, batch {batch}, ms", "/ forward", *(["MiB"] if kind == "cpu" else [])]
            for line, provider in zip(body, providers):
                row = results.row(kind, "resnet50", batch, provider)
                line += [times(row), f"{row['ratio']:.2f}" if "ratio" in row else ""]
                line += [value(row, "peak_mib")] if kind == "cpu" else []
    return f"{markdown(header, body)}\n\n{about(results.bench)}"


def compared_table(results):
    measured = {key[3] for of_kind in results.bench.values() for key, row in of_kind.items() if "median_ms" in row}
    return resnet50_table(results, tuple(provider for provider in COMPARED if provider in measured))


def _columns(results, cpu):
    """(kind, provider) of each column: ``cpu`` of a CPU and `GPU_PEERS` of a GPU, where they were measured."""
    of_kind = {"cpu": cpu, "cuda": GPU_PEERS}
    return [(kind, provider) for kind in _kinds(results.bench) for provider in of_kind[kind]]


def _column_titles(columns):
    return [f"`{provider}`" if kind == "cpu" else f"GPU: `{provider}`" for kind, provider in columns]


def models_table(results):
    columns = _columns(results, PEERS)
    if not columns:
        return NOT_MEASURED
    body = [
        [model, *(ratio(results.row(kind, model, 1, provider)) for kind, provider in columns)] for model in bench.MODELS
    ]
    return markdown(["batch 1, time / plain forward", *_column_titles(columns)], body)


def accelerated_table(results):
    header = [
        "ResNet-50, 224 pixels",
        "batch",
        "as it is, ms",
        "accelerated, ms",
        "",
        "as it is, MiB",
        "accelerated, MiB",
    ]
    body = []
    for peer in (peer.name for peer in adapters.PEERS.values()):
        for batch in (1, 8):
            pair = [results.row("cpu", "resnet50", batch, name) for name in (peer, f"{peer}:accelerated")]
            measured = all("median_ms" in row for row in pair)
            factor = f"{pair[0]['median_ms'] / pair[1]['median_ms']:.2f}x" if measured else ""
            body.append([peer, str(batch), *map(times, pair), factor, *(value(row, "peak_mib") for row in pair)])
    return markdown(header, body)


def methods_table(results):
    """Every method of the other libraries, on a ResNet-50."""
    body = []
    for (library, method, model), row in results.methods.items():
        if model != "resnet50":
            continue
        name = f"{method} ({row['note']})" if row["note"] else method
        if "left_alone" in row:
            body.append([library, name, "", "", "left alone", row["left_alone"]])
        elif "ratio" in row:
            times = [_time(row[field]) for field in ("theirs_ms", "ours_ms")]
            body.append([library, name, *times, _speed_up(row), _difference(row)])
        else:
            body.append([library, name, "", "", NOT_MEASURED, row["not_measured"]])
    if not body:
        return NOT_MEASURED
    header = ["library", "method", "as it is", "accelerated", "", "largest difference"]
    measured = _about_methods(results, ["resnet50"])
    return f"{markdown(header, body)}\n\nResNet-50, one image of 224 pixels. {measured}"


def methods_in_short_table(results):
    """A line a library: its methods with how many times as fast they are, the fastest first."""
    body = []
    for library in dict.fromkeys(key[0] for key in results.methods):
        rows_of = {key[1]: row for key, row in results.methods.items() if key[0] == library and key[2] == "resnet50"}
        measured = {method: row for method, row in rows_of.items() if "ratio" in row}
        if measured:
            fastest = sorted(measured, key=lambda method: -measured[method]["ratio"])
            texts = [f"{method} {_speed_up(measured[method])}" for method in fastest]
            largest = max(measured.values(), key=lambda row: row["max_difference"])
            body.append([library, ", ".join(texts), _difference(largest)])
    if not body:
        return NOT_MEASURED
    return markdown(["library", "ResNet-50, CPU: times as fast", "largest difference"], body)


def methods_elsewhere_table(results):
    """The same on other networks: how many times as fast, and the largest difference."""
    models = [model for model in METHODS_ELSEWHERE if any(key[2] == model for key in results.methods)]
    if not models:
        return NOT_MEASURED
    body = []
    for library, method in dict.fromkeys(key[:2] for key in results.methods):
        found = [results.methods.get((library, method, model), {}) for model in models]
        if any("ratio" in row for row in found):
            cells = [f"{_speed_up(row)}, {_difference(row)}" if "ratio" in row else "" for row in found]
            body.append([library, method, *cells])
    header = ["library", "method", *(METHODS_ELSEWHERE[model] for model in models)]
    return f"{markdown(header, body)}\n\n{_about_methods(results, models)}"


METHODS_ELSEWHERE = {
    "vit_b_16": "ViT-B/16",
    "convnext_tiny": "ConvNeXt-Tiny",
    "demo": "EfficientNet-Lite0, pretrained",
}


def _time(ms):
    return f"{number(ms)} ms" if ms < 1000 else f"{number(ms / 1000)} s"


def _speed_up(row):
    return f"{number(row['ratio'])}x" if row["ratio"] >= 10 else f"{row['ratio']:.2f}x"


def _difference(row):
    text = f"{row['max_difference']:.0e}" if row["max_difference"] else "0"
    if "theirs_off_float64" in row:
        text += f" (from float64: the library {row['theirs_off_float64']:.0e}, ours {row['ours_off_float64']:.0e})"
    return text


def _about_methods(results, models):
    """Devices, versions, dates and commits of the rows that were measured."""
    found = [row for (_, _, model), row in results.methods.items() if model in models and "ratio" in row]
    of = lambda field: list(dict.fromkeys(row[field] for row in found if row.get(field)))
    names = [f"{name} {', '.join(of(name))}" for name in ("torch", "grad-cam", "torchcam", "captum") if of(name)]
    parts = (*of("device"), ", ".join(names), ", ".join(of("date")), f"commit {', '.join(of('commit')) or 'unknown'}")
    return f"{'; '.join(parts)}."


def throughput_table(results):
    """The most maps per second of each provider, at whichever batch that is."""
    columns = _columns(results, (bench.UNIT, *PEERS))
    if not columns:
        return NOT_MEASURED
    header = ["maps/s (batch)", *_column_titles(columns)]
    body = []
    for model in bench.MODELS:
        line = [model]
        for kind, provider in columns:
            found = [row for row in of_model(results, kind, model) if row["provider"] == provider]
            best = max((row for row in found if "median_ms" in row), key=lambda row: row["maps_per_s"], default=None)
            nothing = times(found[0]) if found else NOT_MEASURED
            line.append(nothing if best is None else f"{number(best['maps_per_s'])} ({best['batch']})")
        body.append(line)
    return markdown(header, body)


def of_model(results, kind, model, size=224):
    """The rows of a model, of every batch and provider."""
    return [row for row in results.bench[kind].values() if (row["model"], row["size"]) == (model, size)]


def growth_table(results):
    columns = [
        *(("cpu", way, ("median_ms", "peak_mib"), f"`{way}`: time, memory") for way in growth.WAYS),
        ("cuda", "auto", ("median_ms",), "GPU: time"),
    ]
    alongs = (*growth.SHAPES, "layers")
    columns = [column for column in columns if any(results.series(column[0], along, column[1]) for along in alongs)]
    if not columns:
        return NOT_MEASURED
    body = []
    for along in alongs:
        line = [f"{along}", _span(results.series(columns[0][0], along, "auto"))]
        for kind, way, fields, _ in columns:
            series = results.series(kind, along, way)
            powers = [growth.exponent([row["x"] for row in series], [row[field] for row in series]) for field in fields]
            line.append(", ".join("-" if p is None else f"{p:.2f}" for p in powers) if series else "-")
        body.append(line)
    header = ["cost grows as x to the power of", "x", *(title for *_, title in columns)]
    return f"{markdown(header, body)}\n\n{about(results.growth)}"


def _span(series):
    return f"{series[0]['x']} to {series[-1]['x']}" if series else ""


def gates_table(results):
    body = []
    for op, text in GATES.items():
        row = results.gates.get((op,), {})
        body.append([text, number(row.get("ratio")) if row else NOT_MEASURED, number(row.get("limit"))])
    return markdown(["gate, two CPU cores", "ratio", "limit"], body)


def compiled_table(results):
    """`CFCAM(compile=True)` beside the plain forwards, eager and compiled, and the other libraries."""
    points = dict.fromkeys(key[1:3] for key in results.compiled if key[0] == "end to end")
    if not points:
        return NOT_MEASURED
    body = []
    for model, batch in points:
        of_point = {name: results.compiled.get(("end to end", model, batch, name), {}) for name in COMPILED}
        if not of_point["forward"]:
            continue
        times_ = [_time(of_point[name]["median_ms"]) if of_point[name] else "-" for name in COMPILED[:1]]
        ratios = [ratio(row) if row else "-" for row in list(of_point.values())[1:]]
        found, plain = of_point["cfcam:compile"], of_point["forward:compile"]
        over = f"{found['median_ms'] / plain['median_ms']:.2f}" if plain else "-"
        body.append([METHODS_ELSEWHERE.get(model, "ResNet-50"), str(batch), *times_, *ratios, over, _difference(found)])
    header = ["time / plain forward", "batch", *(f"`{name}`" for name in COMPILED)]
    header += ["`cfcam:compile` / `forward:compile`", "largest difference of the maps"]
    return f"{markdown(header, body)}\n\n{_about_compiled(results)}"


def bfloat16_table(results):
    """The same under autocast, and how far the maps then are from those in float32."""
    body = []
    for op, model, batch, provider in results.compiled:
        if op == "end to end" and provider == "cfcam:compile:bfloat16":
            of_point = [
                results.compiled[op, model, batch, name]
                for name in ("forward:bfloat16", "forward:compile:bfloat16", provider)
            ]
            name, found = METHODS_ELSEWHERE.get(model, "ResNet-50"), of_point[-1]
            body.append([name, str(batch), *map(ratio, of_point), _difference(found), str(found["labels_differ"])])
    if not body:
        return NOT_MEASURED
    header = ["autocast, time / plain forward in float32", "batch", "plain forward", "compiled forward"]
    return markdown([*header, "`cfcam:compile`", "largest difference of the maps", "other labels"], body)


def first_call_table(results):
    """What `CFCAM(compile=True)` takes for its first call, with Inductor's cache on the disk and without."""
    points = {key[1]: row for key, row in results.compiled.items() if key[0] == "first call"}
    if not points:
        return NOT_MEASURED
    body = []
    for model in points:
        seconds = (results.compiled["first call", model, 1, name]["seconds"] for name in FIRST_CALLS)
        body.append([METHODS_ELSEWHERE.get(model, "ResNet-50"), *(f"{each:.0f}" for each in seconds)])
    return markdown(["first call, s", *FIRST_CALLS], body)


FIRST_CALLS = ("empty cache", "second process")

COMPILED = (
    *("forward", "forward:channels_last", "forward:compile", "cfcam", "cfcam:compile"),
    *("torch-cam", "captum", "pytorch-grad-cam"),
)
"""The columns of the table of `compiled_table`: the unit's time, and the others' as multiples of it."""


def _about_compiled(results):
    row = list(results.compiled.values())[-1]
    names = (f"{name} {row[name]}" for name in ("torch", "grad-cam", "torchcam", "captum") if name in row)
    return f"{row['device']}; {', '.join(names)}; {row['date']}, commit {row['commit'] or 'unknown'}."


def memory_table(results):
    """The peaks of video networks: the plain forward, the map, and finding the layer."""
    if not results.memory:
        return NOT_MEASURED
    body = []
    for (model,), row in results.memory.items():
        peaks = [f"{row[field]:.0f}" for field in ("forward_mib", "map_mib", "choice_mib")]
        above = f"{row['map_mib'] - row['forward_mib']:+.0f}"
        body.append([f"`{model}`, {' x '.join(map(str, row['clip']))}", *peaks[:2], above, peaks[2]])
    header = ["a clip, MiB", "plain forward", "`cam.maps`", "above the forward's", "finding the layer, once"]
    return f"{markdown(header, body)}\n\n{_measured_on(list(results.memory.values())[-1])}"


def export_table(results):
    """Exported files: what they take, how equal their maps are, and their speed beside that of `cam.maps`."""
    if not results.export:
        return NOT_MEASURED
    made, timed = [], []
    for (model,), row in results.export.items():
        differences = ", ".join(f"{value:.1g}" for value in row["differences"].values())
        sizes = [f"{row['size_mb']:.0f}", f"{row['export_cpu_s']:.0f}", number(row["load_s"])]
        made.append([export.NETWORKS[model], *sizes, differences])
        for batch, of_batch in row["times"].items():
            timed.append([export.NETWORKS[model], batch, *(times(of_batch[provider]) for provider in export.PROVIDERS)])
    batches = ", ".join(row["differences"])
    header = ["", "file, MB", "export, s of a core", "load, s", f"differences at batches {batches}"]
    parts = [markdown(header, made), markdown(["ms", "batch", *export.PROVIDERS.values()], timed)]
    return "\n\n".join([*parts, _measured_on(row)])


def _measured_on(row):
    versions = ", ".join(f"{package} {row[package]}" for package in ("torch", "torchvision") if package in row)
    return f"{row['device']}; {versions}; {row['date']}, commit {row['commit'] or 'unknown'}."


def _first_rows(results, kind):
    """Of a ResNet-50 at batch 8 the rows of ours, the usual library and the plain forward: of the run with compiled
    networks, which is made again with every default, or else of the suite."""
    names = ("cfcam", "pytorch-grad-cam", bench.UNIT)
    found = {name: results.compiled.get(("end to end", "resnet50", 8, name), {}) for name in names}
    if all(row.get("device_type") == kind for row in found.values()):
        return found
    return {name: results.row(kind, "resnet50", 8, name) for name in names}


def numbers_table(results):
    """The README's first numbers: time against the usual library and the plain forward, and faithfulness."""
    body = []
    for kind in _kinds(results.bench):
        rows_of = _first_rows(results, kind)
        ours, peer, unit = rows_of.values()
        if not all("median_ms" in row for row in rows_of.values()):
            continue
        device = f"ResNet-50, batch 8, {KINDS[kind]} ({ours['device']})"
        ms = {name: f"{number(row['median_ms'])} ms" for name, row in rows_of.items()}
        factor = f"{peer['median_ms'] / ours['median_ms']:.1f} times"
        body.append(
            [f"**{factor}** as fast as pytorch-grad-cam", f"{ms['cfcam']}, not {ms['pytorch-grad-cam']}; {device}"]
        )
        share = f"{ours['median_ms'] / unit['median_ms']:.2f} times"
        body.append(
            [f"**{share}** the forward pass alone", f"{ms['cfcam']}, not {ms[bench.UNIT]}; forward, backward and maps"]
        )
    body += report_faithfulness.number_rows(results)
    return markdown(["", ""], body) if body else NOT_MEASURED


def datasets_table(results):
    """Pictures a second of whole runs, beside the network alone; the memory of longer ones; and kills."""
    of = {op: [row for key, row in results.datasets.items() if key[0] == op] for op in ("explain", "memory", "kill")}
    body, found = [], {row["way"]: row for row in of["explain"]}
    networks = [found[way] for way in ("network", "network, memory kept") if way in found]
    for row in sorted(of["explain"], key=lambda row: row not in networks):
        shares = ["" if row["of_network"] is None else f"{100 * row['of_network']:.0f} %"]
        for kept in networks[1:]:  # another commit's would be another day's machine
            of_kept = row["per_s"] / kept["per_s"]
            shares.append(f"{100 * of_kept:.0f} %" if row["commit"] == kept["commit"] else "")
        spread = f"{number(row['per_s'])} ({number(row['lowest_per_s'])} to {number(row['highest_per_s'])})"
        once = ", one run" if row["rounds"] == 1 < of["explain"][-1]["rounds"] else ""
        body.append([DATASET_WAYS.get(row["way"], row["way"]) + once, spread, *shares, number(row["peak_mib"])])
    header = ["", "pictures a second", "of the network's", *["and with memory kept"] * (len(networks) > 1), "peak MiB"]
    parts = [markdown(header, body) if body else f"Pictures a second: {NOT_MEASURED}."]
    if of["memory"]:
        found = (f"{row['peak_mib']} MiB for {row['photos']} pictures" for row in of["memory"])
        parts.append(f"Peak memory, everything written: {', '.join(found)}.")
    parts += [
        f"{row['kills']} kills at random moments, of runs that take {number(row['undisturbed_s'])} s: the folder was"
        f" {'the same as after an undisturbed run' if row['equal'] else 'NOT the same in the end'}."
        for row in of["kill"]
    ]
    if not body:
        return "\n\n".join(parts)
    row = of["explain"][-1]
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "pillow", "pyarrow", "zarr") if name in row)
    parts.append(
        f"{row['photos']} photographs, EfficientNet-Lite0, batch {row['batch']}, median of {row['rounds']} runs (lowest"
        f" to highest), from when the model is loaded to the end; {row['device']}; {versions}; {row['date']}, commit"
        f" {row['commit'] or 'unknown'}."
    )
    return "\n\n".join(parts)


def formats_table(results):
    """What networks take with images that are channels last, beside channels first."""
    found = [row for key, row in results.datasets.items() if key[0] == "format"]
    if not found:
        return NOT_MEASURED
    body = [
        [
            f"{FORMAT_MODELS.get(row['way'], row['way'])}, batch {row['photos']}",
            *(
                f"{number(row[f'{what}_first_ms'])}, {number(row[f'{what}_last_ms'])}"
                for what in ("forward", "explain")
            ),
            f"{row['difference']:.0e}",
        ]
        for row in found
    ]
    header = ["ms of one core an image: channels first, channels last", "forward", "two maps", "maps differ by"]
    row = found[-1]
    return (
        f"{markdown(header, body)}\n\nMedian of {row['rounds']} rounds; {row['device']}; torch {row['torch']};"
        f" {row['date']}, commit {row['commit'] or 'unknown'}."
    )


FORMAT_MODELS = {
    "demo": "EfficientNet-Lite0",
    "torchvision:resnet50:random": "ResNet-50",
    "torchvision:convnext_tiny:random": "ConvNeXt-Tiny",
}

DATASET_WAYS = {
    "network": "the network alone, pictures read before",
    "network, memory kept": "the same in a process that keeps its memory, as the command does",
    "maps, channels first": "maps, with images that are channels first",
    "maps, one part": "maps, with threads that share each operation instead of the pictures",
    "before": "overlays, one picture after the other, as before",
}

TABLES = {
    "numbers": numbers_table,
    "accelerated": accelerated_table,
    "methods": methods_table,
    "methods in short": methods_in_short_table,
    "methods elsewhere": methods_elsewhere_table,
    "resnet50": compared_table,
    "providers": lambda results: resnet50_table(results, tuple(bench.PROVIDERS)),
    "models": models_table,
    "throughput": throughput_table,
    "growth": growth_table,
    "gates": gates_table,
    "memory": memory_table,
    "export": export_table,
    "compiled": compiled_table,
    "compiled-first-call": first_call_table,
    "compiled-bfloat16": bfloat16_table,
    "datasets": datasets_table,
    "formats": formats_table,
    **report_faithfulness.TABLES,
    **report_scale.TABLES,
    **report_serving.TABLES,
}
"""{name: function of the results}."""

IMAGES = {
    "latency.svg": "Time over the plain forward of every provider on a ResNet-50, batch 1 and 8",
    "throughput.svg": "Maps per second against the batch size, a panel for each model",
    "growth.svg": "Time and memory against channels, grid side, batch and number of target layers",
    "tradeoff.svg": "Insertion minus deletion, and energy in the right cell, against stability, of every method tried",
    "methods.jpg": "Photographs, and the maps of several methods over them",
    "shapes.jpg": "Drawn pictures, the outline of one object in each, and the maps of several methods over them",
}
"""{file in docs/: what it shows}; methods.jpg is `faithfulness.py --picture`, shapes.jpg `shapes.py --picture`, the
others are drawn here."""

PAGES = {
    "README.md": ("numbers", "methods in short", "four"),
    "docs/other-libraries.md": ("methods", "methods elsewhere", "accelerated"),
    "docs/faithfulness.md": ("faithfulness", "methods.jpg"),
    "docs/speed.md": (
        *("resnet50", "latency.svg", "models", "compiled", "compiled-bfloat16", "compiled-first-call"),
        *("memory", "gates"),
    ),
    "docs/datasets.md": ("datasets", "formats"),
    "docs/servers.md": tuple(report_serving.TABLES),
    "docs/exporting.md": ("export",),
    "docs/scale.md": ("ray", "ray terms", "assumptions", "cost"),
    "benchmarks/README.md": ("providers", "throughput", "throughput.svg", "growth", "growth.svg"),
    "benchmarks/faithfulness.md": (
        *(
            "candidates",
            "parts",
            "curves",
            "tradeoff.svg",
            "variants",
            "choose",
            "elsewhere",
            "score-cam",
            "randomization",
            "outsiders",
            "architectures",
            "shapes",
        ),
        "shapes.jpg",
        "volumes",
    ),
}
"""{page: its tables and images}."""


def image(name, page):
    """The image's line in a page, where there is the image."""
    file = ROOT / "docs" / name
    target = Path(os.path.relpath(file, (ROOT / page).parent)).as_posix()
    return f"![{IMAGES[name]}]({target})" if file.exists() else f"{IMAGES[name]}: {NOT_MEASURED}."


def filled(page, text, results):
    """The text of a page with all its tables and images.

    Raises:
        ValueError: markers that are missing, that stand there twice or that are none of the page's.
    """
    for name in PAGES[page]:
        text = fill(text, name, image(name, page) if name in IMAGES else TABLES[name](results), page)
    unknown = set(names(text)) - set(PAGES[page])
    if unknown:
        raise ValueError(f"{page} has tables that nothing fills: {', '.join(sorted(unknown))}")
    return text


# Plots


def plots(results, folder):
    """Draw what has been measured of `DRAWN` into a folder; the paths written."""
    from cfcam_gpu.checks import needs

    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(needs("matplotlib")) from error
    matplotlib.use("agg")
    style = {"svg.hashsalt": "cfcam", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
    written = []
    with matplotlib.rc_context(style):
        for name, draw in DRAWN.items():
            figure = draw(results)
            if figure is not None:
                written.append(folder / name)
                figure.savefig(written[-1], metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return written


def _measured_kinds(some_rows):
    return [kind for kind in KINDS if any("median_ms" in row for row in some_rows[kind].values())]


def _figure(n_columns, width=4.6, height=3.4, n_rows=1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n_columns, height * n_rows))
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def _title(some_rows, kind):
    return f"{KINDS[kind]}: {list(some_rows[kind].values())[-1]['device']}"


def _latency(results):
    kinds = _measured_kinds(results.bench)
    panels = [
        (kind, batch)
        for kind in kinds
        for batch in (1, 8)
        if "ratio" in results.row(kind, "resnet50", batch, bench.UNIT)
    ]
    if not panels:
        return None
    figure, axes = _figure(len(panels), height=4.8)
    for axis, (kind, batch) in zip(axes[0], panels):
        found = [results.row(kind, "resnet50", batch, provider) for provider in bench.PROVIDERS]
        found = [row for row in found if "ratio" in row][::-1]
        unit_ms = results.row(kind, "resnet50", batch, bench.UNIT)["median_ms"]
        middle = [row["ratio"] for row in found]
        spread = [
            [row["ratio"] * abs(1 - row[field] / row["median_ms"]) for row in found] for field in ("p20_ms", "p80_ms")
        ]
        colours = ["tab:blue" if row["provider"].startswith(("cfcam", "pipeline")) else "tab:gray" for row in found]
        axis.barh([row["provider"] for row in found], middle, xerr=spread, color=colours, error_kw={"linewidth": 0.8})
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
        axis.set_xlabel(f"time / plain forward ({number(unit_ms)} ms)")
        axis.set_title(f"{_title(results.bench, kind)}\nResNet-50, batch {batch}", fontsize=9)
    figure.tight_layout()
    return figure


def _throughput(results):
    kinds = _measured_kinds(results.bench)
    if not kinds:
        return None
    providers = (bench.UNIT, *PEERS, "cfcam:capture")
    panels = [(kind, model) for kind in kinds for model in bench.MODELS]
    columns = 4
    figure, axes = _figure(columns, 3.2, 2.7, n_rows=-(-(len(panels) + 1) // columns))
    for axis, (kind, model) in zip(axes.flat, panels):
        measured = [row for row in of_model(results, kind, model) if "median_ms" in row]
        for index, provider in enumerate(providers):
            found = [(row["batch"], row["maps_per_s"]) for row in measured if row["provider"] == provider]
            _line(axis, sorted(found), f"C{index}", provider)
        _log_axes(axis, "batch", "maps/s")
        axis.set_title(f"{model}, {KINDS[kind]}", fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    title = "\n".join(_title(results.bench, kind) for kind in kinds)
    axes.flat[-1].legend(lines.values(), lines.keys(), title=title, loc="center", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    return figure


def _growth(results):
    kinds = _measured_kinds(results.growth)
    if not kinds:
        return None
    columns = (*growth.SHAPES, "layers")
    figure, axes = _figure(len(columns), 3.2, 2.6, n_rows=2)
    lines = [(kind, way) for kind in kinds for way in growth.WAYS]
    for row_of_axes, field, y in zip(axes, ("median_ms", "peak_mib"), ("ms", "peak MiB")):
        for axis, along in zip(row_of_axes, columns):
            for index, (kind, way) in enumerate(lines):
                series = [(row["x"], row[field]) for row in results.series(kind, along, way)]
                positive = [(x, y) for x, y in series if y and y > 0]
                _line(axis, positive, f"C{index}", f"{KINDS[kind]}, {way}")
            _log_axes(axis, along, y)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def _line(axis, points, colour, label):
    if points:
        axis.plot(*zip(*points), color=colour, marker="o", markersize=3, label=label)


def _log_axes(axis, x, y):
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sorted({value for line in axis.lines for value in line.get_xdata()}), minor=False)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelsize=7)
    _plain_ticks(axis.yaxis)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def _plain_ticks(axis):
    """1, 2, 5, 10, ... in full where a decade or two are shown, else the decades."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


DRAWN = {
    "latency.svg": _latency,
    "throughput.svg": _throughput,
    "growth.svg": _growth,
    "tradeoff.svg": report_faithfulness.tradeoff,
}
"""{file in docs/: function of the results, which gives a figure, or None where nothing was measured}."""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when the tables are out of date")
    args = parser.parse_args(argv)
    results, stale = Results(), []
    if not args.check:
        plots(results, ROOT / "docs")
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = filled(page, before, results)
        if before != after:
            stale.append(page)
            if not args.check:
                (ROOT / page).write_text(after, encoding="utf-8")
    if args.check and stale:
        print(f"out of date, run python benchmarks/report.py: {', '.join(stale)}", file=sys.stderr)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
