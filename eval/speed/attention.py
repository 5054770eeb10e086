"""Speed of Fibottention beside dense attention and other ways to compute it; ``python -m eval.speed attention``."""

import functools

import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval.shared.machine import compare, free_memory
from eval.shared.pages import Section, markdown_page
from eval.shared.plots import mark_sizes, name_line_ends
from eval.shared.tables import NONE, short
from policy.attention import fibottention, fibottention_mask, wythoff_offsets
from policy.attention.fibottention import diagonal_table, pattern_density
from policy.training.pictures import BLACK, BLUE, GREEN, PINK, RED, SKY, new_figure, save_png

DIRECTIONS = ("forward", "forward+backward")
OURS = {"fibottention zero": "zero", "fibottention exclude": "exclude"}  # method: masked_score
MASKED = ("dense+mask", "published")  # methods with a mask of all pairs
# Passes over a (B, H, T, D) tensor that nobody can avoid: q, k, v and the output; backward q, k, v, the output and its
# gradient are read and three gradients written.
NECESSARY = {"forward": 4, "forward+backward": 12}
# (B, H, T, T) tensors alive at once in the published formula, its mask included: measured and rounded up.
PAIR_TENSORS = {"forward": 5, "forward+backward": 6}
CHECKED = 1568  # patches up to which the results are compared with a float64 reference
COLOURS = {
    "dense": BLACK,
    "dense+mask": SKY,
    "published": PINK,
    "flex": BLUE,
    "fibottention zero": RED,
    "fibottention exclude": GREEN,
}


# Methods -------------------------------------------------------------------------------------------------------------


