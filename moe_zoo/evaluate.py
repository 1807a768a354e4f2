"""python -m moe_zoo.evaluate: the same as scripts/evaluate.py."""

from moe_zoo.cli.evaluate import main

if __name__ == "__main__":
    main()
