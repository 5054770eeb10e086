"""Kill training runs at random moments, resume them, and compare with runs that nobody killed.

    python -m tests.kills --count 100 --seed 0

Every run goes through train.py's command line in a process of its own, with rollouts and each optimizer. After every
kill the checkpoint must load and be no older than before; at the end weights, metrics, rollouts and files must be those
of the run that was left alone. The exit code says whether all was so.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import door  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from fuzz import in_child  # noqa: E402
from tqdm import tqdm  # noqa: E402

from policy.checkpoint import load_checkpoint  # noqa: E402
from policy.training.optim import OPTIMIZERS  # noqa: E402
from policy.training.processes import SIGNALS  # noqa: E402

SMALL = [
    "preset=smoke",
    "encoder.init=none",
    "encoder.dim=16",
    "encoder.depth=1",
    "encoder.num_heads=2",
    "denoiser.widths=[16,32,64]",
    "training.batch_size=8",
    "training.max_steps=null",
    "training.epochs=3",
    "training.log_every=3",
    "training.rollout_every=1",
    "training.top_k=1",
    "rollout.episodes=2",
    "rollout.videos=1",
    "task.env.max_steps=24",
]


def train(place, run, optimizer, *, resume=False, killed=None):
    """Exit status of a run, or of one that gets the signal ``killed`` = (number, after so many seconds)."""
    own = [f"resume={run}"] if resume else [f"output={run}", f"training.optimizer={optimizer}", *SMALL]
    if not resume:
        own += [f"task.data={place}/demos.zarr", f"cache_dir={place}/cache"]
    process = os.fork()
    if process == 0:
        in_child(lambda: door.door("pusht", *own), place / "log")
    if killed is not None:
        number, seconds = killed
        time.sleep(seconds)
        os.kill(process, number)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(run):
    """What a finished run leaves: tensors, metrics without times, scores of rollouts, names of files."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key != "steps_per_second"} for line in lines]
    rollouts = {file.parent.name: json.loads(file.read_text()) for file in sorted(run.glob("rollouts/*/summary.json"))}
    files = sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file())
    return load_checkpoint(run / "checkpoints" / "last.safetensors")[0], metrics, rollouts, files


def same(first, second):
    """Names of what differs."""
    tensors = set(first[0]) == set(second[0]) and all(torch.equal(first[0][key], second[0][key]) for key in first[0])
    found = {"tensors": tensors}
    found |= {name: first[n] == second[n] for n, name in ((1, "metrics"), (2, "rollouts"), (3, "files"))}
    return [name for name, equal in found.items() if not equal]


def saved_step(run):
    """The step of the checkpoint, 0 without one; raises ValueError where it is damaged."""
    path = run / "checkpoints" / "last.safetensors"
    return load_checkpoint(path)[2]["step"] if path.exists() else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="kills (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and signals (default: 0)")
    args = parser.parse_args()
    rng, kills, faults, counts = random.Random(args.seed), 0, [], {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tiny.write_demos(place / "demos.zarr")
        whole = {}
        for optimizer in OPTIMIZERS:
            start = time.monotonic()
            if train(place, place / optimizer, optimizer):
                raise RuntimeError((place / "log").read_text())
            whole[optimizer] = contents(place / optimizer), time.monotonic() - start
        bar = tqdm(total=args.count, unit="kill", dynamic_ncols=True)
        while kills < args.count:
            optimizer, run = rng.choice(OPTIMIZERS), place / "run"
            expected, seconds = whole[optimizer]
            step = 0
            while True:
                last = kills >= args.count
                number = rng.choice([signal.SIGKILL] * 5 + list(SIGNALS))
                killed = None if last else (number, rng.uniform(0, seconds))
                code = train(place, run, optimizer, resume=step > 0, killed=killed)
                if code == 0:  # it was over before the signal
                    break
                kills += 1
                bar.update()
                counts[signal.Signals(number).name] = counts.get(signal.Signals(number).name, 0) + 1
                if code not in (-number, 128 + number):
                    faults.append(
                        f"{signal.Signals(number).name}: exit code {code}: {(place / 'log').read_text()[-800:]}"
                    )
                try:
                    now = saved_step(run)
                except ValueError as error:
                    faults.append(f"damaged: {error}")
                    break
                if now < step:
                    faults.append(f"lost: step {step} was saved, {now} is left")
                step = now
                if step == 0:  # nothing was saved, so there is nothing to resume
                    shutil.rmtree(run, ignore_errors=True)
            differs = same(contents(run), expected) if code == 0 else ["unfinished"]
            if differs:
                faults.append(f"{optimizer}: {', '.join(differs)} differ from the run that nobody killed")
            shutil.rmtree(run)
        left = [str(path.relative_to(place)) for path in place.rglob("*.partial*")]
    print(f"{kills} kills: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}")
    print(f"{len(faults)} faults, {len(left)} leftovers", *faults, *left, sep="\n")
    raise SystemExit(1 if faults or left else 0)


if __name__ == "__main__":
    main()
