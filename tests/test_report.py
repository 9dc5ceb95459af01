"""benchmarks/report.py: pages that are what the rows give, nothing typed by hand, and the rule for the default."""

import itertools
import shutil
from pathlib import Path

import pytest

for package in ("torchvision", "tqdm", "sklearn", "pytorch_grad_cam", "matplotlib"):
    pytest.importorskip(package)

from cfcam_gpu import bench
from cfcam_gpu.bench import rows
from cfcam_gpu.bench.providers import PROVIDERS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def report(benchmarks):
    return benchmarks("report")


@pytest.fixture
def faithful(benchmarks):
    return benchmarks("report_faithfulness")


@pytest.fixture
def choice(benchmarks):
    return benchmarks("choice")


@pytest.fixture
def pages(report):
    """{page: its text}."""
    return {page: (ROOT / page).read_text(encoding="utf-8") for page in report.PAGES}


def write_speed(folder, growth):
    """Rows as a suite would leave them: an older machine, and a later one with half of the providers."""
    for device in ("old machine", "new machine"):
        here = {**rows.about(*bench.PACKAGES, device="cpu"), "device": device}
        points = []
        for model in bench.MODELS:
            for batch in (1, 8):
                for index, name in enumerate(PROVIDERS):
                    row = {"provider": name, "model": model, "batch": batch, "size": 224, **here}
                    ms = 10.0 * batch * (index + 1)
                    measured = {"median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "ratio": index + 1.0}
                    measured.update(maps_per_s=1e3 * batch / ms, peak_mib=7.0 * index)
                    points.append({**row, **(measured if index % 2 == 0 else {"not_measured": "needs a GPU"})})
        list(rows.append(folder / "bench.jsonl", points))
    grown = [
        {**growth._row(along, x, "auto", (1, x, 1, 1)), "median_ms": 3.0 * x**2, "peak_mib": x**1.5, **here}
        for along, x in growth.points()
    ]
    list(rows.append(folder / "growth.jsonl", grown))


MEANS = {
    **{"insertion": 0.5, "deletion": 0.2, "insertion_minus_deletion": 0.3, "average_drop": 0.2, "increase": 0.25},
    **{"class_sensitivity": 0.2, "gradient_noise_10": 0.92, "gradient_noise_20": 0.8, "input_noise": 0.9},
    **{"energy": 0.8, "hit": 0.95},
}
"""Grad-CAM's, in what is made up here."""


def faithfulness_row(method, half="choose", network="demo", layer="_swish", spread=0.01, **differences):
    """A row that differs from Grad-CAM by so much, each difference's interval as wide as ``spread`` to both sides."""
    assert differences.keys() <= MEANS.keys()
    means = {measure: mean + differences.get(measure, 0) for measure, mean in MEANS.items()}
    around = lambda mean, width: [mean, mean - width, mean + width]
    row = {"network": network, "layer": layer, "half": half, "method": method, "zero_pairs": 3, "n": 100}
    row["measures"] = {measure: around(mean, 0.04) for measure, mean in means.items()}
    if method != "Grad-CAM":
        row["minus_grad_cam"] = {measure: around(differences.get(measure, 0), spread) for measure in MEANS}
    return row | rows.about("grad-cam", "torchmetrics", device="cpu")


def write_faithfulness(folder, *some_rows):
    list(rows.append(folder / "faithfulness.jsonl", some_rows))


def write_every_method(folder, faithful, **special):
    """Grad-CAM's row and one of every method, candidate and variant, that are alike but for those in ``special``."""
    names = dict.fromkeys([*faithful.METHODS, *faithful.CANDIDATES, *faithful.VARIANTS])
    differences = {name: {"gradient_noise_10": -0.001 * index} for index, name in enumerate(names)}
    differences.update(special)
    write_faithfulness(folder, *(faithfulness_row(name, **differences[name]) for name in names))


# The pages


def test_the_report_is_the_rows_and_twice_is_once(report, faithful, benchmarks, pages, tmp_path):
    write_speed(tmp_path, benchmarks("growth"))
    write_every_method(tmp_path, faithful)
    outside = lambda text: [part.partition("<!-- end -->")[2] for part in text.split("<!-- table: ")[1:]]
    once = {page: report.filled(page, text, report.Results(tmp_path)) for page, text in pages.items()}
    for page, text in once.items():
        assert report.filled(page, text, report.Results(tmp_path)) == text
        assert outside(text) == outside(pages[page])
    compact, full = once["docs/speed.md"], once["benchmarks/README.md"]
    assert "new machine" in compact and not any("old machine" in text for text in once.values())
    assert "\n| `forward` | 10 (9 to 11) |" in compact and "`cfcam:numpy`" not in compact
    assert "\n| `cfcam` |" not in compact  # not measured: the full table says why
    assert "| `cfcam` | needs a GPU |" in full
    assert "| `cfcam:numpy` | 30 (27 to 33) | 3.00 | 14 | 240 (216 to 264) | 3.00 | 14 |\n" in full
    assert "| channels | 64 to 4096 | 2.00, 1.50 |\n" in full
    assert "| Grad-CAM++ | 0.500 ± 0.04 |" in once["benchmarks/faithfulness.md"]


def test_the_cost_of_a_billion_pictures(benchmarks, report, tmp_path):
    scale = benchmarks("report_scale")
    names = ("ray", "ray terms", "cost")
    assert {report.TABLES[name](report.Results(tmp_path)) for name in names} == {"not measured"}
    row = {"op": "ray terms", "photos": 200, "file_bytes": 100_000, "written_bytes": 50_000, **rows.about(device="cpu")}
    row |= {f"{name}_ms": 6.0 for name in ("read", "decode", "forward", "map", "write")}
    # 12 cores, 12 ms a picture: a thousand a second, which is less than the network and the GPU would have.
    per_s, seconds, dollars, limit = scale.cost(row, 10**6, 1, 1)
    assert (round(per_s), limit) == (1000, "decode, and compress what is written")
    assert round(seconds) == 1060 and abs(dollars - 4 * 1060 / 3600) < 1e-3
    per_s, _, _, limit = scale.cost(row, 10**6, 1000, 1)
    assert (per_s, limit) == (scale.driver_per_s(), "the driver")
    assert scale.cost(row, 10**6, 1000, 125)[3] != "the driver"
    assert scale.cost(row | {"file_bytes": 10**7}, 10**6, 8, 1)[3] == "read"
    assert scale.cost(row | {"decode_ms": 0, "write_ms": 0}, 10**6, 8, 1)[3] == "forward and maps"
    list(rows.append(tmp_path / "datasets.jsonl", [row]))
    table = report.TABLES["cost"](report.Results(tmp_path))
    assert "| 1 | 1 | 1,000 | 17.7 min | $1.18 | 11.6 days | $1111 | decode" in table


SPEED_TABLES = ("resnet50", "providers", "models", "throughput", "growth")


def test_a_gpu_has_columns_only_when_it_was_measured(report, benchmarks, tmp_path):
    growth = benchmarks("growth")
    tables = lambda: {name: report.TABLES[name](report.Results(tmp_path)) for name in SPEED_TABLES}
    assert set(tables().values()) == {"not measured"}
    write_speed(tmp_path, growth)
    on_cpu = tables()
    assert not any("GPU: " in table or "GPU, " in table or "not measured" in table for table in on_cpu.values())
    for name in ("bench", "growth"):
        cpu_rows = rows.read(tmp_path / f"{name}.jsonl")[-200:]
        list(rows.append(tmp_path / f"{name}.jsonl", [{**row, "device_type": "cuda"} for row in cpu_rows]))
    on_both = tables()
    for name in SPEED_TABLES:
        widths = {len(line.split("|")) for line in on_both[name].splitlines() if line.startswith("|")}
        assert len(widths) == 1 and widths.pop() > on_cpu[name].splitlines()[0].count("|") + 1
        assert "GPU" in on_both[name]


def test_the_first_numbers_are_the_rows(report, tmp_path):
    assert report.numbers_table(report.Results(tmp_path)) == "not measured"
    here = {**rows.about(device="cpu"), "device": "a machine", "model": "resnet50", "batch": 8, "size": 224}
    speed = [{**here, "provider": name, "median_ms": ms} for name, ms in (("forward", 100), ("cfcam", 110))]
    list(rows.append(tmp_path / "bench.jsonl", speed))
    assert report.numbers_table(report.Results(tmp_path)) == "not measured"  # a third is missing
    list(rows.append(tmp_path / "bench.jsonl", [{**here, "provider": "pytorch-grad-cam", "median_ms": 330}]))
    write_faithfulness(tmp_path, faithfulness_row("CF-CAM", "confirm", insertion_minus_deletion=0.02))
    table = report.numbers_table(report.Results(tmp_path))
    assert (
        "| **3.0 times** as fast as pytorch-grad-cam | 110 ms, not 330 ms; ResNet-50, batch 8, CPU (a machine) |"
        in table
    )
    assert "| **1.10 times** the forward pass alone | 110 ms, not 100 ms; " in table
    assert "| **+0.020**: more faithful than Grad-CAM | " in table and "interval +0.010 to +0.030 |" in table
    for difference, verdict in ((-0.02, "**-0.020**: less faithful than"), (0.0, "**+0.000**: level with")):
        write_faithfulness(tmp_path, faithfulness_row("CF-CAM", "confirm", insertion_minus_deletion=difference))
        assert verdict in report.numbers_table(report.Results(tmp_path))


def test_a_marker_that_is_missing_or_unknown_is_an_error(report, pages, tmp_path):
    results = report.Results(tmp_path)
    for page, text in pages.items():
        for name in report.PAGES[page]:
            with pytest.raises(ValueError, match=f"{page} must have <!-- table: {name} --> .* once, got 0 times"):
                report.filled(page, text.replace(f"<!-- table: {name} -->", ""), results)
        with pytest.raises(ValueError, match="once, got 2 times"):
            report.filled(page, text + text, results)
        with pytest.raises(ValueError, match=f"{page} has tables that nothing fills: mine"):
            report.filled(page, f"{text}\n<!-- table: mine -->\n<!-- end -->\n", results)


def test_a_marker_that_is_not_closed_swallows_nothing(benchmarks):
    fill = benchmarks("tables").fill
    text = "<!-- table: a -->\nmine\n<!-- table: b -->\n<!-- end -->\n"
    assert fill(text, "b", "1", "page") == text.replace("b -->\n", "b -->\n1\n")
    with pytest.raises(ValueError, match="page must have <!-- table: a -->"):
        fill(text, "a", "1", "page")


def test_every_table_and_image_has_a_page(report):
    placed = [name for names in report.PAGES.values() for name in names]
    assert sorted(placed) == sorted({**report.TABLES, **report.IMAGES})
    assert report.DRAWN.keys() < report.IMAGES.keys()


def test_the_pages_are_what_the_rows_give(report, pages, monkeypatch, tmp_path, capsys):
    assert report.main(["--check"]) == 0, "run python benchmarks/report.py"
    (tmp_path / "benchmarks").mkdir()
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for changed in report.PAGES:
        for page, text in pages.items():
            first = f"<!-- table: {report.PAGES[page][0]} -->\n"
            (tmp_path / page).write_text(text.replace(first, f"{first}by hand\n") if page == changed else text)
        assert report.main(["--check"]) == 1
        assert capsys.readouterr().err.endswith(f": {changed}\n")


def test_images_are_linked_from_where_they_stand(report, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.image("growth.svg", "README.md").endswith(": not measured.")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "growth.svg").touch()
    assert report.image("growth.svg", "README.md").endswith("](docs/growth.svg)")
    assert report.image("growth.svg", "benchmarks/README.md").endswith("](../docs/growth.svg)")


def test_plots_are_the_same_every_time(report, faithful, benchmarks, tmp_path):
    assert report.plots(report.Results(tmp_path), tmp_path) == []
    write_speed(tmp_path, benchmarks("growth"))
    write_every_method(tmp_path, faithful)
    paths = report.plots(report.Results(tmp_path), tmp_path)
    assert [path.name for path in paths] == ["latency.svg", "throughput.svg", "growth.svg", "tradeoff.svg"]
    before = [path.read_bytes() for path in paths]
    report.plots(report.Results(tmp_path), tmp_path)
    assert [path.read_bytes() for path in paths] == before


# Faithfulness


def test_cells_say_what_differs_from_grad_cam(faithful):
    row = faithfulness_row("mine", insertion=0.02, deletion=0.02, energy=-0.02, average_drop=-0.02, hit=0.009)
    assert faithful.cell(row, "insertion") == "**0.520 ± 0.04 +**"
    assert faithful.cell(row, "deletion") == "**0.220 ± 0.04 −**"  # lower would be better
    assert faithful.cell(row, "average_drop") == "**0.180 ± 0.04 +**"
    assert faithful.cell(row, "energy") == "**0.780 ± 0.04 −**"
    assert faithful.cell(row, "hit") == "0.959 ± 0.04"  # the interval holds zero
    assert faithful.cell(faithfulness_row("Grad-CAM"), "insertion") == "0.500 ± 0.04"
    assert faithful.cell({"measures": {}}, "energy") == "-"
    assert faithful.difference(faithfulness_row("mine", spread=0.002, energy=-0.0004), "energy") == (
        "+0.000 (-0.002 to +0.002)"
    )
    assert [faithful.half_width(0, 2 * half) for half in (0.0004, 0.0006, 0.012, 0.3)] == ["0", "0.0006", "0.01", "0.3"]


def test_tables_with_rows_missing(report, faithful, tmp_path):
    results = report.Results(tmp_path)
    assert {make(results) for make in faithful.TABLES.values()} == {"not measured"} and not faithful.tradeoff(results)
    write_faithfulness(tmp_path, faithfulness_row("Grad-CAM"), faithfulness_row("LayerCAM", insertion=0.1))
    write_faithfulness(tmp_path, faithfulness_row(next(iter(faithful.CANDIDATES))))
    results = report.Results(tmp_path)
    table = faithful.TABLES["choose"](results)
    assert "| LayerCAM | **0.600 ± 0.04 +** |" in table and "| HiResCAM | not measured |" in table
    assert {len(line.split("|")) for line in table.splitlines() if line.startswith("|")} == {len(MEANS) + 4}
    assert (
        faithful.TABLES["faithfulness"](results) == faithful.TABLES["four"](results) == "not measured"
    )  # the other half
    candidates = faithful.TABLES["candidates"](results)
    assert "The rule picks nothing yet; not measured: " in candidates
    assert len({len(line.split("|")) for line in candidates.splitlines() if line.startswith("|")}) == 1
    assert faithful.tradeoff(results) is not None


def test_every_row_finds_its_table(report, faithful, tmp_path):
    few = {measure: 0.1 for measure in faithful.OF_SCORE_CAM}
    score_cam = faithfulness_row("Score-CAM, first 20", **few)
    score_cam["measures"] = {measure: score_cam["measures"][measure] for measure in few}
    write_faithfulness(
        tmp_path,
        faithfulness_row("Grad-CAM", "confirm", energy=0.011),
        faithfulness_row("Grad-CAM", energy=0.022),
        faithfulness_row("Grad-CAM", network="lite2", energy=0.033),
        faithfulness_row("Grad-CAM", "confirm", network="lite2", energy=0.044),
        faithfulness_row("Grad-CAM", layer="_blocks.10", energy=0.055),
        score_cam,
    )
    random = {"network": "demo", "layer": "_swish", "half": "choose", "method": "CF-CAM", "n": 20}
    random |= {"ssim": {"_fc": [0.3, 0.2, 0.4], "_conv_head": None}, "zero": {"_fc": 2, "_conv_head": 20}}
    list(rows.append(tmp_path / "randomization.jsonl", [random | rows.about(device="cpu")]))
    judged = faithfulness_row("CF-CAM", "confirm") | {"measures": {}, "minus_grad_cam": {}}
    for measure in ("infidelity", "sparseness"):  # of which lower and higher is better
        judged["measures"][measure] = [0.5, 0.4, 0.6]
        judged["minus_grad_cam"][measure] = [0.03, 0.02, 0.04]
    list(rows.append(tmp_path / "outsiders.jsonl", [judged]))
    random = {"layer": "norm", "n": 6} | rows.about("timm", device="cpu")
    zero = lambda *counts: dict(zip(("grad_cam_zero", "cf_cam_zero", "only_cf_cam_zero"), counts))
    models = [{"model": "timm:a", **zero(3, 1, 1), **random}, {"model": "timm:b", **zero(0, 0, 0), **random}]
    list(rows.append(tmp_path / "architectures.jsonl", [*models, {"model": "timm:c", "not_measured": "why"}]))
    results = report.Results(tmp_path)
    tables = {name: make(results) for name, make in faithful.TABLES.items()}
    energies = lambda name: [text for text in ("0.811", "0.822", "0.833", "0.844", "0.855") if text in tables[name]]
    assert energies("faithfulness") == energies("four") == ["0.811"] and energies("choose") == ["0.822"]
    assert energies("elsewhere") == ["0.844", "0.855"]  # "choose" only where there is no "confirm"
    assert "| CF-CAM | 0.300 ± 0.1 (2 zero) | - (20 zero) |" in tables["randomization"]
    assert "| CF-CAM | - | - | **0.500 ± 0.1 −** | - | - | **0.500 ± 0.1 +** |" in tables["outsiders"]
    assert "| `timm:a` | `norm` | 3 | 1 | 1 |\n| the other 1 |  | 0 | 0 | 0 |" in tables["architectures"]
    assert "Without a map: `timm:c` (why)." in tables["architectures"]
    assert "| demo | `_swish` | Score-CAM, first 20 | **0.600 ± 0.04 +** | **0.300 ± 0.04 −** |" in tables["score-cam"]


def drawn_row(choice, method, family="resnet", classes=10, seed=0, spread=0.01, **differences):
    """A row of a network that differs from Grad-CAM by so much, each difference's interval as wide to both sides."""
    row = {**faithfulness_row(method, spread=spread, **{name: 1.0 for name in choice.ASKED} | differences)}
    return {**row, "network": family, "classes": classes, "seed": seed, "accuracy": [1.0, 1.0], "zero_maps": 0}


def test_worse_on_a_family_is_worse_over_its_networks(choice):
    lost = lambda *rows: choice.lost_on(list(rows), [])
    of_seeds = lambda **differences: [drawn_row(choice, "a", seed=seed, **differences) for seed in range(4)]
    assert lost(*of_seeds(energy=-0.0049)) == lost(*of_seeds(average_drop=0.0049)) == []  # a half of each width
    assert lost(*of_seeds(energy=-0.0051)) == ["energy"] and lost(*of_seeds(average_drop=0.0051)) == ["average_drop"]
    assert lost(*of_seeds(energy=-0.02)[:1], *of_seeds(energy=0.02)) == []
    # Where Grad-CAM's class sensitivity (0.2 here) is no less than that of random maps, it is noise.
    noisy = of_seeds(class_sensitivity=-0.1)
    below, above = ([faithfulness_row(choice.RANDOM, class_sensitivity=by)] for by in (-0.01, 0.01))
    assert choice.lost_on(noisy, below) == [] and choice.lost_on(noisy, above) == ["class_sensitivity"]


def test_the_candidates_table_marks_what_the_rule_picks(report, faithful, choice, tmp_path):
    first, second, third, fourth, *_ = faithful.CANDIDATES
    asked = itertools.product(faithful.FAMILIES, faithful.DRAWN_CLASSES)
    drawn = [drawn_row(choice, second, *family) for family in asked]
    worse = {measure: 1.1 * asked for measure, asked in choice.ASKED.items()}
    list(rows.append(tmp_path / "shapes.jsonl", [*drawn[:-1], drawn_row(choice, fourth, classes=2, energy=-0.02)]))
    special = {
        fourth: {**worse, "average_drop": -0.01},
        first: {"insertion_minus_deletion": 0.05, "class_sensitivity": -0.08},
        second: choice.ASKED,
        third: {"insertion_minus_deletion": 0.06, "energy": -0.02, "average_drop": 0.1},
    }
    write_every_method(tmp_path, faithful, **special)
    lines = faithful.TABLES["candidates"](report.Results(tmp_path)).splitlines()
    assert f"The rule picks nothing yet; not measured: {second} on the drawn vits with 100 classes." in lines
    list(rows.append(tmp_path / "shapes.jsonl", drawn[-1:]))
    lines = faithful.TABLES["candidates"](report.Results(tmp_path)).splitlines()
    assert f"The rule picks as the default: {second}." in lines
    ends = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1] for line in lines if line.startswith("| ")}
    assert ends[first] == "worse: class sensitivity (1 - SSIM) |"
    assert ends[second] == "**default** |"
    assert ends[third] == "worse: average drop, energy in the right cell |"
    assert ends[fourth] == "worse: energy in the mask on the drawn resnets with 2 classes |"
    assert faithful.CANDIDATES.keys() <= ends.keys()


