"""Train a model. `--help` says how; the work is in moe_zoo/cli/train.py."""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

from moe_zoo.cli.train import main

if __name__ == "__main__":
    main()
