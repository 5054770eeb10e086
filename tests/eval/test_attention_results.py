"""Tables, notes and files of the attention benchmark say what was measured."""

import csv

from eval.attention.page import pages
from eval.attention.plots import line_styles
from eval.attention.tables import Results, csv_text, notes, tables

ROW = {"direction": "forward", "batch": 1, "repeats": 3, "skipped": None}
ERROR = {"std": 0.0, "layers": [0.5, 0.7], "causal": False, "trainable": False}
TRAINED = {"top1_ci95": [0.5, 0.9], "chance": 0.5, "test_samples": 10, "parameters": 3, "minutes": 1.5}


def results():
    """Two mechanisms at the sizes that are compared; one grows linearly, but is slow and skipped at the last size."""
    numbers = {("softmax", 784): (10.0, 1e9), ("softmax", 3136): (150.0, 16e9), ("softmax", 6272): (600.0, 64e9)}
    numbers |= {("slow", 784): (50.0, 2e9), ("slow", 3136): (200.0, 8e9)}
    rows = [
        {
            "mechanism": name,
            "patches": n,
            "flops": flops,
            "ms": ms,
            "quartiles_ms": [ms - 1, ms + 2],
            "memory_mb": ms,
            **ROW,
        }
        for (name, n), (ms, flops) in numbers.items()
    ]
    for row in rows:
        row["ratio"] = numbers["softmax", row["patches"]][0] / row["ms"]
    nothing = {"ms": None, "quartiles_ms": [None, None], "memory_mb": None, "ratio": None}
    rows.append({"mechanism": "slow", "patches": 6272, "flops": 16e9, **nothing, **ROW, "skipped": "skipped (> 1 s)"})
    machine = {"name": "A <CPU>", "threads": 1, "cores": 2, "torch": "2", "commit": None}
    settings = {
        "patches": [784, 3136, 6272],
        "directions": ["forward"],
        "dim": 8,
        "heads": 2,
        "batch": 1,
        "own_time": True,
    }
    errors = [
        {"mechanism": name, "patches": n, "error": n / 1000, **ERROR} for name in ("softmax", "slow") for n in (36, 784)
    ]
    errors[-1] |= {"std": 0.01, "causal": True, "trainable": True}
    module = {"options": {"name": "x", "rank": 4}, "class": "X", "parameters": 30, "own_parameters": 1234}
    return {
        "command": "python -m eval.attention",
        "machine": machine,
        "settings": settings,
        "mechanisms": {"softmax": module, "slow": module},
        "rows": rows,
        "errors": errors,
        "training": [{"mechanism": "slow", "seed": 42, "top1": 0.75, **TRAINED}],
    }


def test_overview_compares_two_sizes():
    overview = tables(results())[0][2]
    assert overview[0][3:] == ["ms, N=784", "ms, N=3136", "ms 3136 / ms 784", "MB, N=3136", "error, N=784"]
    assert overview[2] == ["slow", "1,234", "2", "50 (0.20x)", "200 (0.75x)", "4.0", "200", "0.784 ± 0.010"]
    assert Results(results()).growth("softmax") == 15
    found = results()
    found["settings"]["patches"] = [784, 6272]
    assert (Results(found).small, Results(found).large, Results(found).growth("slow")) == (784, 6272, None)


def test_tables_have_all_sizes_and_say_what_was_skipped():
    parts = {title: rows for title, _, rows in tables(results())}
    assert parts["Forward"][2] == ["slow", "50 [49, 52]", "200 [199, 202]", "skipped (> 1 s)"]
    assert parts["Forward, times faster than softmax"][2] == ["slow", "0.20x", "0.75x", "–"]
    assert parts["Forward, peak memory in MB"][1] == ["softmax", "10", "150", "600"]
    assert parts["GFLOP of a forward call"][2] == ["slow", "2", "8", "16"]
    assert parts["Error to softmax attention"][2][1:] == ["0.036", "0.784 ± 0.010", "0.50 0.70", "at their start"]
    assert parts["Trained"][1] == ["slow", "1", "75.0%", "[50.0%, 90.0%]", "75.0% [50.0%, 90.0%]", "1.5"]


def test_notes_say_why_a_mechanism_is_slower():
    facts = notes(results())
    assert facts["softmax"] == ["4 times the patches take 15 times as long: FLOPs 16-fold, memory 15-fold"]
    assert facts["slow"][0] == (
        "slower than softmax at 3136 patches: 0.5 times its FLOPs at 40 GFLOP/s against 107, 200 MB against 150"
    )
    assert facts["slow"][1] == "always causal: its error is that to causal softmax attention"


def test_csv_has_a_line_for_each_measurement():
    lines = list(csv.DictReader(csv_text(results()).splitlines()))
    assert len(lines) == 6 and lines[3]["mechanism"] == "slow" and float(lines[3]["third_quartile_ms"]) == 52
    assert lines[3]["error"] == "0.784" and lines[4]["error"] == "" and lines[5]["skipped"] == "skipped (> 1 s)"


def test_the_page_is_whole_and_escaped():
    page, text = pages(results(), {"latency.png": b"png"})
    assert "<title>Attention mechanisms side by side</title>" in page and "A &lt;CPU&gt;" in page
    assert "data:image/png;base64,cG5n" in page and "http" not in page and "src='data:" in page
    assert all(f"<h2>{title}</h2>" in page for title, _, _ in tables(results())) and "rank 4" in page
    assert "slower than softmax" in page and "slower than softmax" in text


def test_lines_of_a_picture_can_be_told_apart():
    """Colours are those of groups, also of a mechanism that none of them knows."""
    names = ["softmax", "local", "new", "new", *["local"] * 9]
    styles = line_styles({str(place): {"options": {"name": name}} for place, name in enumerate(names)})
    assert len({tuple(style.values()) for style in styles.values()}) == len(names)
    colours = [style["color"] for style in styles.values()]
    assert colours[1] == colours[4] and colours[2] == colours[3] and len(set(colours)) == 3