def attention_methods(offsets, num_patches, *, backend, device, dtype, batch=1, masked=True):
    """{method: function (q, k, v) -> output}, all of (B, H, 1+N, D); masks are made here, outside of any timing.

    masked: whether the methods that form all pairs, MASKED, are wanted.
    """
    methods = {"dense": F.scaled_dot_product_attention}
    if masked:
        # With a batch axis: torch's fused kernels take no mask of three axes, and the slow path steps in silently.
        allowed = fibottention_mask(offsets, num_patches)[None].to(device)  # (1, H, 1+N, 1+N)
        factor = allowed.to(dtype).repeat(batch, 1, 1, 1)  # theirs has a copy for each image, kept between calls

        def published(q, k, v):
            """Every pair times a dense mask, as in the authors' code (robot_learning/.../vision_transformer.py)."""
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            return (scores * factor).softmax(dim=-1) @ v

        methods["dense+mask"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        methods["published"] = published
    if device == "cuda":
        methods["flex"] = flex_method(offsets, num_patches, device)
    table = diagonal_table(offsets, num_patches).to(device)
    for method, rule in OURS.items():
        options = {"masked_score": rule, "backend": backend, "table": table}
        methods[method] = functools.partial(fibottention, offsets=offsets, **options)
    return methods


def flex_method(offsets, num_patches, device):
    """torch's compiled FlexAttention (arXiv 2412.05496) on the same pattern, rule "exclude"."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size = 1 + num_patches
    wanted = torch.zeros(len(offsets), size, dtype=torch.bool, device=device)  # by distance
    for head, head_offsets in enumerate(offsets):
        wanted[head, [offset for offset in head_offsets if offset < size]] = True

    def attended(batch, head, query, key):
        return (query == 0) | (key == 0) | wanted[head, (query - key).abs()]

    block_mask = create_block_mask(attended, None, len(offsets), size, size, device=device)
    torch.compiler.reset()  # a compiled function refuses a ninth shape
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def forward(method, q, k, v, d_out):
    with torch.no_grad():
        return method(q, k, v)


def forward_backward(method, q, k, v, d_out):
    """Gradients of q, k and v."""
    return torch.autograd.grad(method(q, k, v), (q, k, v), d_out)


def reference_errors(method, rule, offsets, q, k, v, d_out):
    """{direction: largest difference} of output and gradients of ``method`` from a plain float64 formula."""
    out, gradients = forward(method, q, k, v, d_out), forward_backward(method, q, k, v, d_out)
    errors = dict.fromkeys(DIRECTIONS, 0.0)
    for head in range(len(offsets)):  # one at a time, which needs H times less memory
        allowed = fibottention_mask(offsets[head : head + 1], q.shape[2] - 1)[0].to(q.device)
        q1, k1, v1 = (x[:, head].detach().double().requires_grad_() for x in (q, k, v))
        scores = q1 @ k1.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = torch.where(allowed, scores, 0.0 if rule == "zero" else -torch.inf)
        expected = scores.softmax(dim=-1) @ v1
        expected_gradients = torch.autograd.grad(expected, (q1, k1, v1), d_out[:, head].double())
        pairs = [(out, expected), *zip(gradients, expected_gradients, strict=True)]
        worst = [(got[:, head] - wanted).abs().max().item() for got, wanted in pairs]
        errors["forward"] = max(errors["forward"], worst[0])
        errors["forward+backward"] = max(errors["forward+backward"], *worst[1:])
    return errors


# Measurement ---------------------------------------------------------------------------------------------------------


def measure_attention(
    *, patches, tokens, heads, head_dim, variant, backend, device, dtype, seconds, bandwidth, check=True
):
    """A dictionary per patch count, direction and method, as in attention.json.

    dtype: torch's; bandwidth: bytes a second that the machine can copy; seconds: time of one patch count and direction.
    """
    rows = []
    all_pairs = (*MASKED, *(OURS if backend == "dense" else ()))
    with tqdm(total=len(patches) * len(DIRECTIONS), unit="size", leave=False, dynamic_ncols=True) as bar:
        for num_patches in patches:
            batch = max(1, round(tokens / num_patches))
            offsets = wythoff_offsets(num_patches, heads, variant=variant)
            generator = torch.Generator().manual_seed(0)
            shape = (batch, heads, 1 + num_patches, head_dim)
            q, k, v, d_out = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
            inputs = (*(x.requires_grad_() for x in (q, k, v)), d_out)
            size = {"patches": num_patches, "batch": batch, "density": pattern_density(offsets, num_patches)}
            pairs = heads * (1 + num_patches) ** 2 * dtype.itemsize
            skipped = {direction: _too_large(batch * pairs, device, direction) for direction in DIRECTIONS}
            methods = attention_methods(
                offsets,
                num_patches,
                backend=backend,
                device=device,
                dtype=dtype,
                batch=batch,
                masked=not skipped["forward"],
            )
            errors = {}
            if check and num_patches <= CHECKED:
                errors = {m: reference_errors(methods[m], OURS[m], offsets, *inputs) for m in OURS}
            for direction, run in zip(DIRECTIONS, (forward, forward_backward), strict=True):
                bar.set_description(f"{num_patches} patches, {direction}")
                notes = dict.fromkeys(all_pairs, skipped[direction]) if skipped[direction] else {}
                calls = {
                    method: lambda function=function, run=run, inputs=inputs: run(function, *inputs)
                    for method, function in methods.items()
                    if method not in notes
                }
                necessary = NECESSARY[direction] * q.nbytes
                for row in compare(calls, notes, baseline="dense", seconds=seconds, device=device):
                    row = {**size, "direction": direction, **row}
                    if row["method"] in OURS and row["ms"]:
                        speed = necessary / row["ms"] * 1e3
                        row |= {"gb_per_s": speed / 1e9, "share_of_copy": speed / bandwidth}
                    if row["method"] in errors:
                        row["max_error"] = errors[row["method"]][direction]
                    rows.append(row)
                bar.update()
    return rows


def _too_large(nbytes, device, direction):
    """Why methods that hold several tensors of ``nbytes`` for all pairs are left out, or None where they fit."""
    needed, free = PAIR_TENSORS[direction] * nbytes, free_memory(device)
    if free is None or needed < 0.8 * free:
        return None
    return f"skipped: needs about {needed / 1e9:.1f} GB for all pairs, {free / 1e9:.1f} GB are free"


# Results -------------------------------------------------------------------------------------------------------------


def markdown(results):
    """The tables of ``results`` as in attention.json."""
    rows, machine, settings = results["rows"], results["machine"], results["settings"]
    methods = [method for method in COLOURS if any(row["method"] == method for row in rows)]
    intro = (
        f"{machine['name']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, "
        f"{settings['dtype']}, commit {machine['commit'] or 'unknown'}. {settings['heads']} heads of width "
        f"{settings['head_dim']}, variant {settings['variant']}, backend {settings['backend']}. Copying memory: "
        f"{results['copy_gb_per_s']:.1f} GB/s, read and written."
    )
    sections = []
    for direction in DIRECTIONS:
        at = {(row["patches"], row["method"]): row for row in rows if row["direction"] == direction}
        sizes = dict.fromkeys((str(row["patches"]), str(row["batch"]), f"{row['density']:.2%}") for row in at.values())
        cells = (_time_cell, "ms of a batch (times faster than dense)"), (_memory_cell, "peak MB beyond the inputs")
        for cell, text in cells:
            table = [["patches", "batch", "density", *methods]]
            table += [[*size, *(cell(at.get((int(size[0]), method))) for method in methods)] for size in sizes]
            sections.append(Section(f"{direction}: {text}", rows=table))
    ours = [["patches", "method", "direction", "GB/s", "of copying", "largest error"]]
    for row in rows:
        if "gb_per_s" in row:
            error = f"{row['max_error']:.1e}" if "max_error" in row else "not checked"
            cells = [f"{row['gb_per_s']:.3g}", f"{row['share_of_copy']:.1%}", error]
            ours.append([str(row["patches"]), row["method"], row["direction"], *cells])
    text = "Bytes that must be read and written once, over the time; above 100 % the caches hold them."
    notes = [f"{r['patches']} patches, {r['direction']}, {r['method']}: {r['note']}" for r in rows if r["note"]]
    sections.append(Section("Distance to the limit", text, ours, notes))
    return markdown_page("Speed of attention", sections, intro=[intro], command=results["command"])


def _time_cell(row):
    if row is None or row["ms"] is None:
        return NONE
    ratio = f" ({_ratio(row)})" if row["ratio"] and row["method"] != "dense" else ""
    return f"{short(row['ms'])}{ratio}"


def _memory_cell(row):
    return short(row and row["memory_mb"])


def _ratio(row):
    return f"{row['ratio']:.{2 if row['ratio'] < 10 else 1}f}x"


def plot(results, path):
    """Write a picture of ms against patches: a panel a direction, a line a method, named at its end."""
    rows = [row for row in results["rows"] if row["ms"]]
    figure = new_figure(13, 5.6)
    machine, settings = results["machine"], results["settings"]
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}" if machine["device"] == "cpu" else ""
    figure.suptitle(
        f"One batch of about {settings['tokens']:,} patch tokens; in bold: how many times faster than dense\n"
        f"{machine['name']}{threads}, {settings['dtype']}, {settings['heads']} heads of width {settings['head_dim']}, "
        f"variant {settings['variant']}, backend {settings['backend']}",
        fontsize=11,
    )
    panels = figure.subplots(1, 2, sharey=True)
    for axes, direction in zip(panels, DIRECTIONS, strict=True):
        mark_sizes(axes, settings["patches"], "patches N")
        axes.set_title(direction)
        for method, colour in COLOURS.items():
            line = [row for row in rows if row["direction"] == direction and row["method"] == method]
            points = [row["patches"] for row in line], [row["ms"] for row in line]
            dash, width = "--" if "exclude" in method else "-", 2.4 if method in OURS else 1.4  # two of ours coincide
            axes.plot(*points, marker="o", color=colour, linestyle=dash, linewidth=width, markersize=4)
    for axes, direction in zip(panels, DIRECTIONS, strict=True):  # once both have the limits of their common axis
        last = {row["method"]: row for row in rows if row["direction"] == direction}
        styles = {}
        for method, row in last.items():
            bold = method in OURS and row["ratio"]
            styles[method] = {"color": COLOURS[method], "fontweight": "bold" if bold else "normal"}
            styles[method] |= {"text": f"{method}  {_ratio(row)}"} if bold else {}
        name_line_ends(axes, {method: (row["patches"], row["ms"]) for method, row in last.items()}, styles)
    save_png(figure, path)
