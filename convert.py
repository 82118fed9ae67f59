"""Weights in and out: others' files to ours, and what was tuned to where others load it.

    python convert.py import eva_g_lora_5000.pt out/release/lora.safetensors      # the authors' LoRA
    python convert.py import eva_g_detection_heads.ckpt out/release/detection.safetensors
    python convert.py import eva_vit_g.pth weights/eva_g.safetensors    # not needed: --weights reads it
    python convert.py export out/eva_g_visft.safetensors --to timm --lora LORA --weights BACKBONE
    python convert.py export out/llava --to transformers --lora LORA --weights FOLDER

What a file is follows from the names in it (import --from overrides). An export has the LoRA merged into the
vision tower; whatever else it needs (CLIP's text tower, BLIP-2's language model) comes from --weights, and a
model card is put beside it. Files are mapped, not read; nothing is written before everything fits.
"""

import argparse
import json
import re
import shutil
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import files
import lora
import tasks
import weights as weight_files
from backbone import TIMM_NAMES, Backbone, fitting
from ranks import launch

# Width and number of blocks -> --model
MODELS = {(1408, 40): "eva_g", (1408, 39): "eva_g_blip2", (1792, 64): "eva_e", (192, 6): "eva_mini"}

# The authors' names (after `visft_heads.`) -> ours. Every tensor goes over as it is, but for those in `adapt`
RELEASE = {
    "detection": {
        r"input_proj\.": r"input_proj.",
        r"transformer\.task_embeddings_enc\.weight": r"task_token",
        r"transformer\.encoder\.layers\.": r"encoder.",
        r"transformer\.(enc2dec_proj|pos_embed_proj)\.": r"\1.",
        r"transformer\.decoders\.detection\.detection_coco\.layers\.": r"decoder.",
        r"transformer\.decoders\.detection\.detection_coco\.norm\.": r"decoder_norm.",
        r"query_embeds\.detection\.detection_coco\.": r"query_embed.",
        r"(class|bbox)_embeds\.": r"\1_embed.",
    },
    "segmentation": {
        r"segment_pixel_decoder\.input_proj\.0\.": r"input_proj.",
        r"segment_pixel_decoder\.transformer\.level_embed": r"encoder_level",
        r"segment_pixel_decoder\.transformer\.encoder\.layers\.": r"encoder.",
        r"segment_pixel_decoder\.adapter_1\.norm\.": r"G.1.",
        r"segment_pixel_decoder\.adapter_1\.": r"G.0.",
        r"segment_pixel_decoder\.layer_1\.norm\.": r"R.1.",
        r"segment_pixel_decoder\.layer_1\.": r"R.0.",
        r"segment_pixel_decoder\.mask_features\.": r"R.3.",
        r"segment_predictor\.transformer_cross_attention_layers\.(\d+)\.norm\.": r"decoder.\1.norm1.",
        r"segment_predictor\.transformer_self_attention_layers\.(\d+)\.norm\.": r"decoder.\1.norm2.",
        r"segment_predictor\.transformer_ffn_layers\.(\d+)\.norm\.": r"decoder.\1.norm3.",
        r"segment_predictor\.transformer_\w+_layers\.": r"decoder.",
        r"segment_predictor\.level_embed\.weight": r"decoder_level",
        r"segment_predictor\.mask_embed\.": r"MLP.",
        r"segment_predictor\.(decoder_norm|query_feat|query_embed|class_embed)\.": r"\1.",
    },
    "captioning": {r"caption_decoder\.": r""},
}
CLIPS = "open_clip", "eva_clip", "open_clip_vit"
THEIRS = tuple(f for f, prefix in weight_files.TOWERS.items() if prefix is None)  # of transformers
NEEDED = {"open_clip": CLIPS, "blip2": ("blip2",), "transformers": THEIRS}  # others: any tower
SUFFIX = {"timm": ".safetensors", "open_clip": ".safetensors", "eva_clip": ".pt"}  # others: a folder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
USE = {  # what the model card says about loading
    "timm": 'timm.create_model("{timm}", num_classes=0, {more}checkpoint_path="{dst}")',
    "open_clip": 'open_clip.create_model_and_transforms(NAME, pretrained="{dst}")  # NAME of --weights',
    "eva_clip": 'eva_clip.create_model_and_transforms(NAME, "{dst}", force_custom_clip=True)',
    "transformers": 'transformers.{architecture}.from_pretrained("{dst}")',
    "blip2": 'transformers.{architecture}.from_pretrained("{dst}")',
    # timm's EVA reads qkv's weight without calling qkv, so PEFT's update would be without effect
    "peft": 'peft.PeftModel.from_pretrained(model, "{dst}")  # timm: first, attn.qkv_bias_separate = True',
}
CARD = """# {name}{tuned}, for {to}

Made by convert.py of a reimplementation of *Supervised Fine-tuning in turn Improves Visual
Foundation Models* (arXiv 2401.10222). Load it, in fp32 (half precision rounds most of the update
away), with

    {use}
"""


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="action", required=True)
    model = "which ViT it is (default: found from its width and depth)"
    add = sub.add_parser("import", help="others' backbone, LoRA or head -> ours").add_argument
    add("src", metavar="SRC", help="a file, or a folder of transformers")
    add("dst", metavar="DST", help="the .safetensors to write")
    kinds = [*weight_files.TOWERS, "lora", *RELEASE]
    add("--from", dest="kind", choices=kinds, help="what SRC is (default: by its names)")
    add("--model", help=model)
    add("--words", metavar="FILE", help="captioning: the release's WORDMAP_*.json (default: <1>, <2>, ...)")
    add = sub.add_parser("export", help="backbone + LoRA -> the files of others").add_argument
    add("dst", metavar="DST", help="what to write: .safetensors (timm, open_clip), .pt (eva_clip), a folder")
    add("--weights", required=True, help="a backbone; the whole CLIP, BLIP-2, ... where that is the target")
    add("--to", required=True, choices=USE, help="who should be able to load it")
    add("--dtype", choices=DTYPES, help="transformers: type of the merged weights (default: fp32)")
    add("--model", help=model)
    add("--lora", default="none", metavar="FILE|none", help="our LoRA file, merged (peft: written alone)")
    add("--results", nargs="+", default=[], metavar="JSON", help="result.json files for the model card")
    args = p.parse_args()
    (import_ if args.action == "import" else export)(args)


