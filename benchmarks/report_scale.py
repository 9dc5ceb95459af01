"""Tables of docs/scale.md: what was measured of Ray Data, and what that makes of a million and a billion pictures."""

from tables import NOT_MEASURED, markdown, number

ASSUMED = {
    "gpu_ms": (0.5, "ms a picture", "forward, backward of the head and maps on a GPU: 2000 pictures a second"),
    "cores": (12, "cores", "beside each GPU, each as fast as the one that was measured"),
    "node_gb_per_s": (3.0, "GB/s", "network of a node of eight GPUs, 25 Gbit/s, for reading, and as much for writing"),
    "tasks_per_s": (1000, "tasks a second", "that one driver of Ray Data hands out"),
    "rows_a_task": (64, "pictures", "in a task: four batches of 16"),
    "begin_s": (60, "s", "to start the workers and load the models, of every run"),
    "dollars_per_hour": (4.0, "$", "a GPU and hour, with its share of the node"),
    "dollars_per_gb_month": (0.02, "$", "to keep a GB for a month"),
    "dollars_per_request": (0.4e-6, "$", "to open a file in an object store"),
}
"""{name: (value, unit, what it is)}: what nobody has measured for these pages."""

STAGES = 2
"""Tasks that a block of pictures takes where nothing is drawn: reading and explaining. Files take one in a thousand."""

GPUS_A_RUN = 8
"""Of a thousand GPUs, what one driver can feed."""


def terms(row):
    """Seconds a picture that each part leaves to a GPU, by name; the largest is the bottleneck."""
    value = {name: each[0] for name, each in ASSUMED.items()}
    per_gpu = 8 / (1e9 * value["node_gb_per_s"])
    return {
        "read": row["file_bytes"] * per_gpu,
        "decode, and compress what is written": (row["decode_ms"] + row["write_ms"]) / 1e3 / value["cores"],
        "forward and maps": value["gpu_ms"] / 1e3,
        "write": row["written_bytes"] * per_gpu,
    }


def driver_per_s():
    """Pictures a second that one driver hands out."""
    return ASSUMED["tasks_per_s"][0] * ASSUMED["rows_a_task"][0] / STAGES


def cost(row, n_pictures, n_gpus, n_runs):
    """Pictures a second, seconds, dollars of the GPUs, and what limits it."""
    a_gpu = terms(row)
    slowest = max(a_gpu, key=a_gpu.get)
    per_s, limit = n_gpus / a_gpu[slowest], slowest
    if n_runs * driver_per_s() < per_s:
        per_s, limit = n_runs * driver_per_s(), "the driver"
    seconds = n_pictures / per_s + ASSUMED["begin_s"][0]
    return per_s, seconds, seconds / 3600 * n_gpus * ASSUMED["dollars_per_hour"][0], limit


def _rows(results, op):
    return [row for key, row in results.datasets.items() if key[0] == op]


def _row(results, op):
    return next(reversed(_rows(results, op)), None)


def _about(row):
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "ray", "pyarrow", "pillow") if name in row)
    return f"{row['device']}; {versions}; {row['date']}, commit {row['commit'] or 'unknown'}."


def ray_table(results):
    row = _row(results, "ray")
    if row is None:
        return NOT_MEASURED
    body = [
        ["pictures a second, one machine", number(row["local_per_s"])],
        ["pictures a second, Ray on the same machine", number(row["ray_per_s"])],
        ["seconds that Ray and its workers take to begin", number(row["begin_s"])],
        [f"all {row['photos']} photographs, one machine and Ray, s", f"{row['local_s']:.1f}, {row['ray_s']:.1f}"],
        ["maps in float16 that are equal to the last bit", f"{row['equal_maps']} of {row['photos']}"],
        ["largest difference of the others in float16, and before", f"{row['largest_difference']:.1g}, "
         f"{row['before_float16']:.1g}"],
    ]  # fmt: skip
    parts = [markdown(["EfficientNet-Lite0", ""], body)]
    found = _rows(results, "ray memory")
    if found:
        said = ", ".join(
            f"{each['all_mib']} MiB for {each['photos']} pictures (of which the driver {each['driver_mib']}, workers"
            f" {each['workers_mib']}, Ray's other processes with the object store {each['others_mib']})"
            for each in found
        )
        parts.append(f"Peak memory of all of Ray's processes together: {said}.")
    kills = _rows(results, "ray kill")
    if kills:
        workers, drivers, writing = (
            sum(each.get(f"killed_{who}", 0) for each in kills) for who in ("workers", "drivers", "while_writing")
        )
        pictures, batches = (" and ".join(str(each[name]) for each in kills) for name in ("photos", "batch"))
        parts.append(
            f"{workers} workers and {drivers} drivers killed at random moments, {writing} of them after their run had"
            f" begun to write files, of runs over {pictures} pictures in batches of {batches}: in the end every row was"
            f" {'' if all(each['equal'] for each in kills) else 'NOT '}the same as without, bit for bit, and there"
            " once."
        )
    return "\n\n".join([*parts, _about(row)])


def terms_table(results):
    row = _row(results, "ray terms")
    if row is None:
        return NOT_MEASURED
    body = [
        ["read", number(row["read_ms"]), f"{row['file_bytes'] / 1e3:.0f} kB, from the page cache"],
        ["decode and preprocess", number(row["decode_ms"]), ""],
        ["forward", number(row["forward_ms"]), "EfficientNet-Lite0"],
        ["maps of two classes", number(row["map_ms"]), "all of an actor's call that is not the forward"],
        ["write", number(row["write_ms"]), f"{row['written_bytes'] / 1e3:.0f} kB, float16, zstd, to a local disk"],
    ]
    return (
        f"{markdown(['measured', 'ms of one core a picture', ''], body)}\n\n{row['photos']} photographs. {_about(row)}"
    )


def assumptions_table(results):
    body = [[what, f"{value:.6g} {unit}"] for value, unit, what in ASSUMED.values()]
    return markdown(["assumed", ""], body)


def cost_table(results):
    row = _row(results, "ray terms")
    if row is None:
        return NOT_MEASURED
    body = []
    for n_gpus, n_runs in ((1, 1), (8, 1), (1000, 1), (1000, 1000 // GPUS_A_RUN)):
        line = [f"{n_gpus}", f"{n_runs}"]
        for n_pictures in (10**6, 10**9):
            per_s, seconds, dollars, limit = cost(row, n_pictures, n_gpus, n_runs)
            line += [_time(seconds), f"${number(dollars)}"]
        body.append([*line[:2], f"{per_s:,.0f}", *line[2:], limit])
    header = ["GPUs", "runs", "pictures a second", "a million", "", "a billion", "", "the first bottleneck"]
    a_gpu = terms(row)
    shares = ", ".join(f"{name} {1 / seconds:,.0f}" for name, seconds in a_gpu.items())
    stored = row["written_bytes"] * 1e9 / 1e12
    kept = 1e3 * stored * ASSUMED["dollars_per_gb_month"][0]
    asked = ASSUMED["dollars_per_request"][0] * 1e9
    return (
        f"{markdown(header, body)}\n\nPictures a second that each term alone would let a GPU have: {shares}; one driver"
        f" hands out {driver_per_s():,.0f} for all. A billion pictures' maps are {number(stored)} TB, which"
        f" cost ${number(kept)} a month, and to open their files costs ${number(asked)}."
    )


def _time(seconds):
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{seconds:.0f} s"


TABLES = {"ray": ray_table, "ray terms": terms_table, "assumptions": assumptions_table, "cost": cost_table}
