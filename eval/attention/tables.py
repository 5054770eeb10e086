"""Tables of ``python -m eval.attention``, for Markdown and the page alike."""

import csv
import io

from eval.attention.measure import BASELINE
from eval.attention.train import summarise
from eval.shared.tables import NONE, short

COMPARED = (784, 3136)  # patches; time grows fourfold where it is linear
STEEP = 1.5  # times linear growth, from which on a note says what grows
SAYS = (
    "Time is that of attention itself on given queries, keys and values; the linear layers before and behind it are "
    "the same for all and left out. Forward is in evaluation mode; forward+backward in training mode, where what is "
    "random is drawn anew, with the gradients of a mechanism's own parameters. Memory is the peak beyond the inputs."
)
OVERVIEW = (
    "Forward; in brackets: times faster than softmax attention (SDPA). Own parameters are those beside qkv and proj in "
    f"a layer of {COMPARED[0]} patches."
)
ERRORS = (
    "||out - softmax|| / ||softmax|| of the outputs of attention, mean over the layers of the shipped Push-T encoder "
    "on pictures of random scenes. An output of zeros has error 1; means of few values, which are longer than "
    "softmax's and point elsewhere, have more. Its own pictures have 36 patches; larger ones show the same scenes to "
    "the same weights, position codes interpolated. What a mechanism would learn beside qkv and proj is at its start; "
    "± is the deviation over five seeds of what is random."
)


class Results:
    """Rows of results.json by what they are of; ``small`` and ``large`` are the numbers of patches to compare."""

    def __init__(self, results):
        self.all, self.settings = results, results["settings"]
        self.names = list(results["mechanisms"])
        self.rows = {(row["mechanism"], row["direction"], row["patches"]): row for row in results["rows"]}
        self.errors = {(row["mechanism"], row["patches"]): row for row in results["errors"]}
        self.error_patches = sorted({row["patches"] for row in results["errors"]})
        patches = self.settings["patches"]
        self.small, self.large = COMPARED if set(COMPARED) <= set(patches) else (patches[0], patches[-1])

    def row(self, name, patches, direction="forward"):
        return self.rows[name, direction, patches]

    def growth(self, name):
        """Time at ``large`` over time at ``small``, or None."""
        small, large = self.row(name, self.small)["ms"], self.row(name, self.large)["ms"]
        return large / small if small and large else None


def tables(results):
    """[(title, text, rows of text, the first one the head)]."""
    found = Results(results)
    parts = [("Overview", OVERVIEW, _overview(found))]
    for direction in found.settings["directions"]:
        cells = {"": _time, ", times faster than softmax": _speedup, ", peak memory in MB": _memory}
        for what, cell in cells.items():
            text = "ms of a call: median [quartiles]. " + SAYS if cell is _time else ""
            parts.append((direction.capitalize() + what, text, _by_patches(found, direction, cell)))
    parts.append(
        (
            "GFLOP of a forward call",
            "Of matrix products, as torch counts them; a multiply-add is 2.",
            _by_patches(found, "forward", _gflop),
        )
    )
    parts.append(("Error to softmax attention", ERRORS, _error_table(found)))
    if results["training"]:
        text = "Image benchmark from scratch; 95 % intervals: of a run Wilson's, of several seeds Student's t."
        parts.append(("Trained", text, _training_table(results["training"])))
    return parts


def notes(results):
    """{mechanism: [facts that its numbers need]}."""
    found = Results(results)
    facts = {name: [] for name in found.names}
    for name in found.names:
        row, base = found.row(name, found.large), found.row(BASELINE, found.large)
        if row["ratio"] and row["ratio"] < 1:
            work = f"{row['flops'] / base['flops']:.2g} times its FLOPs at {_rate(row)} GFLOP/s against {_rate(base)}"
            memory = f", {short(row['memory_mb'])} MB against {short(base['memory_mb'])}" if row["memory_mb"] else ""
            facts[name].append(f"slower than softmax at {found.large} patches: {work}{memory}")
        growth, more = found.growth(name), found.large / found.small
        if growth and growth > STEEP * more:
            small = found.row(name, found.small)
            memory = f", memory {row['memory_mb'] / small['memory_mb']:.0f}-fold" if row["memory_mb"] else ""
            work = f"FLOPs {row['flops'] / small['flops']:.0f}-fold{memory}"
            facts[name].append(f"{more:.0f} times the patches take {growth:.0f} times as long: {work}")
        error = found.errors[name, found.error_patches[-1]]
        if error["causal"]:
            facts[name].append("always causal: its error is that to causal softmax attention")
    return {name: of_one for name, of_one in facts.items() if of_one}


