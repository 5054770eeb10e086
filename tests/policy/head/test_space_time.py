"""Attention over space and time by brute force, in float64 and from the weights alone (arXiv 2102.05095)."""

import pytest
import torch
import torch.nn.functional as F
from clips import FRAMES, PATCHES, SOFTMAX, classifier, clips
from heads import FIBOTTENTION

from policy.attention import fibottention_mask, shuffle_heads, wythoff_offsets


class Reference:
    """The pieces of a ViT from a ``state_dict``; one token sequence (T, C) at a time."""

    def __init__(self, model):
        self.w = {key: value.double() for key, value in model.state_dict().items()}
        self.blocks = [f"encoder.encoders.image.vit.blocks.{layer}" for layer in range(len(model.vision.vit.blocks))]
        self.heads = model.vision.vit.blocks[0].attn.num_heads

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)

    def attention(self, x, name, masks=None):
        q, k, v = (part.chunk(self.heads, dim=-1) for part in self.linear(x, f"{name}.qkv").chunk(3, dim=-1))
        out = []
        for head in range(self.heads):
            scores = q[head] @ k[head].T / q[head].shape[-1] ** 0.5
            scores = scores if masks is None else scores * masks[head]  # the published rule: score 0, weight exp(0)
            out.append(scores.softmax(dim=-1) @ v[head])
        return self.linear(torch.cat(out, dim=-1), f"{name}.proj")

    def mlp(self, x, name):
        return self.linear(F.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    def embed(self, video):
        """Class token (C,) and patches (F, N, C) of one clip, with position and time codes."""
        vit = "encoder.encoders.image.vit"
        filters = self.w[f"{vit}.patch_embed.proj.weight"]
        pixels = F.unfold(video.double(), filters.shape[-1], stride=filters.shape[-1]).transpose(1, 2)
        patches = pixels @ filters.flatten(1).T + self.w[f"{vit}.patch_embed.proj.bias"]
        position = self.w[f"{vit}.pos_embed"][0]
        patches = patches + position[1:] + self.w["space_time.time_embed"][0][:, None]
        return self.w[f"{vit}.cls_token"][0, 0] + position[0], patches


def pattern(layer, tokens, heads):
    return fibottention_mask(shuffle_heads(wythoff_offsets(tokens, heads, variant="robot"), layer), tokens)


def reference_divided(model, video, *, sparse, average):
    """Tokens after the blocks (F, 1+N, C) of one clip (F, 3, s, s): section 3 of arXiv 2102.05095, loop by loop."""
    r = Reference(model)
    token, patches = r.embed(video)
    tokens = [token] * FRAMES
    for layer, block in enumerate(r.blocks):
        time, masks = f"space_time.layers.{layer}", pattern(layer, PATCHES, r.heads) if sparse else None
        for n in range(PATCHES):
            x = r.norm(patches[:, n], f"{time}.norm")  # (F, C)
            patches = patches.clone()
            patches[:, n] += r.linear(r.attention(x, f"{time}.attn"), f"{time}.fc")
        frames = [torch.cat([tokens[f][None], patches[f]]) for f in range(FRAMES)]
        frames = [x + r.attention(r.norm(x, f"{block}.norm1"), f"{block}.attn", masks) for x in frames]
        tokens, patches = [x[0] for x in frames], torch.stack([x[1:] for x in frames])
        if average:
            tokens = [sum(tokens) / FRAMES] * FRAMES
        tokens, patches = [t + r.mlp(t, block) for t in tokens], patches + r.mlp(patches, block)
    return r.norm(torch.cat([torch.stack(tokens)[:, None], patches], dim=1), "encoder.encoders.image.vit.norm")


def reference_joint(model, video, *, sparse):
    """The same of joint attention: one sequence of 1 + F * N tokens."""
    r = Reference(model)
    token, patches = r.embed(video)
    x = torch.cat([token[None], *patches])
    for layer, block in enumerate(r.blocks):
        masks = pattern(layer, FRAMES * PATCHES, r.heads) if sparse else None
        x = x + r.attention(r.norm(x, f"{block}.norm1"), f"{block}.attn", masks)
        x = x + r.mlp(x, block)
    x = r.norm(x, "encoder.encoders.image.vit.norm")
    frames = [torch.cat([x[:1], part]) for part in x[1:].split(PATCHES)]
    return torch.stack(frames)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_divided_attention(sparse, average):
    attention = FIBOTTENTION if sparse else SOFTMAX
    model = classifier(attention=attention, average_class_token=average)
    video = clips()
    with torch.no_grad():
        tokens = model.space_time(model.vision, video)
    for clip in range(2):
        expected = reference_divided(model, video[clip], sparse=sparse, average=average)
        torch.testing.assert_close(tokens[clip], expected.float(), rtol=0, atol=2e-5)
        for other in ({"sparse": not sparse, "average": average}, {"sparse": sparse, "average": not average}):
            assert (reference_divided(model, video[clip], **other) - expected).abs().max() > 1e-2, other


@pytest.mark.parametrize("sparse", [False, True])
def test_joint_attention(sparse):
    """Also that patterns run over the flattened sequence of all frames."""
    model = classifier(attention=FIBOTTENTION if sparse else SOFTMAX, space_time="joint")
    video = clips()
    with torch.no_grad():
        tokens = model.space_time(model.vision, video)
    for clip in range(2):
        expected = reference_joint(model, video[clip], sparse=sparse)
        torch.testing.assert_close(tokens[clip], expected.float(), rtol=0, atol=2e-5)
        assert (reference_joint(model, video[clip], sparse=not sparse) - expected).abs().max() > 1e-2
