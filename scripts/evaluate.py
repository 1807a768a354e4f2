"""Score a trained model. `--help` says how; the work is in moe_zoo/cli/evaluate.py."""

from moe_zoo.cli.evaluate import main

if __name__ == "__main__":
    main()
