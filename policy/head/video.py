"""Video classification with a policy's vision encoder: TimeSformer (arXiv 2102.05095) or frame by frame."""

import math

import torch.nn.functional as F
from torch import nn

from policy.head.backbone import CAMERA
from policy.head.image import ImageClassifier, build_head
from policy.head.space_time import DividedSpaceTime, JointSpaceTime
from policy.registry import choose

SPACE_TIMES = ("divided", "joint", "space")
HEADS = ("linear", "temporal")
HIDDEN = 256  # of the temporal head


class VideoClassifier(ImageClassifier):
    """clips of ``frames`` F -> scores of ``num_classes``; encoder and ``features`` as in ``ImageClassifier``.

    space_time: "divided" (see ``DividedSpaceTime``, also for average_class_token), "joint" (``JointSpaceTime``) or
    "space": every frame on its own. head: "linear" reads the mean of the frames' features, "temporal" all of them in
    order through an MLP. dropout: of what the head reads. Raises ValueError for choices that do not go together.
    """

    def __init__(
        self,
        *,
        shape_meta,
        crop,
        encoder,
        attention,
        num_classes,
        frames,
        space_time="divided",
        average_class_token=False,
        features="output",
        head="linear",
        dropout=0.0,
        label_smoothing=0.0,
    ):
        super().__init__(
            shape_meta=shape_meta,
            crop=crop,
            encoder=encoder,
            attention=attention,
            num_classes=num_classes,
            features=features,
            label_smoothing=label_smoothing,
        )
        choose("model.space_time", space_time, SPACE_TIMES)
        choose("model.head", head, HEADS)
        if frames < 1 or not 0 <= dropout < 1:
            raise ValueError(f"frames, dropout: got {frames}, {dropout}, allowed: >= 1, 0 to below 1")
        if space_time != "space" and not hasattr(self.vision, "tokens"):
            raise ValueError(f"model.space_time: got {space_time!r}, allowed: space (the encoder is no ViT)")
        if average_class_token and (space_time != "divided" or not self.vision.prefix_tokens):
            raise ValueError(
                "model.average_class_token: got true, allowed: false (for space_time=divided and a class token only)"
            )
        self.frames, self.head_reads, self.width = frames, head, self.head.in_features
        self.space_time = None
        if space_time == "divided":
            self.space_time = DividedSpaceTime(self.vision, frames, average_class_token=average_class_token)
        elif space_time == "joint":
            self.space_time = JointSpaceTime(self.vision, frames, attention=attention)
        self.dropout = nn.Dropout(dropout)
        if head == "temporal":
            mlp = build_head(frames * self.width, HIDDEN, num_classes)
            self.head = nn.Sequential(nn.LayerNorm(self.width), nn.Flatten(-2), mlp)  # (..., F * width) -> (..., K)

    def layer_of(self, name):
        """Layer of the parameter called ``name``: what a block got for time counts as the block's."""
        if name == "space_time.time_embed":
            return 0
        return int(name.split(".")[2]) + 1 if name.startswith("space_time.") else super().layer_of(name)

    def compile_training(self):
        """Compile what a training step spends its time in (torch.compile)."""
        self.compile(dynamic=True)

    def encode_batch(self, batch):
        """Features (B, [V,] F, width) of {"video": (B, [V,] F, 3, s, s)}; "features" of that shape pass through.

        Raises ValueError for another number or size of frames, and for "features" unless frames are on their own.
        """
        if "features" in batch:
            if self.space_time is not None:
                raise ValueError("features: got cached ones, allowed: a video, or model.space_time=space")
            return self._check("features", batch["features"], (self.frames, self.width))
        side = self.encoder.crop or self.encoder.shapes[CAMERA][1]
        video = self._check("video", batch["video"], (self.frames, 3, side, side))
        lead = video.shape[:-4]
        return self._encode_clips(video.flatten(0, -5)).unflatten(0, lead)

    def _check(self, name, values, shape):
        lead = values.ndim - len(shape)
        if lead not in (1, 2) or tuple(values.shape[lead:]) != shape:
            raise ValueError(
                f"{name}: got shape {tuple(values.shape)}, allowed: (B, F, ...) or (B, V, F, ...) that ends in {shape}"
            )
        return values

    def _encode_clips(self, video):
        """video (U, F, 3, s, s) in [-1, 1] -> features (U, F, width)."""
        if self.space_time is None:
            return self.encode(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        return self.read(self.space_time(self.vision, video).flatten(0, 1)).unflatten(0, video.shape[:2])

    def logits(self, batch):
        """{"video" or "features"} as in ``encode_batch`` -> scores (B, K).

        Of several views they are the logarithm of the mean of their probabilities.
        """
        features = self.encode_batch(batch).float()
        if self.head_reads == "linear":
            features = features.mean(dim=-2)
        scores = self.head(self.dropout(features))
        if scores.ndim == 2:
            return scores
        return scores.log_softmax(dim=-1).logsumexp(dim=1) - math.log(scores.shape[1])

    def forward(self, batch, randomness):
        """{"loss": cross-entropy, "top1": share of clips whose label scores highest}."""
        logits, labels = self.logits(batch), batch["label"]
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing if self.training else 0.0)
        return {"loss": loss, "top1": (logits.argmax(dim=1) == labels).float().mean()}
