# What a developer types. Each target is a script that works without make as well.
.PHONY: test lint format bench

test:    ## all tests
	bash scripts/test.sh -q

lint:    ## what the linter and the formatter find
	ruff check . && ruff format --check .

format:  ## lay out the code
	ruff check --fix . && ruff format .

bench:   ## the kernels against the reference's own code, on this machine
	python -m pytest bench -q --benchmark-json bench.json
