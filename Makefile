# make demo | demo-dit | demo-finetune | test | test-all | test-timm | check | docs | package | data | benchmark     (VENV=/elsewhere places the environment)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV ?= .venv
DATA ?= data
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TIMM_TESTS := $(VENV)/timm-tests
export PYTHONUNBUFFERED := 1

.PHONY: install demo demo-dit demo-finetune test test-all test-timm check format docs package data benchmark clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hcvision needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV) || { echo 'no venv module here: try "apt-get install python3-venv"'; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# The tests of the installed timm, out of its source distribution.
$(TIMM_TESTS): $(STAMP)
	rm -rf $@ $@.tmp && mkdir -p $@.tmp
	version=$$($(BIN)/python -c 'import timm; print(timm.__version__)'); \
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $@.tmp "timm==$$version"
	tar -xzf $@.tmp/timm-*.tar.gz -C $@.tmp --strip-components 1 --wildcards '*/tests/*'
	mv $@.tmp/tests $@ && rm -rf $@.tmp

data: $(STAMP)
	$(BIN)/python -m hcvision.data $(DATA)

demo: $(STAMP) data
	$(BIN)/hcvision compare --config configs/studies/demo.yaml --data.root $(DATA)

demo-dit: $(STAMP) data
	$(BIN)/hcvision compare --config configs/studies/demo_dit.yaml --data.root $(DATA)

# A small ViT trained on all kinds of clothes becomes one with connections that tells three kinds of shoes apart.
SMALL := {img_size: 28, patch_size: 7, in_chans: 1, embed_dim: 64, depth: 6, num_heads: 4}
SHOES := $(DATA)/shoes

demo-finetune: $(STAMP)
	$(BIN)/python -m hcvision.data $(DATA) --folder $(SHOES) --images 500 --classes Sandal Sneaker "Ankle boot"
	$(BIN)/hcvision fit --config configs/fashion_mnist.yaml --data.root $(DATA) --run runs/clothes --resume auto \
	  --model.connection residual --data.train_samples 20000 --trainer.max_epochs 2
	$(BIN)/hcvision fit --config configs/finetune.yaml --data.root $(SHOES) --run runs/shoes --resume auto \
	  --model.model vit_tiny_patch16_224 --model.model_args '$(SMALL)' --model.connection dhc2 --model.init_from runs/clothes
	$(BIN)/hcvision test --config runs/shoes/config.yaml --ckpt_path best
	$(BIN)/hcvision predict runs/shoes $(SHOES)/val/Sandal --out runs/shoes/predictions.csv --overwrite true
	$(BIN)/hcvision export runs/shoes runs/shoes/exported --onnx true --torch_export true --overwrite true

# A process for each core (JOBS=4: four of them), which goes on with another's tests when its own are done.
JOBS ?= logical
SHARED := -n $(JOBS) --dist worksteal

test: $(STAMP)
	$(BIN)/python -m pytest $(SHARED) --durations 15 -m 'not slow'

test-all: $(STAMP)
	$(BIN)/python -m pytest $(SHARED) --durations 15

NAMES := vit_tiny_patch16_224_shc4 vit_tiny_patch16_224_dhc2 vit_tiny_patch16_224_sfc2 vit_tiny_patch16_224_dfc4 \
  deit_tiny_distilled_patch16_224_dhc2 eva02_tiny_patch14_224_dhc2 beit_base_patch16_224_dfc2 \
  vit_relpos_small_patch16_224_dhc2 mixer_s32_224_dfc2 swin_tiny_patch4_window7_224_dhc2 hiera_tiny_224_dfc2 \
  pvt_v2_b0_dhc2 convnext_atto_dhc2 poolformer_s12_dfc2 vit_tiny_patch16_224_sihc4 \
  vit_tiny_patch16_224_gr2 vit_tiny_patch16_224_oru vit_tiny_patch16_224_laurel \
  vit_tiny_patch16_224_mhclite3 vit_tiny_patch16_224_krom4 \
  vit_tiny_patch16_224_attnres vit_tiny_patch16_224_dense
REDIRECTS := vit_tiny_patch16_224_dhc2 vit_tiny_patch16_224_dfc2
TIMM_PYTEST := OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m pytest -q $(SHARED) -p timm_suite -c /dev/null \
  --rootdir $(TIMM_TESTS) -W ignore

test-timm: $(TIMM_TESTS)
	HCVISION_NAMES='$(NAMES)' $(TIMM_PYTEST) $(TIMM_TESTS)/test_models.py
	for name in $(REDIRECTS); do \
	  HCVISION_REDIRECT=$$name HCVISION_LEAST=27 $(TIMM_PYTEST) \
	    $(TIMM_TESTS)/test_model_input.py $(TIMM_TESTS)/test_utils.py $(TIMM_TESTS)/test_checkpoint_loading.py; \
	done

check: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

# The pages of docs/ as a site, in build/site; a broken link or reference is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# A wheel and an sdist in build/dist, each installed into an empty environment (5.5 GB, removed again) and tried there.
PACKAGE := build/package
SMOKE := import torch, timm, hcvision; m = timm.create_model("vit_tiny_patch16_224_dhc2", img_size=32, depth=1).eval(); \
  print(hcvision.__file__, m(torch.randn(1, 3, 32, 32)).shape, [*{c.backend for c in m.modules() if hasattr(c, "backend")}])

package: $(STAMP)
	rm -rf build/dist $(PACKAGE)
	$(BIN)/python -m build --outdir build/dist
	for file in build/dist/*.whl build/dist/*.tar.gz; do \
	  $(PYTHON) -m venv $(PACKAGE) && $(PACKAGE)/bin/python -m pip install --quiet --disable-pip-version-check $$file && \
	  (cd $(PACKAGE) && bin/hcvision --version && bin/python -c '$(SMOKE)' && bin/hcvision fit --help > /dev/null) && \
	  rm -rf $(PACKAGE) || exit 1; \
	done

benchmark: $(STAMP)
	$(BIN)/python benchmarks/connections.py

clean:
	rm -rf $(VENV) build *.egg-info
