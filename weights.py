"""Other people's weight files: what a vision tower is called in them, and how they are read.

state = read(path)                      # any of the formats below; only tensors, mapped from the disk
tower(state, recognize(state))          # the vision tower alone, under timm's names
"""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

TOWERS = {  # formats of --weights: where a file keeps the vision tower. Values and layouts never differ
    "open_clip": "visual.trunk.",
    "eva_clip": "visual.",  # the original EVA-CLIP .pt
    "lavis": "visual_encoder.",  # BLIP-2 as LAVIS saves it; its eva_vit_g.pth has timm's names
    "blip2": "vision_model.",  # BLIP-2 as transformers saves it, or
    "timm": "",
    "blip2_vision": "",  # its vision model alone
}
TRANSFORMERS = {  # timm's name -> transformers', in the formats blip2 and blip2_vision
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
    for ours, theirs in TRANSFORMERS.items() if format.startswith("blip2") else ():
        name = re.sub(rf"(?<!\w){theirs}(?!\w)", ours, name)
    return name


def file_name(name: str, format: str) -> str:
    """What a file calls a tensor (or layer) that timm calls `name`: the inverse of timm_name."""
    for ours, theirs in TRANSFORMERS.items() if format.startswith("blip2") else ():
        name = re.sub(rf"(?<!\w){ours}(?!\w)", theirs, name)
    return TOWERS[format] + name


def recognize(names) -> str | None:
    """Which of the formats a file has, from its names; None if it holds no vision tower."""
    first = {f: file_name("patch_embed.proj.weight", f) for f in TOWERS}
    return next((format for format, name in first.items() if name in names), None)


def tower(state: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """The vision tower with timm's names; what else a CLIP or a BLIP-2 has is left out."""
    own = {}
    for name, value in state.items():
        name = timm_name(name, format)
        if name and format.startswith("blip2") and name.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)  # the same key bias for all keys: softmax does not see it, EVA has none
            prefix = name.removesuffix("qkv.bias")
            own[f"{prefix}q_bias"], own[f"{prefix}v_bias"] = q.clone(), v.clone()
        elif name:
            own[name] = value
    return own


def check(state: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raises ValueError, ten lines at most, unless names and shapes are those expected."""
    wrong = [f"missing {k}" for k in expected if k not in state]
    wrong += [f"unexpected {k}" for k in state if k not in expected]
    wrong += [
        f"{k} is {tuple(v.shape)}, expected {tuple(expected[k].shape)}"
        for k, v in state.items()
        if k in expected and v.shape != expected[k].shape
    ]
    if wrong:
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise ValueError("\n  ".join([f"{what}, {len(wrong)} tensors:", *wrong[:8], *more]))
