"""In the style of the original DDPM code and its PyTorch ports: bmm attention with a permuted softmax, popped skips."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(timesteps: Tensor, channels: int) -> Tensor:
    half = channels // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = timesteps.float()[:, None] * rates[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, out_channels)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = h + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        batch, channels, height, width = q.shape
        q = q.reshape(batch, channels, height * width).permute(0, 2, 1)
        k = k.reshape(batch, channels, height * width)
        weights = torch.bmm(q, k) * (int(channels) ** (-0.5))
        weights = torch.nn.functional.softmax(weights, dim=2)
        v = v.reshape(batch, channels, height * width)
        weights = weights.permute(0, 2, 1)
        h = torch.bmm(v, weights).reshape(batch, channels, height, width)
        return x + self.proj_out(h)


class DdpmUNet(nn.Module):
    """Two resolutions, attention at the lower one: 3 shortcuts, 3 attentions."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        embedding = 4 * channels
        self.channels = channels
        self.dense = nn.ModuleList([nn.Linear(channels, embedding), nn.Linear(embedding, embedding)])
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down0 = ResnetBlock(channels, channels, embedding)
        self.downsample = nn.Conv2d(channels, channels, 3, stride=2)
        self.down1 = ResnetBlock(channels, 2 * channels, embedding)
        self.down1_attn = AttnBlock(2 * channels)
        self.mid1 = ResnetBlock(2 * channels, 2 * channels, embedding)
        self.mid_attn = AttnBlock(2 * channels)
        self.mid2 = ResnetBlock(2 * channels, 2 * channels, embedding)
        self.up1 = ResnetBlock(4 * channels, 2 * channels, embedding)
        self.up1_attn = AttnBlock(2 * channels)
        self.upsample = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.up0 = nn.ModuleList(
            [ResnetBlock(3 * channels, channels, embedding), ResnetBlock(2 * channels, channels, embedding)]
        )
        self.norm_out = nn.GroupNorm(4, channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.dense[1](swish(self.dense[0](sinusoids(t, self.channels))))
        hs = [self.conv_in(x)]
        hs.append(self.down0(hs[-1], temb))
        h = self.downsample(torch.nn.functional.pad(hs[-1], (0, 1, 0, 1)))
        h = self.down1_attn(self.down1(h, temb))
        hs.append(h)
        h = self.mid2(self.mid_attn(self.mid1(h, temb)), temb)
        h = self.up1_attn(self.up1(torch.cat([h, hs.pop()], dim=1), temb))
        h = self.upsample(torch.nn.functional.interpolate(h, scale_factor=2.0, mode="nearest"))
        for block in self.up0:
            h = block(torch.cat([h, hs.pop()], dim=1), temb)
        return self.conv_out(swish(self.norm_out(h)))
