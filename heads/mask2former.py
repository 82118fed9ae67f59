"""Segmentation head: Mask2Former with one feature level (paper Sec. 3.2, 4.2; Mask2Former, arXiv 2112.01527).

Instance or panoptic segmentation: the categories and the masks of the data decide.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.matching import hungarian
from heads.transformer import MLP, sine_position
from ranks import mean_over_ranks


class GroupNorm(nn.GroupNorm):
    """Over the valid part of each image, zero on padding: no image depends on what it is batched with."""

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """x: (B, C, H, W); valid: (B, H, W) bool or None."""
        if valid is None:
            return super().forward(x)
        inside = valid[:, None, None]  # (B, 1, 1, H, W)
        x = x.unflatten(1, (self.num_groups, -1))  # (B, groups, C / groups, H, W)
        count = inside.sum((2, 3, 4), keepdim=True) * x.shape[2]
        x = x - (x * inside).sum((2, 3, 4), keepdim=True) / count
        variance = (x.square() * inside).sum((2, 3, 4), keepdim=True) / count
        x = (x * (variance + self.eps).rsqrt()).flatten(1, 2)  # (B, C, H, W)
        return (x * self.weight[:, None, None] + self.bias[:, None, None]) * valid[:, None]


class Layers(nn.Sequential):
    """One layer after the other; the GroupNorms are told what is padding."""

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        for layer in self:
            x = layer(x, valid) if isinstance(layer, GroupNorm) else layer(x)
        return x


class DeformableAttention(nn.Module):
    """Every token reads the map at learned points around itself (Deformable DETR, arXiv 2010.04159, Eq. 2).

    Offsets are in patches; padding reads as zero, as the outside of the map does: its size does not matter.
    """

    def __init__(self, dim: int, heads: int, points: int):
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(dim, heads * points * 2)
        self.attention_weights = nn.Linear(dim, heads * points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Deformable DETR's: head k looks in the k-th of 8 directions, 1 to 4 patches away, all alike."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (heads, 2) as x, y
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto the square around the token
        for layer in self.children():
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        steps = torch.arange(1, self.points + 1)[:, None]
        self.sampling_offsets.bias.data.copy_((direction[:, None] * steps).flatten())

    def forward(self, x: Tensor, pos: Tensor, centres: Tensor, valid: Tensor | None) -> Tensor:
        """x, pos: (B, N, dim); centres: (H, W, 2), x and y of the tokens in (-1, 1); valid: (B, H, W)."""
        (B, N, _), (H, W, _) = x.shape, centres.shape
        value = across(self.value_proj, x.transpose(1, 2))  # (B, dim, N)
        if valid is not None:
            value = value.masked_fill(~valid.flatten(1)[:, None], 0)
        value = value.reshape(B * self.heads, -1, H, W)  # (B * heads, dim / heads, H, W)

        x = (x + pos).transpose(1, 2)  # (B, dim, N)
        at = across(self.sampling_offsets, x).view(B * self.heads, self.points, 2, N).transpose(2, 3)
        patch = torch.stack([x.new_full((), 2 / n) for n in (W, H)])  # new_tensor would wait for the GPU
        at = at * patch + centres.flatten(0, 1)  # (B * heads, points, N, 2) in (-1, 1)
        weights = across(self.attention_weights, x).view(B * self.heads, 1, self.points, N).softmax(2)

        read = F.grid_sample(value, at, align_corners=False)  # (B * heads, dim / heads, points, N)
        read = (read * weights).sum(2).view(B, -1, N)  # (B, dim, N)
        return self.output_proj(read.transpose(1, 2))


class DeformableEncoderLayer(nn.Module):
    """x <- LN(x + DeformableAttention(x)); x <- LN(x + FFN(x))."""

    def __init__(self, dim: int, heads: int, points: int, ffn: int):
        super().__init__()
        self.self_attn = DeformableAttention(dim, heads, points)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, pos: Tensor, centres: Tensor, valid: Tensor | None) -> Tensor:
        """x, pos: (B, N, dim); centres: (H, W, 2); valid: (B, H, W) bool or None; N = H * W."""
        x = self.norm1(x + self.self_attn(x, pos, centres, valid))
        return self.norm2(x + self.linear2(F.relu_(self.linear1(x))))


class MaskedDecoderLayer(nn.Module):
    """Cross-attention within each query's own mask, self-attention, FFN; each followed by its LayerNorm."""

    def __init__(self, dim: int, heads: int, ffn: int):
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, q: Tensor, query_pos: Tensor, keys: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """q, query_pos: (B, Q, dim); memory, keys: (B, N, dim); mask: (B * heads, Q, N), 0 or -inf."""
        attended = self.multihead_attn(q + query_pos, keys, memory, attn_mask=mask, need_weights=False)[0]
        q = self.norm1(q + attended)
        x = q + query_pos
        q = self.norm2(q + self.self_attn(x, x, q, need_weights=False)[0])
        return self.norm3(q + self.linear2(F.relu_(self.linear1(q))))


