# What a developer types. Each target is a script that works without make as well.
.PHONY: fast test lint types format bench docs

fast:    ## tests that take seconds: after every change
	bash scripts/test.sh -q -m "not slow"

test:    ## all tests
	bash scripts/test.sh -q

lint:    ## what the linter and the formatter find
	ruff check . && ruff format --check .

types:   ## what the type checker finds
	basedpyright

format:  ## lay out the code
	ruff format . && ruff check --fix . && ruff format .

bench:   ## the kernels against the reference's own code, on this machine
	python -m pytest bench -q --benchmark-json bench.json

docs:    ## the documentation as a site, in site/; needs `pip install -e '.[docs]'`
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true mkdocs build --strict
