"""Speed and memory of loading demonstrations beside torch's DataLoader over float32 arrays; eval.speed load."""

import itertools
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.shared.compose import compose, locate_data
from eval.shared.machine import check_choices, check_positive, peak_memory, resident_memory
from eval.shared.tables import show
from eval.speed.reference import PlainDataset
from policy.build import datasets_of
from policy.dataset import epoch_order
from policy.dataset.features import place_buffer
from policy.training.batches import to_tensors

STORAGES = ("ram", "mmap", "device")
PUBLISHED_WORKERS = 4


def add_options(parser):
    parser.add_argument("--task", default="pusht", help="a folder of config/, default pusht")
    parser.add_argument("--data", help="as task.data: a name or the path of a zarr; default that of the task")
    parser.add_argument("--storage", nargs="+", default=["ram", "mmap"], help=f"of ours: {', '.join(STORAGES)}")
    parser.add_argument("--batch", type=int, default=64, help="windows a batch, default 64")
    workers = f"processes of the DataLoader, default {PUBLISHED_WORKERS} as published"
    parser.add_argument("--workers", type=int, default=PUBLISHED_WORKERS, help=workers)


def run(args):
    """(name, title, what, settings, rows, table) of what the options ask for."""
    for storage in args.storage:
        check_choices(storage=(storage, STORAGES))
    if "device" in args.storage and args.device != "cuda":
        raise ValueError("--storage: got 'device' without a GPU, allowed here: ram, mmap")
    check_positive(batch=args.batch, seconds=args.seconds)
    if args.workers < 0:
        raise ValueError(f"--workers: got {args.workers}, allowed: >= 0")
    config = compose(args.task, ["preset=paper", *args.overrides])
    config["task"]["data"] = args.data or config["task"]["data"]
    path = locate_data(config["task"], config["cache_dir"])
    settings = {"batch": args.batch, "seconds": args.seconds, "workers": args.workers, "device": args.device}
    rows = measure_load(config, path, storages=args.storage, threads=torch.get_num_threads(), **settings)
    what = f"{path.name}, batches of {args.batch} windows, a process each"
    return "load", "Speed of loading", what, {**settings, "data": str(path)}, rows, cells(rows)


# In a process of its own ---------------------------------------------------------------------------------------------


def plain_batches(config, path, orders, *, workers, device):
    """Endless batches of all T frames as float32, from ``workers`` processes."""
    model, data = config["model"], config["data"]
    sizes = {"horizon": model["horizon"], "obs_steps": model["obs_steps"], "pad_after": data["pad_after"]}
    dataset = PlainDataset.open(path, config["task"]["shape_meta"], **sizes)
    loader = DataLoader(
        dataset,
        batch_sampler=orders(len(dataset)),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # Linux's own way; a spawned parent's children would copy
        pin_memory=device == "cuda",
    )
    for batch in loader:
        yield to_tensors(batch, device)


def our_batches(config, path, orders, *, storage, cache_dir, device):
    """Endless batches as the trainer asks for them, in this process."""
    dataset, _ = datasets_of({**config, "storage": storage, "cache_dir": cache_dir}, path)
    place_buffer(dataset.buffer, storage, device)
    for indices in orders(len(dataset)):
        yield to_tensors(dataset.batch(indices), device)


def load_once(method, config, path, *, batch, seconds, workers, device, threads, cache_dir, launched):
    """A row of load.json, measured in a fresh process that was ``launched`` at that time.time()."""
    imports = time.time() - launched
    torch.set_num_threads(threads)

    def orders(count):
        """Endless batches of shuffled window numbers."""
        for epoch in itertools.count():
            order = epoch_order(count, seed=config["seed"], epoch=epoch)
            yield from np.array_split(order[: len(order) // batch * batch or None], max(len(order) // batch, 1))

    def measure():
        start = time.perf_counter()
        options = {"workers": workers} if method == "plain" else {"storage": method, "cache_dir": cache_dir}
        batches = (plain_batches if method == "plain" else our_batches)(config, path, orders, device=device, **options)
        first = finished(next(batches))
        row["first_s"] = time.perf_counter() - start
        row["kb_per_sample"] = nbytes(first) / len(first["action"]) / 1e3
        start, samples = time.perf_counter(), 0
        while not samples or time.perf_counter() - start < seconds:
            samples += len(finished(next(batches))["action"])
        row["samples_per_s"] = samples / (time.perf_counter() - start)
        row["resident_mb"] = megabytes(resident_memory(), before)

    before = resident_memory()
    row = {"method": method, "imports_s": imports}
    row["peak_mb"] = megabytes(peak_memory(measure, "cpu"), 0)
    return row


def finished(batch):
    """``batch`` once it lies on its device."""
    if batch["action"].is_cuda:
        torch.cuda.synchronize()
    return batch


def nbytes(batch):
    """Bytes of all tensors in nested dictionaries."""
    return sum(map(nbytes, batch.values())) if isinstance(batch, dict) else batch.nbytes


def megabytes(value, before):
    return None if value is None or before is None else (value - before) / 1e6


# Measurement ---------------------------------------------------------------------------------------------------------


def measure_load(config, path, *, storages, **settings):
    """A dictionary per method, as in load.json: plain, then ours in each of ``storages``, "mmap" twice.

    first_s: from the opening of the data set to the first batch, without imports_s; kb_per_sample: handed to the
    model; resident_mb and peak_mb: beyond what the imports hold, of all processes and of the first one.
    """
    for file in Path(path).rglob("*"):  # the first method must not pay for the disk
        if file.is_file():
            file.read_bytes()
    runs = [("plain", "plain")]
    for storage in storages:
        runs += [("mmap", "mmap, first time"), ("mmap", "mmap, again")] if storage == "mmap" else [(storage, storage)]
    rows = []
    with tempfile.TemporaryDirectory() as cache_dir:
        for method, name in tqdm(runs, desc="loading", unit="process", leave=False, dynamic_ncols=True):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                options = {**settings, "cache_dir": cache_dir, "launched": time.time()}
                row = process.submit(load_once, method, config, path, **options).result()
            rows.append({**row, "method": name if method == "plain" else f"ours, {name}"})
    for row in rows:
        row["ratio"] = row["samples_per_s"] / rows[0]["samples_per_s"]
    return rows


def cells(rows):
    """Cells of the Markdown table, a row a method."""
    keys = {
        "first_s": ("first batch, s", ",.2f"),
        "imports_s": ("imports, s", ",.1f"),
        "samples_per_s": ("samples/s", ",.0f"),
        "ratio": ("times faster", ",.2f"),
        "kb_per_sample": ("kB a sample", ",.1f"),
        "resident_mb": ("resident, MB", ",.0f"),
        "peak_mb": ("peak, MB", ",.0f"),
    }
    head = ["method", *(title for title, _ in keys.values())]
    return [head, *([row["method"], *(show(row[key], form) for key, (_, form) in keys.items())] for row in rows)]
