"""Attack what reads files and options with damaged input, each case in a process of its own.

    python -m tests.fuzz --count 200 --seed 0 [--only zarr hdf5]

A case may be accepted, listed at the end with what was done to it, or refused: one line "error: ...", exit code 1.
Anything else is a failure: a traceback, a crash, more than 20 s, more than 2 GB. The exit code says if there was one.
"""

import argparse
import collections
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import door  # noqa: E402
import h5py  # noqa: E402
import numpy as np  # noqa: E402
import robomimic_files  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import zarr  # noqa: E402

from eval.shared.command import command  # noqa: E402
from eval.shared.compose import compose  # noqa: E402
from policy.checkpoint import load_checkpoint, load_policy, save_checkpoint  # noqa: E402
from policy.dataset.replay_buffer import ReplayBuffer  # noqa: E402
from policy.dataset.robomimic.conversion import convert  # noqa: E402
from policy.dataset.video.dataset import open_videos  # noqa: E402
from policy.training.trainer import Trainer  # noqa: E402

SECONDS, BYTES = 20, 2 << 30
VALUES = (
    *(None, True, 0, -1, 1, 10**9, 10**30, 1e-300, 0.5, float("nan"), float("inf"), "", "text", "module:X", "../x"),
    *("é(,=", "${oc.env:HOME}", "${nope}", "???", [], [1, 2], {}, {"a": 1}, [[[[]]]], "null", "0x10", "a" * 5000),
)
WORDS = ["null" if value is None else str(value) for value in VALUES]
FAILURES = ("traceback", "crash", "hang", "memory")


# Damage --------------------------------------------------------------------------------------------------------------


def damage_bytes(rng, path):
    """Change the file ``path``; returns what was done."""
    content = bytearray(path.read_bytes())
    size = len(content)
    at = rng.randrange(size) if size else 0
    kind = rng.choice(["flip", "cut", "zero", "noise", "append", "empty", "double"])
    if kind == "flip" and size:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind in ("zero", "noise"):
        length = min(rng.choice([1, 8, 512]), size - at)
        content[at : at + length] = bytes(length) if kind == "zero" else rng.randbytes(length)
    elif kind == "append":
        content += rng.randbytes(64)
    elif kind == "empty":
        content.clear()
    elif kind == "double":
        content += bytes(content)
    path.write_bytes(content)
    return f"{path.name}: {kind} at {at} of {size}"


def damage_tree(rng, value):
    """Change one place of nested dictionaries and lists; returns what was done."""
    where, node = [], value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        where.append(str(key))
        if not isinstance(node[key], dict | list) or rng.random() < 0.3:
            break
        node = node[key]
    new = rng.choice(["drop", "deep", *VALUES])
    if new == "drop":
        del node[key]
    elif new == "deep":
        node[key] = copy.deepcopy(VALUES[0])
        for _ in range(500):
            node[key] = [node[key]]
    else:
        node[key] = copy.deepcopy(new)
    return f"{'.'.join(where)} = {str(new)[:40]}"


CONVERSIONS = {"zeros": np.zeros_like, "huge": lambda array: array * 1e38, "shape": lambda array: array.ravel()[::2]}
CONVERSIONS |= {kind: lambda array, kind=kind: array.astype(kind) for kind in ("int64", "float16", "float64", "bool")}


def damage_array(rng, array):
    """(another array in the place of ``array``, what was done)."""
    kind = rng.choice(["nan", "inf", *CONVERSIONS])
    if kind in CONVERSIONS:
        return CONVERSIONS[kind](array), kind
    array = np.array(array, dtype=np.float32)
    array.flat[rng.randrange(array.size)] = float(kind)
    return array, kind


# Kinds of cases: each returns (what was done, a function that reads the result) ---------------------------------------


def checkpoint_case(rng, folder, seeds):
    path = folder / "policy.safetensors"
    shutil.copy(seeds / "policy.safetensors", path)
    kind = rng.choice(["bytes", "header", "config", "tensor"])
    if kind == "bytes":
        done = damage_bytes(rng, path)
    elif kind == "header":
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        done = f"header: {damage_tree(rng, header)}"
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    else:  # with digests that are right
        tensors, config, state = load_checkpoint(path)
        if kind == "config":
            part = rng.choice([config, config, state])
            done = f"{'state' if part is state else 'config'}: {damage_tree(rng, part)}"
        else:
            name = rng.choice(sorted(tensors))
            values, done = damage_array(rng, tensors[name].numpy().copy())
            tensors[name], done = torch.from_numpy(values), f"{name}: {done}"
        save_checkpoint(path, tensors, config=config, state=state)

    def read():
        policy = load_policy(path)
        policy.act({"agent_pos": torch.zeros(1, 2, 2), "image": torch.zeros(1, 2, 3, 12, 12, dtype=torch.uint8)})

    return done, read


