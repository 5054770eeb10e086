"""Translation, judged by BLEU and chrF of the test pairs."""

import numpy as np
from tqdm import tqdm

from eval.benchmark.sequence import SequenceBenchmark
from policy.dataset.text.pairs import PairBatches, open_pairs, split_pairs
from policy.dataset.text.tokens import learn_tokens
from policy.files import write_whole
from policy.sequence.search import check_beams
from policy.training.batches import to_tensors

SHOWN = 40  # translations in examples.txt
LENGTHS = ("source_length", "target_length")


class TranslationBenchmark(SequenceBenchmark):
    """Sentences of one language into another."""

    def open_data(self, tokens):
        """(tokens, pairs for training, held-out pairs) that the configuration names."""
        metrics()  # a missing package or an impossible option is an error before the training
        config = self.config
        check_beams(config["beams"])
        if not 0 <= config["length_penalty"] <= 10:
            raise ValueError(f"length_penalty: got {config['length_penalty']}, allowed: 0 to 10")
        pairs = open_pairs(config["source"], config["target"], count=config["pairs"], seed=config["seed"])
        parts = split_pairs(pairs, held_out=config["held_out"], seed=config["seed"])
        self.repeated = len(pairs) - sum(map(len, parts.values()))
        if tokens is None:
            sides = [side for pair in parts["train"] for side in pair]
            tokens = learn_tokens(config["tokens"], sides, size=config["vocabulary"])
        lengths = {key: config[key] for key in LENGTHS}
        self.parts = {part: PairBatches(pairs, tokens, **lengths) for part, pairs in parts.items()}
        return tokens, self.parts["train"], self.parts["valid"]

    def describe_data(self):
        """One line of the plan."""
        counts = [f"{len(data):,} {part} ({data.dropped} too long, dropped)" for part, data in self.parts.items()]
        source = self.config["source"] or "embedded pairs"
        return f"{source}: {', '.join(counts)}; {self.repeated:,} repeat a sentence and are left out"

    def test(self, model, device):
        """BLEU, chrF and exact sentences of beam search, BLEU of greedy search; writes examples.txt."""
        config, data = self.config, self.parts["test"]
        options = {"length_penalty": config["length_penalty"], "device": device}
        translations = translate(model, data, self.tokens, beams=config["beams"], **options)
        greedy = translate(model, data, self.tokens, beams=1, **options)
        references = [reference for _, reference in data.texts]
        rows = zip(data.texts, translations, strict=True)
        shown = [f"source     {one}\nreference  {other}\nmodel      {made}\n" for (one, other), made in rows]
        write_whole(self.run_dir / "examples.txt", "\n".join(shown[:SHOWN]))
        return {
            "decoder_attention": config["model"]["decoder_attention"]["name"],
            "data": [str(config["source"]), str(config["target"])] if config["source"] else "embedded",
            "train_pairs": len(self.parts["train"]),
            "test_pairs": len(data),
            "dropped": {part: pairs.dropped for part, pairs in self.parts.items()},
            "beams": config["beams"],
            **score(translations, references),
            "bleu_greedy": score(greedy, references)["bleu"],
        }

    @staticmethod
    def describe(summary):
        """One line of a summary."""
        low, high = summary["bleu_ci95"]
        return (
            f"BLEU {summary['bleu']:.1f} [{low:.1f}, {high:.1f}], chrF {summary['chrf']:.1f},"
            f" exact {summary['exact']:.1%}, BLEU of greedy search {summary['bleu_greedy']:.1f}"
        )

    def finish(self, trainer):
        """As every sequence model; and the command that translates."""
        use = f'python -m eval.translate --checkpoint {self.run_dir} --translate "Pick up the red cup."'
        return super().finish(trainer) | {"examples": self.run_dir / "examples.txt", "next": use}


def metrics():
    """sacrebleu's classes BLEU and CHRF; ImportError names the install line."""
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
    bleu_metric, chrf_metric = (metric() for metric in metrics())
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
