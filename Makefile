# A thin shim: everything happens in `python -m tclib`, which also works where there is no make.
#   make run NAME=mine MODEL=bundled ONLY=04,06 PARAMS="-p layer 1"
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
export TORCH_INDEX

.PHONY: run test test-all venv lab clean

run:
	@"$(PYTHON)" -m tclib run $(if $(MODEL),--model "$(MODEL)") $(if $(NAME),--name "$(NAME)") $(if $(ONLY),--only "$(ONLY)") $(PARAMS)

test test-all venv lab:
	@"$(PYTHON)" -m tclib $@

# runs/ holds your results and .venv is slow to rebuild: neither is touched.
clean:
	rm -rf build dist
