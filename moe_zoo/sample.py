"""python -m moe_zoo.sample: the same as scripts/sample.py."""

from moe_zoo.cli.sample import main

if __name__ == "__main__":
    main()
