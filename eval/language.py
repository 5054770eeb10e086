"""Test a trained language model, or let it write.

    python -m eval.language --checkpoint RUN                                      bits a byte, perplexity
    python -m eval.language --checkpoint RUN --generate "The for statement" --temperature 0.7

Text is generated token by token. Training: python train.py --config-dir=config/language.
"""

import json
from pathlib import Path

from eval.benchmark.language import LanguageBenchmark, measure, write_sample
from eval.benchmark.sequence import check_kind
from eval.shared.command import Parser, command
from policy.checkpoint import load_model
from policy.dataset.text.corpus import text_parts
from policy.dataset.text.tokens import load_tokens


def test(model, tokens, text=None):
    """{"contexts": bits a byte and perplexity at each least context} of the test part of ``text`` or of its own."""
    config = model.config
    encoded = tokens.encode(text_parts(text or config["text"])["test"])
    return {"test_tokens": len(encoded), "contexts": measure(model, encoded, tokens, config["contexts"], "cpu")}


@command
def main(arguments=None):
    """The command line."""
    parser = Parser("eval.language", __doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--text", type=Path, help="test on this file or folder (default: the text of the training)")
    parser.add_argument("--generate", metavar="PROMPT", help="print how the model goes on, no test")
    parser.add_argument("--length", type=int, default=400, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the generated text")
    parser.add_argument("--output", type=Path, help="write the test's numbers to this JSON file")
    args = parser.parse_args(arguments)
    model = load_model(args.checkpoint)
    check_kind(model.config, "language", args.checkpoint)
    tokens = load_tokens(model.config["tokens"], args.checkpoint)
    if args.generate is not None:
        options = {"length": args.length, "temperature": args.temperature, "seed": args.seed}
        print(write_sample(model, tokens, args.generate, **options)[0])
        return
    results = test(model, tokens, args.text)
    print(LanguageBenchmark.describe(results))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
