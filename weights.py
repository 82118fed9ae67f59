"""Other people's models and weight files: what a vision tower is called in them, and how they are read.

state = read(path)                      # any of the formats below; only tensors, mapped from the disk
tower(state, recognize(state))          # the vision tower alone, as timm has it: names, q, k and v in one
check_settings(path, vit)               # what no tensor tells, where a config.json does
"""

import json
import pickle
import re
import zipfile
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

TIMM_NAMES = {  # ours -> timm's
    "eva_g": "eva_giant_patch14_clip_224.laion400m",  # Table 2, EVA-ViT-G: EVA01-CLIP-g, 1.0 B
    "eva_e": "eva02_enormous_patch14_clip_224.laion2b_plus",  # Table 2, EVA-ViT-E: EVA02-CLIP-E-plus, 4.4 B
}

TOWERS = {  # formats of --weights: what stands before the vision tower's names; None: whatever does
    "open_clip": "visual.trunk.",  # one of timm's
    "open_clip_vit": "visual.",  # its own ViT: OpenAI's CLIPs and most of LAION's
    "eva_clip": "visual.",  # the original EVA-CLIP .pt
    "lavis": "visual_encoder.",  # BLIP-2 as LAVIS saves it; its eva_vit_g.pth has timm's names
    "timm": "",
    # as transformers saves them, alone or in a CLIP, a LLaVA, ...:
    "blip2": None,
    "clip": None,  # and SigLIP's, and SigLIP 2's
    "dinov2": None,  # with registers and without
    "dinov3": None,
}
CLIP = {  # timm's name -> transformers', a regular expression; in this order
    "cls_token": r"embeddings\.class_embedding",
    "pos_embed": r"embeddings\.position_embedding(\.weight)?",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": r"encoder\.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": r"self_attn\.(projection|out_proj)",
    "attn": "self_attn",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
}
RENAMES = {  # format -> its table of names, if they are not timm's
    "blip2": CLIP,
    "clip": CLIP,
    "dinov2": {
        "pos_embed": r"embeddings\.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "reg_token": r"embeddings\.register_tokens",
        "cls_token": r"embeddings\.cls_token",
        "blocks": r"encoder\.layer",
        "attn.q_proj": r"attention\.(attention\.query|q_proj)",
        "attn.k_proj": r"attention\.(attention\.key|k_proj)",
        "attn.v_proj": r"attention\.(attention\.value|v_proj)",
        "attn.proj": r"attention\.(output\.dense|o_proj)",
        "ls1.gamma": r"layer_scale1\.lambda1",
        "ls2.gamma": r"layer_scale2\.lambda1",
        "mlp.fc1": r"mlp\.weights_in",
        "mlp.fc2": r"mlp\.weights_out",
        "norm": "layernorm",
    },
    "dinov3": {
        "patch_embed.proj": "embeddings.patch_embeddings",
        "reg_token": r"embeddings\.register_tokens",
        "cls_token": r"embeddings\.cls_token",
        "blocks": r"(model\.)?layer",
        "attn.proj": r"attention\.o_proj",
        "attn": "attention",
        "gamma_1": r"layer_scale1\.lambda1",
        "gamma_2": r"layer_scale2\.lambda1",
        "mlp.fc1_g": r"mlp\.gate_proj",
        "mlp.fc1": r"mlp\.up_proj",
        "mlp.fc2": r"mlp\.down_proj",
    },
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

    Never runs code. Raises FileNotFoundError, or ValueError: truncated, not tensors, a pickle that needs
    code, a model of transformers' whose code is not in transformers, or whose weights are quantized.
    """
    path = Path(path)
    check_folder(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"no weights at {path}: expected a file, or a folder with *.safetensors")
    state = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state.update(load_file(file))
            else:  # mmap: only torch's own zip files can be mapped, older ones are read
                zipped = zipfile.is_zipfile(file)
                if zipped and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(file).namelist()):
                    why = "a TorchScript archive, as OpenAI's own CLIP files are, holds code"
                    raise ValueError(f"{file}: {why}: take open_clip's `openai` weights, the same as tensors")
                state = torch.load(file, "cpu", weights_only=True, mmap=zipped)
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


def check_folder(path: Path) -> None:
    """Raises as read does for what a folder's JSON says: custom code, quantized weights, absent shards."""
    said = read_json(path / "config.json")
    if code := said.get("auto_map"):
        where = f"its code is in the folder, not in transformers ({next(iter(code.values()), '')})"
        raise ValueError(f"{path}: {said.get('model_type')} is not supported: {where}")
    if quantized := said.get("quantization_config"):
        how = quantized.get("quant_method", "an unknown method")
        raise ValueError(f"{path}: quantized by {how}: save it dequantized, in 16 or 32 bit, first")
    shards = {str(x) for x in read_json(path / "model.safetensors.index.json").get("weight_map", {}).values()}
    if absent := sorted(shard for shard in shards if not (path / shard).is_file()):
        raise FileNotFoundError(f"{path}: {len(absent)} of {len(shards)} shards are absent: {absent[0]}")


def read_json(path: Path) -> dict:
    """{} if there is no such file. Raises ValueError if it holds something else, or parts of another kind."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
        parts = [content.get(k) or {} for k in ("auto_map", "quantization_config", "weight_map")]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not JSON, or not an object: {error}") from error
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path}: auto_map, quantization_config or weight_map is not an object")
    return content


def prefixes(names, format: str) -> list[str]:
    """What stands before the names of a format's towers in a file; nothing if it has none of it."""
    first = file_name("patch_embed.proj.weight", format)
    if TOWERS[format] is not None:
        return [TOWERS[format]] if first in names else []
    found = [name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")]
    if format not in ("blip2", "clip"):
        return found
    qkv = "encoder.layers.0.self_attn.qkv.weight"  # these two differ in it alone
    return [prefix for prefix in found if (prefix + qkv in names) == (format == "blip2")]


def timm_names(names, format: str) -> dict[str, str]:
    """{name in a file: timm's} of the vision tower's tensors, without what M has not: heads, mask tokens."""
    prefix, found = (prefixes(names, format) or [TOWERS[format] or ""])[0], {}
    for name in names:
        if format == "lavis" and name.startswith("ln_vision."):
            found[name] = name.replace("ln_vision", "norm")
        elif name.startswith(prefix):
            own = name.removeprefix(prefix)
            for ours, theirs in RENAMES.get(format, {}).items():
                own = re.sub(rf"(?<!\w){theirs}(?!\w)", ours, own)
            if TOWERS[format] is not None or not own.startswith(("head.", "embeddings.")):
                found[name] = own
    return found


def file_name(name: str, format: str) -> str:
    """What a file calls a tensor that timm calls `name`; of transformers' the patch embedding, no prefix."""
    for ours, theirs in RENAMES.get(format, {}).items():
        name = re.sub(rf"(?<!\w){ours}(?!\w)", theirs, name)
    return (TOWERS[format] or "") + name


def recognize(names) -> str | None:
    """Which of the formats a file has, from its names; None if it holds no vision tower.

    Raises ValueError if a model of transformers' has several.
    """
    found = {format: prefixes(names, format) for format in TOWERS}
    theirs = [prefix or "the whole file" for f, some in found.items() if TOWERS[f] is None for prefix in some]
    if len(theirs) > 1:
        raise ValueError(f"weights of {len(theirs)} vision towers: {', '.join(theirs)}: one is expected")
    return next((format for format, some in found.items() if some), None)


def renamed(state: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """The vision tower with timm's names; q, k and v as the file has them.

    Raises ValueError naming what is not supported: CoCa, CLIPA, SigLIP 2's NaFlex, quantized weights.
    """
    if format == "open_clip_vit" and "visual.attn_pool.query" in state:
        raise ValueError("weights of CoCa: attention pooling is behind its ViT, and only [CLS] is supported")
    if format == "open_clip_vit" and "visual.ln_pre.weight" not in state:
        raise ValueError("weights of CLIPA: its ViT averages the patches, and only [CLS] is supported")
    own = {}
    for name, ours in timm_names(state, format).items():
        value = state[name]
        if TOWERS[format] is None and (value.dtype.itemsize == 1 or name.endswith("qweight")):
            raise ValueError(f"weights of a quantized model: {name} holds {str(value.dtype)[6:]}")
        if ours == "patch_embed.proj.weight" and value.ndim == 2:
            raise ValueError("weights of SigLIP 2 NaFlex: no convolution cuts its patches, as a ViT's must")
        own[ours] = reshaped(ours, value, format)
    return own


def tower(state: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """The vision tower as timm has it, with q, k and v in one; what else a CLIP or a LLaVA has is left out.

    Raises ValueError as `renamed` does.
    """
    own = renamed(state, format)
    for name in [k for k in own if TOWERS[format] is None and k.endswith("attn.q_proj.weight")]:
        attn = name.removesuffix("q_proj.weight")
        for part in ("weight", "bias"):
            q, k, v = (own.pop(f"{attn}{x}_proj.{part}", None) for x in "qkv")
            if format == "dinov3" and part == "bias":  # timm's has no bias of k: one that is not 0 is refused
                biases = {f"{attn}q_bias": q, f"{attn}k_bias": k, f"{attn}v_bias": v}
                own |= {x: b for x, b in biases.items() if b is not None and ("k_" not in x or b.any())}
            elif None not in (shapes := [getattr(x, "shape", None) for x in (q, k, v)]):
                if shapes[0] == shapes[1] == shapes[2] != ():  # else it is missing
                    own[f"{attn}qkv.{part}"] = torch.cat([q, k, v])
    for name in [k for k in own if format == "blip2" and k.endswith("attn.qkv.bias")]:
        # The same key bias for all keys: softmax does not see it, EVA has none
        q, _, v = own.pop(name).chunk(3)
        attn = name.removesuffix("qkv.bias")
        own[f"{attn}q_bias"], own[f"{attn}v_bias"] = q.clone(), v.clone()
    if format == "dinov2" and "reg_token" in own and {"cls_token", "pos_embed"} <= own.keys():
        pos = own["pos_embed"]  # timm's has none for [CLS]
        own["cls_token"], own["pos_embed"] = own["cls_token"] + pos[:, :1], pos[:, 1:]
    if format == "dinov3":
        gated = any("fc1_g" in k for k in own)
        own = {k.replace("mlp.fc1.", "mlp.fc1_x.") if gated else k: v for k, v in own.items() if v.numel()}
    return own


def reshaped(name: str, value: Tensor, format: str) -> Tensor:
    """A tensor of another's ViT as timm has it: cls_token (1, 1, D), pos_embed (1, N, D)."""
    if name == "head.weight" and format == "open_clip_vit":
        return value.T
    return value.reshape(1, -1, value.shape[-1]) if name in ("cls_token", "pos_embed") else value


def body(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tower without what is behind M, nor biases of zeros where the model has none (DINOv3's)."""
    behind, biases = ("head.", "attn_pool."), ("q_bias", "v_bias")
    alien = {k for k in state if k.startswith(behind) or (k.endswith(biases) and not state[k].any())}
    return {k: v for k, v in state.items() if k in expected or k not in alien}


def read_config(path: str | Path):
    """transformers' config of a folder, or of a file in one; None without a config.json.

    Raises ValueError if transformers does not know the model.
    """
    from transformers import AutoConfig  # seconds that --help need not wait

    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not (folder / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # no type of transformers', code of its own, values that are none
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder}/config.json: {why}") from error


def check_settings(path: str | Path, vit: nn.Module) -> None:
    """Raises ValueError if what no tensor tells is not as in timm's model: attention heads, activation."""
    from transformers.activations import ACT2FN

    if not (config := read_config(path)):
        return
    config, block = getattr(config, "vision_config", config), vit.blocks[0]
    heads, act = (getattr(config, k, None) for k in ("num_attention_heads", "hidden_act"))
    act = "silu" if getattr(config, "use_swiglu_ffn", False) else act
    # GELU and its tanh form are 5e-4 apart at most, and timm's base SigLIPs have one for the other
    x = torch.linspace(-4, 4, 99, device="cpu")
    same = act in ACT2FN and (ACT2FN[act](x) - block.mlp.act(x)).abs().max() < 1e-3
    ours = f"{block.attn.num_heads} heads and {act if same else type(block.mlp.act).__name__}"
    theirs = f"{heads} heads and {act}"
    if ours != theirs:
        raise ValueError(f"{path} has {theirs}; the model of --model has {ours}")
