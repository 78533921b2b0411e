"""fastvid's kernels. Each lives in a file of its own beside its plain-torch reference."""
