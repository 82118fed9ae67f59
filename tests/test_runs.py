"""Which commands the scripts of runs/ call, by stand-ins for torchrun, python and srun."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as parse_torchrun

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if '__name__ == "__main__"' in p.read_text())
NOTE = r"""#!/usr/bin/env bash
printf '%q ' "$(basename "$0")" "$@" >> "$CALLS" && echo >> "$CALLS"
"""
MAKE = r"""
[[ -n $FAIL && $* == *$FAIL* ]] && exit 7
what="$*"
while [ $# -gt 0 ] && [ "$1" != --out ]; do shift; done
[ $# -gt 0 ] || exit 0
mkdir -p "$2" && cd "$2"
[[ $what != *stage2_lora.py* ]] || touch lora_0{05,15,20,50}000.safetensors
"""
SETS = (
    "imagenet-1k imagenet-a imagenet-r imagenet-sketch eurosat cifar-10 cifar-100 gtsrb caltech-101".split()
)
DATA = [
    *(f"coco/{split}2017/" for split in ("train", "val")),
    *(f"sets/{name}/" for name in (*SETS, "flickr30k", "gqa/images", "nocaps/images", "lmdb/evaluation")),
    *(f"sets/lmdb/training/{part}/" for part in ("MJ", "ST")),
    *(f"sets/coco-goi/{part}.jsonl" for part in ("train", "val")),
    *("sets/dataset_coco.json", "sets/dataset_flickr30k.json", "sets/nocaps/nocaps_val_4500_captions.json"),
    "sets/vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
    "sets/okvqa/OpenEnded_mscoco_val2014_questions.json",
    "sets/gqa/testdev_balanced_questions.json",
    *("sets/textvqa/TextVQA_0.5.1_val.json", "sets/textvqa/train_images/"),
]
POPE = [f"sets/pope/coco_pope_{setting}.json" for setting in ("random", "popular", "adversarial")]


def stand_in(folder: Path, **programs: str) -> dict[str, str]:
    """An environment where these programs are these texts."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return {**kept, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


class Runs:
    """Calls a script of runs/ in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "calls.txt"
        self.env = stand_in(folder, torchrun=NOTE + MAKE, python=NOTE + MAKE)
        self.env |= dict(
            COCO=f"{folder}/coco", DATA=f"{folder}/sets", OUT=f"{folder}/out", CALLS=str(self.log)
        )

    def add_data(self) -> None:
        for name in DATA:
            path = self.folder / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.touch()

    def __call__(self, script: str, *names: str, fail: str = "", **env: str):
        """The finished process, and the commands it called, the torchrun of each as it was."""
        self.log.write_text("")
        env = {**self.env, "FAIL": fail, **env}
        command = ["bash", f"runs/{script}", *names]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        return done, [shlex.split(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def runs(tmp_path) -> Runs:
    runs = Runs(tmp_path)
    runs.add_data()
    return runs


class Parsed(Exception):
    """Thrown by parse_args with what it found."""


def script_of(call: list[str]) -> list[str]:
    """The script and its options: what python is given, or torchrun's own parser leaves."""
    if call[0] == "python":
        return call[1:]
    found = parse_torchrun(call[1:])
    return [found.training_script, *found.training_script_args]


@pytest.fixture
def parse(monkeypatch):
    """parse(["stage1_heads.py", "--task", ...]) -> what the script's argparse makes of it; nothing is run."""
    real = argparse.ArgumentParser.parse_args

    def stop(self, *arguments):
        raise Parsed(real(self, *arguments))

    def parse_command(command: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(command[0].removesuffix(".py")).main()
        monkeypatch.undo()
        return parsed.value.args[0]

    return parse_command


# --- paper.sh, ablations.sh

# Every cell: of which script, of what, after how many steps of stage 2. "0k" is each command's `before`
RETRIEVAL = [
    ("eval_zeroshot retrieval", f"{tower} {set}")
    for tower in ("clip", "blip2")
    for set in ("coco", "flickr30k")
]
QUESTIONS = [(llm, kind) for llm in ("2.7b", "6.7b") for kind in ("vqav2", "okvqa", "gqa")]
CELLS = {
    "eva_g": {
        *(("eval_ocr", "", k) for k in (5, 15)),  # Table 3
        *(("eval_goi", "", k) for k in (5, 15)),  # Table 4
        *((*what, 5) for what in RETRIEVAL if "blip2" in what[1]),  # Table 6
        *(("eval_vqa", f"{llm} {kind}", k) for llm, kind in QUESTIONS for k in (5, 20)),  # Table 7
        *(("eval_caption", "2.7b nocaps_val_4500_captions", k) for k in (5, 15)),  # Table 8
        ("visualize attention", "", 5),  # Fig. 3
    },
    "eva_e": {
        ("eval_goi", "", 5),  # Table 4
        *(("eval_zeroshot classification", name, 5) for name in SETS),  # Table 5
        *((*what, k) for what in RETRIEVAL if "clip" in what[1] for k in (5, 50)),  # Table 6
    },
}


def cells_of(command: list[str], args: argparse.Namespace) -> set[tuple]:
    """What a command gives, in the form of CELLS."""
    if not getattr(args, "compare", None):
        return set()
    script, steps = command[0].removesuffix(".py"), int(re.search(r"lora_0*(\d+)000", args.compare)[1])
    if script == "eval_zeroshot":
        if args.task == "classification":
            return {("eval_zeroshot classification", entry.partition("=")[0], steps) for entry in args.sets}
        set_ = Path(args.captions).stem.removeprefix("dataset_")
        return {("eval_zeroshot retrieval", f"{'blip2' if args.blip2 else 'clip'} {set_}", steps)}
    llm = args.blip2.rpartition("-")[2] if hasattr(args, "blip2") else ""
    if script == "eval_vqa":
        return {(script, f"{llm} {args.kind}", steps)}
    if script == "eval_caption":
        return {(script, f"{llm} {Path(args.captions).stem}", steps)}
    return {(f"{script} attention" if script == "visualize" else script, "", steps)}


@pytest.mark.parametrize("model", CELLS)
def test_paper_has_a_command_for_every_cell_that_its_script_accepts(runs, parse, model):
    done, calls = runs("paper.sh", MODEL=model)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout
    found, folders, lora = set(), [], set()
    for call in calls:
        command = script_of(call)
        args = parse(command)
        found |= cells_of(command, args)
        folders.append(str(args.out))
        if command[0] != "eval_zeroshot.py" and "blip2" not in args:
            assert args.model == model
        if command[0] == "stage1_heads.py":
            assert args.out == f"{runs.folder}/out/stage1/{args.task}" and args.resume
        elif command[0] == "stage2_lora.py":
            assert args.heads == [f"{runs.folder}/out/stage1"] and args.resume
            lora = {str(path) for path in Path(args.out).glob("lora_*")}
        else:
            assert args.compare in lora
    assert len(set(folders)) == len(folders)
    assert CELLS[model] <= found, CELLS[model] - found
    tower = {"eva_g": "EVA01-g-14", "eva_e": "EVA02-E-14-plus"}[model]
    zeroshot = [parse(script_of(call)) for call in calls if "eval_zeroshot.py" in call]
    assert {args.clip for args in zeroshot if not getattr(args, "blip2", None)} == {tower}


# NAME of a row -> what differs from the default, by hand from Tables 9-12
ROWS = {
    "default": {},
    "rank8": {"rank": 8},
    "rank16": {"rank": 16},
    "rank32": {"rank": 32},
    "data25": {"data_fraction": 0.25},
    "data50": {"data_fraction": 0.5},
    "heads0.1": {"head_lr_ratio": 0.1},
    "heads1": {"head_lr_ratio": 1.0},
    "tasks_with_pose": {"tasks": ["detection", "segmentation", "captioning", "pose"]},
    "tasks_panoptic": {"tasks": ["detection", "panoptic", "captioning"]},
    "tasks_without_detection": {"tasks": ["segmentation", "captioning"]},
    "tasks_without_segmentation": {"tasks": ["detection", "captioning"]},
    "tasks_without_captioning": {"tasks": ["detection", "segmentation"]},
}


def test_ablations_differ_in_one_thing_and_are_scored(runs, parse):
    done, calls = runs("ablations.sh")
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout
    rows, scored, heads = {}, set(), []
    for call in calls:
        command = script_of(call)
        args = parse(command)
        name = Path(args.out).name
        if command[0] == "stage1_heads.py":
            heads.append(args.task)
        elif command[0] == "stage2_lora.py":
            rows[name] = vars(args)
        else:
            assert (
                args.compare == f"{runs.folder}/out/{Path(args.compare).parent.name}/lora_005000.safetensors"
            )
            scored.add((Path(args.compare).parent.name, args.task, *(getattr(args, "sets", None) or ())))
        if command[0] != "eval_zeroshot.py":
            assert args.exclude_images == f"{runs.folder}/sets/dataset_coco.json" and args.model == "eva_e"
    assert sorted(heads) == ["captioning", "detection", "panoptic", "pose", "segmentation"]
    assert {name: differs(row, rows["default"]) for name, row in rows.items()} == ROWS
    imagenet = f"imagenet-1k={runs.folder}/sets/imagenet-1k"
    table12 = [name for name in ROWS if name == "default" or name.startswith("tasks")]
    assert scored == {(name, "retrieval") for name in ROWS} | {
        (n, "classification", imagenet) for n in table12
    }
    _, calls = runs(
        "ablations.sh", "rank8", EXCLUDE="", OUT=f"{runs.folder}/all", HEADS=f"{runs.folder}/out/stage1"
    )
    assert [parse(script_of(call)).exclude_images for call in calls[:1]] == [None] and len(calls) == 2


def test_vlm_tunes_and_asks_llava_all_five_sets(runs, parse):
    for file in POPE:
        (runs.folder / file).parent.mkdir(exist_ok=True)
        (runs.folder / file).write_text(
            '{"image": "COCO_val2014_000000310196.jpg"}\n{"image": "COCO_val2014_000000000042.jpg"}\n'
        )
    folder = runs.folder / "llava"
    folder.mkdir()
    done, calls = runs("vlm.sh", VLM=str(folder))
    assert done.returncode == 0 and "left out" not in done.stdout, done.stderr
    *commands, export = [script_of(call) for call in calls]
    args = [parse(command) for command in commands]
    assert [command[0] for command in commands] == ["stage1_heads.py"] * 3 + ["stage2_lora.py"] + [
        "eval_vqa.py"
    ] * 5
    ids = runs.folder / "out/pope_images.txt"
    for stage in args[:4]:
        assert stage.model == "vit_large_patch14_clip_quickgelu_336" and stage.weights == "pretrained"
        assert stage.exclude_images == str(ids) and stage.resume
    assert ids.read_text() == "42\n310196\n"
    lora = f"{runs.folder}/out/visft/lora_005000.safetensors"
    assert [a.kind for a in args[4:]] == ["pope", "textvqa", "gqa", "okvqa", "vqav2"]
    for asked in args[4:]:
        assert asked.vlm == str(folder) and asked.compare == lora and asked.resume and not asked.blip2
        assert (len(asked.questions), bool(asked.annotations)) == (
            3 if asked.kind == "pope" else 1, asked.kind in ("okvqa", "vqav2"),
        )  # fmt: skip
    assert export[:3] == ["convert.py", "export", f"{runs.folder}/out/export/model"]
    assert parse(export).to == "transformers" and parse(export).lora == lora
    done, calls = runs("vlm.sh", "textvqa", OUT=f"{runs.folder}/new")
    assert done.returncode == 0 and calls == [] and "no " + lora.replace("/out/", "/new/") in done.stdout
    done, calls = runs("vlm.sh", OUT=f"{runs.folder}/hub")
    assert [script_of(call)[0] for call in calls][-1] == "eval_vqa.py" and "export: left out" in done.stdout


def differs(row: dict, default: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("out", "resume") and v != default[k]}


@pytest.mark.parametrize("script, fail", [("paper.sh", "eval_goi.py"), ("ablations.sh", "--rank 16")])
def test_a_failure_stops_and_what_was_done_is_not_repeated(runs, script, fail):
    failed, before = runs(script, fail=fail)
    assert failed.returncode == 7 and fail in shlex.join(before[-1])
    done, after = runs(script)
    assert done.returncode == 0, done.stderr
    _, whole = runs(script, OUT=f"{runs.folder}/new")
    told = [[word.replace(f"{runs.folder}/new", f"{runs.folder}/out") for word in call] for call in whole]
    assert after[0] == before[-1] and before[:-1] + after == told
    done, calls = runs(script)
    assert done.returncode == 0 and calls == [] and done.stdout.count("done before") == len(whole)


@pytest.mark.parametrize("script", ["paper.sh", "ablations.sh"])
def test_what_has_no_data_is_left_out_and_said(tmp_path, script):
    runs = Runs(tmp_path)
    done, calls = runs(script)
    assert done.returncode == 0 and not calls
    assert f"stage1/detection: left out, no {tmp_path}/coco" in done.stdout
    runs.add_data()
    (tmp_path / "sets" / "imagenet-1k").rmdir()
    done, calls = runs(script)
    assert done.returncode == 0 and f"no {tmp_path}/sets/imagenet-1k\n" in done.stdout
    assert calls and not any("imagenet-1k" in word for call in calls for word in call)


def test_names_choose_parts(runs):
    runs("paper.sh", "detection", "segmentation", "captioning", "visft")
    _, calls = runs("paper.sh", "table7_okvqa", "figure3")
    assert [script_of(call)[0] for call in calls] == ["eval_vqa.py"] * 4 + ["visualize.py"]
    _, calls = runs("paper.sh", "table3", CHECKPOINTS="010000 015000")
    assert [call[call.index("--compare") + 1][-18:] for call in calls] == [
        "015000.safetensors"
    ]  # of those there
    _, calls = runs("paper.sh", "table7_gqa", LLM="6.7b", BLIP2="/models")
    assert [call[call.index("--blip2") + 1] for call in calls] == ["/models/blip2-opt-6.7b"] * 2
    done, calls = runs("paper.sh", "table8", "tabel7")
    assert done.returncode == 2 and not calls and "no part begins with tabel7" in done.stderr


def test_papers_table_names_parts_that_there_are(runs):
    """PAPER.md: cell -> command."""
    text = (ROOT / "PAPER.md").read_text()
    named = re.findall(r"`(?:MODEL=(\w+) )?runs/(\w+\.sh) ([\w. ]+)`", text)
    assert len(named) > 15
    for model, script, names in named:
        done, _ = runs(script, *names.split(), MODEL=model or {"paper.sh": "eva_g"}.get(script, "eva_e"))
        assert done.returncode == 0, done.stderr


# --- slurm.sh

SRUN = '#!/usr/bin/env bash\nshift\nexec "$@"\n'
SCONTROL = '#!/usr/bin/env bash\nprintf "%s\\n" one two\n'


@pytest.mark.parametrize(
    "command, resumed",
    [
        ("stage2_lora.py", True),  # out/visft
        ("stage2_lora.py --model eva_e --out out/e", True),
        ("stage2_lora.py --out=out/e --heads out", True),
        ("stage1_heads.py --task pose", True),  # out/pose
        ("eval_ocr.py --train a b --test c", True),  # out/ocr/before, after
        ("eval_ocr.py --test c --head h.safetensors", False),
        ("eval_ocr.py --test c --head=h.safetensors", False),
        ("eval_vqa.py --kind gqa --questions q --blip2 b --images i", True),  # has no last.pt
        ("eval_vqa.py --kind gqa --questions q --results a b", False),  # refuses --resume
        ("eval_caption.py --captions c --blip2 b --images i", True),
        ("eval_caption.py --captions c --results=a", False),
        ("eval_heads.py --task pose --head out", False),
        ("eval_goi.py --coco coco --out=out/goi", False),
        ("eval_zeroshot.py retrieval --captions c --images i", False),
        ("./stage2_lora.py", True),
    ],
)
def test_slurm_resumes_what_can_be_resumed(tmp_path, parse, command, resumed):
    """Whatever is there: --resume without a checkpoint begins at step 0."""
    env = stand_in(tmp_path, torchrun=NOTE, srun=SRUN, scontrol=SCONTROL)
    env |= dict(
        SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_NODELIST="x[1-2]", SLURM_NNODES="2", SLURM_JOB_ID="9"
    )
    env |= dict(CALLS=str(tmp_path / "calls.txt"))
    (tmp_path / "out" / "visft").mkdir(parents=True)  # of another script
    (tmp_path / "out" / "visft" / "last.pt").touch()
    words = command.split()
    done = subprocess.run(["bash", ROOT / "runs/slurm.sh", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    call = shlex.split((tmp_path / "calls.txt").read_text())
    torchrun = parse_torchrun(call[1:])
    assert torchrun.rdzv_endpoint == "one:29500" and (torchrun.nnodes, torchrun.nproc_per_node) == ("2", "8")
    assert script_of(call) == words + ["--resume"] * resumed
    parse([words[0].removeprefix("./"), *script_of(call)[1:]])


def test_slurm_knows_every_script_that_can_resume(monkeypatch, capsys):
    can = []
    for script in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(script).main()
        can += [f"{script}.py"] if "[--resume]" in capsys.readouterr().out else []
    listed = re.search(r"in (stage1.*?)\) RESUME", (ROOT / "runs/slurm.sh").read_text())[1].split(" | ")
    assert sorted(can) == sorted(listed)


def test_readmes_recipe_links_an_export_with_all_in_one_folder(scenes, tmp_path):
    """As Roboflow writes it: pictures and _annotations.coco.json side by side; a category of no object."""
    export = tmp_path / "export" / "train"
    shutil.copytree(scenes / "train2017", export)
    content = json.loads((scenes / "annotations" / "instances_train2017.json").read_text())
    content["categories"].append({"id": 0, "name": "objects", "supercategory": "none"})
    (export / "_annotations.coco.json").write_text(json.dumps(content))
    lines = (ROOT / "README.md").read_text().splitlines()
    at = next(k for k, line in enumerate(lines) if line.strip() == "mkdir -p mine/annotations")
    *links, train = (line.strip() for line in lines[at : at + 4])
    subprocess.run(["bash", "-ec", "\n".join(links)], cwd=tmp_path, check=True)
    small = "--model eva_mini --weights random --image-scale 0.2 --iters 1 --warmup 0 --workers 0 --out o"
    command = f"{train.replace('python', sys.executable).replace('stage1', f'{ROOT}/stage1')} {small}"
    done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "detection.safetensors").is_file()
