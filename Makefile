# A thin shim: everything happens in `python -m tclib`, which also works where there is no make.
#   make run NAME=mine MODEL=bundled ONLY=02,03 PARAMS="-p layer 1"
#   make sweep FOLDER=results PARAMS="-p seed [0,1,2]"
#   make report NOTEBOOK=04
#   make lab NAME=mine OPTIONS="--port 9000 --no-browser"
#   make grade NOTEBOOK=04 NBGRADER=path/to/its/environment
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
export TORCH_INDEX
# exec: make hands SIGTERM to its child alone, which would be a shell.
TCLIB = exec "$(PYTHON)" -m tclib

.PHONY: run sweep student grade bundle report smollm2 test test-all lint docs venv lab explore clean

run:
	@$(TCLIB) run $(if $(MODEL),--model "$(MODEL)") $(if $(NAME),--name "$(NAME)") $(if $(ONLY),--only "$(ONLY)") $(PARAMS)

sweep:
	@$(TCLIB) sweep $(if $(GRID),--grid "$(GRID)") $(if $(FOLDER),--folder "$(FOLDER)") $(PARAMS)

# `make student GRADED=1` writes sources for nbgrader instead.
student:
	@$(TCLIB) student $(if $(GRADED),--graded)

grade:
	@$(TCLIB) grade "$(NOTEBOOK)" $(if $(NBGRADER),--nbgrader "$(NBGRADER)")

report:
	@$(TCLIB) report $(if $(NOTEBOOK),"$(NOTEBOOK)")

lab:
	@$(TCLIB) lab $(if $(NAME),--name "$(NAME)") $(OPTIONS)

explore:
	@$(TCLIB) explore $(OPTIONS)

test test-all lint docs venv bundle smollm2:
	@$(TCLIB) $@

# runs/ and build/nbgrader/ hold results and .venv is slow to rebuild: none of them is touched.
clean:
	rm -rf dist $(filter-out build/nbgrader,$(wildcard build/*))
