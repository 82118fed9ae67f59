"""Host memory of loading frozen models on several ranks, as a multiple of the file.

    python benchmarks/loading.py          # files of about 1 GB, two ranks, a few minutes

Ranks load at the same time, touch all weights and hold them. `private` is what a rank has added of its own
(Private_Clean and Private_Dirty of /proc/self/smaps_rollup), `most` the largest sample of its anonymous
memory on the way; the least of three loads, of the rank with the most. `shared` is there once for all ranks:
it is the mapped file. `8 ranks` is 8 x private + shared, and must stay below 1.3 where the model's device is
elsewhere or its type is the file's, fp32 here: in `cpu, bf16` what is private is the model itself. The meta
device stands in for a GPU: the model is built there and has no bytes here, but nothing reads the file either.
"""

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import open_clip
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a lora.py too

import backbone as vit
import clip
import files

VIT = "vit_large_patch14_dinov2.lvd142m"  # 1.2 GB in fp32
REPEATS = 3


def clip_config(width: int, layers: int) -> dict:
    return {
        "embed_dim": width,
        "vision_cfg": {"image_size": 224, "patch_size": 16, "width": width, "layers": layers},
        "text_cfg": {"width": width, "heads": width // 64, "layers": layers},
    }


def ways(model: str, folder: Path) -> dict[str, tuple[str, Callable]]:
    """What is measured: the file that counts, and how it is loaded."""
    weights = folder / "vit.safetensors"
    hub = mock.patch("huggingface_hub.hf_hub_download", lambda repo, name: str(weights))
    elsewhere = SimpleNamespace(device=torch.device("meta"), dtype=torch.bfloat16)

    def pretrained(device: str) -> vit.Backbone:
        with hub:
            return vit.load(model, "pretrained", torch.float32, device)

    def open_clips(file: str) -> torch.nn.Module:
        open_clip.add_model_config(folder / "stand_in.json")
        with mock.patch("open_clip.get_tokenizer"):  # 20 MB, whatever the size of the model
            return clip.Clip("stand_in", file, elsewhere, seed=0).model

    return {
        "a file, cpu, fp32": (weights.name, partial(vit.load, model, str(weights))),
        "a file, cpu, bf16": (weights.name, partial(vit.load, model, str(weights), torch.bfloat16)),
        "a file, elsewhere": (weights.name, partial(vit.load, model, str(weights), torch.bfloat16, "meta")),
        "pretrained, cpu, fp32": (weights.name, partial(pretrained, "cpu")),
        "pretrained, elsewhere": (weights.name, partial(pretrained, "meta")),
        "random, elsewhere": (weights.name, partial(vit.load, model, "random", torch.bfloat16, "meta")),
        "CLIP, elsewhere": ("clip.pt", partial(open_clips, str(folder / "clip.pt"))),
        "random CLIP, elsewhere": ("clip.pt", partial(open_clips, "random")),
    }


def memory() -> dict[str, int]:
    """Bytes of this process, by the names in smaps_rollup, which counts in kB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {name: 1024 * int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    found["private"] = found["Private_Clean"] + found["Private_Dirty"]
    found["shared"] = found["Shared_Clean"] + found["Shared_Dirty"]
    return found


def added(load: Callable) -> dict[str, int]:
    """Bytes that a rank has more with the model loaded and held, and the most of its own on the way."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what is free in the heap hides what is added
    before, most, done = memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most.append(memory()["Anonymous"])

    watching = threading.Thread(target=watch)
    watching.start()
    model = load()
    done.set()
    watching.join()
    held = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    sum(t.sum().item() for t in held)  # what is mapped is there only once it is read
    dist.barrier()
    after = memory()
    dist.barrier()
    peak = max(*most, after["Anonymous"]) - before["Anonymous"]
    return {name: after[name] - before[name] for name in ("private", "shared")} | {"most": peak}


def rank_of(rank: int, world: int, model: str, folder: Path) -> None:
    """One rank: loads every way; of both ranks' figures, the larger are kept."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    warnings.filterwarnings("ignore", "for .* copying from a non-meta parameter")  # of each tensor
    found = {}
    for name, (_, load) in ways(model, folder).items():
        # The least: what libraries need once, or an allocator keeps for later, is not what a model takes
        mine = torch.tensor([list(added(load).values()) for _ in range(REPEATS)]).amin(0)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        found[name] = dict(zip(("private", "shared", "most"), mine.tolist(), strict=True))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def ratios(
    model: str = VIT, layers: int = 14, width: int = 768, world: int = 2
) -> dict[str, dict[str, float]]:
    """Of each way to load: what ranks add, as multiples of the file, and the file's GB."""
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files.write_json(folder / "stand_in.json", clip_config(width, layers))
        files.save(vit.Backbone(model).vit.state_dict(), folder / "vit.safetensors")
        open_clip.add_model_config(folder / "stand_in.json")
        with files.replacing(folder / "clip.pt") as part, open(part, "wb") as file:
            torch.save(open_clip.create_model("stand_in").state_dict(), file)
        mp.start_processes(rank_of, (world, model, folder), nprocs=world, start_method="fork")
        found = json.loads((folder / "found.json").read_text())
        size = {name: (folder / name).stat().st_size for name in ("vit.safetensors", "clip.pt")}
    for way, (file, _) in ways(model, folder).items():
        found[way] = {name: value / size[file] for name, value in found[way].items()}
        found[way] |= {"8 ranks": 8 * found[way]["private"] + found[way]["shared"], "GB": size[file] / 1e9}
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=VIT, help="a timm ViT whose weights are on the hub")
    p.add_argument("--layers", type=int, default=14, help="of each of CLIP's towers (14: 0.9 GB)")
    p.add_argument("--ranks", type=int, default=2)
    args = p.parse_args()
    found = ratios(args.model, args.layers, world=args.ranks)
    print("| loaded | file, GB | private | most | shared | 8 ranks |\n|---|---|---|---|---|---|")
    for way, r in found.items():
        cells = (f"{r[name]:.3f}" for name in ("private", "most", "shared", "8 ranks"))
        print(f"| {way} | {r['GB']:.2f} |", " | ".join(cells), "|")
    print("\n" + json.dumps({**vars(args), **found}))


if __name__ == "__main__":
    main()
