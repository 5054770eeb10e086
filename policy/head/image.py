"""Image classification with a policy's vision encoder and a linear head."""

import torch
import torch.nn.functional as F
from torch import nn

from policy.head.backbone import OnEncoder, kept_tokens
from policy.head.mixing import draw_mixing, mix_images, soft_targets
from policy.registry import at_least, choose

FEATURES = ("output", "mean", "cls")


def build_head(width, hidden, num_classes):
    """A linear head (B, width) -> (B, K) that starts at nothing, or one with a layer of ``hidden`` units before it."""
    if hidden is not None:
        at_least(1, **{"model.hidden": hidden})
    last = nn.Linear(hidden or width, num_classes)
    nn.init.trunc_normal_(last.weight, std=2e-5)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), last) if hidden else last


class ImageClassifier(OnEncoder):
    """images -> scores of ``num_classes``; ``encoder`` is an ``ObservationEncoder`` of one camera, as in a policy.

    features: "output" (what the encoder hands to a policy), "mean" of the patch tokens or the "cls" token;
    normalize_features: batch normalisation without weights before the head, for frozen encoders (arXiv 2111.06377,
    appendix A.1); hidden: width of a hidden layer of the head, None for a linear one. In training only: mixup and
    cutmix (parameters of their Beta distributions), label_smoothing, and mask_ratio, the share of the patch tokens that
    are dropped before the first block.
    """

    def __init__(
        self,
        *,
        shape_meta,
        crop,
        encoder,
        attention,
        num_classes,
        features="output",
        normalize_features=False,
        hidden=None,
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=0.0,
        mask_ratio=0.0,
    ):
        choose("model.features", features, FEATURES)
        at_least(2, num_classes=num_classes)
        if min(mixup, cutmix) < 0 or not 0 <= label_smoothing < 1 or not 0 <= mask_ratio < 1:
            got = f"{mixup}, {cutmix}, {label_smoothing}, {mask_ratio}"
            raise ValueError(
                f"mixup, cutmix, label_smoothing, mask_ratio: got {got}, allowed: >= 0, >= 0, 0 to below 1 twice"
            )
        super().__init__(shape_meta=shape_meta, crop=crop, encoder=encoder, attention=attention)
        self.features, self.num_classes = features, num_classes
        self.mixup, self.cutmix, self.label_smoothing, self.mask_ratio = mixup, cutmix, label_smoothing, mask_ratio
        vision = self.vision
        if not hasattr(vision, "tokens") and (features != "output" or mask_ratio):
            raise ValueError("features, mask_ratio: got a choice of tokens, allowed: output and 0 (no ViT)")
        if features == "cls" and vision.vit.cls_token is None:
            raise ValueError("model.features: got 'cls', allowed: output, mean (no class token)")
        width = vision.out_dim if features == "output" else vision.vit.embed_dim
        if features != "output":
            self.freeze_reading()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if normalize_features else nn.Identity()
        self.head = build_head(width, hidden, num_classes)

    def compile_training(self):
        """Compile what a training step spends its time in (torch.compile)."""
        self.encoder.compile_cameras()

    def randomness(self, count, generator):
        """What a training step draws: how to mix, and an order of the patch tokens of which the last are dropped."""
        drawn = {}
        if self.mixup or self.cutmix:
            drawn |= draw_mixing(count, generator, mixup=self.mixup, cutmix=self.cutmix)
        if self.mask_ratio:
            rows, columns = self.vision.grid
            drawn["order"] = torch.rand(count, rows * columns, generator=generator)
        return drawn

    def encode(self, images, kept=None):
        """images (B, 3, h, w) in [-1, 1] -> features (B, width)."""
        if self.features == "output":
            return self.vision(images) if kept is None else self.vision(images, kept)
        return self.read(self.vision.tokens(images, kept))

    def read(self, tokens):
        """tokens after the final norm (B, P+N, C) -> features (B, width)."""
        if self.features == "output":
            return self.vision.read(tokens)
        return tokens[:, 0] if self.features == "cls" else tokens[:, self.vision.prefix_tokens :].mean(dim=1)

    def encode_batch(self, batch):
        """{"image": (B, 3, h, w)} -> features (B, width), what ``logits`` takes in place of images."""
        return self.encode(batch["image"])

    def logits(self, batch):
        """{"image": (B, 3, h, w)} or {"features": (B, width)} -> scores (B, K)."""
        features = batch["features"] if "features" in batch else self.encode_batch(batch)
        return self.head(self.norm(features.float()))

    def forward(self, batch, randomness):
        """{"loss": cross-entropy, "top1": share of images whose label, when mixed the larger one, scores highest}."""
        labels = batch["label"]
        if not self.training or "features" in batch:
            logits = self.logits(batch)
            smoothing = self.label_smoothing if self.training else 0.0
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            return {"loss": loss, "top1": (logits.argmax(dim=1) == labels).float().mean()}
        images, share = batch["image"], None
        if "share" in randomness:
            images, share = mix_images(images, randomness)
        kept = kept_tokens(randomness["order"], self.mask_ratio) if "order" in randomness else None
        logits = self.head(self.norm(self.encode(images, kept).float()))
        loss = F.cross_entropy(
            logits, soft_targets(labels, self.num_classes, smoothing=self.label_smoothing, share=share)
        )
        main = labels if share is None else torch.where(share >= 0.5, labels, labels.flip(0))
        return {"loss": loss, "top1": (logits.argmax(dim=1) == main).float().mean()}
