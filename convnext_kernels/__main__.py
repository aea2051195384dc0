"""The command line ``convnext-kernels``, also ``python -m convnext_kernels`` from a checkout that is not installed.

The commands need click and rich. Only `verify` runs without them, for a machine that has PyTorch and little else.
"""

import importlib.util
import sys


def main() -> None:
    """Run the command that `sys.argv` names."""
    missing = " ".join(name for name in ("click", "rich") if importlib.util.find_spec(name) is None)
    if not missing:
        from convnext_kernels import cli

        cli.main(prog_name="convnext-kernels")
    elif sys.argv[1:2] == ["verify"]:
        from convnext_kernels.bench import verify

        verify.main(sys.argv[2:])
    else:
        sys.exit(f"Error: this command is not possible without: {missing} (pip install {missing}). Only verify is.")


if __name__ == "__main__":
    main()
