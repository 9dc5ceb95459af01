"""Tables of docs/servers.md: the server under load, what it holds over many requests, and other libraries."""

from tables import NOT_MEASURED, markdown, number

MAKES = {"classes": "`/classify`: the plain network", "maps": "`/explain`: classes and map"}


def _rows(results, op):
    return [row for key, row in results.serving.items() if key[0] == op]


def _about(row):
    names = ("torch", "starlette", "uvicorn", "litserve", "ray", "pillow")
    versions = ", ".join(f"{name} {row[name]}" for name in names if name in row)
    return f"{row['device']}; {versions}; {row['date']}, commit {row['commit'] or 'unknown'}."


def _latencies(row):
    return [number(row[name]) for name in ("per_s", "p50_ms", "p95_ms", "p99_ms")]


HEADER = ["a second", "p50 ms", "p95 ms", "p99 ms"]


def load_table(results):
    found = _rows(results, "load")
    if not found:
        return NOT_MEASURED
    body = [
        [
            MAKES[row["makes"]],
            f"{row['answered']}",
            *_latencies(row),
            number(row["mean_batch"]),
            f"{sum(row['broken'].values())}",
            f"{sum(row['wrong'].values())}",
            f"{row['half_sent']}",
            f"{row['exit']}",
        ]
        for row in found
    ]
    header = ["", "answers", *HEADER, "a batch", "broken requests", "wrong answers", "half-sent", "exit status"]
    row = found[-1]
    kinds = ", ".join(f"{name} ({count})" for name, count in sorted(row["broken"].items()))
    return (
        f"{markdown(header, body)}\n\n{row['clients']} clients, {row['seconds']:.0f} s, {row['photos']} photographs,"
        " EfficientNet-Lite0; the clients run on the same cores. Broken requests are mixed in; a wrong answer is any"
        " other than 200 to a sound request, and any other than its 413 or 422 to a broken one. Of the last line:"
        f" {kinds}. In the end SIGTERM, while all clients go on. Beside the load, other processes took"
        f" {' and '.join(number(each['cores_of_others']) for each in found)} cores. {_about(row)}"
    )


def memory_table(results):
    found = _rows(results, "memory")
    if not found:
        return f"Memory over many requests: {NOT_MEASURED}."
    row = found[-1]
    step = row["requests"] / (len(row["mib"]) - 2)
    marks = [f"{step * index / 1e3:.0f} 000" if index else "0" for index in range(len(row["mib"]) - 1)]
    names = {"mib": "resident MiB", "threads": "threads", "files": "open files"}
    body = [[what, *(number(value, 4) for value in row[name])] for name, what in names.items()]
    return (
        f"{markdown(['after requests', *marks, 'and 6 s'], body)}\n\n{row['requests']} requests of {row['clients']}"
        f" clients, one in ten broken, to a network of one layer; {row['wrong']} wrong answers. {_about(row)}"
    )


def libraries_table(results):
    found = _rows(results, "library")
    if not found:
        return f"Maps a second, and clients that leave: {NOT_MEASURED}."
    body = [
        [
            row["server"],
            *_latencies(row),
            f"{row['computed_for_nobody']} of {row['leaving']}",
            f"{row['wrong_in_the_end']}",
            f"{row['half_sent']}",
            f"{row['exit']}",
            f"{row['ended_s']:.1f}",
        ]
        for row in found
    ]
    header = [
        *("", *HEADER, "computed for clients that left"),
        *("lost in the end", "half-sent", "exit status", "s to end"),
    ]
    row = found[-1]
    return (
        f"{markdown(header, body)}\n\nMaps of EfficientNet-Lite0, {row['clients']} clients, {row['seconds']:.0f} s,"
        " sound requests alone. Lost in the end: requests in work at SIGTERM that got another answer than theirs, or"
        f" half of one. {_about(row)}"
    )


TABLES = {"load": load_table, "serving memory": memory_table, "serving libraries": libraries_table}
