"""Make a corpus of several languages and domains. `--help` says how; the work is in moe_zoo/cli/prepare_data.py."""

from moe_zoo.cli.prepare_data import main

if __name__ == "__main__":
    main()
