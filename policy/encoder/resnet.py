"""ResNet-18 with GroupNorm and spatial softmax, the published baseline encoder (arXiv 2303.04137, section III-A)."""

import torchvision
from torch import nn

from policy.encoder.spatial_softmax import SpatialSoftmax


class ResNet18Encoder(nn.Module):
    """One camera: images (B, 3, h, w) in [-1, 1] -> features (B, out_dim).

    BatchNorm is replaced by GroupNorm because an exponential moving average of the weights does not fit running
    statistics. image_size: h = w after cropping.
    """

    def __init__(self, *, image_size, num_keypoints=32, out_dim=64):
        super().__init__()
        if image_size <= 32:  # a feature map of one cell, whose spatial softmax sees nothing
            raise ValueError(f"image size: got {image_size}, allowed: at least 33 px for a ResNet-18")
        resnet = torchvision.models.resnet18(norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels))
        self.backbone = nn.Sequential(*list(resnet.children())[:-2])  # (B, 512, h/32, w/32)
        side = -(-image_size // 32)
        self.keypoints = SpatialSoftmax(512, num_keypoints, (side, side))
        self.readout = nn.Linear(self.keypoints.out_dim, out_dim)
        self.out_dim = out_dim

    num_layers = 5  # for layer-wise learning rates: the stem, four stages; what follows is the last one's successor

    def layer_of(self, name):
        """Layer of the parameter called ``name``: 0 stem, 1 to 4 stages, ``num_layers`` key points and read-out."""
        if not name.startswith("backbone."):
            return self.num_layers
        return max(int(name.split(".")[1]) - 3, 0)

    def forward(self, images):
        """images (B, 3, h, w) in [-1, 1] -> features (B, out_dim)."""
        return self.readout(self.keypoints(self.backbone(images)))
