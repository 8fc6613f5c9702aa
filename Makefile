# Everything is installed into .venv on first use: Python 3.10 or newer and make are all that is needed.
PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

PHOTOGRAPHS := --pretrained_weights runs/photographs/checkpoint.pth

.PHONY: demo pictures test test-slow test-gpu style

demo: .venv/installed
	@echo "== k-NN of the untrained teacher"
	$(PY) eval_knn.py --dataset digits --pretrained_weights none --arch vit_micro --patch_size 8 --crop_size 32
	@echo "== k-NN of the raw pixels"
	$(PY) eval_knn.py --dataset digits --pretrained_weights pixels --crop_size 8
	@echo "== pretraining on scikit-learn's digits"
	$(PY) main_lgssl.py @recipes/demo.args --output_dir $(RUN) $(OPTIONS)
	@echo "== k-NN after training"
	$(PY) eval_knn.py --dataset digits --pretrained_weights $(RUN)/checkpoint.pth
	@echo "DINO, five seeds of docs/study.md: 84.5 ± 1.3 %; the paper's mean loss: 73.8 ± 3.6 %"
	$(PY) visualize.py matches --seed 1 --output $(RUN)/matches.png
	$(PY) visualize.py map --dataset digits --pretrained_weights $(RUN)/checkpoint.pth --output $(RUN)/map.png
	@echo "log $(RUN)/log.txt, checkpoint $(RUN)/checkpoint.pth, figures $(RUN)/matches.png and map.png, curves: .venv/bin/tensorboard --logdir runs"

# The pictures in README.md, docs/visualizing.md and docs/reproducing.md
pictures: .venv/installed-dev
	$(PY) main_lgssl.py @recipes/photographs.args --output_dir runs/photographs
	$(PY) visualize.py matches coffee --seed 51 $(PHOTOGRAPHS) --output assets/matches.png
	$(PY) visualize.py matches coffee --seed 51 --patch_augmentation --output assets/patch_augmentation.png
	$(PY) visualize.py attention $(PHOTOGRAPHS) --output assets/attention.png
	$(PY) visualize.py features china flower chelsea coffee --image_size 320 $(PHOTOGRAPHS) --output assets/features.png
	$(PY) visualize.py neighbours china flower rocket --patch 175 235 --k 12 --image_size 320 $(PHOTOGRAPHS) --output assets/neighbours.png

# These two hide GPUs, because what they expect holds on a CPU.
test: .venv/installed-dev
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0

test-slow: .venv/installed-dev
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m slow

test-gpu: .venv/installed-dev
	$(PY) -m pytest -m gpu -rs tests/test_gpu.py

style: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and f"error: Python 3.10 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
