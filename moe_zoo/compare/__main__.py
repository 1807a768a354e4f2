"""python -m moe_zoo.compare: the same as scripts/compare.py."""

import runpy

if __name__ == "__main__":
    # by name: the command line stands above this package, which does not import it
    runpy.run_module("moe_zoo.cli.compare", run_name="__main__")
