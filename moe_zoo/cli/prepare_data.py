"""A corpus of several languages and domains from what is installed: prepare_data.py --out=DIR [--root=FOLDER ...]"""

import sys
from collections.abc import Sequence

from moe_zoo.cli import common


def prepare_data(argv: Sequence[str]) -> None:
    """Writes the corpus and prints what is in it."""
    parser = common.Parser(prog="prepare_data", description=__doc__)
    parser.add_argument("--out", required=True, help="the folder to make: a folder per domain, and manifest.json")
    parser.add_argument(
        "--root", action="append", help="where to look, several if need be: / (the default), or a folder that packages "
        "were unpacked into",
    )  # fmt: skip
    parser.add_argument("--domains", help="comma-separated; all if not given (help_LANGUAGE for further languages)")
    parser.add_argument("--bytes-per-domain", type=int, default=None, help="the default is 3,000,000")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus made before")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON, the manifest")
    arguments, overrides = parser.parse_known(argv)
    if overrides:
        raise common.ConfigError("--config.KEY=VALUE is for train.py")

    import logging

    from moe_zoo.data.installed import DOMAINS
    from moe_zoo.data.prepare import BYTES_PER_DOMAIN, prepare

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    manifest = prepare(
        arguments.out,
        roots=arguments.root or ["/"],
        domains=arguments.domains.split(",") if arguments.domains else DOMAINS,
        bytes_per_domain=arguments.bytes_per_domain or BYTES_PER_DOMAIN,
        overwrite=arguments.overwrite,
    )
    _print(arguments.out, manifest)
    if arguments.json:
        common.print_json(manifest)


def _print(out: str, manifest: dict) -> None:
    width = max(map(len, manifest["domains"]))
    print(f"{'domain':{width}} {'bytes':>10} {'documents':>9}  licence, from")
    for name, row in manifest["domains"].items():
        print(f"{name:{width}} {row['bytes']:10,} {row['documents']:9,}  {row['licence']}, {row['from']}")
    print(f"{manifest['bytes']:,} bytes of {len(manifest['domains'])} domains; train on it with")
    print(f"  scripts/train.py --config=quickstart --workdir=runs/mine --config.data.source={out}")


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    sys.exit(common.run(prepare_data))