# --- import


@cache
def coco_categories() -> list[dict]:
    """COCO's 80, which torchvision lists by category id."""
    # A second that --help need not wait
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [{"id": i, "name": name} for i, name in enumerate(names) if name not in ("__background__", "N/A")]


def import_(args: argparse.Namespace) -> None:
    """Recognise SRC, check it, write DST."""
    src, dst = Path(args.src), Path(args.dst)
    if dst.suffix != ".safetensors" or dst.is_dir():
        raise ValueError(f"{dst}: our files are .safetensors")
    state = {name.removeprefix("visft_heads."): value for name, value in weight_files.read(src).items()}
    kind = args.kind or recognize(state, src)
    if args.words and kind != "captioning":
        raise ValueError(f"--words goes with a captioning head; {src} holds {kind}")
    if kind == "lora":
        told = import_lora(state, args)
    elif kind in RELEASE:
        told = import_head(state, kind, args)
    else:
        weights = weight_files.tower(state, kind)
        name, _ = fits(weights, src, args.model, kind)
        write(dst, weights)
        rest = len(state) - len(weight_files.timm_names(state, kind))
        told = [f"backbone {name}; left out: {rest} tensors outside of the vision tower"]
    print(f"{dst}: {src}, read as {kind}", *told, sep="\n  ")


def recognize(state: dict[str, Tensor], src: Path) -> str:
    """What the names say: lora, a head's task, or a format of weight_files.TOWERS."""
    if any(name.endswith(".lora_A") for name in state):
        return "lora"
    if kind := weight_files.recognize(state):
        return kind
    tasks = [task for task in RELEASE if any(head_name(name, task) is not None for name in state)]
    if len(tasks) == 1:
        return tasks[0]
    held = f"the heads {', '.join(tasks)}" if tasks else f"names like {', '.join(list(state)[:3]) or 'none'}"
    raise ValueError(f"{src}: no vision tower, LoRA or single head, but {held}: choose one with --from")


