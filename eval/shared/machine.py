"""The machine of a measurement: what it is, and time, memory and bandwidth measured on it."""

import ctypes
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
SLOW = 0.5  # s; a call beyond it is repeated SLOW_REPEATS times only
SLOW_REPEATS = 3
MIN_ROUNDS, MAX_ROUNDS = 5, 200
MAX_BURST = 10  # consecutive calls of one function


def choose_device(name):
    """The device meant by "auto", "cpu" or "cuda"; raises ValueError for another, or CUDA where torch sees none."""
    available = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, allowed: auto, cpu, cuda")
    if name == "cuda" and not available:
        raise ValueError("--device: got 'cuda', but torch sees no CUDA device; allowed here: auto, cpu")
    return ("cuda" if available else "cpu") if name == "auto" else name


def check_choices(**options):
    """Raise ValueError unless each {option: (value, allowed)} has an allowed value."""
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise ValueError(f"--{name.replace('_', '-')}: got {value!r}, allowed: {', '.join(allowed)}")


def check_positive(**options):
    """Raise ValueError unless each {option: number} is positive or None."""
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, allowed: > 0")


def describe_machine(device):
    """{"device", "name", "cores", "threads", "memory_gb", "python", "torch", "cuda", "commit"} of this run."""
    if device == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        name, memory = _cpu_name(), _meminfo("MemTotal")
    return {
        "device": device,
        "name": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit():
    """Short hash of the checkout that runs, with "+changes" where it differs from that commit; None without git."""

    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "--short", "HEAD").strip()
        return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _proc_bytes(path, key):
    """The field ``key`` of a /proc file in bytes, or None where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")]
    return values[0] if values else None


def _meminfo(key):
    return _proc_bytes("/proc/meminfo", key)


def free_memory(device):
    """Bytes that a program can still allocate, or None where that is not known."""
    if device == "cuda":
        torch.cuda.empty_cache()  # torch keeps freed blocks
        return torch.cuda.mem_get_info()[0]
    return _meminfo("MemAvailable")


# Time ----------------------------------------------------------------------------------------------------------------


def timed(call, device):
    """Seconds of one ``call``, until the device has finished."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved_times(calls, *, seconds, device, clock=None):
    """{name: [seconds of each call]} of the warmed-up ``calls`` {name: function}, about ``seconds`` in all.

    clock(call, device): seconds of one call, default ``timed``.

    In every round each of them has a turn, in an order drawn anew, so that a drift of the machine hits all alike. A
    turn is a burst of calls whose first one, which pays for what the others left in the caches, does not count; slow
    calls have neither bursts nor a turn in every round.
    """
    clock = clock or timed
    estimates = {name: clock(call, device) for name, call in calls.items()}
    turn = seconds / MIN_ROUNDS / len(calls) if calls else 0
    bursts = {name: min(max(int(turn / estimate), 1), MAX_BURST) for name, estimate in estimates.items()}
    slow = [name for name, estimate in estimates.items() if estimate > SLOW]
    fast = sum(estimates[name] * bursts[name] for name in calls if name not in slow)
    left = seconds - SLOW_REPEATS * sum(estimates[name] for name in slow)
    rounds = min(max(int(left / fast), MIN_ROUNDS), MAX_ROUNDS) if fast else SLOW_REPEATS
    turns = {name: SLOW_REPEATS if name in slow else rounds for name in calls}
    times = {name: [] for name in calls}
    order, generator = list(calls), random.Random(0)
    for number in range(rounds):
        generator.shuffle(order)
        for name in order:
            if (number + 1) * turns[name] // rounds > number * turns[name] // rounds:  # spread over the rounds
                burst = [clock(calls[name], device) for _ in range(bursts[name])]
                times[name] += burst[1:] or burst
    return times


def fix_allocation():
    """Fix glibc's two thresholds, which follow what was freed before, where they end; elsewhere nothing happens.

    Else a call of 3 ms may take 8, because its memory went back to the system and is faulted in again, page by page;
    which call depends on the sizes before it. Arrays beyond 32 MiB keep going back, as they always do.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, -1)


# Limits --------------------------------------------------------------------------------------------------------------


def copy_bandwidth(device):
    """Bytes a second of copying a large float32 tensor, read and written bytes together, the best of several runs."""
    source = torch.ones(2**28 if device == "cuda" else 2**25, device=device)  # 1 GiB, 128 MiB: beyond all caches
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def read_bandwidth(device):
    """Bytes a second of reading a float32 tensor of 1 GiB with all threads, the best of several runs."""
    source = torch.ones(2**28, device=device)
    return source.nbytes / _fastest(source.sum, device)


def multiply_rate(device, dtype):
    """Floating-point operations a second of multiplying square matrices of torch's ``dtype``, the best of runs."""
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: left @ right, device)


def _fastest(call, device):
    call()
    return min(timed(call, device) for _ in range(10))


# Memory --------------------------------------------------------------------------------------------------------------


def peak_memory(call, device):
    """Largest number of bytes that ``call`` (run once before) holds beyond what was there, or None if not measurable.

    On a CPU the kernel's high-water mark of resident memory, reset before, so that memory of numpy and numba counts
    like torch's; exact to about half a MB.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # glibc keeps freed memory, and a call that reuses it would look as if it needed none.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _proc_bytes("/proc/self/status", "VmRSS")
    mark = _proc_bytes("/proc/self/status", "VmHWM")
    if before is None or mark is None or mark - before > 2**20:  # a kernel that ignores the reset
        return None
    call()
    return max(_proc_bytes("/proc/self/status", "VmHWM") - before, 0)


def resident_memory():
    """Bytes that this process and its children hold, shared pages counted once; None where the kernel does not tell."""
    own = Path("/proc/self/task").glob("*/children")
    try:
        children = [pid for path in own for pid in path.read_text().split()]
    except OSError:
        return None
    sizes = [_proc_bytes(f"/proc/{pid}/smaps_rollup", "Pss") for pid in ("self", *children)]
    return None if sizes[0] is None else sum(size or 0 for size in sizes)


def compare(calls, notes, *, baseline, seconds, device):
    """Measure ``calls`` {name: function} side by side, in about ``seconds`` after warm-up.

    notes: {name: why it is left out}. Yields a row each, {"method", "ms" (median), "ratio" (times faster than
    ``baseline``), "repeats", "memory_mb" (beyond what was there before), "note"}, with None for what is not known.
    """
    running = {}
    for name, call in calls.items():
        try:
            call()  # compiles and warms up
            running[name] = call
        except RuntimeError as error:  # out of memory, or a kernel that this machine cannot run: the others go on
            notes = {**notes, name: f"failed: {' '.join(str(error).split())[:200]}"}
    times = interleaved_times(running, seconds=seconds, device=device)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    for name, call in running.items():
        memory = peak_memory(call, device)
        yield {
            "method": name,
            "ms": medians[name],
            "ratio": medians[baseline] / medians[name] if baseline in medians else None,
            "repeats": len(times[name]),
            "memory_mb": None if memory is None else memory / 1e6,
            "note": None,
        }
    for name, note in notes.items():
        yield {"method": name, "ms": None, "ratio": None, "repeats": 0, "memory_mb": None, "note": note}
