# Everything here works on a machine with nothing but Python 3.11 or newer, its pip, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-transformers test-triton lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/python examples/train_bytes.py

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The models with another transformers than the pinned one, the newest unless named: TRANSFORMERS='transformers==5.24.0'.
TRANSFORMERS ?= transformers
test-transformers: $(VENV)/installed
	rm -rf build/transformers
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target build/transformers '$(TRANSFORMERS)'
	PYTHONPATH=build/transformers $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=build/transformers OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto tests/models

# All kernels compiled ahead of time, without a GPU, by another Triton than the pinned one, the oldest unless named.
TRITON ?= triton==3.6.0
test-triton: $(VENV)/installed
	rm -rf build/triton
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target build/triton '$(TRITON)'
	PYTHONPATH=build/triton $(BIN)/python -c 'import triton; print("triton", triton.__version__)'
	PYTHONPATH=build/triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto \
		-m 'not gpu' -k 'compile or test_launch' tests/kernels/test_*_triton*.py tests/kernels/test_launch.py

# `kernels`, `passes` and `models` are imported from inside `fla_compile`: mypy is shown them there.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	rm -rf build/types && mkdir -p build/types/fla_compile
	ln -s $(addprefix $(CURDIR)/,$(wildcard fla_compile/*) kernels passes models) build/types/fla_compile/
	$(BIN)/mypy -p fla_compile
	$(BIN)/mypy examples/*.py benchmarks/*.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/cpu_demo.py all
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(BIN)/python benchmarks/kernels.py && $(BIN)/python benchmarks/losses.py; fi

# Torch goes first, by its exact version: a looser request, of ours or of a dependency, may bring another build.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep -x 'torch==.*' constraints.txt)"
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation --editable '.[test,train]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info
