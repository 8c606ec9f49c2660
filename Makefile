# A thin shim: everything happens in `python -m tclib`, which also works where there is no make.
#   make run NAME=mine MODEL=bundled ONLY=04,06 PARAMS="-p layer 1"
#   make sweep FOLDER=results PARAMS="-p seed [0,1,2]"
#   make report NOTEBOOK=04
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
export TORCH_INDEX

.PHONY: run sweep student bundle report test test-all venv lab explore clean

run:
	@"$(PYTHON)" -m tclib run $(if $(MODEL),--model "$(MODEL)") $(if $(NAME),--name "$(NAME)") $(if $(ONLY),--only "$(ONLY)") $(PARAMS)

sweep:
	@"$(PYTHON)" -m tclib sweep $(if $(GRID),--grid "$(GRID)") $(if $(FOLDER),--folder "$(FOLDER)") $(PARAMS)

# make student GRADED=1 writes sources for nbgrader instead.
student:
	@"$(PYTHON)" -m tclib student $(if $(GRADED),--graded)

report:
	@"$(PYTHON)" -m tclib report "$(NOTEBOOK)"

test test-all venv bundle lab explore:
	@"$(PYTHON)" -m tclib $@

# runs/ holds your results and .venv is slow to rebuild: neither is touched.
clean:
	rm -rf build dist
