"""The tables of README.md and the plots of docs/, from the rows: the latest of every point on the latest device.

    python benchmarks/report.py            # rewrites both
    python benchmarks/report.py --check    # exit status 1 when the README's tables are not what the rows give

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; all else in the README is written by hand. Running
it twice changes nothing.
"""

import argparse
import re
import sys
from pathlib import Path

import growth
import rows

from cfcam_gpu import bench

ROOT = Path(__file__).resolve().parent.parent

NOT_MEASURED = "not measured"

KINDS = {"cpu": "CPU", "cuda": "GPU"}

PEERS = ("cfcam", "pytorch-grad-cam", "pytorch-grad-cam:accelerated", "torch-cam", "captum")

GATES = {
    "test_end_to_end[1]": "`cam.maps` over the plain forward, ResNet-50, batch 1",
    "test_end_to_end[8]": "`cam.maps` over the plain forward, ResNet-50, batch 8",
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
        self.gates = rows.latest(rows.read(folder / "gates.jsonl"), "op")

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
    """One line: device, versions, commit and date of the newest row of each kind of device."""
    lines = []
    for kind, name in KINDS.items():
        newest = list(some_rows[kind].values())[-1:]
        for row in newest:
            versions = ", ".join(
                f"{package} {row[package]}" for package in ("torch", *bench.PACKAGES) if package in row
            )
            lines.append(f"{name}: {row['device']}; {versions}; {row['date']}, commit {row['commit'] or 'unknown'}.")
        if not newest:
            lines.append(f"{name}: {NOT_MEASURED}.")
    return "\n".join(lines)


def markdown(header, body):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value, digits=3):
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def times(row):
    """ "62.7 (60.1 to 64.2)", or why there is no number."""
    if "median_ms" not in row:
        return row.get("not_measured", NOT_MEASURED).partition(":")[0]
    return f"{number(row['median_ms'])} ({number(row['p20_ms'])} to {number(row['p80_ms'])})"


def ratio(row):
    return f"{row['ratio']:.2f}" if "ratio" in row else times(row)


def value(row, field):
    return number(row.get(field)) if "median_ms" in row else ""


def resnet50_table(results):
    header = ["ResNet-50, 224 pixels", "batch 1, ms", "/ forward", "MiB", "batch 8, ms", "/ forward", "MiB"]
    header += ["GPU, batch 1, ms", "/ forward", "GPU, batch 8, ms", "/ forward"]
    body = []
    for provider in bench.PROVIDERS:
        line = [f"`{provider}`"]
        for kind in KINDS:
            for batch in (1, 8):
                row = results.row(kind, "resnet50", batch, provider)
                line += [times(row), f"{row['ratio']:.2f}" if "ratio" in row else ""]
                line += [value(row, "peak_mib")] if kind == "cpu" else []
        body.append(line)
    return f"{markdown(header, body)}\n\n{about(results.bench)}{_image('latency')}{_image('throughput')}"


def models_table(results):
    header = ["batch 1, time / plain forward", *(f"`{peer}`" for peer in PEERS), "GPU: `cfcam`", "`pytorch-grad-cam`"]
    body = [
        [
            model,
            *(ratio(results.row("cpu", model, 1, peer)) for peer in PEERS),
            *(ratio(results.row("cuda", model, 1, peer)) for peer in ("cfcam", "pytorch-grad-cam")),
        ]
        for model in bench.MODELS
    ]
    return markdown(header, body)


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
    for peer in ("pytorch-grad-cam", "torch-cam", "captum"):
        for batch in (1, 8):
            pair = [results.row("cpu", "resnet50", batch, name) for name in (peer, f"{peer}:accelerated")]
            measured = all("median_ms" in row for row in pair)
            factor = f"{pair[0]['median_ms'] / pair[1]['median_ms']:.2f}x" if measured else ""
            body.append([peer, str(batch), *map(times, pair), factor, *(value(row, "peak_mib") for row in pair)])
    return markdown(header, body)


