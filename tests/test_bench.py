"""`cfcam bench` and the suite: every row whole, no number without agreement, nothing measured twice."""

import gc
import json
import sys
import time

import pytest
import torch

for package in ("torchvision", "tqdm", "sklearn"):
    pytest.importorskip(package)

from cfcam_gpu import bench, cli, warm_up
from cfcam_gpu.adapters import PEERS
from cfcam_gpu.bench import compiling, providers, rows, run, timing
from cfcam_gpu.bench.providers import CF_CAM, PROVIDERS, Provider
from cfcam_gpu.programs import NotCompiled

POINT = {"op", "provider", "method", "model", "layer", "batch", "size", "shape", "dtype"}
MEASURED = {"median_ms", "p20_ms", "p80_ms", "rounds", "ratio", "maps_per_s", "peak_mib", "memory"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick_collection():
    """A peak of memory begins with a garbage collection: one of all imported modules takes a quarter of a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def net(tmp_path, monkeypatch):
    """The spec of a small network in the current folder."""
    (tmp_path / "bench_net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    layers = nn.Conv2d(3, 40, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5)\n"
        "    return nn.Sequential(*layers)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "bench_net:build"
    sys.modules.pop("bench_net", None)


@pytest.fixture
def subject(net):
    return bench.subject(net, batch=2, size=64)


def measure(subject, *names, **options):
    """{provider: row} of a short run."""
    return {row["provider"]: row for row in bench.measure(subject, names, rounds=3, time_limit_s=20, **options)}


def plant(monkeypatch, name, build, method=CF_CAM):
    monkeypatch.setitem(PROVIDERS, name, Provider(name, method, build))


# The command


def test_bench_prints_and_writes_a_row_of_every_provider(net, tmp_path, capfd):
    out = tmp_path / "rows.jsonl"
    assert (
        cli.main(["bench", "--model", net, "--batch", "2,1", "--size", "64", "--rounds", "3", "--out", str(out)]) == 0
    )
    written = rows.read(out)
    assert [(row["batch"], row["provider"]) for row in written] == [(b, name) for b in (1, 2) for name in PROVIDERS]
    assert {"device", "device_type", "torch", "commit", "date", "python"} <= written[0].keys()
    ran = {row["provider"] for row in written if "median_ms" in row}
    assert {"forward", "cfcam", "cfcam:numpy", "cfcam:torch+batched", "cfcam:reference", "pipeline"} <= ran
    for row in written:
        assert POINT <= row.keys() and (MEASURED <= row.keys()) != bool(row.get("not_measured")), row
        if "median_ms" in row:
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["rounds"] >= timing.MIN_ROUNDS
            classes = 5 if row["method"] in (providers.CF_CAM_OF_TEN, providers.GRAD_CAM_OF_TEN) else 1  # it has five
            assert row["maps_per_s"] == pytest.approx(1e3 * row["batch"] * classes / row["median_ms"])
            assert row["max_difference"] <= run.TOLERANCE and row["judge"] in PROVIDERS
    table, err = capfd.readouterr()
    assert err == "" and f"{net}, 1 (40 x 8 x 8), batch 1, 64 pixels" in table
    assert "not run: needs a GPU" in table or torch.cuda.is_available()
    assert "not run: only when asked for" in table


def test_peers_of_one_method_agree(subject):
    for package in PEERS:
        pytest.importorskip(package)
    names = [name for name, provider in PROVIDERS.items() if provider.method == providers.GRAD_CAM]
    of_ten = [name for name, provider in PROVIDERS.items() if provider.method == providers.GRAD_CAM_OF_TEN]
    measured = measure(subject, *names, *of_ten)
    assert len(names) == 2 * len(PEERS) and len(of_ten) == 1 + len(PEERS)
    assert all("ratio" in measured[name] for name in (*names, *of_ten)), measured
    assert {measured[name]["judge"] for name in names} == {"pytorch-grad-cam"}
    assert {measured[name]["judge"] for name in of_ten} == {"pytorch-grad-cam:ten calls"}
    # Nothing of the peers stays on the model, where it would cost the next run time and memory.
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in subject.model.modules()]
    assert not any(before or after for after, before in hooks)


def test_gradients_left_on_parameters_count_as_their_providers_memory(subject, monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(16 * 2**18))
    subject.model.register_parameter("extra", parameter)

    def run():
        parameter.grad = None
        parameter.grad = torch.ones_like(parameter)  # 16 MiB that the next call frees

    plant(monkeypatch, "planted", lambda subject: run, method=None)
    row = measure(subject, "planted")["planted"]
    if row["peak_mib"] is None:
        pytest.skip("peak memory is read from /proc (Linux)")
    assert row["peak_mib"] > 15


@pytest.mark.parametrize(
    "args, message",
    [
        (["--batch", "0"], "argument --batch: expected a positive integer, got '0'"),
        (["--batch", "1,x"], "argument --batch: expected a positive integer, got 'x'"),
        (["--time-limit", "-1"], "argument --time-limit: expected a positive number of seconds, got '-1'"),
        (["--time-limit", "nan"], "argument --time-limit: expected a positive number"),
        (["--rounds", "0"], "argument --rounds: expected a positive integer, got '0'"),
        (["--providers", "captain"], "providers must be among forward, cfcam, "),
        (["--model", "resnet19"], "no classification model 'resnet19'; did you mean resnet18"),
        (["--device", "cuda:99"], "argument --device: expected a device that is here (cpu"),
        (["--model", "bench_net:build", "--out", "."], "--out must be a file, got the folder ."),
    ],
)
def test_bad_arguments_end_in_one_line_and_status_2(net, capfd, args, message):
    assert cli.main(["bench", *args]) == 2
    _, err = capfd.readouterr()
    assert err.startswith("cfcam: error: ") and err.count("\n") == 1 and message in err


def test_bench_says_what_is_missing(net, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cli.main(["bench", "--model", net]) == 2
    assert 'pip install "cfcam_gpu[' in capfd.readouterr().err


# No agreement, no number


@pytest.mark.parametrize(
    "wrong",
    [
        lambda maps: maps.flip(2),
        lambda maps: maps.flip(0),
        torch.zeros_like,
        lambda maps: maps * torch.nan,
        lambda maps: maps[:1],
        lambda maps: 1 - maps,
    ],
    ids=["mirrored", "shuffled", "zeros", "NaN", "one map", "inverted"],
)
def test_a_wrong_provider_gets_no_number(subject, monkeypatch, wrong):
    def build(subject):
        right = PROVIDERS["cfcam"].build(subject)
        return lambda: wrong(right())

    plant(monkeypatch, "planted", build)
    measured = measure(subject, "cfcam", "planted")
    assert "ratio" in measured["cfcam"]
    assert measured["planted"]["not_measured"].startswith("no agreement") and not MEASURED & measured["planted"].keys()


def test_a_forward_of_another_model_gets_no_number(subject, monkeypatch):
    plant(monkeypatch, "planted", lambda subject: lambda: subject.model(subject.images.flip(0)), providers.SCORES)
    assert measure(subject, "planted")["planted"]["not_measured"].startswith("no agreement with forward")


def test_the_scale_of_maps_is_the_librarys_own(subject, monkeypatch):
    plant(monkeypatch, "planted", lambda subject: lambda: 1e-9 * PROVIDERS["cfcam"].build(subject)() + 3e-9)
    assert measure(subject, "planted")["planted"]["max_difference"] < run.TOLERANCE


def test_flat_maps_judge_nothing(subject, monkeypatch):
    flat = lambda subject: lambda: torch.zeros(subject.images[:, 0].shape)
    plant(monkeypatch, "pipeline:reference", flat)
    assert "is flat" in measure(subject, "cfcam")["cfcam"]["not_measured"]


def test_a_missing_peer_is_a_reason_and_the_others_go_on(subject, monkeypatch):
    pytest.importorskip("captum")
    for package in ("pytorch_grad_cam", "torchcam", "torchcam.methods"):
        monkeypatch.setitem(sys.modules, package, None)
    measured = measure(subject, "pytorch-grad-cam", "torch-cam:accelerated", "captum")
    assert 'pip install "cfcam_gpu[grad-cam]"' in measured["pytorch-grad-cam"]["not_measured"]
    assert 'pip install "cfcam_gpu[torchcam]"' in measured["torch-cam:accelerated"]["not_measured"]
    assert measured["captum"]["judge"] == "captum" and measured["captum"]["ratio"] > 0
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert 'pip install "cfcam_gpu[captum]"' in measure(subject, "captum")["captum"]["not_measured"]


# Limits


def test_what_ran_out_is_not_tried_at_larger_batches(subject, monkeypatch):
    tried = []

    def build(subject):
        tried.append(len(subject.images))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    plant(monkeypatch, "planted", build)
    points = list(bench.sweep(subject, {1: ["planted"], 2: ["planted"], 4: ["planted"]}, rounds=3))
    reasons = [point[1]["not_measured"] for point in points]
    assert reasons == ["out of memory", "out of memory at batch 1", "out of memory at batch 1"] and tried == [1]
    assert bench.over_limit(points[0] + points[1]) == {"planted": "out of memory at batch 1"}


def test_the_time_limit_is_for_three_calls(subject, monkeypatch):
    def build(subject):
        right = PROVIDERS["cfcam"].build(subject)
        return lambda: (time.sleep(0.2), right())[1]

    plant(monkeypatch, "planted", build)
    row = {row["provider"]: row for row in bench.measure(subject, ["planted"], time_limit_s=0.5, rounds=3)}["planted"]
    assert row["not_measured"].startswith("time limit: one call took 0.2")


def test_without_the_unit_there_is_no_ratio_and_the_sweep_ends(subject, monkeypatch):
    plant(monkeypatch, "forward", lambda subject: lambda: time.sleep(0.2), method=None)
    points = list(bench.sweep(subject, {1: ["cfcam"], 2: ["cfcam"]}, time_limit_s=0.5))
    assert len(points) == 1
    assert points[0][1]["not_measured"].startswith("the unit was not measured: time limit")


def test_rounds_are_interleaved_and_turn_around():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleaved(functions, "cpu", {"a": 4, "b": 2, "c": 4})
    assert "".join(calls) == "accba" + "accba" and [len(times[name]) for name in "abc"] == [4, 2, 4]
    assert timing.quantiles_ms([0.001 * i for i in range(11)]) == pytest.approx(
        {"median_ms": 5, "p20_ms": 2, "p80_ms": 8}
    )


def test_peak_memory_is_that_of_the_call():
    for mib in (64, 16, 64):
        peak = timing.peak_mib(lambda mib=mib: torch.ones(mib * 2**18), "cpu")
        if peak is None:
            pytest.skip("peak memory is read from /proc (Linux)")
        assert mib - 2 < peak < mib + 8


# What is compiled


def test_compiled_networks(subject, monkeypatch):
    programs = []

    def as_it_is(graph, *args, **options):
        programs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", as_it_is)
    monkeypatch.setattr("cfcam_gpu.programs.compile_graph", as_it_is)
    takes = lambda ways, device: {name: name == warm_up.EAGER for name in ways}
    monkeypatch.setattr(warm_up, "medians", takes)
    measured = measure(subject, "cfcam:compile", "forward:compile")
    assert "ratio" in measured["cfcam:compile"] and "ratio" in measured["forward:compile"] and len(programs) == 5

    def no_compiler(*args, **options):
        raise NotCompiled("no C++ compiler\nat all")

    monkeypatch.setattr("cfcam_gpu.programs.compile_graph", no_compiler)
    row = measure(subject.with_batch(2), "cfcam:compile")["cfcam:compile"]
    assert row["not_measured"].startswith("compilation failed: ") and row["not_measured"].endswith(": no C++ compiler")


def test_compiling_has_a_budget():
    start = time.monotonic()
    with pytest.raises(compiling.Unavailable, match="it took more than 0.1 s$"):
        compiling.compiled(lambda: time.sleep(30), budget_s=0.1)
    assert time.monotonic() - start < 10


# The suite, as from a checkout


def test_exponents(benchmarks):
    exponent = benchmarks("growth").exponent
    xs = [64, 128, 256, 512, 1024, 2048]
    assert exponent(xs, [3 * x**1.75 for x in xs]) == pytest.approx(1.75)
    assert exponent(xs, [7.0 if x < 512 else x**2 for x in xs]) == pytest.approx(2)  # the fixed cost is left out
    assert exponent(xs[::-1], [x**-1.0 for x in xs[::-1]]) == pytest.approx(-1)
    assert exponent([1, 2], [1, 2]) is None and exponent([1, 2, 4], [0, 2, None]) is None


def test_growth_rows(benchmarks, monkeypatch):
    growth = benchmarks("growth")
    monkeypatch.setitem(growth.SHAPES, "channels", {24: (1, 24, 5, 5)})
    found = {row["provider"]: row for row in growth.measure("channels", 24, time_limit_s=5, rounds=3)}
    assert found.keys() == growth.WAYS.keys()
    for way in ("auto", "torch+batched", "torch+sklearn"):
        assert found[way]["median_ms"] > 0 and found[way]["rounds"] == 3 and found[way]["x"] == 24
    assert "cuml" in found["torch+cuml"]["not_measured"]

    monkeypatch.setattr(growth, "subject", lambda name, device: bench.subject(name, size=64, device=device))
    (row,) = growth.measure("layers", 2, rounds=3)
    assert row["forward_ms"] > 0 and row["x"] == 2 and row["median_ms"] > 0

    flipped = lambda *args, **choices: growth.real(*args, **choices)._replace(maps=torch.rand(1, 5, 5))
    monkeypatch.setattr(growth, "real", growth.cf_cam, raising=False)
    monkeypatch.setattr(growth, "cf_cam", flipped)
    found = {row["provider"]: row for row in growth.measure("channels", 24, rounds=3)}
    assert found["torch+sklearn"]["not_measured"].startswith("no agreement")


def test_the_suite_goes_on_where_it_was(benchmarks, net, tmp_path, monkeypatch):
    suite, plan = benchmarks("suite"), [(net, {1: ["cfcam"]})]
    monkeypatch.setattr(suite, "plan", lambda: plan)
    args = ["--out", str(tmp_path / "out"), "--size", "64", "--models", net, "--no-growth", "--device", "cpu"]
    read = lambda: [(row["provider"], row["batch"]) for row in rows.read(tmp_path / "out" / "bench.jsonl")]
    suite.main(args)
    assert read() == [("forward", 1), ("cfcam", 1)]
    plan.append((net, {2: ["cfcam"]}))
    suite.main(args)
    suite.main(args)
    assert read() == [("forward", 1), ("cfcam", 1), ("forward", 2), ("cfcam", 2)]
    suite.main([*args, "--again", "--deadline", "0"])
    assert len(read()) == 4
    suite.main([*args, "--again"])
    assert len(read()) == 8
    plan.append(("no_such_net:build", {1: ["cfcam"]}))
    suite.main([*args[:4], *args[6:], "--models", net, "no_such_net:build"])
    assert len(read()) == 8


def test_the_plan_has_every_model_and_provider(benchmarks):
    plan = benchmarks("suite").plan()
    points = [(model, batch) for model, batches in plan for batch in batches]
    assert len(points) == len(set(points)), "nothing is planned twice"
    assert set(points) >= {(model, batch) for model in bench.MODELS for batch in (1, 8, 256)}
    assert points.index(("swin_t", 1)) < points.index(("resnet18", 2)), "latency before throughput"
    assert set(dict(plan)["resnet50"][8]) == PROVIDERS.keys()
    for _, batches in plan:
        for names in batches.values():
            assert bench.select(names) == [name for name in PROVIDERS if name in names]


def test_profile_fills_its_part_and_leaves_the_remarks(benchmarks, net, tmp_path):
    page = tmp_path / "profile.md"
    page.write_text("mine\n<!-- table: cpu -->\n<!-- end -->\nmy remark\n<!-- table: cuda -->\n<!-- end -->\n")
    args = ["--device", "cpu", "--model", net, "--size", "64", "--rounds", "3", "--page", str(page)]
    benchmarks("where_time_goes").main(args)
    text = page.read_text()
    assert text.startswith("mine\n") and "\nmy remark\n<!-- table: cuda -->\n<!-- end -->\n" in text
    assert text.count("| forward up to the target layer |") == 2 and "convolution" in text


def test_rows_are_json_lines(tmp_path):
    assert rows.read(tmp_path / "none.jsonl") == []
    path = tmp_path / "folder" / "rows.jsonl"
    written = [{"a": 1, "b": [1, 2]}, {"a": 2, "b": [1, 2]}, {"a": 1, "b": [1, 2], "c": 3}]
    assert list(rows.append(path, written[:2])) + list(rows.append(path, written[2:])) == written
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows.read(path) == written
    assert rows.latest(written, "a", "b") == {(1, (1, 2)): written[2], (2, (1, 2)): written[1]}
