"""Translation with any attention mechanism in the encoder: training, beam search, BLEU and chrF.

    python -m eval.translate                                        English to German, an embedded grammar
    python -m eval.translate --attention softmax eva_text lara_text       several encoders, and a table
    python -m eval.translate --source wmt.en --target wmt.de --preset paper
    python -m eval.translate --checkpoint RUN --translate "Pick up the red cup."

The decoder's attention is attention@model.decoder_attention=NAME.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.shared import sequence
from eval.shared.command import command
from eval.shared.tracker import write_whole
from policy.checkpoint import load_model
from policy.dataset.text.pairs import PairBatches, open_pairs, split_pairs
from policy.dataset.text.tokens import learn_tokens, load_tokens
from policy.sequence.search import check_beams
from policy.training.trainer import to_tensors

SHOWN = 40  # translations in examples.txt
COLUMNS = {
    "BLEU [95 %]": lambda summary: "{:.1f} [{:.1f}, {:.1f}]".format(summary["bleu"], *summary["bleu_ci95"]),
    "chrF": lambda summary: f"{summary['chrf']:.1f}",
    "exact": lambda summary: f"{summary['exact']:.1%}",
    "BLEU, greedy": lambda summary: f"{summary['bleu_greedy']:.1f}",
    "steps": lambda summary: f"{summary['steps']}",
    "parameters": lambda summary: f"{summary['parameters'] / 1e6:.2f} M",
    "training, minutes": lambda summary: f"{summary['training_minutes']:.1f}",
}


def open_data(config, run_dir):
    """{"tokens", "train", "valid", "test"} of the pairs that ``config`` names; run_dir: a run whose tokens to take."""
    _metrics()  # what is missing or impossible is said before the training
    check_beams(config["beams"])
    if not 0 <= config["length_penalty"] <= 10:
        raise ValueError(f"length_penalty: got {config['length_penalty']}, allowed: 0 to 10")
    pairs = open_pairs(config["source"], config["target"], count=config["pairs"], seed=config["seed"])
    parts = split_pairs(pairs, held_out=config["held_out"], seed=config["seed"])
    print(f"{len(pairs) - sum(map(len, parts.values()))} of {len(pairs)} pairs repeat a sentence and are left out")
    if run_dir is None:
        sides = [side for pair in parts["train"] for side in pair]
        tokens = learn_tokens(config["tokens"], sides, size=config["vocabulary"])
    else:
        tokens = load_tokens(config["tokens"], run_dir)
    lengths = {key: config[key] for key in ("source_length", "target_length")}
    data = {part: PairBatches(pairs, tokens, **lengths) for part, pairs in parts.items()}
    for part, batches in data.items():
        print(f"{part}: {len(batches)} pairs; {batches.dropped} with too many tokens dropped")
    return {"tokens": tokens, **data}


def _metrics():
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ImportError('BLEU needs the package sacrebleu: pip install -e ".[language]"') from None
    return BLEU, CHRF


def translate(model, data, tokens, *, beams, length_penalty, device, batch_size=50):
    """Texts that ``model`` makes of the sources of ``data``, in its order."""
    order = np.argsort([len(source) for source, _ in data.pairs], kind="stable")  # alike ones end together
    texts = [None] * len(data)
    with tqdm(total=len(data), desc="translating", unit="sentence", leave=False, dynamic_ncols=True) as bar:
        for rows in np.array_split(order, -(-len(order) // batch_size)):
            source = to_tensors(data.batch(rows), device)["source"]
            found = model.translate(source, beams=beams, length_penalty=length_penalty)
            for row, sentence in zip(rows, found, strict=True):
                texts[row] = tokens.decode(sentence)
            bar.update(len(rows))
    return texts


def score(translations, references):
    """BLEU with its 95 % interval (1,000 resamplings of the sentences), chrF, signatures, share of exact ones.

    sacrebleu keeps the interval in attributes that begin with an underscore.
    """
    bleu_metric, chrf_metric = (metric() for metric in _metrics())
    bleu = bleu_metric.corpus_score(translations, [references], n_bootstrap=1000)
    exact = sum(one == other for one, other in zip(translations, references, strict=True))
    return {
        "bleu": bleu.score,
        "bleu_ci95": [bleu._mean - bleu._ci, bleu._mean + bleu._ci],
        "bleu_signature": str(bleu_metric.get_signature()),
        "chrf": chrf_metric.corpus_score(translations, [references]).score,
        "chrf_signature": str(chrf_metric.get_signature()),
        "exact": exact / len(references),
    }


def run(config, data, run_dir, *, resume):
    """Train and test what ``config`` describes; returns the summary."""
    started = time.monotonic()
    trainer = sequence.fit(config, data, run_dir, resume=resume)
    trained = time.monotonic()
    model, test = trainer.ema.model.eval(), data["test"]
    options = {"length_penalty": config["length_penalty"], "device": trainer.accelerator.device}
    translations = translate(model, test, data["tokens"], beams=config["beams"], **options)
    greedy = translate(model, test, data["tokens"], beams=1, **options)
    references = [reference for _, reference in test.texts]
    summary = {
        **sequence.describe(trainer, config),
        "decoder_attention": config["model"]["decoder_attention"]["name"],
        "data": [str(config["source"]), str(config["target"])] if config["source"] else "embedded",
        "train_pairs": len(data["train"]),
        "test_pairs": len(test),
        "dropped": {part: data[part].dropped for part in ("train", "valid", "test")},
        "beams": config["beams"],
        **score(translations, references),
        "bleu_greedy": score(greedy, references)["bleu"],
        "training_minutes": (trained - started) / 60,
        "minutes": (time.monotonic() - started) / 60,
    }
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=1))
    rows = zip(test.texts, translations, strict=True)
    shown = [f"source     {one}\nreference  {other}\nmodel      {made}\n" for (one, other), made in rows]
    write_whole(run_dir / "examples.txt", "\n".join(shown[:SHOWN]))
    line = ", ".join(f"{heading} {form(summary)}" for heading, form in COLUMNS.items())
    print(f"{summary['attention']}: {line}\nresults: {run_dir}")
    return summary


def translate_line(args):
    """Print the translation of a sentence by a trained model."""
    model = load_model(args.checkpoint)
    sequence.check_kind(model.config, "translation", args.checkpoint)
    config = model.config
    tokens = load_tokens(config["tokens"], args.checkpoint)
    lengths = {key: config[key] for key in ("source_length", "target_length")}
    data = PairBatches([(args.translate.strip(), "")], tokens, **lengths)
    options = {key: config[key] for key in ("beams", "length_penalty")}
    print(*translate(model, data, tokens, device="cpu", **options))


@command
def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sequence.add_arguments(parser)
    parser.add_argument("--source", type=Path, help="a sentence a line, UTF-8 (default: an embedded grammar)")
    parser.add_argument("--target", type=Path, help="their translations, a line each")
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="with --translate: a run folder")
    parser.add_argument("--translate", metavar="SENTENCE", help="print its translation by a trained model")
    args = sequence.parse(parser, arguments)
    if (args.translate is None) != (args.checkpoint is None):
        raise ValueError("--translate, --checkpoint: got one of them, allowed: both or neither")
    if args.translate is not None:
        translate_line(args)
        return
    overrides = [sequence.quoted(side, getattr(args, side)) for side in ("source", "target") if getattr(args, side)]
    sequence.main(args, kind="translation", overrides=overrides, open_data=open_data, run=run, columns=COLUMNS)


if __name__ == "__main__":
    main()