def import_lora(state: dict[str, Tensor], args: argparse.Namespace) -> list[str]:
    """The authors' eva_{g,e}_lora_N.pt: our names behind a prefix; the rank is in the shapes, alpha is 1."""
    found = {re.sub(r"^.*?(?=blocks\.\d)", "", k): v for k, v in state.items() if ".lora_" in k}
    first = "blocks.0.attn.qkv.lora_"
    if f"{first}A" not in found or f"{first}B" not in found:
        raise ValueError(f"{args.src}: no {first}A and {first}B")
    rank, dim = found[f"{first}B"].shape[1], found[f"{first}A"].shape[1]
    depth = 1 + max(int(k.split(".")[1]) for k in found if re.match(r"blocks\.\d+\.", k))
    name = model_name(dim, depth, args.src, args.model)
    with torch.device("meta"):
        expected = lora.parameters(lora.attach(Backbone(name).vit, rank))
    files.check(found, expected, f"{args.src} is no LoRA of rank {rank} for {name}")
    header = {"rank": rank, "alpha": 1.0, "targets": ["qkv"], **released_features(name)}
    write(Path(args.dst), {k: v.float() for k, v in found.items()}, lora=header)
    return [f"LoRA of rank {rank}, alpha 1 (the release's scale, 1/{rank}), for all {depth} blocks of {name}"]


def import_head(state: dict[str, Tensor], task: str, args: argparse.Namespace) -> list[str]:
    """The authors' *_heads.ckpt, layouts and names of their trainer."""
    found, left, unknown = {}, [], []
    for name, value in state.items():
        ours = head_name(name, task)
        if ours is None:
            known = name == "det_losses.empty_weight" or any(head_name(name, t) is not None for t in RELEASE)
            (left if known else unknown).append(name)
        elif ours in found and not torch.equal(found[ours], value):
            raise ValueError(f"{args.src}: {name} and its alias differ")
        else:
            found[ours] = value
    if unknown:
        raise ValueError(f"{args.src}: {len(unknown)} tensors of no head: {', '.join(unknown[:4])}")
    widths = ("input_proj.weight", "input_proj.0.weight", "attention.encoder_att.weight")  # (_, D, ...)
    dim = next((found[name].shape[1] for name in widths if name in found), None)
    if dim is None:
        raise ValueError(f"{args.src}: no {task} head: nothing becomes our {' or '.join(widths)}")
    name = args.model or next((m for (width, _), m in MODELS.items() if width == dim), None)
    if name is None:
        raise ValueError(f"{args.src}: features of width {dim} are of no known model: pass --model")
    arguments = {"categories": coco_categories()} | ({"eq2_h": False} if task == "segmentation" else {})
    if task == "captioning":
        arguments = {"vocabulary": vocabulary(args.words, len(found.get("embedding.weight", ())))}
    head = tasks.find(task).Head(dim, **arguments)
    told = adapt(found, task)
    files.check(found, head.state_dict(), f"{args.src} is no {task} head of the release")
    write(Path(args.dst), found, head={"task": task, "config": head.config, **released_features(name)})
    told += [f"left out: {name}" for name in left[:8]] + [f"and {len(left) - 8} more"] * (len(left) > 8)
    return [f"{task} head for {name} (width {dim}), {len(found)} tensors", *told]


def head_name(name: str, task: str) -> str | None:
    """Our name of a tensor of the release's head; None if it is not of this task."""
    name = re.sub(r"^segment_head\.(?=pixel_decoder|predictor)", "segment_", name)  # all stored twice
    for theirs, ours in RELEASE[task].items():
        ours, fits = re.subn(f"^{theirs}", ours, name)
        if fits:
            return ours
    return None


