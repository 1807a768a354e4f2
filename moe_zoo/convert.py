"""python -m moe_zoo.convert: the same as scripts/convert.py."""

from moe_zoo.cli.convert import main

if __name__ == "__main__":
    main()
