"""Translation: an encoder on any attention mechanism, a causal decoder (arXiv 1706.03762, with norms first)."""

import torch
import torch.nn.functional as F
from torch import nn

from policy.sequence.blocks import Blocks, Embedding
from policy.sequence.search import beam_search

SPECIALS = 3  # end, start, padding: the numbers that follow those of the vocabulary


class TranslationModel(nn.Module):
    """source (B, S) and the target so far (B, T) -> scores (B, T, V+1) of what follows: V tokens, or the end.

    attention: {"name": ..., options} of the encoder's self-attention; decoder_attention: of the decoder's, causal;
    attention to the source is dense. Tokens V, V+1 and V+2 are end, start and padding; sources end with the end and
    are padded to ``source_length``, so that a mechanism's windows and landmarks do not depend on the batch. The
    embeddings of both languages and the output share weights. label_smoothing: in training. Raises ValueError for a
    decoder without a causal form.
    """

    def __init__(
        self,
        *,
        attention,
        decoder_attention,
        vocabulary,
        source_length,
        target_length,
        dim,
        depth,
        decoder_depth,
        num_heads,
        mlp_ratio=4.0,
        dropout=0.0,
        label_smoothing=0.0,
    ):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: got {label_smoothing}, allowed: 0 to below 1")
        sizes = {"dim": dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "dropout": dropout}
        self.encoder = Blocks(attention, length=source_length, depth=depth, **sizes)
        self.decoder = Blocks(
            decoder_attention, length=target_length, depth=decoder_depth, causal=True, cross=True, **sizes
        )
        self.end, self.start, self.padding = range(vocabulary, vocabulary + SPECIALS)
        self.source_length, self.target_length = source_length, target_length
        self.source_embedding = Embedding(vocabulary + SPECIALS, source_length, dim)
        self.target_embedding = Embedding(vocabulary + SPECIALS, target_length, dim)
        self.target_embedding.tokens = self.source_embedding.tokens
        self.dropout = nn.Dropout(dropout)
        self.label_smoothing = label_smoothing

    def compile_training(self):
        """Compile what a training step spends its time in (torch.compile)."""
        self.encoder.compile()
        self.decoder.compile(dynamic=True)

    def randomness(self, count, generator):
        """A training step draws nothing but dropout and what the attention draws, both from torch's own generator."""
        return {}

    def encode(self, source):
        """source (B, S) of source_length tokens -> what each block of the decoder reads of it."""
        padding = source == self.padding
        encoded = self.encoder(self.dropout(self.source_embedding(source)), key_padding_mask=padding)
        return self.decoder.read(encoded, padding)

    def logits(self, source, target):
        """source (B, S) of source_length tokens, target (B, T) from the start on -> scores (B, T, V+1)."""
        x = self.dropout(self.target_embedding(target))
        return self._scores(self.decoder(x, memories=self.encode(source)))

    def begin(self, source):
        """The state of decoding before the first token, of source (B, S)."""
        return self.decoder.start(self.encode(source))

    def step(self, tokens, state):
        """The next tokens (B,) of the targets, after those of ``state`` -> (scores (B, V+1), the new state)."""
        x, state = self.decoder.step(self.target_embedding.step(tokens, state.place), state)
        return self._scores(x), state

    def _scores(self, x):
        return F.linear(x, self.target_embedding.tokens.weight[: self.end + 1])  # start and padding never follow

    def forward(self, batch, randomness):
        """{"source": (B, S), "target": (B, T+1)} -> {"loss": mean cross-entropy in nats a token, "top1": share right}.

        A target starts with the start, ends with the end and is padded then.
        """
        target = batch["target"]
        logits = self.logits(batch["source"], target[:, :-1]).float().flatten(0, 1)
        labels = target[:, 1:].flatten()
        smoothing = self.label_smoothing if self.training else 0.0
        options = {"ignore_index": self.padding, "label_smoothing": smoothing, "reduction": "sum"}
        real = labels != self.padding
        count = real.sum().clamp(min=1)  # targets may be padding alone, of which the mean would be NaN
        right = (logits.argmax(dim=-1) == labels) & real
        return {"loss": F.cross_entropy(logits, labels, **options) / count, "top1": right.sum() / count}

    def translate(self, source, *, beams=4, length_penalty=1.0):
        """The likeliest target that was found for each source (B, S): a list of lists of tokens, in evaluation mode."""
        ends = {"start": self.start, "end": self.end, "most": self.target_length}
        options = {"beams": beams, "length_penalty": length_penalty, "device": source.device}
        with torch.no_grad():
            found = beam_search(self.step, self.begin(source), len(source), **ends, **options)
        return [best[0][1] for best in found]
