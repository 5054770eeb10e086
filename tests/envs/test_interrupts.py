"""Ctrl-C while several processes make a data set: one line, exit code 130, and nothing but what is gone on from."""

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT

SCENES = """
from envs.pusht.scenes import ensure_scenes
from envs.shared.commands import Parser, run_command
parser = Parser()
parser.add_argument("cache_dir")
if __name__ == "__main__":
    print("ready", flush=True)
    sys.exit(run_command(lambda cache_dir: ensure_scenes(cache_dir=cache_dir, frames=100_000), parser, sys.argv[1:]))
"""
DEMOS = """
from envs.pusht_demos import main
if __name__ == "__main__":
    print("ready", flush=True)
    sys.exit(main(["--episodes", "40", "--processes", "2", "--output", f"{sys.argv[1]}/set.zarr"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.1, 0.3, 0.6, 1.5])
@pytest.mark.parametrize(("program", "left"), [(SCENES, []), (DEMOS, ["set.zarr.partial"])], ids=["scenes", "demos"])
def test_ctrl_c_ends_with_one_line_at_every_moment(tmp_path, program, left, seconds):
    run = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{program}", tmp_path],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # shells may have it ignored
    )
    assert run.stdout.readline() == "ready\n"
    time.sleep(seconds)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    start = time.monotonic()
    _, errors = run.communicate(timeout=60)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip() and "/s]" not in line]
    assert run.returncode == 130 and len(lines) == 1 and "stopped" in lines[0], errors
    assert time.monotonic() - start < 10
    assert [path.name for path in tmp_path.iterdir()] in ([], left)