# The rule


def picked(choice, **differences):
    """The default among candidates that differ from Grad-CAM by so much, each a dictionary; the rest is as asked."""
    return choice.pick({name: faithfulness_row(name, **choice.ASKED | of_one) for name, of_one in differences.items()})


def test_not_worse_anywhere(choice):
    assert picked(choice, a={"average_drop": 0.0100}) == "a"  # the interval is from 0 to twice the loss
    assert picked(choice, a={"average_drop": 0.0101}) is None
    assert picked(choice, a={"average_drop": -0.5}) == "a"  # better than Grad-CAM is not worse
    for measure in choice.ASKED:
        assert choice.holds(faithfulness_row("a", **{measure: -0.0100}))
        assert not choice.holds(faithfulness_row("a", **{measure: -0.0101}))
        assert choice.holds(faithfulness_row("a", **{measure: 0.5}))


@pytest.mark.parametrize("measure", ["insertion_minus_deletion", "gradient_noise_10", "class_sensitivity", "energy"])
def test_of_those_the_largest_smallest_gain(choice, measure):
    best = {name: 1.2 * asked for name, asked in choice.ASKED.items()}
    other = {**{name: 9 * asked for name, asked in choice.ASKED.items()}, measure: choice.ASKED[measure]}
    assert picked(choice, a=other, b=best) == picked(choice, b=best, a=other) == "b"
    assert picked(choice, a=other, b={**best, "average_drop": 0.1}) == "a"
    close = {measure: 1.1 * choice.ASKED[measure], "average_drop": -0.02}
    close = {**best, **close}
    assert picked(choice, a=close, b=best) == picked(choice, b=best, a=close) == "a"
    assert picked(choice, a={**close, measure: choice.ASKED[measure]}, b=best) == "b"
    assert picked(choice, a={measure: float("nan")}) is picked(choice, a={measure: -0.001}) is picked(choice) is None
