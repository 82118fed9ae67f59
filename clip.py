"""A frozen CLIP model of open_clip's: images and texts in one space (Tables 5 and 6)."""

import argparse
import hashlib
import json
from pathlib import Path
from unittest.mock import patch

import open_clip
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor

import files
import lora
from ranks import Ranks
from weights import TIMM_NAMES, read, register_models, tower

# What open_clip's config says of its own ViT if it is the plain one: [CLS] through the last norm and `proj`
PLAIN = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "patch_dropout"}


class Clip:
    """A frozen open_clip model. Features are L2-normalized float32.

    tower: its vision tower M, where LoRA goes; dim: the width D of the common space; transform: PIL image ->
    (3, h, w) uint8, open_clip's own but for the last two steps, which `pixels` does on the device
    """

    def __init__(self, name: str, weights: str, ranks: Ranks, seed: int):
        register_models()
        try:
            on_gpu = [ranks.device] if ranks.device.type == "cuda" else []
            # Built on the device, and its file mapped: 30 GB for E-plus that eight ranks' host need not have
            mapped = patch.object(open_clip.factory, "load_state_dict", lambda path, **_: read(path))
            with torch.random.fork_rng(devices=on_gpu), torch.device(ranks.device), mapped:
                torch.manual_seed(seed)
                source = None if weights == "random" else weights
                model, _, transform = open_clip.create_model_and_transforms(name, source, device=ranks.device)
            self.tokenize = open_clip.get_tokenizer(name)
        except Exception as error:  # whatever open_clip meets: no network, a file that does not fit
            raise ValueError(f"--clip {name} --clip-weights {weights}: {str(error)[:300]}") from error
        self.steps = transform.transforms
        *steps, to_tensor, normalize = self.steps
        assert isinstance(to_tensor, ToTensor) and isinstance(normalize, Normalize), transform
        self.transform, self.ranks = Compose([*steps, PILToTensor()]), ranks
        self.mean = torch.tensor(normalize.mean, device=ranks.device)[:, None, None]
        self.std = torch.tensor(normalize.std, device=ranks.device)[:, None, None]
        config = open_clip.get_model_config(name)
        if plain(config):  # open_clip's attention keeps q, k and v where no LoRA can go
            model.visual = timm_vit(config, model.visual)
        self.model = model.to(ranks.device, ranks.dtype).requires_grad_(False).eval()
        self.tower = getattr(model.visual, "trunk", model.visual)
        self.dim: int = config["embed_dim"]

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 -> normalized floats on the device."""
        images = images.to(self.ranks.device, non_blocking=True)
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, D)"""
        with self.ranks.autocast():
            f = self.model.encode_image(pixels)
        return F.normalize(f.float(), dim=-1)

    def text_features(self, texts: list[str], templates: list[str], batch: int) -> Tensor:
        """(T, D): of each text the mean over the templates, of normalized features, normalized again.

        Raises FloatingPointError naming texts whose features are not finite.
        """
        W = torch.zeros(len(texts), self.dim, device=self.ranks.device)
        mine = range(self.ranks.rank, len(texts), self.ranks.world)
        if mine:
            at_once, share = max(1, batch // len(templates)), [texts[i] for i in mine]
            with self.ranks.autocast():
                columns = open_clip.build_zero_shot_classifier(
                    self.model, self.tokenize, share, templates, at_once, self.ranks.device
                )  # (D, mine)
            W[mine.start :: mine.step] = columns.T.float()
        dist.all_reduce(W)
        broken = (~W.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            what = f"{len(broken)} texts have features that are not finite"
            raise FloatingPointError(f"{what}: {texts[broken[0]]}")
        return W


def check_clip(args: argparse.Namespace) -> dict:
    """Refuse a model, weights or LoRA that do not go together, before anything is loaded.

    Leaves open_clip's name in args.clip and the weights in args.clip_weights; returns open_clip's config.
    """
    if args.clip.endswith(".json"):
        path = Path(args.clip)
        if not path.is_file():
            raise FileNotFoundError(f"--clip {path}: no such file")
        try:
            open_clip.add_model_config(path)
        except ValueError as error:
            raise ValueError(f"--clip {path} is not JSON: {error}") from error
        args.clip = path.stem
        if path.stem not in open_clip.list_models():
            raise ValueError(f"{path}: not an open_clip config (embed_dim, vision_cfg, text_cfg)")
    if args.clip not in open_clip.list_models():
        raise ValueError(f"--clip {args.clip}: neither a model that open_clip has nor a .json config of one")
    config = open_clip.get_model_config(args.clip)
    tags = open_clip.list_pretrained_tags_by_model(args.clip)
    args.clip_weights = args.clip_weights or next(iter(tags), None)
    if args.clip_weights not in ("random", *tags) and not Path(args.clip_weights or "").is_file():
        theirs = f"one of open_clip's for {args.clip} ({', '.join(tags) or 'it has none'})"
        raise FileNotFoundError(
            f"--clip-weights {args.clip_weights}: neither a file nor `random` nor {theirs}"
        )
    if args.lora:
        check_tower(args, config)
    return config


def check_tower(args: argparse.Namespace, config: dict) -> None:
    """Raises ValueError, naming both, if args.lora cannot go into the vision tower of args.clip."""
    vision, tuned = config["vision_cfg"], lora.read_header(args.lora).get("backbone")
    tower, tuned = vision.get("timm_model_name"), TIMM_NAMES.get(tuned, tuned)
    why = None
    if tower is None and not plain(config):
        more = sorted({*vision} - PLAIN)
        why = f"has not open_clip's plain ViT ({', '.join(more)})"
        why = "is CoCa" if "multimodal_cfg" in config else why
    elif tower and vision.get("timm_pool") == "map":
        why = f"pools {tower}'s patches by attention (SigLIP), and only [CLS] is supported"
    elif tower and "mci" in tower:
        why = f"has a hybrid, {tower} (MobileCLIP), and only plain ViTs are supported"
    if why:
        raise ValueError(f"--clip {args.clip} {why}, so {args.lora} cannot go into it")
    if tower and tuned and _architecture(tuned) != _architecture(tower):
        raise ValueError(f"{args.lora} was tuned on {tuned}; the tower of --clip {args.clip} is {tower}")
    register_models()
    if tower is None and tuned and timm.is_model(tuned):
        with torch.device("meta"):
            theirs, ours = describe(timm.create_model(tuned)), describe(timm_vit(config))
        if theirs != ours:
            raise ValueError(
                f"{args.lora} was tuned on {tuned}: {theirs}; the tower of --clip {args.clip} is {ours}"
            )


def plain(config: dict) -> bool:
    """Whether an open_clip config is of its own ViT, in the form that timm has too."""
    vision = config["vision_cfg"]
    return {"layers", "width"} <= {*vision} <= PLAIN and isinstance(vision["layers"], int)


def timm_vit(config: dict, visual: nn.Module | None = None) -> VisionTransformer:
    """timm's ViT in the place of open_clip's own, with the weights of `visual`; `proj` is its head."""
    vision = {"patch_size": 16, "head_width": 64, "mlp_ratio": 4.0, "image_size": 224, **config["vision_cfg"]}
    width, act = vision["width"], QuickGELU if config.get("quick_gelu") else nn.GELU
    with torch.device("meta"):
        vit = VisionTransformer(
            vision["image_size"], vision["patch_size"], num_classes=0, embed_dim=width,
            depth=vision["layers"], num_heads=width // vision["head_width"], mlp_ratio=vision["mlp_ratio"],
            pre_norm=True, norm_layer=nn.LayerNorm, act_layer=act,
        )  # fmt: skip
        vit.head = nn.Linear(width, config["embed_dim"], bias=False)
    if visual:
        state = tower({f"visual.{k}": v for k, v in visual.state_dict().items()}, "open_clip_vit")
        vit.load_state_dict(state, assign=True)
    return vit


def describe(vit: nn.Module) -> str:
    """What a LoRA's place depends on, in words."""
    if not isinstance(vit, VisionTransformer):
        return type(vit).__name__
    block, patch = vit.blocks[0], vit.patch_embed.patch_size[0]
    heads, act = block.attn.num_heads, type(block.mlp.act).__name__
    return f"{len(vit.blocks)} blocks of width {vit.embed_dim}, {heads} heads, patch {patch}, {act}"


def _architecture(timm_name: str) -> str:
    """open_clip's eva_giant_patch14_224 is timm's eva_giant_patch14_clip_224.laion400m."""
    return timm_name.partition(".")[0].replace("_clip_", "_")


def cached_texts(
    clip: Clip, texts: list[str], templates: list[str], config: dict, args: argparse.Namespace
) -> Tensor:
    """(T, D) features of texts, from --text-cache where the same model met the same list before."""
    W, cached, path = torch.zeros(len(texts), clip.dim), [False], None
    if clip.ranks.rank == 0:
        weights = args.clip_weights
        weights = files.sha256(weights) if Path(weights).is_file() else [weights, args.seed]
        made_of = [config, weights, str(clip.ranks.dtype), texts, templates]
        name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
        path = Path(args.text_cache) / f"{name}.safetensors"
        if path.is_file():
            state = files.read_tensors(path)
            files.check(state, {"texts": W}, f"{path} is not of these texts: remove it")
            W, cached = state["texts"], [True]
    W = W.to(clip.ranks.device)
    dist.broadcast_object_list(cached, device=clip.ranks.device)  # rank 0's answer is all ranks'
    if cached[0]:
        dist.broadcast(W, src=0)
        return W
    W = clip.text_features(texts, templates, args.batch)
    if path:
        files.save({"texts": W}, path)
    return W