def adapt(found: dict[str, Tensor], task: str) -> list[str]:
    """The few tensors whose rows mean something else with us, in place. Returns what the user should know."""
    if task == "captioning":
        return []
    if task == "segmentation":
        # The release labels 1..80 but counts 80 as no-object: label i is its logit i + 1, and toothbrush is
        # trained as background. Its logit 0, never a target, is all that is left for it
        rows = [*range(1, 80), 0, 80]
        told = ["classes 0..78 are its logits 1..79; toothbrush, which it trained as no-object, its unused 0"]
        found |= {k: found[k].squeeze(0) for k in ("encoder_level", "decoder_level") if k in found}
    else:
        rows = [*(c["id"] for c in coco_categories()), 91]
        told = ["92 logits by category id -> 80 categories and no-object", "left out: task table's rows 1.."]
        found |= {k: found[k][0] for k in ("task_token",) if k in found}
    for name in ("class_embed.weight", "class_embed.bias"):
        if name in found and len(found[name]) > max(rows):
            found[name] = found[name][rows]
    return told


def vocabulary(words: str | None, n: int) -> list[str]:
    """n words by token, from {word: token}; without the file <1>, <2>, ... stand for them."""
    if words is None:
        return ["<pad>", *(f"<{i}>" for i in range(1, n - 3)), "<unk>", "<start>", "<end>"]
    try:
        tokens = json.loads(Path(words).read_text())
        if sorted(tokens.values()) != list(range(n)):
            raise ValueError(f"{len(tokens)} words, the head has {n}, each with a token 0..{n - 1}")
        return sorted(tokens, key=tokens.get)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"--words {words}: {error}") from error


def released_features(name: str) -> dict:
    """What the release trained on (see backbone.backbone_settings)."""
    return {"backbone": name, "no_cls": True, "imagenet_norm": True, "source": "TencentARC/ViSFT"}


# --- export


def export(args: argparse.Namespace) -> None:
    """Check all, then write DST and its model card."""
    refuse_target(args)
    dst, base, folder = Path(args.dst), Path(args.weights), args.to in ("blip2", "transformers")
    state = weight_files.read(base)
    source = weight_files.recognize(state)
    refuse_source(args, state, source)
    names = {ours: theirs for theirs, ours in weight_files.timm_names(state, source).items()}
    header, updates, told = {}, {}, []
    if (folder or args.to == "peft") and not args.model:  # any size: only the LoRA has to fit
        tower = weight_files.renamed(state, source)
        name = f"the vision tower of {base.name}"
    else:
        tower = weight_files.tower(state, source)
        name, body = fits(tower, base, args.model, source)
        if folder or args.to == "peft":
            tower = weight_files.renamed(state, source)
        elif args.to == "timm" and (behind := [k for k in tower if k not in body]):
            told = [f"left out: {', '.join(behind[:4])}, {len(behind)} in all, which are not M's"]
            tower = body
    if args.lora != "none":
        header, updates, dropped = read_lora(args.lora, tower, source, args.weights)
        told += dropped
    if folder:
        config = weight_files.read_config(base)
        told += unread(config, len({k.split(".")[1] for k in updates})) if updates else []
        dtype = DTYPES[args.dtype or "fp32"]
        if updates and dtype != torch.float32:
            lost = 100 * lost_share(tower, updates, dtype)
            told.append(f"{lost:.1f}% of the update lost in the rounding to {args.dtype}")
    use = how_to_use(args, name, tower)
    text = card(args, name, header, told, use)
    if args.to == "peft":
        write_peft(dst, updates, header, names, args.weights, text)
    elif folder:
        write_folder(dst, base, {names[k]: update for k, update in updates.items()}, dtype, text)
    else:
        out, target = {k: merge(v, updates.get(k)) for k, v in tower.items()}, args.to
        if target == "open_clip" and source == "open_clip_vit":  # its own names, and its shapes
            out, target = {k: v.T if k == "head.weight" else v for k, v in out.items()}, source
            out |= {"cls_token": out["cls_token"].flatten(), "pos_embed": out["pos_embed"][0]}
        out = {weight_files.file_name(k, target): v.contiguous() for k, v in out.items()}
        if args.to != "timm" and source in CLIPS:
            rest = state.keys() - names.values()
            out |= {k: v for k, v in state.items() if k in rest}
        write(dst, out)
        dst.with_suffix(".md").write_text(text)
    print(f"{dst}: {args.weights} ({source}) + {args.lora}", *told, use, sep="\n  ")


