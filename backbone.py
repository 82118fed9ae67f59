"""The vision foundation model M: EVA-ViT-G and -E (paper Table 2), or any timm ViT by name.

    f = backbone(images)          # f.cls (B, D), f.grid (B, D, H, W), f.valid: after the final norm

The network itself is timm's (`timm.models.eva.Eva`, `VisionTransformer`); this file adds what ViSFT needs
around it: any input size, the patch-token map beside [CLS], padding that no valid token ever sees, frozen
weights in a storage type of their own, and recomputation of the blocks in the backward pass. It knows nothing
of LoRA.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import files
import weights as weight_files
from ranks import Ranks
from weights import TIMM_NAMES, register_models

IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, std: what the authors' release uses


# Bytes that a head and its loss take for each token of the ViT: benchmarks/memory.py computes 284,000
# for segmentation with 100 objects
HEAD_PER_TOKEN = 500_000


class Features(NamedTuple):
    """What every head receives, float32.

    cls: (B, D) the [CLS] token, or None when the backbone runs without it
    grid: (B, D, H, W) the patch tokens, H = h / patch
    valid: (B, H, W) bool, False where a patch is padding only; None when there is no padding
    """

    cls: Tensor | None
    grid: Tensor
    valid: Tensor | None


class Backbone(nn.Module):
    """A frozen ViT at any input size.

    name: eva_g, eva_e, eva_mini, eva_g_blip2, or the name of any timm ViT
    use_cls: False drops [CLS] and its kin from the sequence, as the authors' release does in training
    pretrained: timm downloads the weights
    Raises ValueError for a name that timm does not have or a model that is not a plain ViT: one convolution,
    then [CLS] and registers (either, both or neither) and the patches through the same blocks.
    """

    def __init__(self, name: str, use_cls: bool = True, pretrained: bool = False):
        super().__init__()
        import timm
        from timm.layers import PatchEmbed
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer

        register_models()
        timm_name = TIMM_NAMES.get(name, name)
        if not timm.is_model(timm_name):
            raise ValueError(
                f"--model {name}: neither {', '.join(TIMM_NAMES)}, eva_mini nor a model that timm has"
            )
        self.name, self.use_cls = name, use_cls
        self.recompute: int | None = 0  # how many of the first blocks are computed again in the backward pass
        self.memory = 0.0  # bytes that a step may take, for recompute None: as few blocks as these ask
        self.kept_per_token = 0.0
        options = dict(pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        try:
            self.vit = timm.create_model(timm_name, **options)
        except (TypeError, RuntimeError) as error:  # not a ViT: other options; no weights to download
            raise ValueError(f"--model {name}: timm cannot build it as a plain ViT: {error}") from error
        if type(self.vit) not in (Eva, VisionTransformer):
            raise ValueError(f"--model {name}: not a plain ViT of timm's but a {type(self.vit).__name__}")
        if not isinstance(self.vit.patch_embed, PatchEmbed):
            embed = type(self.vit.patch_embed).__name__
            raise ValueError(f"--model {name}: not a plain ViT: patches from {embed}, not one convolution")
        self.vit.reset_classifier(0, "")  # no pooling; the norm that some have behind it stays
        if not use_cls:  # else timm's attention leaves as many tokens at the front without RoPE
            for module in self.vit.blocks.modules():
                if hasattr(module, "num_prefix_tokens"):
                    module.num_prefix_tokens = 0
        self.dim: int = self.vit.embed_dim
        self.patch: int = self.vit.patch_embed.patch_size[0]
        self.mean, self.std = self.vit.pretrained_cfg["mean"], self.vit.pretrained_cfg["std"]
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, valid: Tensor | None = None) -> Features:
        """Patch tokens and [CLS] after the final norm.

        images: (B, 3, h, w) normalized floats, h and w multiples of the patch size
        valid: (B, h, w) bool, True on image, False on the padding to its right and below; None: no padding
        """
        if valid is not None:
            valid = valid[:, :: self.patch, :: self.patch]  # (B, H, W): a patch with any image in it counts
        x, (H, W) = self._embed(images, valid)  # (B, N, D), N = prefix + H * W
        mask = None
        if valid is not None:  # padding is never a key, so an image's features do not depend on its batch
            mask = F.pad(valid.flatten(1), (x.shape[1] - H * W, 0), value=True)[:, None, None]  # (B, 1, 1, N)
        rope = self._rotations(H, W, valid)  # one for each block
        recompute = self.fewest_blocks(*x.shape[:2]) if self.recompute is None else self.recompute
        for i, block in enumerate(self.vit.blocks):
            where = {"attn_mask": mask} if rope is None else {"attn_mask": mask, "rope": rope[i]}
            if i < recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **where)
            else:
                x = block(x, **where)
        x = self.vit.fc_norm(self.vit.norm(x)).float()  # timm's ViTs have one of them, or none
        grid = x[:, -H * W :].transpose(1, 2).unflatten(2, (H, W))  # (B, D, H, W)
        return Features(x[:, 0] if self.has_cls else None, grid, valid)

    def compile_blocks(self) -> None:
        """torch.compile each block in place, for any number of tokens; names and files stay as they are."""
        for block in self.vit.blocks:
            block.compile(dynamic=True)

    def fewest_blocks(self, B: int, N: int) -> int:
        """How many blocks must be recomputed for a step of stage 2 with (B, N) tokens to fit in `memory`."""
        if self.memory <= 0:
            return len(self.vit.blocks)
        self.kept_per_token = self.kept_per_token or self._kept_per_token()
        # Every block keeps its input, fp32 behind a LayerNorm; three are for the block in hand and gradients
        always = 4 * self.dim * len(self.vit.blocks) + 3 * self.kept_per_token + HEAD_PER_TOKEN
        left = self.memory - B * N * always
        return max(0, len(self.vit.blocks) - max(0, int(left / (B * N * self.kept_per_token))))

    def _kept_per_token(self) -> float:
        """Bytes that the backward pass keeps of a block for each token, counted on the last one."""
        own = {p.untyped_storage().data_ptr() for p in self.parameters()}
        block, weight, kept = self.vit.blocks[-1].forward, self.vit.patch_embed.proj.weight, {}
        N = 32 * 32 + (self.vit.num_prefix_tokens if self.use_cls else 0)
        rope = self._rotations(32, 32, None)
        where = {} if rope is None else {"rope": rope[-1].clone()}  # of what all share, a block's part
        x = torch.zeros(1, N, self.dim, dtype=weight.dtype, device=weight.device)

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.no_grad():
            x = block(x, **where)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = block(x.requires_grad_(), **where)  # its graph holds what is counted: no address used twice
        del out
        return sum(size for address, size in kept.items() if address not in own) / N

    @property
    def has_cls(self) -> bool:
        return self.use_cls and self.vit.cls_token is not None

    def _embed(self, images: Tensor, valid: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """Patch, class and position embeddings, the last resized by plain bicubic interpolation as in EVA."""
        vit = self.vit
        if images.shape[2] % self.patch or images.shape[3] % self.patch:
            raise ValueError(
                f"images of {tuple(images.shape[2:])}: both sides must be multiples of {self.patch}"
            )
        x = vit.patch_embed(images)  # (B, H, W, D)
        B, H, W, _ = x.shape
        x = x.flatten(1, 2)  # (B, H * W, D)
        prefix = [token.expand(B, -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.pos_embed is None:
            x = torch.cat([*prefix, x], 1)
        elif vit.no_embed_class:
            x = torch.cat([*prefix, x + self._positions(H, W, valid)], 1)
        else:
            x = torch.cat([*prefix, x], 1) + self._positions(H, W, valid)
        if not self.use_cls:
            x = x[:, vit.num_prefix_tokens :]
        return vit.norm_pre(x), (H, W)

    def _positions(self, H: int, W: int, valid: Tensor | None) -> Tensor:
        """(1 or B, prefix + H * W, D), stretched over the valid part of each image.

        timm's own resize smooths (antialias), which is 5-8% off what EVA was trained with.
        """
        pos, (H0, W0) = self.vit.pos_embed, self.vit.patch_embed.grid_size
        if (H, W) == (H0, W0) and valid is None:
            return pos
        prefix, grid = pos[:, : -H0 * W0], pos[:, -H0 * W0 :]
        grid = grid.transpose(1, 2).unflatten(2, (H0, W0)).float()  # (1, D, H0, W0)
        if valid is None:
            grid = F.interpolate(grid, (H, W), mode="bicubic", align_corners=False)
        else:  # the same interpolation, each image to its own size, which is known on the device only
            y = (torch.arange(H, device=pos.device) * 2 + 1) / valid[:, :, :1].sum(1) - 1  # (B, H) in (-1, 1)
            x = (torch.arange(W, device=pos.device) * 2 + 1) / valid[:, :1].sum(2) - 1  # (B, W)
            y, x = y[:, :, None].expand(-1, -1, W), x[:, None].expand(-1, H, -1)  # (B, H, W)
            at = torch.stack([x, y], -1)  # (B, H, W, 2)
            grid = grid.expand(len(at), -1, -1, -1)
            grid = F.grid_sample(grid, at.to(grid.dtype), "bicubic", "border", align_corners=False)
        grid = grid.flatten(2).transpose(1, 2).to(pos.dtype)  # (1 or B, H * W, D)
        return torch.cat([prefix.expand(len(grid), -1, -1), grid], 1)

    def _rotations(self, H: int, W: int, valid: Tensor | None) -> Tensor | None:
        """RoPE's sines and cosines, each image's grid of its own; None without RoPE.

        (depth, 1 or B, 1 or heads, H * W, 2 d) for heads of width d, as timm's attention takes them.
        Most count patches from the upper left corner, so that padding changes nothing. Two depend on the size
        of the image: EVA-02's and PE's stretch the grid of pretraining over it, DINOv3's goes from -1 to 1.
        timm wants that size on the host; it is known on the device only, so they are computed here.
        """
        rope, depth = getattr(self.vit, "rope", None), len(self.vit.blocks)
        if rope is None:
            return None
        centered = hasattr(rope, "periods")  # DINOv3's
        if valid is None or not (centered or getattr(rope, "ref_feat_shape", None)):
            table = rope.get_embed(shape=(H, W))
            return table[:, None] if self.vit.rope_mixed else table.expand(depth, 1, 1, -1, -1)
        y, x = (torch.arange(n, device=valid.device).float() + rope.grid_offset for n in (H, W))
        h, w = valid[:, :, :1].sum(1), valid[:, :1].sum(2)  # (B, 1)
        if centered:
            y, x, bands = (y + 0.5) / h * 2 - 1, (x + 0.5) / w * 2 - 1, 2 * math.pi / rope.periods
        else:
            (h0, w0), bands = rope.ref_feat_shape, rope.bands
            y, x = y / h * h0, x / w * w0  # (B, H), (B, W)
        at = torch.stack([y[:, :, None].expand(-1, -1, W), x[:, None].expand(-1, H, -1)], -1)  # (B, H, W, 2)
        at = at.flip(-1) if rope.grid_indexing == "xy" else at
        angles = (at[..., None] * bands).flatten(3).flatten(1, 2)  # (B, H * W, d / 2)
        table = torch.stack([angles.sin(), angles.cos()], -2)  # (B, H * W, 2, d / 2)
        table = torch.cat([table, table], -1) if rope.rotate_half else table.repeat_interleave(2, -1)
        return table.flatten(-2)[:, None].expand(depth, -1, -1, -1, -1)


# --- which M, by options or by name


def add_backbone_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("backbone M").add_argument
    add("--model", default="eva_g", help="eva_g, eva_e (Table 2), eva_mini, or the name of any timm ViT")
    where = "a file, `pretrained` (timm downloads) or `random` (default: weights/MODEL.safetensors)"
    add("--weights", help=where)
    add("--no-cls", action="store_true", help="no [CLS] in the sequence (the authors' release)")
    add("--imagenet-norm", action="store_true", help="ImageNet's mean and std (the release), not the model's")


def check_backbone_options(args: argparse.Namespace) -> None:
    """Fill in the default weights. Raises FileNotFoundError if there are none."""
    args.weights = args.weights or f"weights/{args.model}.safetensors"
    if args.weights not in ("random", "pretrained") and not Path(args.weights).exists():
        raise FileNotFoundError(
            f"no backbone weights at {args.weights}: pass --weights FILE, or `pretrained` (timm downloads)"
        )


def backbone_settings(args: argparse.Namespace) -> dict:
    """The options that decide which features a head or LoRA sees; kept in their files."""
    return {"backbone": args.model, "no_cls": args.no_cls, "imagenet_norm": args.imagenet_norm}


def open_backbone(args: argparse.Namespace, ranks: Ranks, dtype: torch.dtype | None = None) -> Backbone:
    """M as the options say, on this rank's device, frozen; stored in dtype, by default --backbone-dtype."""
    dtype = dtype or ranks.dtype
    backbone = load(args.model, args.weights, dtype, ranks.device, args.seed, not args.no_cls)
    if args.imagenet_norm:
        backbone.mean, backbone.std = IMAGENET_NORM
    return backbone