class Mask2Former(nn.Module):
    """Queries -> class logits and masks.

    dim: width D of the backbone
    categories: the classes in the order of their labels, [{"id": 1, "name": "person"}, ...], with "isthing"
        if the data is panoptic; no-object comes after them
    eq2_h: False leaves H out of Eq. 2, as the authors' release does
    queries, layers (of encoder and decoder): Sec. 4.2; points: P for each mask, Mask2Former's

    y holds for each image
        size (h, w): the image in pixels, before padding
        padded_size: the pixels that the grid covers, (H * patch, W * patch)
        labels (n,) in 0..C-1, masks (n, h, w) bool or uint8: for the loss
        image_id, orig_size (h, w): to predict
    """

    # all Mask2Former's
    weight = {"class": 2.0, "mask": 5.0, "dice": 5.0}  # in the loss and in the matching
    no_object_weight = 0.1  # most of the queries have no target
    oversampling, important = 3, 0.75  # 3/4 of the P points are the most uncertain of 3 P
    instances = 100  # predicted for each image
    sure, overlap = 0.8, 0.8  # panoptic: least p(class), least part of its mask that a segment keeps

    def __init__(
        self, dim: int, categories: list[dict], eq2_h: bool = True, queries=100, layers=(6, 9), points=12544
    ):
        super().__init__()
        sizes = {"queries": queries, "layers": list(layers), "points": points}
        self.config = {"dim": dim, "categories": categories, "eq2_h": eq2_h, **sizes}
        self.num_classes, self.points, (L_enc, L_dec) = len(categories), points, layers
        width, heads, groups = 256, 8, 32  # Sec. 4.2; groups: Mask2Former
        # encoder
        self.input_proj = Layers(nn.Conv2d(dim, width, 1), GroupNorm(groups, width))
        self.encoder_level = nn.Parameter(torch.randn(width))
        self.encoder = nn.ModuleList(DeformableEncoderLayer(width, heads, 4, ffn=512) for _ in range(L_enc))
        # Eq. 2
        self.G = Layers(nn.Conv2d(dim, width, 1, bias=False), GroupNorm(groups, width))
        self.H = Layers()
        if eq2_h:
            self.H = Layers(nn.Conv2d(width, width, 1, bias=False), GroupNorm(groups, width))
        conv3x3, conv1x1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.Conv2d(width, width, 1)
        self.R = Layers(conv3x3, GroupNorm(groups, width), nn.ReLU(), conv1x1)
        self.MLP = MLP(width, width, width, depth=3)
        # decoder
        self.query_feat, self.query_embed = nn.Embedding(queries, width), nn.Embedding(queries, width)
        self.decoder_level = nn.Parameter(torch.randn(width))
        self.decoder = nn.ModuleList(MaskedDecoderLayer(width, heads, ffn=1024) for _ in range(L_dec))
        self.decoder_norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, self.num_classes + 1)

        self.reset_parameters()
        class_weight = torch.ones(self.num_classes + 1)
        class_weight[-1] = self.no_object_weight
        self.register_buffer("class_weight", class_weight, persistent=False)

    def reset_parameters(self) -> None:
        """Mask2Former's: Xavier in the transformer layers and their input, Kaiming in Eq. 2."""
        for p in (*self.input_proj.parameters(), *self.encoder.parameters(), *self.decoder.parameters()):
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        for layer in self.encoder:
            layer.self_attn.reset_parameters()
        for layer in (*self.G, *self.H, *self.R):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(self.input_proj[0].bias)
        nn.init.zeros_(self.R[-1].bias)

    # --- network

    def encode(self, F_0: Tensor, pos: Tensor, valid: Tensor | None) -> Tensor:
        """F_0 (B, D, H, W) -> F_1^enc (B, 256, H, W), zero on padding."""
        H, W = F_0.shape[2:]
        y, x = ((2 * torch.arange(n, device=F_0.device) + 1) / n - 1 for n in (H, W))
        centres = torch.stack([x.expand(H, W), y[:, None].expand(H, W)], -1)  # (H, W, 2)
        x = self.input_proj(F_0, valid).flatten(2).transpose(1, 2)  # (B, N, 256), N = H * W
        pos = pos + self.encoder_level
        for layer in self.encoder:
            x = layer(x, pos, centres, valid)
        # contiguous: convolutions of tokens would lay out their gradients in a way that DDP warns about
        x = x.transpose(1, 2).contiguous().unflatten(2, (H, W))  # (B, 256, H, W)
        return x if valid is None else x.masked_fill(~valid[:, None], 0)

    def pixel_features(self, F_0: Tensor, F_1: Tensor, valid: Tensor | None) -> Tensor:
        """Eq. 2's per-pixel features, (B, 256, H, W), zero on padding.

        H's upsampling to the size of F_0 is the identity: with one level, F_1^enc has that size.
        """
        features = self.R(self.G(F_0, valid) + self.H(F_1, valid), valid)
        return features if valid is None else features.masked_fill(~valid[:, None], 0)

    def decode(self, f) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """L answers (10): the query features themselves, and the output of each of the (9) decoder layers.

        Returns class logits (L, B, Q, C + 1), MLP(q) (L, B, Q, 256), the per-pixel features (B, 256, H, W),
        and their product, the mask logits (L, B, Q, H, W): without gradient, as the loss needs few of them.
        """
        pos = sine_position(f.grid, f.valid, feats=128)  # (B or 1, N, 256)
        F_1 = self.encode(f.grid, pos, f.valid)
        pixels = self.pixel_features(f.grid, F_1, f.valid)
        memory = F_1.flatten(2).transpose(1, 2) + self.decoder_level  # (B, N, 256)
        keys = memory + pos

        q = self.query_feat.weight.expand(len(memory), -1, -1)  # (B, Q, 256)
        query_pos = self.query_embed.weight.expand_as(q)
        queries, embeddings, masks = [], [], []
        for layer in (None, *self.decoder):
            if layer is not None:
                mask = attention_mask(masks[-1].flatten(2), f.valid, layer.multihead_attn.num_heads)
                q = layer(q, query_pos, keys, memory, mask)
            queries.append(self.decoder_norm(q))
            embeddings.append(self.MLP(queries[-1]))
            with torch.no_grad():
                masks.append(torch.einsum("bqd,bdhw->bqhw", embeddings[-1], pixels))  # Eq. 2
        return self.class_embed(torch.stack(queries)), torch.stack(embeddings), pixels, torch.stack(masks)

    # --- loss

    def forward(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(f, y)

    def loss(self, f, y: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        """Match queries to targets at every level; supervise each matched pair, and the rest as no-object.

        Returns the sum over the levels, and the last level's terms for the log. Sums over targets are divided
        by their number, class weights by their sum, both averaged over the ranks.
        """
        return self.criterion(*self.decode(f), y)

    def criterion(self, logits: Tensor, embeddings: Tensor, pixels: Tensor, masks: Tensor, y: list[dict]):
        """The loss of what decode returns: logits (L, B, Q, C + 1), embeddings (L, B, Q, 256), pixels
        (B, 256, H, W), masks (L, B, Q, H, W). y and what is returned: as loss."""
        levels, B, Q = logits.shape[:3]
        labels, counts = torch.cat([t["labels"] for t in y]), [len(t["labels"]) for t in y]  # (N,), N targets
        truth = [t["masks"].float() for t in y]  # B of (n, h, w)
        scales = torch.tensor([t["size"] for t in y]) / torch.tensor([t["padded_size"] for t in y])
        scales = scales.flip(1).to(pixels.device, non_blocking=True)  # (B, 2): x, y of the image in the grid

        match = hungarian(self.matching_costs(logits.detach(), masks, labels.split(counts), truth, scales))
        level = torch.arange(levels, device=logits.device)[:, None]  # (L, 1)
        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)  # (L, B, Q) no-object
        classes[level, match.image, match.query] = labels[match.target]
        cross_entropy = F.cross_entropy(
            logits.flatten(0, 2), classes.flatten(), self.class_weight, reduction="none"
        )

        query = classes.new_zeros(levels, len(labels))  # (L, N): each target's query
        query[level, match.target] = match.query
        matched = logits.new_zeros(levels, len(labels))  # with more targets than queries some have none
        matched[level, match.target] = 1
        q = [embeddings[level, b, queries] for b, queries in enumerate(query.split(counts, 1))]
        bce, dice = zip(*map(self.mask_losses, q, pixels, truth, scales), strict=True)

        pairs = match.query.shape[1]
        weights = pairs + self.no_object_weight * (B * Q - pairs)
        num_masks, weights = mean_over_ranks([len(labels), weights], logits.device)
        num_masks = num_masks.clamp(min=1)
        terms = {
            "class": cross_entropy.view(levels, -1).sum(1) / weights,  # (L,) each
            "mask": (torch.cat(bce, 1) * matched).sum(1) / num_masks,
            "dice": (torch.cat(dice, 1) * matched).sum(1) / num_masks,
        }
        loss = sum(self.weight[name] * term.sum() for name, term in terms.items())
        return loss, {name: term[-1].detach() for name, term in terms.items()}

    @torch.no_grad()
    def matching_costs(self, logits: Tensor, masks: Tensor, labels, truth, scales) -> list[Tensor]:
        """B tensors (L, Q, n): - 2 p(class) + 5 BCE + 5 dice of every query with every target of its image.

        logits (L, B, Q, C + 1); masks (L, B, Q, H, W) logits; for each image labels (n,), truth (n, h, w) in
        {0, 1}, scales (2,): the image's part of the grid, x and y. All masks of an image are compared at the
        same P random points.
        """
        costs = []
        for b, scale in enumerate(scales):
            points = self.random_points(1, self.points, masks.device)[None]  # (1, 1, P, 2)
            target = sample(truth[b][None], points)[0, :, 0].T  # (P, n)
            x = sample(masks[:, b], (points * scale).expand(len(masks), -1, -1, -1))[:, :, 0]  # (L, Q, P)
            # BCE(x, t) = softplus(x) - x t: its sum over the points is a matrix product
            bce = (F.softplus(x).sum(2, keepdim=True) - x @ target) / self.points  # (L, Q, n)
            x = x.sigmoid()
            dice = 1 - (2 * (x @ target) + 1) / (x.sum(2, keepdim=True) + target.sum(0) + 1)
            costs.append(
                self.weight["mask"] * bce
                + self.weight["dice"] * dice
                - self.weight["class"] * logits[:, b].softmax(-1)[..., labels[b]]
            )
        return costs

    def mask_losses(self, q: Tensor, pixels: Tensor, truth: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """BCE and dice, (L, n) each, of an image's n targets with the queries that they are matched with.

        q: MLP(q) (L, n, 256); pixels: (256, H, W); truth: (n, h, w) in {0, 1}; scale: (2,), the image's part
        of the grid, x and y
        """
        masks = torch.einsum("nld,dhw->nlhw", q.transpose(0, 1), pixels)  # (n, L, H, W)
        points = self.uncertain_points(masks.detach(), scale)  # (n, L, P, 2)
        target = sample(truth[:, None], points)[:, 0]  # (n, L, P)
        x = sample(masks.flatten(0, 1)[:, None], (points * scale).flatten(0, 1)[:, None]).view_as(target)
        bce = F.binary_cross_entropy_with_logits(x, target, reduction="none").mean(2)
        x = x.sigmoid()
        dice = 1 - (2 * (x * target).sum(2) + 1) / (x.sum(2) + target.sum(2) + 1)
        return bce.T, dice.T

    @torch.no_grad()
    def uncertain_points(self, masks: Tensor, scale: Tensor) -> Tensor:
        """(n, L, P, 2): 3/4 are those of 3 P random points where the logits (n, L, H, W) are nearest to zero,
        the rest are anywhere. All levels choose from the same 3 P."""
        n, levels = masks.shape[:2]
        important = int(self.important * self.points)
        points = self.random_points(n, self.oversampling * self.points, masks.device)  # (n, 3 P, 2)
        certainty = sample(masks, (points * scale)[:, None])[:, :, 0].abs()  # (n, L, 3 P)
        chosen = certainty.topk(important, largest=False, sorted=False).indices
        chosen = points[torch.arange(n, device=points.device)[:, None, None], chosen]  # (n, L, 3/4 P, 2)
        anywhere = self.random_points(n, self.points - important, masks.device)
        return torch.cat([chosen, anywhere[:, None].expand(-1, levels, -1, -1)], 2)

    def random_points(self, n: int, count: int, device: torch.device) -> Tensor:
        """(n, count, 2): x and y in [0, 1] of the image, padding left out; torch's global generator."""
        return torch.rand(n, count, 2, device=device)

    # --- answers

    @torch.no_grad()
    def predict(self, f, y: list[dict]) -> list[dict]:
        """The 100 best instances of each image, of things only.

        Returns B dicts: image_id, scores (n,): p(class) times the mean probability within the mask,
        labels (n,) in 0..C-1, masks (n, h, w) bool at orig_size.
        """
        logits, _, _, masks = self.decode(f)
        thing = [c.get("isthing", True) for c in self.config["categories"]]
        thing = torch.tensor(thing, dtype=torch.bool, device=logits.device)
        answers = []
        for t, probs, mask in zip(y, logits[-1].softmax(-1), masks[-1], strict=True):
            probs = probs[:, :-1]  # (Q, C)
            scores, best = probs.flatten().topk(min(self.instances, probs.numel()))
            query, labels = best // self.num_classes, best % self.num_classes
            scores, query, labels = (x[thing[labels]] for x in (scores, query, labels))
            rows, row = query.unique(return_inverse=True)
            mask = full_size(mask[rows], t)  # (rows, h, w)
            inside = mask > 0
            quality = (mask.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
            answer = {"scores": scores * quality[row], "labels": labels, "masks": inside[row]}
            answers.append({"image_id": t["image_id"], **answer})
        return answers

    @torch.no_grad()
    def predict_panoptic(self, f, y: list[dict]) -> list[dict]:
        """One segment for each pixel, or none (0). Queries that are sure of a class compete for the pixels;
        those that lose too much of their mask give up; what is left of the same stuff is one segment.

        Returns B dicts: image_id, segments (h, w) int32 at orig_size, segments_info: ids and category_ids.
        """
        logits, _, _, masks = self.decode(f)
        answers = []
        for t, probs, mask in zip(y, logits[-1].softmax(-1), masks[-1], strict=True):
            scores, labels = probs.max(-1)  # (Q,)
            kept = ((labels < self.num_classes) & (scores > self.sure)).nonzero()[:, 0]
            mask = full_size(mask[kept], t).sigmoid()  # (kept, h, w)
            winner = (scores[kept, None, None] * mask).argmax(0) if len(kept) else None  # (h, w)
            segments = torch.zeros(t["orig_size"], dtype=torch.int32, device=mask.device)
            segments_info, stuff = [], {}
            for k, label in enumerate(labels[kept].tolist()):
                category, won, own = self.config["categories"][label], winner == k, mask[k] >= 0.5
                if not (won & own).any() or won.sum() < self.overlap * own.sum():
                    continue
                if label not in stuff:
                    segments_info.append({"id": len(segments_info) + 1, "category_id": category["id"]})
                segments[won & own] = stuff.get(label, len(segments_info))
                if not category.get("isthing", True):
                    stuff.setdefault(label, len(segments_info))
            answers.append({"image_id": t["image_id"], "segments": segments, "segments_info": segments_info})
        return answers


class Panoptic(Mask2Former):
    """The same head, whose answer is a panoptic segmentation (Table 12)."""

    def predict(self, f, y: list[dict]) -> list[dict]:
        return self.predict_panoptic(f, y)


def attention_mask(masks: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    """A query attends to its mask (sigmoid >= 0.5), or to the whole image if it is empty; never to padding.

    masks: (B, Q, N) logits; valid: (B, H, W) bool or None. Returns 0 or -inf, (B * heads, Q, N).
    """
    inside = masks.new_ones(1, dtype=torch.bool) if valid is None else valid.flatten(1)[:, None]  # (B, 1, N)
    seen = (masks >= 0) & inside
    seen |= inside & ~seen.any(-1, keepdim=True)
    mask = torch.zeros_like(masks).masked_fill_(~seen, -torch.inf)
    return mask[:, None].expand(-1, heads, -1, -1).flatten(0, 1)


def across(linear: nn.Linear, x: Tensor) -> Tensor:
    """The linear layer over the channels of x (B, dim, N), which then need not be moved: (B, out, N)."""
    return linear.weight @ x + linear.bias[:, None]


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Maps (K, C, h, w) at points (K, A, P, 2), x and y in [0, 1] -> (K, C, A, P): bilinear, zero outside."""
    return F.grid_sample(maps, 2 * points - 1, align_corners=False)


def full_size(masks: Tensor, t: dict) -> Tensor:
    """Eq. 2's Upsample: logits (n, H, W) of the grid -> (n, h, w) at orig_size, the padding cut off."""
    patch = t["padded_size"][0] // masks.shape[1]
    (h, w), (H, W) = t["size"], (-(-side // patch) for side in t["size"])
    masks = F.interpolate(masks[:, None, :H, :W], scale_factor=patch, mode="bilinear")
    return F.interpolate(masks[..., :h, :w], t["orig_size"], mode="bilinear")[:, 0]
