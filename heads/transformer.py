"""Transformer layers of the heads: post-norm, positions added to queries and keys (DETR, arXiv 2005.12872).

Submodule names follow torch.nn.Transformer, and so do the weights of the authors' release.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EncoderLayer(nn.Module):
    """x <- LN(x + SelfAttention(x)); x <- LN(x + FFN(x))."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float = 0.0):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, pos: Tensor, padding: Tensor | None) -> Tensor:
        """x, pos: (B, N, dim); padding: (B, N) bool, True is padding, or None."""
        keys = x + pos
        attended = self.self_attn(keys, keys, x, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DecoderLayer(nn.Module):
    """Self-attention over the queries, cross-attention into the memory, FFN; a LayerNorm after each."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float = 0.0):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, q: Tensor, query_pos: Tensor, keys: Tensor, memory: Tensor, padding: Tensor | None):
        """q, query_pos: (B, Q, dim); memory: (B, N, dim), keys: memory + positions; padding as above."""
        x = q + query_pos
        q = self.norm1(q + self.dropout(self.self_attn(x, x, q, need_weights=False)[0]))
        x = q + query_pos
        attended = self.multihead_attn(x, keys, memory, key_padding_mask=padding, need_weights=False)[0]
        q = self.norm2(q + self.dropout(attended))
        return self.norm3(q + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(q))))))


class MLP(nn.Module):
    """Linear layers with ReLU between them: dim -> hidden -> ... -> out."""

    def __init__(self, dim: int, hidden: int, out: int, depth: int):
        super().__init__()
        widths = [dim, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def sine_position(grid: Tensor, valid: Tensor | None, feats: int) -> Tensor:
    """Sine and cosine of the row and the column, normalized to (0, 2 pi] over the valid part.

    grid: (B, D, H, W), for its size and device; valid: (B, H, W) bool or None
    Returns (B, H * W, 2 * feats), B = 1 without padding: the rows' code, then the columns'
    """
    if valid is None:
        valid = torch.ones(1, *grid.shape[2:], dtype=torch.bool, device=grid.device)
    y = valid.cumsum(1, dtype=torch.float32)  # (B, H, W), counted from 1
    x = valid.cumsum(2, dtype=torch.float32)
    y, x = 2 * math.pi * y / (y[:, -1:] + 1e-6), 2 * math.pi * x / (x[:, :, -1:] + 1e-6)
    wavelength = 10_000 ** (torch.arange(0, feats, 2, device=grid.device) / feats)  # (feats / 2,)
    angles = [p[..., None] / wavelength for p in (y, x)]
    codes = [torch.stack([a.sin(), a.cos()], -1).flatten(3) for a in angles]  # sine and cosine alternate
    return torch.cat(codes, -1).flatten(1, 2).to(grid.dtype)  # (B, H * W, 2 * feats)
