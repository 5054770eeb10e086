"""Commands go on, and lose nothing, when nobody reads what they print; there is never a traceback."""

import subprocess
import sys

import pytest
from paths import ROOT

WORK = """
import sys
from pathlib import Path
from tqdm import tqdm
from eval.shared.streams import lasting_streams

@lasting_streams()
def main():
    for number in tqdm(range(300), mininterval=0):
        print("line", number, flush=number % 2 == 0)
    with open("kept", "w") as kept:
        kept.write(f"all, not in {kept.fileno() <= 2}")
    print("error: one line", file=sys.stderr)
    raise SystemExit(3)

main()
"""
REDIRECTED = {
    "read": "",
    "reader of output gone": "| (exec <&-; sleep 0.5)",
    "reader of errors gone": "2> >(exec <&-; sleep 0.5)",
    "reader of both gone": "2>&1 | (exec <&-; sleep 0.5)",
    "output closed": ">&-",
    "errors closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "full disk": "> /dev/full 2> /dev/full",
}


@pytest.mark.parametrize("redirected", REDIRECTED)
def test_work_goes_on_when_nobody_reads(tmp_path, redirected):
    line = f"PYTHONPATH={ROOT} {sys.executable} -c '{WORK}' {REDIRECTED[redirected]}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and (tmp_path / "kept").read_text() == "all, not in False"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if redirected == "read":
        assert done.stdout.count("line") == 300 and done.stderr.endswith("error: one line\n")


def test_a_command_does():
    line = f"{sys.executable} -m eval.report nowhere 2>&1 >/dev/full <&-"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("error: ") and done.stdout.count("\n") == 1
