# make demo: the main job on real text, about ten minutes on two cores; make test: everything that is checked, but for what takes long;
# make proofs: what takes long.
# make kernels: compiles every GPU kernel for cards that need not be there, in .venv-aot.
# make docs: counts again what docs/flash_attention.md says, two minutes in the same environment.
# make native: builds the C++ kernels with other compilers, in fewer lanes and under sanitizers, and tests each; as root it installs the
# compilers, and says which it did not find.
# make deploy: two servers behind HAProxy, watched by Prometheus, with faults on purpose; as root it installs what Debian has of them.
# make ray: two replicas on Ray Serve, in .venv-ray.
# make notebooks: executes notebooks/ and keeps in each what came out.
# make docs-site: the pages of docs/ as a site in build/site, with every link checked.
# All set up their .venv first, with uv where it is there and pip otherwise.
.PHONY: setup demo smoke test proofs lint readme notebooks native deploy ray kernels docs docs-site clean

PYTHON ?= python3
STUDY ?= runs/study

# Installs programs that Debian has, as root and where they are not there.
define debian
	@for each in $(1); do \
	  command -v $$each >/dev/null 2>&1 || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null 2>&1 \
	    || { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$each; } >/dev/null 2>&1 || true; \
	done
endef

setup: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python '>=3.12' .venv \
	  && uv pip install --quiet --python .venv/bin/python -r requirements.lock \
	  && uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .; \
	else \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	    || { echo "kvcascade needs Python 3.12 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }; \
	  echo "setting up .venv, once: about a minute and 1.5 GB" >&2; \
	  $(PYTHON) -m venv .venv \
	  && .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock \
	  && .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

# The compilers, in an environment of their own: where the CUDA plug-in is installed, every start of JAX without a GPU complains.
.venv-aot/ready: requirements.lock pyproject.toml
	@sed 's/ \\$$//; /^ *--hash/d' requirements.lock > .constraints-aot
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python '>=3.12' .venv-aot \
	  && uv pip install --quiet --python .venv-aot/bin/python -r requirements.lock \
	  && uv pip install --quiet --python .venv-aot/bin/python -c .constraints-aot --no-build-isolation -e '.[aot]'; \
	else \
	  $(PYTHON) -m venv .venv-aot \
	  && .venv-aot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock \
	  && .venv-aot/bin/python -m pip install --quiet --disable-pip-version-check -c .constraints-aot --no-build-isolation -e '.[aot]'; \
	fi
	@rm -f .constraints-aot
	@touch $@

kernels: .venv-aot/ready
	JAX_PLATFORMS=cpu .venv-aot/bin/pytest -q tests/test_kernels_check.py tests/test_fit.py
	JAX_PLATFORMS=cpu .venv-aot/bin/kvcascade kernels check --gpu h100 --gpu a100

native: setup
	$(call debian,g++-11 clang-14)
	.venv/bin/pytest -q -n 2 -rs tests/native_builds.py

deploy: setup
	$(call debian,haproxy prometheus)
	.venv/bin/pytest -q -rs tests/deployed.py

# Ray, in an environment of its own: it is as large as all the rest.
.venv-ray/ready: requirements.lock pyproject.toml
	@sed 's/ \\$$//; /^ *--hash/d; /^ *#/d' requirements.lock > .constraints-ray
	@$(PYTHON) -m venv .venv-ray && .venv-ray/bin/python -m pip install --quiet --disable-pip-version-check -c .constraints-ray -e '.[ray]' pytest openai
	@rm -f .constraints-ray
	@touch $@

ray: .venv-ray/ready
	.venv-ray/bin/python -m pytest -q --noconftest -c /dev/null --import-mode=importlib -W ignore tests/on_ray.py

demo: setup
	.venv/bin/kvcascade study --preset quick --dir $(STUDY)

smoke: setup
	.venv/bin/kvcascade study --preset smoke --dir runs/smoke

# LLVM optimises little here, and a file's tests run in one process: both are about compiling, which is most of the time. Tests of
# what is computed to the last bit ask for `optimised` programs.
test: setup
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv/bin/pytest -q -n 2 --dist loadfile -m "not slow"

proofs: setup
	$(call debian,chromium)
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv/bin/pytest -q -n 2 --dist loadfile -m slow

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

readme: setup
	.venv/bin/python -m kvcascade.scripts.readme
	.venv/bin/python docs/flash_attention.py --fill

notebooks: setup
	.venv/bin/python tests/make_notebooks.py

docs-site: .venv-docs/ready
	.venv-docs/bin/mkdocs build --quiet --strict

.venv-docs/ready: pyproject.toml
	@$(PYTHON) -m venv .venv-docs && .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.6,<10'
	@touch $@

docs: .venv-aot/ready
	.venv-aot/bin/python docs/flash_attention.py

clean:
	rm -rf .venv .venv-aot .venv-docs .venv-ray build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