def refuse_target(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for options that cannot be, before anything is read."""
    dst, suffix = Path(args.dst), SUFFIX.get(args.to)
    if suffix and (dst.suffix != suffix or dst.is_dir()):
        raise ValueError(f"{dst}: --to {args.to} writes a {suffix} file")
    if not suffix and (dst.is_file() or (dst.is_dir() and any(dst.iterdir()))):
        raise ValueError(f"{dst} is there already: --to {args.to} writes a new folder")
    if args.to == "peft" and args.lora == "none":
        raise ValueError("--to peft writes the LoRA alone: pass --lora FILE")
    if args.dtype and args.to not in ("blip2", "transformers"):
        raise ValueError(f"--dtype goes with --to transformers; --to {args.to} writes what is merged in fp32")
    for file in args.results:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--results {file}: no such file")


def refuse_source(args: argparse.Namespace, state: dict[str, Tensor], source: str | None) -> None:
    """Raises ValueError if --weights holds no tower, or one that --to cannot take."""
    base, needed = Path(args.weights), NEEDED.get(args.to, weight_files.TOWERS)
    whole = any(k.startswith(("text.", "token_embedding.")) for k in state)
    if source not in needed or (args.to == "open_clip" and not whole):
        needed = " or ".join(needed)
        raise ValueError(f"{base} is {source or 'no ViT'}: --to {args.to} needs a whole {needed}")
    if args.to in ("blip2", "transformers") and not (base / "config.json").is_file():
        raise ValueError(f"{base}: --to {args.to} needs the folder that save_pretrained wrote")
    if args.to == "peft" and source in THEIRS and source != "blip2":
        why = "transformers' modules have other names than its files, which PEFT goes by"
        raise ValueError(f"{base} is {source}: {why}: --to transformers")
    if args.to in ("peft", "eva_clip") and source == "open_clip_vit":
        why = {"peft": "has no layer for q and v that PEFT could tune", "eva_clip": "is not EVA-CLIP's"}
        raise ValueError(f"{base}: open_clip's own ViT {why[args.to]}: --to open_clip, or timm")


def how_to_use(args: argparse.Namespace, name: str, tower: dict[str, Tensor]) -> str:
    """The line that loads DST."""
    import timm

    model, more = "eva_g" if name == "eva_g_blip2" else name, "depth=39, " * (name == "eva_g_blip2")
    model = TIMM_NAMES.get(model, model)
    if args.to == "timm" and not more:
        with torch.device("meta"):  # some pool the patches, behind a norm of another name, or attend to them
            default = timm.create_model(model, num_classes=0).state_dict()
        more = "" if default.keys() == tower.keys() else 'global_pool="", '
    config, architecture = Path(args.weights) / "config.json", "AutoModel"
    if args.to in ("blip2", "transformers"):
        architecture = (json.loads(config.read_text()).get("architectures") or [architecture])[0]
    names = dict(timm=model.split(".")[0], architecture=architecture)
    return USE[args.to].format(dst=args.dst, more=more, **names)


def read_lora(path: str, tower: dict[str, Tensor], source: str, weights: str) -> tuple[dict, dict, list[str]]:
    """Its header; {name of a weight: LoRALinear}; what was left out. Raises ValueError if it does not fit."""
    (header, state), told = lora.read(path), []
    ends = tuple(f"attn.{target}.weight" for names in lora.TARGETS for target in names)
    layers = [k.removesuffix(".weight") for k in tower if k.endswith(ends)]
    if source in ("lavis", *THEIRS):
        depth = len({layer.split(".")[1] for layer in layers})
        dropped = [k for k in state if k.startswith(f"blocks.{depth}.")]
        state = {k: v for k, v in state.items() if k not in dropped}
        owner = "BLIP-2" if source in ("lavis", "blip2") else weights
        told = [f"left out: {k}, of a block that {owner} does not have" for k in dropped]
    updates = {}
    for layer in layers:
        rows, columns = tower[f"{layer}.weight"].shape
        blocks, updated = (3, (0, 2)) if rows == 3 * columns else (1, (0,))
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        updates[layer] = lora.LoRALinear(linear, header["rank"], header["alpha"], blocks, updated)
    parts = [(layer, part) for layer in layers for part in ("lora_A", "lora_B")]
    expected = {f"{layer}.{part}": getattr(updates[layer], part) for layer, part in parts}
    state = lora.as_in(expected, state)
    files.check(state, expected, f"{path}, tuned on {header.get('backbone', '?')}, does not fit {weights}")
    for layer, part in parts:
        setattr(updates[layer], part, nn.Parameter(state[f"{layer}.{part}"], requires_grad=False))
    return header, {f"{layer}.weight": update for layer, update in updates.items()}, told


def merge(weight: Tensor, update: lora.LoRALinear | None) -> Tensor:
    """W + (alpha / rank) B A, in fp32: half precision would round most of the update away."""
    return weight if update is None else weight.float() + update.delta()


def lost_share(tower: dict[str, Tensor], updates: dict[str, lora.LoRALinear], dtype: torch.dtype) -> float:
    """The part of the update that rounding W + dW takes: 1 less the projection of what arrives on dW."""
    arrived = whole = 0.0
    for name, update in updates.items():
        W, dW = tower[name], update.delta()
        change = merge(W, update).to(dtype).double() - W.to(dtype).double()
        arrived, whole = arrived + (change * dW).sum().item(), whole + dW.double().square().sum().item()
    return 1 - arrived / whole if whole else 0.0


def unread(config, depth: int) -> list[str]:
    """What should be known of a model that reads its tower before the last block, as LLaVA does."""
    layer = getattr(config, "vision_feature_layer", None)
    if layer is None:
        return []
    at = [depth + 1 + i if i < 0 else i for i in (layer if isinstance(layer, list | tuple) else [layer])]
    blocks = [f"blocks.{i}" for i in range(max(at), depth)]
    why = f"it reads the tower at layer {layer}, before the final norm"
    return [f"without effect there: dW of {', '.join(blocks)}: {why}"] if blocks else []


def write_folder(
    dst: Path, base: Path, updates: dict[str, lora.LoRALinear], dtype: torch.dtype, text: str
) -> None:
    """A copy of transformers' folder with the LoRA merged into its vision tower, one file at a time.

    updates: by the name of the weight in the files; what is merged is stored as dtype, which config.json says
    """
    left_out = shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", ".*")
    shards, total = sorted(base.glob("*.safetensors")), 0
    with files.replacing(dst, 2 * sum(file.stat().st_size for file in shards)) as part:
        shutil.copytree(base, part, ignore=left_out)
        for file in shards:
            out = {k: merge(v, updates.get(k)) for k, v in load_file(file).items()}
            out = {k: v.to(dtype) if k in updates else v for k, v in out.items()}
            total += size(out)
            save_file(out, part / file.name, metadata={"format": "pt"})
        index = part / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text())
            content["metadata"] = {**content.get("metadata", {}), "total_size": total}
            index.write_text(json.dumps(content, indent=2))
        if updates:
            config, kind = json.loads((part / "config.json").read_text()), str(dtype)[6:]
            text_of_config = json.dumps({**in_dtype(config, kind), "dtype": kind}, indent=2)
            (part / "config.json").write_text(text_of_config)
        (part / "README.md").write_text(text)


def in_dtype(config: dict, dtype: str) -> dict:
    """A config of transformers', or one within it, for which it loads `dtype`: 16 bit rounds dW away."""
    content = {k: in_dtype(v, dtype) if isinstance(v, dict) else v for k, v in config.items()}
    return {k: dtype if k in ("dtype", "torch_dtype") else v for k, v in content.items()}


def write_peft(dst: Path, updates: dict, header: dict, names: dict, weights: str, text: str) -> None:
    """The LoRA alone. PEFT has one product for all rows of a Linear, so a fused qkv gets rank 2 r, not r:

    [[B_q, 0], [0, 0], [0, B_v]] [A_q; A_v] is the same update, with zeros in the rows of k.
    """
    state, targets, factor = {}, [], 1
    for name, update in updates.items():
        target, B = names[name].removesuffix(".weight"), update.lora_B
        if update.blocks == 3:
            (q, v), zeros, factor = B.chunk(2), torch.zeros(len(B) // 2, B.shape[1]), 2
            B = torch.cat([torch.cat([q, zeros, zeros]), torch.cat([zeros, zeros, v])], 1)  # (3 D, 2 r)
        state[f"base_model.model.{target}.lora_A.weight"] = update.lora_A.contiguous()
        state[f"base_model.model.{target}.lora_B.weight"] = B.contiguous()
        targets.append(target)
    config = {
        "peft_type": "LORA", "base_model_name_or_path": weights, "target_modules": targets, "bias": "none",
        "r": factor * header["rank"], "lora_alpha": factor * header["alpha"], "lora_dropout": 0.0,
        "inference_mode": True,
    }  # fmt: skip
    with files.replacing(dst, size(state)) as part:
        part.mkdir()
        save_file(state, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2))
        (part / "README.md").write_text(text)


def card(args: argparse.Namespace, name: str, header: dict, told: list[str], use: str) -> str:
    """The model card: how to load it, what it is made of, how it was tuned, what it scores."""
    weights, run, details = Path(args.weights), Path(args.lora).parent / "last.pt", {}
    made_of = sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]
    if header:
        made_of.append(Path(args.lora))
    if header and run.is_file():
        options = torch.load(run, "cpu", weights_only=True, mmap=True)["options"]
        details["Options and data of the tuning"] = options
    details |= {file: json.loads(Path(file).read_text()) for file in args.results}
    what = "PEFT adapter" if args.to == "peft" else "merged into the weights" if header else "none"
    lines = [CARD.format(name=name, tuned=" after ViSFT" * bool(header), to=args.to, use=use)]
    lines += [f"LoRA: {what}. {json.dumps(header) if header else ''}", *(f"- {line}" for line in told), ""]
    lines += ["| made of | sha256 |", "|---|---|"]
    lines += [f"| {file} | {files.sha256(file)} |" for file in made_of]
    for title, content in details.items():
        lines += ["", f"## {title}", "", "```json", json.dumps(content, indent=1, default=str), "```"]
    return "\n".join(lines) + "\n"


