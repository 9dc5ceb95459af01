"""The tables and the plot of faithfulness, for report.py: every method, the candidates under the rule, the variants."""

import itertools
import math

import choice
from faithfulness import CANDIDATES, CONTROLS, METHODS, NOISE, VARIANTS
from tables import NOT_MEASURED, markdown

MAIN = ("demo", "_swish")
"""Network and layer, its last, of the tables that are not of the others."""

MEASURES = {
    "insertion": "insertion",
    "deletion": "deletion",
    "insertion_minus_deletion": "insertion - deletion",
    "average_drop": "average drop",
    "increase": "increase",
    "class_sensitivity": "class sensitivity (1 - SSIM)",
    **{f"gradient_noise_{std:g}": f"SSIM, gradient noise {std:g}x" for std in NOISE},
    "input_noise": "SSIM, input noise",
    "energy": "energy in the right cell",
    "hit": "peak in the right cell",
}
"""{measure: its column's title}."""

FAMILIES = ("resnet", "convnext", "vit")
"""Of shapes.py, which the rule asks too, at each of these numbers of classes:"""

DRAWN_CLASSES = (2, 10, 100)

WITH_SSIM = ("class_sensitivity", "gradient_noise_10", "input_noise")

SHAPES = {
    **{measure: MEASURES[measure] for measure in ("insertion_minus_deletion", "average_drop", *WITH_SSIM)},
    "energy": "energy in the mask",
    "hit": "peak in the mask",
    "iou": "IoU at the best threshold",
}
"""The same of shapes.py."""

VOLUMES = {measure: title for measure, title in SHAPES.items() if measure not in WITH_SSIM}
"""And of volumes.py."""

OUTSIDERS = {
    "pixel_flipping": "pixel flipping",
    "selectivity": "selectivity",
    "infidelity": "infidelity",
    "faithfulness_correlation": "faithfulness correlation",
    "max_sensitivity": "max-sensitivity",
    "sparseness": "sparseness",
}
"""The same of outsiders.py."""

COMPACT = ("insertion_minus_deletion", "average_drop", "class_sensitivity", choice.STABILITY, "energy", "hit")

FOUR = ("insertion_minus_deletion", "class_sensitivity", choice.STABILITY, "energy")
"""The README's columns: one of each question that is asked."""

IN_README = ("Grad-CAM", "Grad-CAM++", "LayerCAM", "Eigen-CAM", "random", "CF-CAM, published", "CF-CAM 0.1", "CF-CAM")

OF_SCORE_CAM = ("insertion", "deletion", "insertion_minus_deletion", "average_drop", "increase")


# Cells


def title(measure, titles=MEASURES):
    return f"{titles[measure]} {'↓' if measure in choice.LOWER_IS_BETTER else '↑'}"


def better(row, measure):
    """1 or -1 where the paired interval of the difference from Grad-CAM excludes zero, else 0."""
    _, low, high = row.get("minus_grad_cam", {}).get(measure, (0, 0, 0))
    sign = (low > 0) - (high < 0)
    return -sign if measure in choice.LOWER_IS_BETTER else sign


def half_width(low, high):
    """One digit of half the interval, without an exponent."""
    half = (high - low) / 2
    return f"{half:.1g}" if half >= 5e-4 else "0"


def cell(row, measure):
    """ "0.329 ± 0.04"; bold and with + or - where better or worse than Grad-CAM."""
    if measure not in row["measures"]:
        return "-"
    mean, low, high = row["measures"][measure]
    text = f"{mean:.3f} ± {half_width(low, high)}"
    sign = better(row, measure)
    return f"**{text} {'+' if sign > 0 else '−'}**" if sign else text


def difference(row, measure):
    """ "+0.002 (-0.003 to +0.007)", the paired difference from Grad-CAM."""
    # The zero added makes a negative zero, of what rounds to it, a positive one.
    mean, low, high = (round(value, 3) + 0.0 for value in row["minus_grad_cam"][measure])
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def about(found):
    """One line: how many photographs, device, versions, dates and commits of the rows."""
    of = lambda field: list(dict.fromkeys(str(row[field]) for row in found if row.get(field)))
    n = sorted({row["n"] for row in found})
    packages = ("torch", "grad-cam", "torchmetrics", "quantus", "captum", "timm")
    versions = [f"{package} {', '.join(of(package))}" for package in packages if of(package)]
    counts = f"{n[0]} photographs" if len(n) == 1 else f"{n[0]} to {n[-1]} photographs"
    commits = f"commit {', '.join(of('commit')) or 'unknown'}"
    return f"{'; '.join([counts, *of('device'), ', '.join(versions), ', '.join(of('date')), commits])}."


