"""The parts of docs/extending.md, added to a copy of the repository as the page says: tested, measured, trained."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
COPIED = ("policy", "envs", "eval", "config", "tests", "train.py", "pyproject.toml")
SMALL = ["device=cpu", "training.max_steps=2", "training.batch_size=4", "training.warmup_steps=0"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository with the page's files and lines."""
    root = tmp_path_factory.mktemp("repository")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name)
        else:
            shutil.copy2(ROOT / name, root)
    (root / "pretrained").symlink_to(ROOT / "pretrained")
    files = re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^One line in `(\w+)` of `([\w/.]+)`: `(.*)`$", PAGE, re.MULTILINE)
    assert len(files) == 8 and len(lines) == 5
    for path, text in files:
        assert not (root / path).exists()
        (root / path).write_text(text)
    for table, path, line in lines:
        text = (root / path).read_text()
        head, tail = text.split(f"\n{table} = ")
        place = tail.index("{") + 1
        (root / path).write_text(f"{head}\n{table} = {tail[:place]}\n        {line},{tail[place:]}")
    return root


def run(repository, *arguments):
    """The output of ``python ARGUMENTS`` there."""
    command = [sys.executable, *map(str, arguments)]
    ran = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def test_the_attention_keeps_the_contract(repository):
    out = run(repository, "-m", "pytest", "-v", "tests/policy/attention/test_attention_contract.py", "-k", "sigmoid")
    assert int(re.search(r"(\d+) passed", out)[1]) > 15 and "skipped" not in out


def test_the_attention_is_measured(repository):
    sizes = ["--patches", "9", "--dim", "16", "--heads", "2", "--seconds", "0.02", "--images", "1", "--device", "cpu"]
    run(repository, "-m", "eval.attention", "--attention", "sigmoid", "--quick", *sizes, "--output", "measured")
    found = json.loads((repository / "measured" / "results.json").read_text())
    rows = {row["mechanism"]: row for row in found["rows"]}
    assert rows["sigmoid"]["flops"] == rows["softmax"]["flops"] > 0 and rows["sigmoid"]["ms"] > 0
    assert {row["mechanism"] for row in found["errors"]} == {"softmax", "sigmoid"}


def test_the_attention_models_language(repository):
    sizes = ["model.dim=16", "model.depth=1", "model.num_heads=2", "context=16", "contexts=[0]", "vocabulary=300"]
    run(repository, "train.py", "--config-dir=config/language", "attention=sigmoid", *SMALL, *sizes, "output=language")
    assert (repository / "language" / "checkpoints" / "last.safetensors").exists()


@pytest.mark.parametrize("encoder", ["cnn", "vit_image"])
def test_encoder_denoiser_and_task_make_a_policy(repository, encoder):
    """The vision transformer attends by sigmoids."""
    parts = ["task=reach", f"encoder={encoder}", "attention=sigmoid", "denoiser=transformer", "denoiser.dim=16"]
    parts += ["encoder.depth=1", "encoder.dim=16", "encoder.num_heads=2"] if encoder == "vit_image" else []
    few = ["task.datasets.demos.episodes=3", "rollout.episodes=2", "rollout.videos=0", "data.max_train_episodes=2"]
    run(repository, "train.py", "--config-dir=config/pusht", *parts, *SMALL, *few, f"output={encoder}")
    run(repository, "-m", "eval.rollout", "--checkpoint", encoder, "--episodes", "2", "--output", f"{encoder}_rollout")
    summary = json.loads((repository / f"{encoder}_rollout" / "summary.json").read_text())
    assert len(summary["episodes"]) == 2 and 0 < summary["score_mean"] <= 1


COMPOSE = """
import sys
from eval.shared.compose import compose_task
for line in sys.argv[1:]:
    folder, *changes = line.split()
    config = compose_task(folder.removeprefix("--config-dir=config/"), changes)
    print(config.model.name)
"""


def test_the_commands_of_the_page_compose(repository):
    lines = re.findall(r"^python train\.py (.*?)\s*(?:#.*)?$", PAGE, re.MULTILINE)
    jobs = []
    for line in lines:
        line = line.replace("--multirun ", "")
        count = max(len(choices.split(",")) for choices in re.findall(r"=(\S+)", line))
        jobs += [re.sub(r"=(\S+,\S+)", lambda m: "=" + m[1].split(",")[job], line) for job in range(count)]  # noqa: B023
    assert len(lines) >= 9 and len(run(repository, "-c", COMPOSE, *jobs).split()) == len(jobs)