def pretrained_file(name: str) -> str | None:
    """timm's weights on the hub, downloaded if need be, to be mapped; None where timm has them elsewhere."""
    import timm
    from huggingface_hub import hf_hub_download

    register_models()
    timm_name = TIMM_NAMES.get(name, name)
    config = timm.get_pretrained_cfg(timm_name) if timm.is_model(timm_name) else None
    if not config or not (config.hf_hub_id or "").startswith("timm/") or config.custom_load:
        return None
    return hf_hub_download(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")


def load(name: str, weights: str, dtype=torch.float32, device="cpu", seed: int = 0, use_cls=True) -> Backbone:
    """A frozen Backbone with its weights.

    weights: a file, or folder of safetensors, in a format of weights.TOWERS; `pretrained` (timm's); `random`
        (from `seed`)
    dtype: how the frozen weights are stored
    Raises FileNotFoundError, or ValueError naming weights that are missing, unexpected or of another shape.
    """
    if weights == "pretrained" and (file := pretrained_file(name)):
        try:
            return load(name, file, dtype, device, seed, use_cls)
        except ValueError:  # it has a pooling or a norm that only timm knows how to leave out
            pass
    if weights in ("random", "pretrained"):
        on_gpu = [device] if torch.device(device).type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu), torch.device(device):  # not on the host of eight ranks
            torch.manual_seed(seed)
            backbone = Backbone(name, use_cls, pretrained=weights == "pretrained")
        return backbone.to(device=device, dtype=dtype)

    state = weight_files.read(weights)
    format = weight_files.recognize(state) or "timm"
    with torch.device("meta"):
        backbone = Backbone(name, use_cls)
    state, vit = fitting(weight_files.tower(state, format), backbone, weights, format), backbone.vit
    vit.load_state_dict({k: v.to(device=device, dtype=dtype) for k, v in state.items()}, assign=True)
    for module in vit.modules():  # EVA's zero key bias, RoPE tables: not in the file, so still on meta
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, torch.empty_like(buffer, device=device))
            module.init_non_persistent_buffers()
    return backbone.to(device=device, dtype=dtype).requires_grad_(False)


def fitting(
    state: dict[str, Tensor], backbone: Backbone, weights: str | Path, format: str
) -> dict[str, Tensor]:
    """What M has of a tower. Raises ValueError if it is not this backbone's, by tensors or by its config."""
    expected = backbone.vit.state_dict()
    state = weight_files.body(state, expected)
    files.check(state, expected, f"{weights} does not fit --model {backbone.name}")
    if weight_files.TOWERS[format] is None:
        weight_files.check_settings(weights, backbone.vit)
    return state
