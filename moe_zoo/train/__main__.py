"""python -m moe_zoo.train: the same as scripts/train.py."""

from moe_zoo.cli.train import main

if __name__ == "__main__":
    main()
