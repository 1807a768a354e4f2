"""Loss at equal training FLOPs, over model width. `--help` says how; the work is in moe_zoo/cli/isoflop.py."""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

from moe_zoo.cli.isoflop import main

if __name__ == "__main__":
    main()