def zarr_case(rng, folder, seeds):
    path = folder / "demos.zarr"
    shutil.copytree(seeds / f"format{rng.choice([2, 3])}.zarr", path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    kind = rng.choice(["bytes", "description", "array", "missing"])
    if kind == "bytes":
        done = damage_bytes(rng, rng.choice(files))
    elif kind == "missing":
        file = rng.choice(files)
        done = f"without {file.relative_to(path)}"
        file.unlink()
    elif kind == "description":
        file = rng.choice([file for file in files if file.name in (".zarray", "zarr.json", ".zgroup")])
        tree = json.loads(file.read_text())
        done = f"{file.relative_to(path)}: {damage_tree(rng, tree)}"
        file.write_text(json.dumps(tree))
    else:
        root = zarr.open_group(str(path), mode="a")
        name = rng.choice(["data/img", "data/state", "data/action", "meta/episode_ends"])
        values, done = damage_array(rng, root[name][:])
        root.create_array(name, data=values, overwrite=True)
        done = f"{name}: {done}"
    specs = {
        "image": {"source": "img", "shape": (3, 12, 12), "type": "rgb"},
        "agent_pos": {"source": "state", "shape": (2,), "type": "low_dim", "columns": [0, 1]},
        "action": {"source": "action", "shape": (2,), "type": "low_dim"},
    }
    storage = rng.choice(["ram", "mmap"])

    def read():
        buffer = ReplayBuffer.open(path, specs, storage=storage, cache_dir=folder / "cache")
        assert all(np.isfinite(np.asarray(array)).all() for array in buffer.arrays.values())

    return done, read


def hdf5_case(rng, folder, seeds):
    path = folder / "demos.hdf5"
    shutil.copy(seeds / "demos.hdf5", path)
    if rng.random() < 0.5:
        done = damage_bytes(rng, path)
    else:
        with h5py.File(path, "a") as file:
            names = []
            file.visit(names.append)
            name = rng.choice(names)
            kind = rng.choice(["drop", "array", "attribute", "group", "external", "soft"])
            node = file[name]
            if kind == "array" and isinstance(node, h5py.Dataset) and node.dtype.kind in "biuf":
                values, kind = damage_array(rng, node[()])
                del file[name]
                file[name] = values
            elif kind == "attribute" and len(node.attrs):
                key = rng.choice(list(node.attrs))
                value = rng.choice(
                    [v for v in VALUES if not isinstance(v, dict | type(None)) and v not in ([], 10**30)]
                )
                node.attrs[key] = json.dumps(value) if isinstance(value, list) else value
                kind = f"{key} = {str(value)[:40]}"
            else:
                del file[name]
                if kind == "group":
                    file.create_group(name)
                elif kind == "external":
                    file[name] = h5py.ExternalLink("/etc/passwd", "/data")
                elif kind == "soft":
                    file[name] = h5py.SoftLink("/data/demo_0")
            done = f"{name}: {kind}"
    actions = rng.choice(["absolute", "recorded"])
    return done, lambda: convert(path, folder / "demos.zarr", actions=actions)


def csv_case(rng, folder, seeds):
    for name in ("a.mp4", "b.mp4", "c d.mp4"):
        (folder / name).write_bytes(b"")
    lines = [
        rng.choice(["a.mp4 0", "b.mp4,1", "c d.mp4 1", "a.mp4,x.npy,2", "path,label", "# no", "", "a.mp4", "a.mp4 -1",
                    "b.mp4 999999999", "b.mp4 1.5", "/etc/passwd 0", "é.mp4 0", '"a.mp4",0', "a.mp4 cat", "a.mp4,,,"])
        for _ in range(rng.randrange(1, 6))
    ]  # fmt: skip
    content = "\n".join(lines).encode()
    if rng.random() < 0.2:
        content += rng.randbytes(20)
    (folder / "train.csv").write_bytes(content)
    return " | ".join(lines), lambda: open_videos(folder, "train", num_classes=rng.choice([None, 2]))


TASKS = {
    "pusht": ["preset=smoke", "rollout.episodes=0", "encoder.init=none", "encoder.depth=1"],
    "language": [],
    "translation": [],
    "pusht_octant": [],
}


def leaves(section, prefix=""):
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def override_case(rng, folder, seeds):
    task = rng.choice(list(TASKS))
    keys = sorted(leaves(json.loads((seeds / f"{task}.json").read_text())))
    changes = [f"{rng.choice(keys)}={rng.choice(WORDS)}" for _ in range(rng.choice([1, 1, 2]))]
    place = [f"cache_dir={seeds}/cache", f"output={folder}/run"]
    if task == "pusht":
        place.append(f"task.data={seeds}/demos.zarr")
    return f"{task} {' '.join(changes)[:200]}", lambda: until_training(task, *TASKS[task], *place, *changes)


def resume_case(rng, folder, seeds):
    shutil.copytree(seeds / "run", folder / "run")
    keys = sorted(leaves(json.loads((seeds / "language.json").read_text())))
    changes = [f"{rng.choice(keys)}={rng.choice(WORDS)}"]
    return f"resume {changes[0][:200]}", lambda: until_training("language", f"resume={folder}/run", *changes)


def until_training(*arguments):
    """The door up to the first step: what is wrong must have been said by then."""

    def reached(self, stop_at=None):
        raise SystemExit(0)

    Trainer.fit = reached
    door.door(*arguments)


KINDS = {
    "checkpoint": checkpoint_case,
    "zarr": zarr_case,
    "hdf5": hdf5_case,
    "csv": csv_case,
    "overrides": override_case,
    "resume": resume_case,
}


# Running them --------------------------------------------------------------------------------------------------------


def prepare(folder):
    """What the cases damage: a policy, zarrs of both formats, an HDF5, configurations, a run; data that runs render."""
    config = tiny.policy_config(images=True)
    tiny.save(folder / "policy.safetensors", tiny.policy(images=True), config)
    rng = np.random.default_rng(0)
    for number in (2, 3):
        root = zarr.open_group(str(folder / f"format{number}.zarr"), mode="w", zarr_format=number)
        root.create_array(
            "data/img", data=rng.integers(0, 256, (30, 12, 12, 3), dtype=np.uint8), chunks=(10, 12, 12, 3)
        )
        root.create_array("data/state", data=rng.uniform(50, 450, (30, 5)).astype(np.float32))
        root.create_array("data/action", data=rng.uniform(50, 450, (30, 2)).astype(np.float32))
        root.create_array("meta/episode_ends", data=np.array([9, 20, 30]))
    robomimic_files.make_hdf5(folder / "demos.hdf5", lengths=(4, 3))
    tiny.write_demos(folder / "demos.zarr")
    for task, changes in TASKS.items():
        (folder / f"{task}.json").write_text(json.dumps(compose(task, changes)))
    small = ["model.dim=16", "model.depth=1", "model.num_heads=2", "context=16", "contexts=[0]", "stride=512"]
    small += ["training.max_steps=2", "training.log_every=1", f"cache_dir={folder}/cache", f"output={folder}/run"]
    outcome, text, _ = run_case(lambda: door.door("language", *small), folder / "log", seconds=300)
    if not (folder / "run" / "checkpoints").exists():
        raise RuntimeError(f"no run to resume: {outcome}\n{text}")
    place = [f"cache_dir={folder}/cache", f"output={folder}/rendered"]
    run_case(lambda: until_training("pusht_octant", *place), folder / "log", seconds=300)


def run_case(function, log, *, seconds=SECONDS):
    """(outcome, what it printed, seconds) of ``function`` in a process of its own."""
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        in_child(function, log)
    status, usage = None, None
    while status is None:
        done, code, usage = os.wait4(process, os.WNOHANG)
        if done:
            status = code
        elif time.monotonic() - start > seconds:
            os.kill(process, signal.SIGKILL)
            os.wait4(process, 0)
            return "hang", log.read_text(errors="replace"), time.monotonic() - start
        else:
            time.sleep(0.01)
    text = log.read_text(errors="replace")
    if os.WIFSIGNALED(status):
        outcome = "crash"
    elif usage.ru_maxrss * 1024 > BYTES:
        outcome = "memory"
    elif os.WEXITSTATUS(status) == 0:
        outcome = "accepted"
    else:
        refused = os.WEXITSTATUS(status) == 1 and "error: " in text and "Traceback" not in text
        outcome = "refused" if refused else "traceback"
    return outcome, text, time.monotonic() - start


def in_child(function, log):
    """Run ``function`` as a command does, print to ``log``, end the process."""
    place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(place, 1), os.dup2(place, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 0
    try:
        command(function)()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="cases (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes, accepted, failed = collections.Counter(), [], []
    with tempfile.TemporaryDirectory() as place:
        seeds = Path(place) / "seeds"
        seeds.mkdir()
        prepare(seeds)
        for number in range(args.count):
            kind = args.only[number % len(args.only)]
            folder = Path(place) / str(number)
            folder.mkdir()
            done, read = KINDS[kind](random.Random(f"{args.seed} {number}"), folder, seeds)
            outcome, text, seconds = run_case(read, folder / "log")
            outcomes[kind, outcome] += 1
            line = f"{kind} {number}: {done}"
            if outcome == "accepted":
                accepted.append(line)
            elif outcome in FAILURES:
                failed.append(f"{outcome} after {seconds:.1f} s: {line}\n{text[-1500:]}")
                print(failed[-1], flush=True)
            shutil.rmtree(folder)
    print("\n".join(["accepted:", *accepted, ""]))
    for kind in args.only:
        found = {outcome: outcomes[kind, outcome] for outcome in ("refused", "accepted", *FAILURES)}
        print(f"{kind:<11}", ", ".join(f"{count} {outcome}" for outcome, count in found.items()))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
