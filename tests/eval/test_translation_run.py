"""Translation from the one door: BLEU, what a run leaves, and the command that tests it and translates."""

import json

import pytest
from door import door
from omegaconf import OmegaConf

from eval import translate as command_module
from eval.benchmark.translation import TranslationBenchmark, score, translate
from policy.checkpoint import load_model
from policy.dataset.text.pairs import embedded_pairs

REFERENCES = [german for _, german in embedded_pairs(40, seed=5)]
TINY = [
    "model.dim=16", "model.depth=1", "model.decoder_depth=1", "model.num_heads=2", "source_length=32",
    "target_length=32", "pairs=120", "held_out=10", "vocabulary=600", "training.max_steps=2", "training.batch_size=16",
    "training.log_every=1", "training.warmup_steps=1",
]  # fmt: skip


def test_bleu_of_perfect_translations():
    found = score(REFERENCES, REFERENCES)
    assert found["bleu"] == pytest.approx(100) and found["bleu_ci95"] == pytest.approx([100, 100])
    assert found["chrf"] == pytest.approx(100) and found["exact"] == 1
    assert "tok:13a" in found["bleu_signature"] and "version:" in found["chrf_signature"]


def test_bleu_of_others():
    worse = [reference.replace("den", "dem").replace("die", "der") for reference in REFERENCES]
    found = score(worse, REFERENCES)
    low, high = found["bleu_ci95"]
    assert 10 < low < found["bleu"] < high < 100 and high - low > 1 and found["exact"] < 1
    assert found == score(worse, REFERENCES)
    assert score(["nichts"] * 40, REFERENCES)["bleu"] < 1


def command(*arguments):
    command_module.main([str(argument) for argument in arguments])


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run on twelve sentences, whose test pairs are those it learned."""
    folder = tmp_path_factory.mktemp("learned")
    pairs = embedded_pairs(14, seed=3)
    for side, name in enumerate(("text.en", "text.de")):
        (folder / name).write_text("\n".join(pair[side] for pair in pairs))
    door("translation", f"source={folder}/text.en", f"target={folder}/text.de", f"output={folder}/run", *TINY,
         "held_out=1", "model.dim=64", "model.dropout=0", "model.label_smoothing=0", "source_length=80",
         "target_length=80", "training.lr=0.01", "training.max_steps=150", "training.epochs=150",
         "training.ema.max_decay=0.5", "training.val_every=999", "training.checkpoint_every=999",
         "training.warmup_steps=10")  # fmt: skip
    return folder / "run"


def test_learning_by_heart(learned):
    """The training sentences come out again, word by word, one at a time as in batches."""
    net = load_model(learned)
    benchmark = TranslationBenchmark(net.config, learned, resume=True)
    options = {"beams": 4, "length_penalty": 1.0, "device": "cpu"}
    translations = translate(net, benchmark.train_data, benchmark.tokens, **options)
    references = [reference for _, reference in benchmark.train_data.texts]
    assert score(translations, references)["bleu"] > 90
    assert translate(net, benchmark.train_data, benchmark.tokens, **options, batch_size=1) == translations


def test_a_run_leaves_everything_and_may_be_tested_again(learned, tmp_path):
    found = summary(learned)
    assert found["train_pairs"] == 12 and found["test_pairs"] == 1 and found["beams"] == 4
    assert found["dropped"] == {"train": 0, "valid": 0, "test": 0} and 0 <= found["bleu"] <= 100
    assert found["decoder_attention"] == "softmax" and found["steps"] == 150
    assert "reference" in (learned / "examples.txt").read_text()
    for name in ("curves.png", "tokens.json", "config.yaml", "metrics.jsonl"):
        assert (learned / name).stat().st_size > 0
    command("--checkpoint", learned, "--output", tmp_path / "test.json")
    again = json.loads((tmp_path / "test.json").read_text())
    assert {key: found[key] for key in again} == again
    files = [learned.parent / name for name in ("text.en", "text.de")]
    command("--checkpoint", learned, "--source", files[0], "--target", files[1], "--output", tmp_path / "files.json")
    assert json.loads((tmp_path / "files.json").read_text())["bleu"] > 80  # twelve of the fourteen were learned
    door("translation", f"resume={learned}")
    timing = {"training_minutes", "minutes"}
    assert {k: v for k, v in summary(learned).items() if k not in timing} == {
        k: v for k, v in found.items() if k not in timing
    }


def test_translating_a_sentence(learned, capsys):
    english, german = embedded_pairs(14, seed=3)[0]
    capsys.readouterr()
    command("--checkpoint", learned, "--translate", english)
    assert capsys.readouterr().out.split()[0] == german.split()[0]
    with pytest.raises(SystemExit):
        command("--checkpoint", learned, "--translate", "word " * 99)
    assert "source_length, target_length" in capsys.readouterr().err


def test_options_reach_the_run(tmp_path, capsys):
    door("translation", f"output={tmp_path}/run", *TINY, "attention=eva_text", "beams=2", "length_penalty=0.5",
         "attention@model.decoder_attention=performer", "source_length=28", "target_length=28")  # fmt: skip
    found = summary(tmp_path / "run")
    assert (found["attention"], found["decoder_attention"], found["beams"]) == ("eva", "performer", 2)
    assert found["dropped"]["train"] > 0 and found["data"] == "embedded"
    assert f"{found['dropped']['train']} too long, dropped" in capsys.readouterr().out
    config = OmegaConf.to_container(OmegaConf.load(tmp_path / "run" / "resolved.yaml"))
    parts = TranslationBenchmark(config, tmp_path / "run", resume=True).parts
    sources = [{one for one, _ in parts[part].texts} for part in ("train", "valid", "test")]
    assert not sources[0] & sources[1] and not sources[0] & sources[2] and not sources[1] & sources[2]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["source=nowhere.en"], "source, target"),
        (["source=nowhere.en", "target=nowhere.de"], "nowhere.en"),
        (["attention=no_such"], "attention"),
        (["attention@model.decoder_attention=eva"], "attention"),
        (["held_out=60"], "held_out"),
        (["source_length=3"], "source_length"),
        (["pairs=many"], "pairs"),
        (["beams=0"], "beams"),
    ],
    ids=str,
)
def test_wrong_options_give_one_line_before_anything_is_written(changes, key, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        door("translation", f"output={tmp_path}/run", *TINY, *changes)
    error = capsys.readouterr().err
    assert end.value.code == 1 and key in error and error.count("error:") == 1
    assert not (tmp_path / "run").exists()