def _rate(row):
    return f"{row['flops'] / row['ms'] / 1e6:.0f}"


def _overview(found):
    large, small, patches = found.large, found.small, found.error_patches[-1]
    head = ["mechanism", "own parameters", f"GFLOP, N={small}", f"ms, N={small}", f"ms, N={large}"]
    head += [f"ms {large} / ms {small}", f"MB, N={large}", f"error, N={patches}"]
    rows = [head]
    for name in found.names:
        at_small, at_large, growth = found.row(name, small), found.row(name, large), found.growth(name)
        cells = [f"{found.all['mechanisms'][name]['own_parameters']:,}", _gflop(at_small)]
        cells += [
            f"{short(row['ms'])} ({_speedup(row)})" if row["ms"] else row["skipped"] for row in (at_small, at_large)
        ]
        cells += [f"{growth:.1f}" if growth else NONE, _memory(at_large), _error(found.errors[name, patches])]
        rows.append([name, *cells])
    return rows


def _by_patches(found, direction, cell):
    patches = found.settings["patches"]
    head = ["mechanism", *(f"N={count}" for count in patches)]
    return [head, *([name, *(cell(found.row(name, count, direction)) for count in patches)] for name in found.names)]


def _time(row):
    if row["skipped"]:
        return row["skipped"]
    low, high = row["quartiles_ms"]
    return f"{short(row['ms'])} [{short(low)}, {short(high)}]"


def _speedup(row):
    return NONE if row["ratio"] is None else f"{row['ratio']:.2f}x"


def _memory(row):
    return NONE if row["memory_mb"] is None else short(row["memory_mb"])


def _gflop(row):
    return short(row["flops"] / 1e9)


def _error(row):
    return f"{row['error']:.3f}" + (f" ± {row['std']:.3f}" if row["std"] else "")


def _error_table(found):
    head = [
        "mechanism",
        *(f"N={patches}" for patches in found.error_patches),
        f"layer by layer, N={found.error_patches[-1]}",
        "own parameters",
    ]
    rows = [head]
    for name in found.names:
        own = [found.errors[name, patches] for patches in found.error_patches]
        layers = " ".join(f"{value:.2f}" for value in own[-1]["layers"])
        rows.append([name, *map(_error, own), layers, "at their start" if own[-1]["trainable"] else "none"])
    return rows


def _training_table(rows):
    table = [["mechanism", "seeds", "top-1, mean", "95 % interval", "each seed", "minutes"]]
    for name, summary in summarise(rows).items():
        each = [f"{row['top1']:.1%} {_percent(row['top1_ci95'])}" for row in rows if row["mechanism"] == name]
        cells = [str(summary["seeds"]), f"{summary['top1']:.1%}", _percent(summary["interval"]), "; ".join(each)]
        table.append([name, *cells, f"{summary['minutes']:.1f}"])
    return table


def _percent(interval):
    return "[{:.1%}, {:.1%}]".format(*interval)


# Files ---------------------------------------------------------------------------------------------------------------


def describe_settings(results):
    """One line: where and on what sizes was measured."""
    machine, settings = results["machine"], results["settings"]
    where = f"{machine['name']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, float32"
    sizes = f"{settings['heads']} heads of width {settings['dim'] // settings['heads']}, batch {settings['batch']}"
    clock = "Processor time, waiting for a core not counted" if settings["own_time"] else "Time on the clock"
    return f"{where}, commit {machine['commit'] or 'unknown'}. {sizes}, one class token and N patches. {clock}."


def csv_text(results):
    """results.csv: a line for each mechanism, direction and number of patches."""
    found, file = Results(results), io.StringIO()
    kept = ("mechanism", "direction", "patches", "batch", "flops", "ms")
    more = ("ratio", "repeats", "memory_mb", "skipped")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*kept, "first_quartile_ms", "third_quartile_ms", *more, "parameters", "own_parameters", "error"])
    for row in results["rows"]:
        name = row["mechanism"]
        module, error = results["mechanisms"][name], found.errors.get((name, row["patches"]))
        cells = [*(row[key] for key in kept), *row["quartiles_ms"], *(row[key] for key in more)]
        writer.writerow([*cells, module["parameters"], module["own_parameters"], error and error["error"]])
    return file.getvalue()