def growth_table(results):
    header = ["cost grows as x to the power of", "x", *(f"`{way}`: time, memory" for way in growth.WAYS), "GPU: time"]
    body = []
    for along in (*growth.SHAPES, "layers"):
        line = [f"{along}", _span(results.series("cpu", along, "auto"))]
        for kind, way, fields in (
            *(("cpu", way, ("median_ms", "peak_mib")) for way in growth.WAYS),
            ("cuda", "auto", ("median_ms",)),
        ):
            series = results.series(kind, along, way)
            powers = [growth.exponent([row["x"] for row in series], [row[field] for row in series]) for field in fields]
            line.append(", ".join("-" if p is None else f"{p:.2f}" for p in powers) if series else NOT_MEASURED)
        body.append(line)
    return f"{markdown(header, body)}\n\n{about(results.growth)}{_image('growth')}"


def _span(series):
    return f"{series[0]['x']} to {series[-1]['x']}" if series else ""


def gates_table(results):
    body = []
    for op, text in GATES.items():
        row = results.gates.get((op,), {})
        body.append([text, number(row.get("ratio")) if row else NOT_MEASURED, number(row.get("limit"))])
    return markdown(["gate, two CPU cores", "ratio", "limit"], body)


TABLES = {
    "accelerated": accelerated_table,
    "resnet50": resnet50_table,
    "models": models_table,
    "growth": growth_table,
    "gates": gates_table,
}


def fill(text, name, content, file="README.md"):
    """``text`` with ``content`` between the markers of table ``name``.

    Raises:
        ValueError: the markers are not there, or more than once.
    """
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
    text, count = pattern.subn(lambda match: f"{match[1]}{content}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"{file} must have <!-- table: {name} --> ... <!-- end --> once, got {count} times")
    return text


def filled(text, results):
    """The README with all tables."""
    for name, make in TABLES.items():
        text = fill(text, name, make(results))
    unknown = set(re.findall(r"<!-- table: (.*?) -->", text)) - TABLES.keys()
    if unknown:
        raise ValueError(f"README.md has tables that nothing fills: {', '.join(sorted(unknown))}")
    return text


# Plots

ALT = {
    "latency": "Time over the plain forward of every provider on a ResNet-50, batch 1 and 8",
    "throughput": "Maps per second against the batch size on a ResNet-50",
    "growth": "Time and memory against channels, grid side, batch and number of target layers",
}


def _image(name):
    """The plot's line in the README, where there is a plot."""
    return f"\n\n![{ALT[name]}](docs/{name}.svg)" if (ROOT / "docs" / f"{name}.svg").exists() else ""


def plots(results, folder):
    """Write latency.svg, throughput.svg and growth.svg of what has been measured; the paths written."""
    from cfcam_gpu.images import needs

    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(needs("matplotlib")) from error
    matplotlib.use("agg")
    style = {"svg.hashsalt": "cfcam", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
    written = []
    with matplotlib.rc_context(style):
        for name, draw in (("latency", _latency), ("throughput", _throughput), ("growth", _growth)):
            figure = draw(results)
            if figure is not None:
                written.append(folder / f"{name}.svg")
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
    figure, axes = _figure(len(kinds), width=5.5)
    for axis, kind in zip(axes[0], kinds):
        for index, provider in enumerate((bench.UNIT, *PEERS, "cfcam:capture")):
            found = [row for row in results.bench[kind].values() if row["model"] == "resnet50" and "median_ms" in row]
            found = [(row["batch"], row["maps_per_s"]) for row in found if row["provider"] == provider]
            _line(axis, sorted(found), f"C{index}", provider)
        _log_axes(axis, "batch", "maps/s")
        axis.set_title(f"{_title(results.bench, kind)}, ResNet-50", fontsize=9)
        axis.legend(fontsize=7)
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when the tables are out of date")
    args = parser.parse_args(argv)
    results, readme = Results(), ROOT / "README.md"
    if not args.check:
        plots(results, ROOT / "docs")
    before = readme.read_text(encoding="utf-8")
    after = filled(before, results)
    if args.check:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
