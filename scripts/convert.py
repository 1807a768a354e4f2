"""Published checkpoints in and out. `--help` says how; the work is in moe_zoo/cli/convert.py."""

from moe_zoo.cli.convert import main

if __name__ == "__main__":
    main()
