"""Detection head: DETR on a frozen ViT's patch tokens (paper Sec. 3.2, 4.2; DETR, arXiv 2005.12872).

Shaped as the authors built it: an encoder of width 128 that also reads one learned task token, and whose
output is added to its input; linear bridges 128 -> 256 for memory and positions; a decoder of width 256 with
all six layers supervised.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou

from heads.matching import hungarian
from heads.transformer import MLP, DecoderLayer, EncoderLayer, sine_position
from ranks import mean_over_ranks


class Detr(nn.Module):
    """Queries -> class logits and boxes.

    dim: width D of the backbone
    categories: [{"id": 1, "name": "person"}, ...] in the order of the labels; no-object comes after them
    queries, layers (of encoder and decoder): Sec. 4.2; dropout: the authors' release
    """

    weight = {"class": 1.0, "l1": 5.0, "giou": 2.0}  # in the loss and in the matching; DETR's
    no_object_weight = 0.1  # DETR's: most of the queries have no target

    def __init__(self, dim: int, categories: list[dict], queries=100, layers=(6, 6), dropout=0.1):
        super().__init__()
        sizes = {"queries": queries, "layers": list(layers), "dropout": dropout}
        self.config = {"dim": dim, "categories": categories, **sizes}
        self.num_classes = len(categories)
        encoder, decoder, ffn, heads = 128, 256, 1024, 8  # Sec. 4.2
        L_enc, L_dec = layers
        self.input_proj = nn.Conv2d(dim, encoder, kernel_size=1)
        self.task_token = nn.Parameter(torch.randn(encoder))
        self.encoder = nn.ModuleList(EncoderLayer(encoder, heads, ffn, dropout) for _ in range(L_enc))
        self.enc2dec_proj, self.pos_embed_proj = nn.Linear(encoder, decoder), nn.Linear(encoder, decoder)
        self.decoder = nn.ModuleList(DecoderLayer(decoder, heads, ffn, dropout) for _ in range(L_dec))
        self.decoder_norm = nn.LayerNorm(decoder)
        for layer in (*self.encoder, *self.decoder):
            for p in layer.parameters():
                if p.dim() > 1:
                    nn.init.xavier_uniform_(p)  # as DETR; the release left the decoder at PyTorch's default
        self.query_embed = nn.Embedding(queries, decoder)
        self.class_embed = nn.Linear(decoder, self.num_classes + 1)
        self.bbox_embed = MLP(decoder, decoder, 4, depth=3)
        class_weight = torch.ones(self.num_classes + 1)
        class_weight[-1] = self.no_object_weight
        self.register_buffer("class_weight", class_weight, persistent=False)

    # --- network

    def decode(self, f) -> tuple[Tensor, Tensor]:
        """Features -> logits (L, B, Q, C + 1), boxes_cxcywh (L, B, Q, 4) in [0, 1]; L decoder layers."""
        pos = sine_position(f.grid, f.valid, feats=64)  # (B or 1, N, 128), N = H * W
        padding = None if f.valid is None else ~f.valid.flatten(1)  # (B, N), True is padding
        x = self.input_proj(f.grid).flatten(2).transpose(1, 2)  # (B, N, 128)

        tokens = torch.cat([self.task_token.expand(len(x), 1, -1), x], 1)  # (B, 1 + N, 128)
        token_pos = F.pad(pos, (0, 0, 1, 0))  # the task token has position zero
        token_padding = None if padding is None else F.pad(padding, (1, 0), value=False)
        for layer in self.encoder:
            tokens = layer(tokens, token_pos, token_padding)
        memory = self.enc2dec_proj(x + tokens[:, 1:])  # (B, N, 256)

        keys = memory + self.pos_embed_proj(pos)
        query_pos = self.query_embed.weight.expand(len(x), -1, -1)  # (B, Q, 256)
        q, levels = torch.zeros_like(query_pos), []
        for layer in self.decoder:
            q = layer(q, query_pos, keys, memory, padding)
            levels.append(self.decoder_norm(q))
        q = torch.stack(levels)  # (L, B, Q, 256)
        return self.class_embed(q), self.bbox_embed(q).sigmoid()

    # --- loss

    def forward(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(f, y)

    def loss(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        """1. Match queries to targets at every level. 2. Supervise the pairs, and the rest as no-object.

        y: B dicts with labels (n,) in 0..C-1 and boxes_cxcywh (n, 4) in [0, 1]
        Returns the sum over the levels, and the last level's terms for the log. Sums over targets are divided
        by their number, class weights by their sum, both averaged over the ranks.
        """
        return self.criterion(*self.decode(f), y)

    def criterion(self, logits: Tensor, boxes: Tensor, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of what decode returns: logits (L, B, Q, C + 1), boxes_cxcywh (L, B, Q, 4) in [0, 1].

        With M matched pairs a level, of B images with N targets in all. y and what is returned: as loss.
        """
        match = hungarian(self.matching_costs(logits.detach(), boxes.detach(), y))
        levels, B, Q = logits.shape[:3]
        pairs = match.query.shape[1]  # M
        level = torch.arange(levels, device=logits.device)[:, None]  # (L, 1)
        labels = torch.cat([t["labels"] for t in y])[match.target]  # (L, M)
        targets = torch.cat([t["boxes_cxcywh"] for t in y])[match.target]  # (L, M, 4)

        weights = pairs + self.no_object_weight * (B * Q - pairs)
        num_boxes, weights = mean_over_ranks([sum(len(t["labels"]) for t in y), weights], logits.device)
        num_boxes = num_boxes.clamp(min=1)

        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)  # (L, B, Q) no-object
        classes[level, match.image, match.query] = labels
        cross_entropy = F.cross_entropy(
            logits.flatten(0, 2), classes.flatten(), self.class_weight, reduction="none"
        ).view(levels, -1)
        matched = boxes[level, match.image, match.query]  # (L, M, 4)
        giou = paired_giou(*(box_convert(b, "cxcywh", "xyxy") for b in (matched, targets)))  # (L, M)
        terms = {
            "class": cross_entropy.sum(1) / weights,  # (L,) each
            "l1": (matched - targets).abs().sum((1, 2)) / num_boxes,
            "giou": (1 - giou).sum(1) / num_boxes,
        }
        loss = sum(self.weight[name] * term.sum() for name, term in terms.items())
        return loss, {name: term[-1].detach() for name, term in terms.items()}

    @torch.no_grad()
    def matching_costs(self, logits: Tensor, boxes: Tensor, y: list[dict]) -> list[Tensor]:
        """B tensors (L, Q, n): - p(class) + 5 L1 - 2 GIoU of every query with every target of its image."""
        costs = []
        for b, t in enumerate(y):
            probabilities = logits[:, b].softmax(-1)[..., t["labels"]]  # (L, Q, n)
            l1 = torch.cdist(boxes[:, b], t["boxes_cxcywh"].expand(len(boxes), -1, -1), p=1)  # (L, Q, n)
            corners = [
                box_convert(x, "cxcywh", "xyxy") for x in (boxes[:, b].flatten(0, 1), t["boxes_cxcywh"])
            ]
            giou = generalized_box_iou(*corners).view_as(l1)
            w = self.weight
            costs.append(w["l1"] * l1 - w["class"] * probabilities - w["giou"] * giou)
        return costs

    # --- answers

    @torch.no_grad()
    def predict(self, f, y: list[dict]) -> list[dict]:
        """The last level's answer for each image, best class of each query; no suppression is needed.

        y: B dicts with image_id and orig_size (h, w)
        Returns B dicts: image_id, scores (Q,), labels (Q,) in 0..C-1, boxes_xyxy (Q, 4) in original pixels.
        """
        logits, boxes = self.decode(f)
        scores, labels = logits[-1].softmax(-1)[..., :-1].max(-1)  # (B, Q)
        sizes = boxes.new_tensor([[*t["orig_size"][::-1]] * 2 for t in y])[:, None]  # (B, 1, 4): w, h, w, h
        boxes_xyxy = box_convert(boxes[-1], "cxcywh", "xyxy") * sizes
        return [
            {"image_id": t["image_id"], "scores": s, "labels": c, "boxes_xyxy": b}
            for t, s, c, b in zip(y, scores, labels, boxes_xyxy, strict=True)
        ]


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU (arXiv 1902.09630) of each box_xyxy in a with its partner in b: (..., 4) -> (...).

    torchvision's loss of the same selects pairs by a mask, for which the host waits for the GPU.
    """
    (a_min, a_max), (b_min, b_max) = a.split(2, -1), b.split(2, -1)
    overlap = (torch.minimum(a_max, b_max) - torch.maximum(a_min, b_min)).clamp(min=0).prod(-1)
    union = (a_max - a_min).prod(-1) + (b_max - b_min).prod(-1) - overlap
    hull = (torch.maximum(a_max, b_max) - torch.minimum(a_min, b_min)).prod(-1)
    return overlap / union - (hull - union) / hull