# Tables


def _of(results, names, half, network=MAIN):
    """{name: row, or None where it was not measured}."""
    return {name: results.faithfulness.get((*network, half, name)) for name in names}


def _lines(found, measures):
    """A line a method: its cells, with the zero pairs beside the class sensitivity they belong to."""
    for name, row in found.items():
        if row is None:
            yield [name, NOT_MEASURED, *[""] * len(measures)]
            continue
        cells = [name]
        for measure in measures:
            cells.append(cell(row, measure))
            if measure == "class_sensitivity":
                cells.append(str(row["zero_pairs"]))
        yield cells


def _header(first, measures):
    header = [*first]
    for measure in measures:
        header += [title(measure), *(["zero pairs"] if measure == "class_sensitivity" else [])]
    return header


def methods_table(results, names, half):
    found = _of(results, names, half)
    rows = [row for row in found.values() if row]
    if not rows:
        return NOT_MEASURED
    return f"{markdown(_header(['method'], MEASURES), _lines(found, MEASURES))}\n\n{about(rows)}"


def four_table(results):
    """The README's: four columns of a few methods, without their counts."""
    found = _of(results, IN_README, "confirm")
    rows = [row for row in found.values() if row]
    if not rows:
        return NOT_MEASURED
    body = [[name, *(cell(row, measure) for measure in FOUR)] for name, row in found.items() if row]
    return f"{markdown(['method', *map(title, FOUR)], body)}\n\n{about(rows)}"


def number_rows(results):
    """One line of the README's numbers: insertion minus deletion beside Grad-CAM's; none where it is not measured."""
    row = _of(results, ["CF-CAM"], "confirm")["CF-CAM"]
    measure = "insertion_minus_deletion"
    if row is None or measure not in row.get("minus_grad_cam", {}):
        return []
    verdict = {1: "more faithful than Grad-CAM", 0: "level with Grad-CAM", -1: "less faithful than Grad-CAM"}
    mean, low, high = (round(value, 3) + 0.0 for value in row["minus_grad_cam"][measure])
    text = f"{MEASURES[measure]}, paired on {row['n']} photographs; 95 % interval {low:+.3f} to {high:+.3f}"
    return [[f"**{mean:+.3f}**: {verdict[better(row, measure)]}", text]]


def drawn(results, name):
    """{(family, number of classes): the measures in which a candidate is worse there}, where it was measured."""
    by_family = {}
    for (*family, _, method), row in results.shapes.items():
        by_family.setdefault(tuple(family), {}).setdefault(method, []).append(row)
    return {
        family: choice.lost_on(of_family[name], of_family.get(choice.RANDOM, []))
        for family, of_family in by_family.items()
        if name in of_family
    }


def _of_drawn(family, classes):
    return f"the drawn {family}s with {classes} classes"


def chosen(results):
    """The rule's default, what is missing, and of candidates that Lite0 alone would have picked {name: where it lost}.

    While anything is missing, the rule picks nothing.
    """
    left = _of(results, CANDIDATES, "choose")
    missing, lost = [name for name, row in left.items() if row is None], {}
    while not missing and (name := choice.pick(left)):
        found = drawn(results, name)
        lost[name] = {family: measures for family, measures in found.items() if measures}
        if not lost[name]:
            del lost[name]
            asked = itertools.product(FAMILIES, DRAWN_CLASSES)
            missing = [f"{name} on {_of_drawn(*family)}" for family in asked if family not in found]
            return None if missing else name, missing, lost
        del left[name]
    return None, missing, lost


def candidates_table(results):
    found = _of(results, CANDIDATES, "choose")
    if not any(found.values()):
        return NOT_MEASURED
    default, missing, lost = chosen(results)
    header = ["candidate", *(f"{title(measure)}, minus Grad-CAM's" for measure in choice.NOT_WORSE), "the rule"]
    body = []
    for name, row in found.items():
        if row is None:
            body.append([name, NOT_MEASURED, *[""] * (len(header) - 2)])
            continue
        worse = [MEASURES[measure] for measure in choice.NOT_WORSE if not choice.reaches_zero(row, measure)]
        worse += [
            f"{SHAPES[measure]} on {_of_drawn(*family)}"
            for family, measures in lost.get(name, {}).items()
            for measure in measures
        ]
        verdict = "**default**" if name == default else f"worse: {', '.join(worse)}" if worse else ""
        body.append([name, *(difference(row, measure) for measure in choice.NOT_WORSE), verdict])
    verdict = f"The rule picks as the default: {default or 'none'}."
    if missing:
        verdict = f"The rule picks nothing yet; {NOT_MEASURED}: {'; '.join(missing)}."
    return f"{markdown(header, body)}\n\n{verdict}\n\n{about([*filter(None, found.values())])}"


