"""A language model on text, judged by bits a byte and perplexity of the test part."""

import math
import time

import torch

from eval.benchmark.sequence import SequenceBenchmark
from policy.dataset.text.corpus import TokenWindows, text_parts
from policy.dataset.text.tokens import learn_tokens
from policy.files import write_whole
from policy.sequence.language import surprise, window_starts
from policy.sequence.stepping import way_of

PROMPT = "The "


class LanguageBenchmark(SequenceBenchmark):
    """The next token of a text."""

    def open_data(self, tokens):
        """(tokens, windows for training, held-out windows) of the text that the configuration names."""
        config = self.config
        if not config["contexts"] or not all(isinstance(context, int) for context in config["contexts"]):
            raise ValueError(f"contexts: got {config['contexts']}, allowed: whole numbers, at least one")
        texts = text_parts(config["text"])
        if tokens is None:
            tokens = learn_tokens(config["tokens"], [texts["train"]], size=config["vocabulary"])
        self.encoded = {part: tokens.encode(text) for part, text in texts.items()}
        length = config["context"]
        for context in config["contexts"]:  # an impossible one is an error before the training
            window_starts(len(self.encoded["test"]), length, context)
        train = TokenWindows(self.encoded["train"], length=length, stride=config["stride"])
        return tokens, train, TokenWindows(self.encoded["valid"], length=length, stride=length)

    def describe_data(self):
        """One line of the plan."""
        sizes = ", ".join(f"{len(tokens):,} {part}" for part, tokens in self.encoded.items())
        return f"{self.config['text'] or 'embedded text'}, {self.config['tokens']} tokens: {sizes}"

    def test(self, model, device):
        """Surprise at each of the contexts, and a sample of text."""
        contexts = measure(model, self.encoded["test"], self.tokens, self.config["contexts"], device)
        length = self.config["context"] * 2
        text, rate = write_sample(model, self.tokens, PROMPT, length=length, temperature=0.8, seed=0)
        write_whole(self.run_dir / "sample.txt", text)
        return {
            "text": self.config["text"] or "embedded",
            "test_tokens": len(self.encoded["test"]),
            **max(contexts, key=lambda result: result["context"]),
            "contexts": contexts,
            "decoding": way_of(model.blocks.blocks[0].attention),
            "generated_per_second": rate,
        }

    @staticmethod
    def describe(summary):
        """One line of a summary."""
        return ", ".join(
            f"{result['bits_per_byte']:.3f} bits a byte, perplexity {result['perplexity']:.2f}"
            f" (at least {result['context']} tokens before each)"
            for result in summary["contexts"]
        )

    def finish(self, trainer):
        """As every sequence model; and the command that writes text."""
        use = f'python -m eval.language --checkpoint {self.run_dir} --generate "The "'
        return super().finish(trainer) | {"sample": self.run_dir / "sample.txt", "next": use}


def measure(model, test_tokens, tokens, contexts, device):
    """[{"context", "bits_per_byte", "perplexity" a token}] of the test part, for each least context."""
    size = tokens.count_bytes(test_tokens[1:])
    results = []
    for context in contexts:
        nats = surprise(model, test_tokens, least_context=context, device=device).double()
        bits = nats.sum().item() / math.log(2) / size
        results.append({"context": context, "bits_per_byte": bits, "perplexity": nats.mean().exp().item()})
    return results


def write_sample(model, tokens, prompt, *, length, temperature, seed):
    """(``prompt`` and what the model makes of it, tokens a second)."""
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    drawn = model.generate(tokens.encode(prompt), length, temperature=temperature, generator=generator)
    return prompt + tokens.decode(drawn), length / (time.monotonic() - started)
