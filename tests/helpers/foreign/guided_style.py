"""In the style of guided-diffusion: scale-shift norm, qkv as conv1d, einsum attention with both operands scaled."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foreign.ddpm_style import sinusoids


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, embedding: int, *, up: bool = False) -> None:
        super().__init__()
        self.up = up
        self.in_layers = nn.Sequential(
            nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(4, out_channels),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.up:
            h = self.in_layers[:-1](x)
            h = nn.functional.interpolate(h, scale_factor=2, mode="nearest")
            x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
            h = self.in_layers[-1](h)
        else:
            h = self.in_layers(x)
        scale, shift = torch.chunk(self.emb_layers(emb)[:, :, None, None], 2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *spatial = x.shape
        x = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(x))
        length, width = qkv.shape[-1], channels // self.heads
        q, k, v = qkv.reshape(batch * self.heads, 3 * width, length).split(width, dim=1)
        scale = 1 / math.sqrt(math.sqrt(width))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(batch, -1, length)
        return (x + self.proj_out(h)).reshape(batch, channels, *spatial)


class GuidedUNet(nn.Module):
    """Two resolutions, upsampling inside a residual block, class labels: 3 shortcuts, 3 attentions."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        embedding = 4 * channels
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label_emb = nn.Embedding(classes, embedding)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.input0 = ResBlock(channels, channels, embedding)
        self.downsample = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.input1 = ResBlock(channels, 2 * channels, embedding)
        self.input1_attention = AttentionBlock(2 * channels, 2)
        self.middle1 = ResBlock(2 * channels, 2 * channels, embedding)
        self.middle_attention = AttentionBlock(2 * channels, 2)
        self.middle2 = ResBlock(2 * channels, 2 * channels, embedding)
        self.output1 = ResBlock(4 * channels, 2 * channels, embedding)
        self.output1_attention = AttentionBlock(2 * channels, 2)
        self.upsample = ResBlock(2 * channels, 2 * channels, embedding, up=True)
        self.output0 = nn.ModuleList(
            [ResBlock(3 * channels, channels, embedding), ResBlock(2 * channels, channels, embedding)]
        )
        self.out = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, 6, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(sinusoids(timesteps, self.channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        hs = [self.stem(x)]
        hs.append(self.input0(hs[-1], emb))
        h = self.input1_attention(self.input1(self.downsample(hs[-1]), emb))
        hs.append(h)
        h = self.middle2(self.middle_attention(self.middle1(h, emb)), emb)
        h = self.output1_attention(self.output1(torch.cat([h, hs.pop()], dim=1), emb))
        h = self.upsample(h, emb)
        for block in self.output0:
            h = block(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h)
