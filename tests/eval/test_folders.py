"""Folders of runs and results: nobody shares one, nothing is overwritten unsaid, failed starts leave none."""

import errno
import subprocess
import sys
import time

import pytest
from paths import ROOT

from eval.shared import folders
from eval.shared.folders import own_folder, result_name, results_folder

HOLD = """
import sys, time
from eval.shared.folders import own_folder
with own_folder(sys.argv[1]) as folder:
    (folder / "metrics.jsonl").write_text("")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that works in the folder ``run``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == str(tmp_path / "run")
        yield process
        process.kill()


def test_two_runs_of_one_second_have_a_folder_each(tmp_path, holder):
    with own_folder(tmp_path / "run") as folder:
        assert folder == tmp_path / "run_2"
        (folder / "metrics.jsonl").write_text("")
    with own_folder(tmp_path / "run") as folder:
        assert folder == tmp_path / "run_3"
    assert not folder.exists()


def test_a_disk_without_file_locks_is_worked_on(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    with own_folder(tmp_path / "run") as folder:
        assert folder == tmp_path / "run"


@pytest.mark.parametrize("key", ["resume", "output"])
def test_a_named_folder_is_held_by_one_process(tmp_path, holder, key):
    with pytest.raises(ValueError, match=f"{key}: got .*run, in which another process works"), \
         own_folder(tmp_path / "run", key=key):  # fmt: skip
        pass
    holder.kill()
    holder.wait()
    for _ in range(50):  # the system frees it a moment after the kill
        try:
            with own_folder(tmp_path / "run", key=key) as folder:
                assert folder == tmp_path / "run"
            break
        except ValueError:
            time.sleep(0.1)
    else:
        pytest.fail("still held")


def test_a_failed_start_leaves_no_folder_and_no_other_is_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError), own_folder(tmp_path / "mine" / "run", key="output"):
        raise RuntimeError
    assert (tmp_path / "mine").exists() and not (tmp_path / "mine" / "run").exists()
    with pytest.raises(RuntimeError), own_folder(tmp_path / "task" / "run"):
        raise RuntimeError
    assert not (tmp_path / "task").exists()


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("runs/lr0.1", "lr0.1"),
        ("runs/lr0.01", "lr0.01"),
        ("runs/pusht/fast_2026-01-01", "pusht_fast_2026-01-01"),
        ("runs/lr0.1/checkpoints/last.safetensors", "lr0.1_last"),
        ("runs/lr0.2/checkpoints/last.safetensors", "lr0.2_last"),
        ("runs/a/checkpoints/step=00000010_score=0.9.safetensors", "a_step=00000010_score=0.9"),
        ("pretrained/pusht_policy.safetensors", "pusht_policy"),
        ("elsewhere/mine", "mine"),
    ],
)
def test_results_are_named_after_run_and_file(tmp_path, monkeypatch, checkpoint, name):
    monkeypatch.chdir(tmp_path)
    assert result_name(checkpoint) == name


def test_results_are_never_overwritten_unsaid(tmp_path, capsys):
    first, second = (results_folder(None, tmp_path, "pretrained/a.safetensors") for _ in range(2))
    assert (first.name, second.name) == ("a", "a_2") and first.is_dir() and second.is_dir()
    assert results_folder(first, tmp_path, "b.safetensors") == first and not capsys.readouterr().out
    (first / "summary.json").write_text("{}")
    assert results_folder(first, tmp_path, "b.safetensors") == first
    assert "replace" in capsys.readouterr().out
