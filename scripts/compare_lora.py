"""One LoRA against mixtures of LoRA, at equal trained parameters. `--help` says how; moe_zoo/cli/compare_lora.py."""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

from moe_zoo.cli.compare_lora import main

if __name__ == "__main__":
    main()
