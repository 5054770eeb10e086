"""A small language model with any causal attention mechanism: training, perplexity, text.

    python -m eval.language                                         Python's own help texts, bytes
    python -m eval.language --attention softmax causal_eva_text performer     several, and a table
    python -m eval.language --text FILE_OR_FOLDER tokens=bpe
    python -m eval.language --checkpoint RUN --generate "The for statement" --temperature 0.7

Text is generated token by token; summary.json says what the mechanism keeps for that.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from eval.shared import sequence
from eval.shared.command import command
from eval.shared.tracker import write_whole
from policy.checkpoint import load_model
from policy.dataset.text.corpus import TokenWindows, text_parts
from policy.dataset.text.tokens import learn_tokens, load_tokens
from policy.sequence.language import surprise, window_starts
from policy.sequence.stepping import way_of

PROMPT = "The "
COLUMNS = {
    "bits a byte (least context)": lambda summary: _at_contexts(summary, "bits_per_byte", 3),
    "perplexity": lambda summary: _at_contexts(summary, "perplexity", 2),
    "steps": lambda summary: f"{summary['steps']}",
    "parameters": lambda summary: f"{summary['parameters'] / 1e6:.2f} M",
    "training, minutes": lambda summary: f"{summary['training_minutes']:.1f}",
    "decoding keeps": lambda summary: summary["decoding"],
    "tokens a second": lambda summary: f"{summary['generated_per_second']:.0f}",
}


def _at_contexts(summary, key, digits):
    """The values of ``key`` at the first and the last of the contexts."""
    results = summary["contexts"]
    return ", ".join(f"{result[key]:.{digits}f} ({result['context']})" for result in (results[0], results[-1]))


def open_data(config, run_dir):
    """{"tokens", "train", "valid", "test"} of the text that ``config`` names; run_dir: a run whose tokens to take.

    "train" and "valid" are windows for the trainer, "test" (n,) token numbers.
    """
    if not config["contexts"] or not all(isinstance(context, int) for context in config["contexts"]):
        raise ValueError(f"contexts: got {config['contexts']}, allowed: whole numbers, at least one")
    texts = text_parts(config["text"])
    if run_dir is None:
        tokens = learn_tokens(config["tokens"], [texts["train"]], size=config["vocabulary"])
    else:
        tokens = load_tokens(config["tokens"], run_dir)
    encoded = {part: tokens.encode(text) for part, text in texts.items()}
    length = config["context"]
    sizes = ", ".join(f"{len(encoded[part]):,} {part}" for part in encoded)
    print(f"{config['text'] or 'embedded text'}, {config['tokens']}: tokens {sizes}")
    for context in config["contexts"]:  # what is impossible is said before the training
        window_starts(len(encoded["test"]), length, context)
    return {
        "tokens": tokens,
        "train": TokenWindows(encoded["train"], length=length, stride=config["stride"]),
        "valid": TokenWindows(encoded["valid"], length=length, stride=length),
        "test": encoded["test"],
    }


def measure(model, data, config, device):
    """Bits a byte and perplexity a token of the test part, at each of config["contexts"]."""
    tokens = data["test"]
    size = data["tokens"].count_bytes(tokens[1:])
    results = []
    for context in config["contexts"]:
        nats = surprise(model, tokens, least_context=context, device=device).double()
        results.append(
            {
                "context": context,
                "bits_per_byte": nats.sum().item() / math.log(2) / size,
                "perplexity": nats.mean().exp().item(),
            }
        )
    return results


def write_sample(model, tokens, prompt, *, length, temperature, seed):
    """(``prompt`` and what the model makes of it, tokens a second)."""
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    drawn = model.generate(tokens.encode(prompt), length, temperature=temperature, generator=generator)
    return prompt + tokens.decode(drawn), length / (time.monotonic() - started)


def run(config, data, run_dir, *, resume):
    """Train and test what ``config`` describes; returns the summary."""
    started = time.monotonic()
    trainer = sequence.fit(config, data, run_dir, resume=resume)
    trained = time.monotonic()
    model = trainer.ema.model.eval()
    results = measure(model, data, config, trainer.accelerator.device)
    text, rate = write_sample(model, data["tokens"], PROMPT, length=config["context"] * 2, temperature=0.8, seed=0)
    write_whole(run_dir / "sample.txt", text)
    summary = {
        **sequence.describe(trainer, config),
        "text": config["text"] or "embedded",
        "test_tokens": len(data["test"]),
        **max(results, key=lambda result: result["context"]),
        "contexts": results,
        "decoding": way_of(model.blocks.blocks[0].attention),
        "generated_per_second": rate,
        "training_minutes": (trained - started) / 60,
        "minutes": (time.monotonic() - started) / 60,
    }
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=1))
    for result in results:
        print(
            f"context >= {result['context']}: {result['bits_per_byte']:.3f} bits a byte,"
            f" perplexity {result['perplexity']:.2f} a token"
        )
    print(f"results: {run_dir}")
    return summary


def generate(args):
    """Print what a trained model makes of a prompt."""
    model = load_model(args.checkpoint)
    sequence.check_kind(model.config, "language", args.checkpoint)
    tokens = load_tokens(model.config["tokens"], args.checkpoint)
    print(
        write_sample(model, tokens, args.generate, length=args.length, temperature=args.temperature, seed=args.seed)[0]
    )


@command
def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sequence.add_arguments(parser)
    parser.add_argument("--text", type=Path, help="a UTF-8 file or a folder (default: Python's own help texts)")
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="with --generate: a run folder")
    parser.add_argument("--generate", metavar="PROMPT", help="print how a trained model goes on")
    parser.add_argument("--length", type=int, default=400, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is generated (default: %(default)s)")
    args = sequence.parse(parser, arguments)
    if (args.generate is None) != (args.checkpoint is None):
        raise ValueError("--generate, --checkpoint: got one of them, allowed: both or neither")
    if args.generate is not None:
        generate(args)
        return
    overrides = [sequence.quoted("text", args.text)] if args.text else []
    sequence.main(args, kind="language", overrides=overrides, open_data=open_data, run=run, columns=COLUMNS)


if __name__ == "__main__":
    main()