def differences_table(results, names, half="confirm"):
    """Paired differences from Grad-CAM, a line a method."""
    found = {name: row for name, row in _of(results, names, half).items() if row and "minus_grad_cam" in row}
    if not found:
        return NOT_MEASURED
    measures = ("insertion", "deletion", *choice.NOT_WORSE, "hit")
    body = [[name, *(difference(row, measure) for measure in measures)] for name, row in found.items()]
    header = ["method, minus Grad-CAM", *map(title, measures)]
    return f"{markdown(header, body)}\n\n{about([*found.values()])}"


def elsewhere_table(results):
    """The methods at all other networks and layers; on "confirm" where any was measured there."""
    places = dict.fromkeys(key[:2] for key in results.faithfulness if key[:2] != MAIN)
    body, rows = [], []
    for place in places:
        halves = [half for half in ("confirm", "choose") if any(_of(results, METHODS, half, place).values())]
        for half in halves[:1]:
            found = {name: row for name, row in _of(results, METHODS, half, place).items() if row}
            rows += found.values()
            for index, line in enumerate(_lines(found, COMPACT)):
                body.append([*([place[0], f"`{place[1]}`", half] if index == 0 else [""] * 3), *line])
    if not body:
        return NOT_MEASURED
    header = _header(["network", "layer", "half", "method"], COMPACT)
    return f"{markdown(header, body)}\n\n{about(rows)}"


def score_cam_table(results):
    found = {key: row for key, row in results.faithfulness.items() if ", first " in key[3]}
    if not found:
        return NOT_MEASURED
    body = [
        [key[0], f"`{key[1]}`", key[3], *(cell(row, measure) for measure in OF_SCORE_CAM)] for key, row in found.items()
    ]
    header = ["network", "layer", "method", *map(title, OF_SCORE_CAM)]
    return f"{markdown(header, body)}\n\n{about(list(found.values()))}"


def randomization_table(results):
    """SSIM of the maps before and after each layer, and all behind it, was made random."""
    found = {key: row for key, row in results.randomization.items() if key[:2] == MAIN}
    if not found:
        return NOT_MEASURED
    layers = list(next(iter(found.values()))["ssim"])
    body = []
    for (*_, method), row in found.items():
        cells = ["-" if of is None else f"{of[0]:.3f} ± {half_width(*of[1:])}" for of in row["ssim"].values()]
        zero = [f" ({count} zero)" if count else "" for count in row["zero"].values()]
        body.append([method, *map("".join, zip(cells, zero))])
    header = ["random from the head down to", *(f"`{layer}`" for layer in layers)]
    return f"{markdown(header, body)}\n\n{about(list(found.values()))}"


def curves_table(results):
    """CF-CAM's differences from Grad-CAM on "confirm", by what a pixel is where the image is not and by the steps."""
    found = {key: row for key, row in results.curves.items() if key[:4] == (*MAIN, "confirm", "CF-CAM")}
    if not found:
        return NOT_MEASURED
    measures = ("insertion", "deletion", "insertion_minus_deletion")
    body = [[*map(str, key[4:]), *(difference(row, measure) for measure in measures)] for key, row in found.items()]
    header = ["baseline", "steps", *(f"{title(measure)}, minus Grad-CAM's" for measure in measures)]
    return f"{markdown(header, body)}\n\n{about(list(found.values()))}"


def outsiders_table(results):
    """The methods under other libraries' measures, on "confirm"."""
    found = {key[3]: row for key, row in results.outsiders.items() if key[:3] == (*MAIN, "confirm")}
    if not found:
        return NOT_MEASURED
    body = [[method, *(cell(row, measure) for measure in OUTSIDERS)] for method, row in found.items()]
    header = ["method", *(title(measure, OUTSIDERS) for measure in OUTSIDERS)]
    return f"{markdown(header, body)}\n\n{about([*found.values()])}"


