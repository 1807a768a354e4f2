"""Which idea is better at equal cost. `--help` says how; the work is in moe_zoo/cli/compare.py."""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

from moe_zoo.cli.compare import main

if __name__ == "__main__":
    main()
