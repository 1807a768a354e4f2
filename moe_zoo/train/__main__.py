"""python -m moe_zoo.train: the same as scripts/train.py."""

import runpy

if __name__ == "__main__":
    # by name: the command line stands above this package, which does not import it
    runpy.run_module("moe_zoo.cli.train", run_name="__main__")
