"""A frozen CLIP model of open_clip's: images and texts in one space (Tables 5 and 6)."""

import argparse
import hashlib
import json
from pathlib import Path
from unittest.mock import patch

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor

import files
import lora
from ranks import Ranks
from weights import TIMM_NAMES, read, register_models


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
        self.model = model.to(ranks.device, ranks.dtype).requires_grad_(False).eval()
        self.tower = getattr(model.visual, "trunk", model.visual)
        self.dim: int = open_clip.get_model_config(name)["embed_dim"]

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
        tower = config["vision_cfg"].get("timm_model_name")
        if tower is None:
            raise ValueError(f"--clip {args.clip} has no timm vision tower, so {args.lora} cannot go into it")
        tuned = lora.read_header(args.lora).get("backbone")
        if tuned and _architecture(TIMM_NAMES.get(tuned, tuned)) != _architecture(tower):
            raise ValueError(f"{args.lora} was tuned on {tuned}; the tower of --clip {args.clip} is {tower}")
    return config


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