def architectures_table(results):
    """The random networks of which some map is zero; of the others how many there are."""
    measured = {model: row for (model,), row in results.architectures.items() if "n" in row}
    if not measured:
        return NOT_MEASURED
    counts = ("grad_cam_zero", "cf_cam_zero", "only_cf_cam_zero")
    body = [
        [f"`{model}`", f"`{row['layer']}`", *(str(row[count]) for count in counts)]
        for model, row in measured.items()
        if any(row[count] for count in counts)
    ]
    body.append([f"the other {len(measured) - len(body)}", "", *("0" for _ in counts)])
    body.append([f"all {len(measured)}", "", *(str(sum(row[count] for row in measured.values())) for count in counts)])
    header = ["network", "layer", "zero maps, Grad-CAM ↓", "CF-CAM ↓", "CF-CAM alone ↓"]
    failed = [f"`{model}` ({row['not_measured']})" for (model,), row in results.architectures.items() if "n" not in row]
    failed = f"Without a map: {', '.join(failed)}.\n\n" if failed else ""
    return f"{markdown(header, body)}\n\n{failed}{about([*measured.values()]).replace('photographs', 'noise images')}"


def shapes_table(results):
    shown = {key: row for key, row in results.shapes.items() if key[3] not in CANDIDATES}
    return _drawn_table(shown, SHAPES, "pictures")


def volumes_table(results):
    return _drawn_table(results.volumes, VOLUMES, "volumes")


def _drawn_table(measured, measures, drawn):
    """A line a family, number of classes and method: the mean of its networks, bold where all of these agree."""
    families = dict.fromkeys(key[:2] for key in measured)
    body, rows = [], []
    for family in families:
        of_family = {key: row for key, row in measured.items() if key[:2] == family}
        seeds = list(dict.fromkeys(key[2] for key in of_family))
        accuracies = [[row["accuracy"][i] for row in of_family.values()] for i in (0, 1)]
        network = f"{family[0]}, {family[1]} classes, {len(seeds)} seeds"
        network += f"; {', '.join(f'{min(each):.0%} to {max(each):.0%}' for each in accuracies)}"
        for method in dict.fromkeys(key[3] for key in of_family):
            keys = [(*family, seed, method) for seed in seeds]
            found = [of_family[key] for key in keys if key in of_family]
            cells = [_over_seeds(found, measure) for measure in measures]
            body.append([network, method, *cells, str(sum(row["zero_maps"] for row in found))])
            network = ""
            rows += found
    if not body:
        return NOT_MEASURED
    header = [
        "network; accuracy on one object, on two",
        "method",
        *(title(measure, measures) for measure in measures),
        "zero maps",
    ]
    return f"{markdown(header, body)}\n\n{about(rows).replace('photographs', f'{drawn} of each kind')}"


def _over_seeds(found, measure):
    """ "0.329"; bold and with + or - where better or worse than Grad-CAM on every network; "-" where not measured."""
    if any(measure not in row["measures"] for row in found):
        return "-"
    text = f"{sum(row['measures'][measure][0] for row in found) / len(found):.3f}"
    signs = {better(row, measure) for row in found}
    sign = signs.pop() if len(signs) == 1 else 0
    return f"**{text} {'+' if sign > 0 else '−'}**" if sign else text


TABLES = {
    "four": four_table,
    "shapes": shapes_table,
    "volumes": volumes_table,
    "faithfulness": lambda results: methods_table(results, METHODS, "confirm"),
    "candidates": candidates_table,
    "parts": lambda results: differences_table(results, ["CF-CAM", *CONTROLS]),
    "curves": curves_table,
    "variants": lambda results: methods_table(results, ["Grad-CAM", *VARIANTS], "choose"),
    "choose": lambda results: methods_table(results, METHODS, "choose"),
    "elsewhere": elsewhere_table,
    "score-cam": score_cam_table,
    "randomization": randomization_table,
    "outsiders": outsiders_table,
    "architectures": architectures_table,
}


# Plot

BOX = 7.0
"""Side of a number's box, in points."""


