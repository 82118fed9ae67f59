"""Text recognition head: a 4-layer transformer over patch tokens, read character by character (Sec. 4.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranks import mean_over_ranks

IGNORE = -100  # of cross_entropy: what comes after a word's end


class OcrHead(nn.Module):
    """T_o: the characters are read from the first patch tokens in order, as ViTSTR (arXiv 2105.08582).

    dim: width of the features; tokens: how many, [CLS] included; longest: characters of a word, at most
    """

    def __init__(self, dim: int, tokens: int, charset: str, longest=25, width=512, depth=4):
        super().__init__()
        self.config = dict(dim=dim, tokens=tokens, charset=charset, longest=longest, width=width, depth=depth)
        self.charset, self.length = charset, longest + 1  # the characters and the end
        if tokens < self.length + 1:
            raise ValueError(f"{tokens} tokens are too few to read {self.length} from: larger --size")
        self.project = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        # As large as the projected tokens: at ViT's 0.02 the head learns late where it is reading
        self.position = nn.Parameter(0.5 * torch.randn(1, tokens, width))
        shape = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)  # as DeiT, ViTSTR
        layers = (nn.TransformerEncoderLayer(width, 8, 4 * width, **shape) for _ in range(depth))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, 1 + len(charset))  # 0 is the end, 1 the first character

    def forward(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(f, y)

    def logits(self, f) -> Tensor:
        """Features -> (B, 26, 1 + characters)."""
        x = self.project(tokens_of(f)) + self.position  # (B, N, width)
        for layer in self.layers:
            x = layer(x)
        first = 0 if f.cls is None else 1  # ViTSTR reads from [CLS] on, and ignores what that says
        return self.classify(self.norm(x[:, first : first + self.length]))

    def loss(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, averaged over all characters and ends of the batch on all ranks.

        y: B dicts with label, of characters of the charset
        """
        logits, targets = self.logits(f), self.encode([t["label"] for t in y]).to(f.grid.device)
        characters = mean_over_ranks([sum(len(t["label"]) + 1 for t in y)], logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        right = (logits.argmax(-1) == targets) | (targets == IGNORE)
        return loss / characters[0], {"right": right.all(1).float().mean()}

    @torch.no_grad()
    def predict(self, f, y: list[dict]) -> list[dict]:
        """The most likely character at each place up to the first end; all of them if there is no end."""
        best = self.logits(f).argmax(-1).tolist()  # (B, 26)
        texts = [self.decode(codes) for codes in best]
        return [{"image_id": t["image_id"], "text": text} for t, text in zip(y, texts, strict=True)]

    def encode(self, labels: list[str]) -> Tensor:
        """(B, 26): the characters, the end, then IGNORE."""
        words = [[*(1 + self.charset.index(c) for c in label), 0] for label in labels]
        return torch.tensor([codes + [IGNORE] * (self.length - len(codes)) for codes in words])

    def decode(self, codes: list[int]) -> str:
        """The characters of (26,) codes up to the first end."""
        end = codes.index(0) if 0 in codes else len(codes)
        return "".join(self.charset[code - 1] for code in codes[:end])


def tokens_of(f) -> Tensor:
    """(B, N, dim): [CLS], if there is one, and the patch tokens."""
    x = f.grid.flatten(2).transpose(1, 2)
    return x if f.cls is None else torch.cat([f.cls[:, None], x], 1)
