"""``python -m convnext_kernels``: the command line."""

from convnext_kernels.cli import main

if __name__ == "__main__":
    main(prog_name="convnext-kernels")
