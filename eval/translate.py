"""Test a trained translation model, or let it translate.

    python -m eval.translate --checkpoint RUN                                     BLEU, chrF
    python -m eval.translate --checkpoint RUN --source test.en --target test.de
    python -m eval.translate --checkpoint RUN --translate "Pick up the red cup."

Training: python train.py --config-dir=config/translation.
"""

import json
from pathlib import Path

from eval.benchmark.sequence import check_kind
from eval.benchmark.translation import LENGTHS, TranslationBenchmark, score, translate
from eval.shared.command import Parser, command
from policy.checkpoint import load_model
from policy.dataset.text.pairs import PairBatches, open_pairs, split_pairs
from policy.dataset.text.tokens import load_tokens


def test_pairs(config, source, target):
    """Sentences and references: those of two files, or the test part of the pairs of the training."""
    if source or target:
        return open_pairs(source, target, count=None, seed=config["seed"])
    pairs = open_pairs(config["source"], config["target"], count=config["pairs"], seed=config["seed"])
    return split_pairs(pairs, held_out=config["held_out"], seed=config["seed"])["test"]


@command
def main(arguments=None):
    """The command line."""
    parser = Parser("eval.translate", __doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--source", type=Path, help="sentences to test on, one a line, UTF-8 (default: held-out pairs)")
    parser.add_argument("--target", type=Path, help="their translations, a line each")
    parser.add_argument("--translate", metavar="SENTENCE", help="print its translation, no test")
    parser.add_argument("--beams", type=int, help="of the search (default: as in training)")
    parser.add_argument("--output", type=Path, help="write the test's numbers to this JSON file")
    args = parser.parse_args(arguments)
    model = load_model(args.checkpoint)
    config = model.config
    check_kind(config, "translation", args.checkpoint)
    tokens = load_tokens(config["tokens"], args.checkpoint)
    lengths = {key: config[key] for key in LENGTHS}
    options = {"beams": args.beams or config["beams"], "length_penalty": config["length_penalty"], "device": "cpu"}
    if args.translate is not None:
        print(*translate(model, PairBatches([(args.translate.strip(), "")], tokens, **lengths), tokens, **options))
        return
    data = PairBatches(test_pairs(config, args.source, args.target), tokens, **lengths)
    references = [reference for _, reference in data.texts]
    results = score(translate(model, data, tokens, **options), references)
    results["bleu_greedy"] = score(translate(model, data, tokens, **{**options, "beams": 1}), references)["bleu"]
    print(f"{len(data)} pairs, {data.dropped} too long and dropped: {TranslationBenchmark.describe(results)}")
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
