"""Other people's models and weight files: what a vision tower is called in them, and how they are read.

state = read(path)                      # any of the formats below; only tensors, mapped from the disk
tower(state, recognize(state))          # the vision tower alone, under timm's names
"""

import pickle
import re
import zipfile
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

TIMM_NAMES = {  # ours -> timm's
    "eva_g": "eva_giant_patch14_clip_224.laion400m",  # Table 2, EVA-ViT-G: EVA01-CLIP-g, 1.0 B
    "eva_e": "eva02_enormous_patch14_clip_224.laion2b_plus",  # Table 2, EVA-ViT-E: EVA02-CLIP-E-plus, 4.4 B
}

TOWERS = {  # formats of --weights: where a file keeps the vision tower
    "open_clip": "visual.trunk.",  # one of timm's
    "open_clip_vit": "visual.",  # its own ViT: OpenAI's CLIPs and most of LAION's
    "eva_clip": "visual.",  # the original EVA-CLIP .pt
    "lavis": "visual_encoder.",  # BLIP-2 as LAVIS saves it; its eva_vit_g.pth has timm's names
    "blip2": "vision_model.",  # BLIP-2 as transformers saves it, or
    "timm": "",
    "blip2_vision": "",  # its vision model alone
}
BLIP2 = {  # timm's name -> transformers'
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm": "post_layernorm",
}
RENAMES = {  # format -> its table of names, if they are not timm's
    "blip2": BLIP2,
    "blip2_vision": BLIP2,
    "open_clip_vit": {
        "head.weight": "proj",  # first: the others have a proj in timm's name
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "blocks": "transformer.resblocks",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.weight": "attn.in_proj_weight",
        "attn.qkv.bias": "attn.in_proj_bias",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "norm": "ln_post",
    },
}


@cache
def register_models() -> None:
    """Have timm know eva_mini and eva_g_blip2. It is imported here: seconds that --help need not wait."""
    from timm.models import generate_default_cfgs, register_model
    from timm.models.eva import _cfg, _create_eva

    global default_cfgs  # where timm looks for them
    small = _cfg(num_classes=0, input_size=(3, 112, 112))  # 8 x 8 positions: the demo's
    default_cfgs = generate_default_cfgs(
        {"eva_mini.px224": _cfg(num_classes=0), "eva_mini.px112": small, "eva_g_blip2": _cfg(num_classes=0)}
    )

    @register_model
    def eva_mini(pretrained: bool = False, **kwargs):
        """EVA-ViT-G's architecture at 2.8 M parameters: for the demo, the tests, and a laptop."""
        size = dict(patch_size=14, embed_dim=192, depth=6, num_heads=3, mlp_ratio=4, global_pool="token")
        return _create_eva("eva_mini", pretrained=pretrained, **{**size, **kwargs})

    @register_model
    def eva_g_blip2(pretrained: bool = False, **kwargs):
        """EVA-ViT-G as BLIP-2 has it: 39 of its 40 blocks, then a norm of BLIP-2's own."""
        size = dict(patch_size=14, embed_dim=1408, depth=39, num_heads=16, mlp_ratio=6144 / 1408)
        return _create_eva("eva_g_blip2", pretrained=pretrained, **{**size, "global_pool": "token", **kwargs})


def read(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder's safetensors, mapped from the disk: read only when used.

    Never runs code. Raises FileNotFoundError, or ValueError: truncated, not tensors, or a pickle that needs
    code.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"no weights at {path}: expected a file, or a folder with *.safetensors")
    state = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state.update(load_file(file))
            else:  # mmap: only torch's own zip files can be mapped, older ones are read
                state = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:
            needs = re.search(r"GLOBAL ([\w.]+\.\w+)", str(error))
            why = f"to run {needs[1]}" if needs else "more than tensors"
            raise ValueError(
                f"{file}: refused: this pickle wants {why}, and only tensors are read"
            ) from error
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            why = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{file}: truncated, or not a file of weights ({why})") from error
    for key in ("model", "module", "state_dict"):  # what others wrap their weights in
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds {type(state).__name__}, not tensors by name")
    return {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}


def timm_name(name: str, format: str) -> str | None:
    """What timm calls a tensor of a file; None if it does not belong to the vision tower."""
    if format == "lavis" and name.startswith("ln_vision."):
        return name.replace("ln_vision", "norm")
    if not name.startswith(TOWERS[format]):
        return None
    name = name.removeprefix(TOWERS[format])
    for ours, theirs in RENAMES.get(format, {}).items():
        name = re.sub(rf"(?<!\w){theirs}(?!\w)", ours, name)
    return name


def file_name(name: str, format: str) -> str:
    """What a file calls a tensor (or layer) that timm calls `name`: the inverse of timm_name."""
    for ours, theirs in RENAMES.get(format, {}).items():
        name = re.sub(rf"(?<!\w){ours}(?!\w)", theirs, name)
    return TOWERS[format] + name


def recognize(names) -> str | None:
    """Which of the formats a file has, from its names; None if it holds no vision tower."""
    first = {f: file_name("patch_embed.proj.weight", f) for f in TOWERS}
    return next((format for format, name in first.items() if name in names), None)


def tower(state: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """The vision tower with timm's names; what else a CLIP or a BLIP-2 has is left out.

    Raises ValueError for open_clip's own ViT where it is not the plain one: CoCa's, CLIPA's.
    """
    if format == "open_clip_vit" and "visual.attn_pool.query" in state:
        raise ValueError("weights of CoCa: attention pooling is behind its ViT, and only [CLS] is supported")
    if format == "open_clip_vit" and "visual.ln_pre.weight" not in state:
        raise ValueError("weights of CLIPA: its ViT averages the patches, and only [CLS] is supported")
    own = {}
    for name, value in state.items():
        name = timm_name(name, format)
        if name and format.startswith("blip2") and name.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)  # the same key bias for all keys: softmax does not see it, EVA has none
            prefix = name.removesuffix("qkv.bias")
            own[f"{prefix}q_bias"], own[f"{prefix}v_bias"] = q.clone(), v.clone()
        elif name:
            own[name] = reshaped(name, value) if format == "open_clip_vit" else value
    return own


def reshaped(name: str, value: Tensor) -> Tensor:
    """A tensor of open_clip's own ViT as timm has it: cls_token (1, 1, D), pos_embed (1, N, D)."""
    if name == "head.weight":
        return value.T
    return value.reshape(1, -1, value.shape[-1]) if name in ("cls_token", "pos_embed") else value
