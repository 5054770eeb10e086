"""Language models from the one door: what a run leaves, and the command that tests it and lets it write."""

import json

import pytest
from door import door, stopped_run
from PIL import Image

from eval import language
from eval.benchmark.sequence import check_kind
from eval.shared.classify import quoted
from eval.shared.compose import compose
from policy.checkpoint import load_model
from policy.dataset.text.tokens import load_tokens

TINY = [
    "model.dim=16", "model.depth=1", "model.num_heads=2", "context=16", "contexts=[0,8]", "training.batch_size=8",
    "training.max_steps=6", "training.log_every=2", "training.warmup_steps=1", "training.ema.max_decay=0.5",
    "stride=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("one two three four five six seven eight nine ten\n" * 60)
    return path


def command(*arguments):
    language.main([str(argument) for argument in arguments])


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    door("language", f"text={text}", f"output={folder}", *TINY, "tokens=bpe", "vocabulary=300", "training.max_steps=40",
         "training.epochs=10", "training.lr=0.02")  # fmt: skip
    return folder


def test_a_run_learns_and_leaves_everything(trained, text, tmp_path, capsys):
    found = summary(trained)
    assert found["bits_per_byte"] < 1.5 and found["vocabulary"] <= 300 and found["text"] == str(text)
    assert [result["context"] for result in found["contexts"]] == [0, 8] and found["decoding"] == "keys and values"
    assert found["bits_per_byte"] == found["contexts"][1]["bits_per_byte"]
    assert Image.open(trained / "curves.png").size[0] > 100 and (trained / "sample.txt").read_text().startswith("The ")
    command("--checkpoint", trained, "--output", tmp_path / "test.json")
    assert json.loads((tmp_path / "test.json").read_text())["contexts"] == found["contexts"]
    other = tmp_path / "other.txt"
    other.write_text("ten nine eight seven six five four three two one\n" * 60)
    command("--checkpoint", trained, "--text", other, "--output", tmp_path / "other.json")
    surprised = json.loads((tmp_path / "other.json").read_text())["contexts"][1]["bits_per_byte"]
    assert surprised > 2 * found["bits_per_byte"] and "bits a byte" in capsys.readouterr().out


def test_generate(trained, capsys):
    def printed(*arguments):
        capsys.readouterr()
        command("--checkpoint", trained, "--generate", "one two", "--length", 20, *arguments)
        return capsys.readouterr().out

    first = printed("--seed", 3)
    assert first.startswith("one two") and printed("--seed", 3) == first != printed("--seed", 4)
    assert printed("--temperature", 0) == printed("--temperature", 0, "--seed", 4)
    assert len(printed("--length", 3)) < len(first)


def test_a_stopped_run_goes_on_with_its_tokens(text, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    door("language", f"text={text}", f"output={whole}", *TINY, "tokens=bpe", "vocabulary=300", "attention=performer")
    stopped_run(whole, half, 3)
    door("language", f"resume={half}")
    weights = [load_model(folder).state_dict() for folder in (whole, half)]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    assert summary(half)["contexts"] == summary(whole)["contexts"]
    assert load_tokens("bpe", half).encode("one") == load_tokens("bpe", whole).encode("one")


@pytest.mark.parametrize(
    "change",
    ["attention=eva", "text=nowhere.txt", "context=200", "contexts=[16]", "contexts=[]", "tokens=word", "model.detph=2",
     "preset=image_fast"],
)  # fmt: skip
def test_wrong_options_give_one_line_before_anything_is_written(change, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        door("language", f"text={text}", f"output={tmp_path}/run", *TINY, change)
    assert end.value.code == 1 and capsys.readouterr().err.count("error:") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["123", "null", "a (1).txt", "a=b.txt", "x{y}.txt", "it's.txt", "a, b.txt", "b\\c"])
def test_paths_of_any_characters(name):
    assert compose("language", [f"text={quoted(name)}"])["text"] == name


def test_a_run_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="x: got a 'translation' run"):
        check_kind({"model": {"name": "translation"}}, "language", "x")
