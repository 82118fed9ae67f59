PYTHON ?= python3
SEEDS ?= 1
HEADS ?= demo/heads

.PHONY: setup test demo demo-pretrain demo-heads

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

test: setup  # two files at a time, a core each
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -n 2 --dist loadfile

demo: setup  # SEEDS=5: standard errors; HEADS=train: heads of one's own; OUT=FOLDER: another place
	PATH="$(CURDIR)/.venv/bin:$$PATH" SEEDS="$(SEEDS)" HEADS="$(HEADS)" bash runs/demo.sh $(OUT)

demo-pretrain: setup
	.venv/bin/python demo/pretrain.py --out out/pretrain --resume
	cp out/pretrain/eva_mini_clip.safetensors demo/
	cp out/pretrain/log.jsonl demo/eva_mini_clip.jsonl

demo-heads: setup
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/heads.sh out/heads
	mkdir -p demo/heads && cp out/heads/half/* demo/heads/
