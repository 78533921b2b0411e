"""``python -m fastvid <command>``, and ``torchrun -m fastvid <command>``."""

from fastvid.cli import main

if __name__ == "__main__":
    main()
