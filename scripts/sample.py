"""Continue a prompt with a trained model. `--help` says how; the work is in moe_zoo/cli/sample.py."""

from moe_zoo.cli.sample import main

if __name__ == "__main__":
    main()