# --- both


def fits(tower: dict[str, Tensor], src: str | Path, given: str | None, format: str) -> tuple[str, dict]:
    """The --model that the tower is, and what M has of it. Raises ValueError if it is none or not `given`."""
    blocks = {k.split(".")[1] for k in tower if k.startswith("blocks.")}
    dim = tower["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in tower else 0
    name = given or model_name(dim, len(blocks), src, None)
    with torch.device("meta"):
        backbone = Backbone(name)
    return name, fitting(tower, backbone, src, format)


def model_name(dim: int, depth: int, src: str | Path, given: str | None) -> str:
    """Which model has this width and this many blocks. Raises ValueError if none, or not the one given."""
    found = f"{src}: width {dim}, {depth} blocks"
    if given:
        with torch.device("meta"):
            backbone = Backbone(given)
        if (have := (backbone.dim, len(backbone.vit.blocks))) != (dim, depth):
            raise ValueError(f"{found}; --model {given} has width {have[0]}, {have[1]} blocks")
    elif (dim, depth) not in MODELS:
        raise ValueError(f"{found}: none of {', '.join(MODELS.values())}: pass --model")
    return given or MODELS[dim, depth]


def size(state: dict[str, Tensor]) -> int:
    return sum(value.nbytes for value in state.values())


def write(dst: Path, state: dict[str, Tensor], **header: dict) -> None:
    """A .safetensors, with what is given as JSON in its header, or torch's .pt."""
    if dst.suffix == ".pt":
        with files.replacing(dst, size(state)) as part, open(part, "wb") as file:
            torch.save(state, file)  # given a path, it would hide the disk's error
    else:
        files.save(state, dst, **header)


if __name__ == "__main__":
    launch(main)