def tradeoff(results):
    """Faithfulness and localisation against stability on "choose", a numbered point a method; None without rows."""
    from matplotlib.figure import Figure

    groups = {"tab:gray": METHODS, "tab:blue": CANDIDATES, "tab:orange": VARIANTS}
    colours = {name: colour for colour, names in groups.items() for name in names}
    found = {name: row for name, row in _of(results, colours, "choose").items() if row}
    if "Grad-CAM" not in found:
        return None
    default, *_ = chosen(results)
    colours["Grad-CAM"] = "black"
    if default:
        colours[default] = "tab:red"
    numbers = {name: index for index, name in enumerate(found, 1)}

    figure = Figure(figsize=(11.5, max(4.2, 0.135 * len(found) + 0.6)))
    *axes, legend = figure.subplots(1, 3, width_ratios=(1, 1, 0.55))
    figure.subplots_adjust(left=0.05, right=0.99, top=0.97, bottom=0.1, wspace=0.24)
    for axis, measure in zip(axes, ("insertion_minus_deletion", "energy")):
        _scatter(axis, found, measure, colours, {"Grad-CAM", default}, numbers)
    legend.axis("off")
    legend.set(xlim=(0, 1), ylim=(len(found) + 1, 0))
    for name, index in numbers.items():
        weight = "bold" if name == default else "normal"
        style = {"fontsize": 7, "va": "center", "color": colours[name], "weight": weight}
        legend.text(0.0, index, str(index), ha="right", **style)
        legend.text(0.04, index, f"{name}: the default" if name == default else name, **style)
    return figure


def _scatter(axis, found, measure, colours, large, numbers):
    """One panel. The bars are the paired intervals of the differences from Grad-CAM, which the rule looks at."""
    fields = (choice.STABILITY, measure)
    points = {name: [choice.mean(row, field) for field in fields] for name, row in found.items()}
    points = {name: point for name, point in points.items() if not any(map(math.isnan, point))}
    limits = [_limits([point[i] for point in points.values()]) for i in (0, 1)]
    axis.set(xlim=limits[0], ylim=limits[1], xlabel=title(fields[0]), ylabel=title(measure))
    axis.axvline(points["Grad-CAM"][0], color="black", linewidth=0.5)
    axis.axhline(points["Grad-CAM"][1], color="black", linewidth=0.5)
    shown = {
        name: [min(max(value, low), high) for value, (low, high) in zip(point, limits)]
        for name, point in points.items()
    }
    to_points = lambda point: axis.transData.transform(point) * 72 / axis.figure.dpi
    offsets = _offsets({name: to_points(point) for name, point in shown.items()})
    for name, point in shown.items():
        style = {"color": colours[name], "zorder": 4 if name in large else 3}
        if point == points[name]:
            paired = [found[name].get("minus_grad_cam", {}).get(field, (0, 0, 0)) for field in fields]
            x_bar, y_bar = ([[mean - low], [high - mean]] for mean, low, high in paired)
            axis.errorbar(*point, xerr=x_bar, yerr=y_bar, linewidth=0.4, **style)
        marker = "o" if point == points[name] else "v"
        axis.plot(*point, marker, markersize=6 if name in large else 3, clip_on=False, **style)
        axis.annotate(
            str(numbers[name]),
            point,
            offsets[name],
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "shrinkA": 0, "shrinkB": 0, "color": colours[name]},
            annotation_clip=False,
            fontsize=7,
            ha="center",
            va="center",
            bbox={"boxstyle": "square,pad=0", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
            color=colours[name],
            zorder=5,
        )


def _limits(values):
    """What an axis shows: all values but those far out, which a triangle on its edge stands for."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    reach = 3 * max(high - low, 1e-3)  # Tukey's outer fences
    low, high = max(ordered[0], low - reach), min(ordered[-1], high + reach)
    margin = 0.06 * max(high - low, 1e-3)
    return low - margin, high + margin


def _offsets(anchors):
    """Where each number goes beside its point, in points: the nearest place that is free of points and numbers."""
    places = [
        (radius * math.cos(angle * math.pi / 8), radius * math.sin(angle * math.pi / 8))
        for radius in range(7, 80, 4)
        for angle in range(16)
    ]
    points, taken, offsets = list(anchors.values()), [], {}
    overlap = lambda a, b, width, height: abs(a[0] - b[0]) < width and abs(a[1] - b[1]) < height
    for name, (x, y) in anchors.items():
        for dx, dy in places:
            box = (x + dx, y + dy)
            crowded = any(overlap(box, other, 1.3 * BOX, BOX) for other in taken)
            if not crowded and not any(overlap(box, point, 0.9 * BOX, 0.7 * BOX) for point in points):
                break
        taken.append(box)
        offsets[name] = (dx, dy)
    return offsets
