"""Plans the recipes of 7B and 13B for slices of v4, v5e and v5p: the table of docs/performance.md.

python -m benchmarks.plans --to=FOLDER [--only=13b]

Compiles at low effort, one to three minutes each. FOLDER keeps the figures of `dreamllm_jax.plan`, and those
that are there are not made again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SMALL = {"v4": "v4-8", "v5e": "v5e-8", "v5p": "v5p-8"}
MIDDLE = {"v4": "v4-16", "v5e": "v5e-16", "v5p": "v5p-16"}
LARGE = {"v4": "v4-32", "v5e": "v5e-32", "v5p": "v5p-32"}
SLICES = {
    **{f"{recipe}.py:7b": SMALL for recipe in ("stage1_comprehension", "stage1_creation", "stage1_joint")},
    **{f"{recipe}.py:13b": MIDDLE for recipe in ("stage1_comprehension", "stage1_creation", "stage1_joint")},
    "stage2_igpt.py:7b": MIDDLE,  # of which stage3_sft's step is the same
    "stage2_igpt.py:13b": LARGE,
}


def plan(config: str, topology: str, file: Path) -> dict:
    """The figures of a recipe on a slice, with its own rows or, where they do not fit, half as many, and so on."""
    rows: list[str] = []
    while True:
        command = [sys.executable, "-m", "dreamllm_jax.plan", f"--config=configs/{config}", f"--topology={topology}"]
        done = subprocess.run([*command, "--effort=low", f"--json={file}", *rows], capture_output=True, text=True)
        figures = json.loads(file.read_text()) if file.exists() else {}
        if figures.get("fits") or figures.get("rows_per_chip") == 1:
            return figures
        if not figures:
            sys.exit(done.stderr)
        rows = [f"--rows_per_chip={max(1, int(figures['rows_per_chip'] // 2))}"]


def line(config: str, figures: dict) -> str:
    hbm, sent = figures["hbm"], sum(one["bytes"] for one in figures["collectives"])
    cells = [
        f"`{config}`",
        figures["topology"],
        f"{figures['rows_per_chip']:g}",
        f"{hbm['peak'] / 2**30:.1f} of {hbm['limit'] / 2**30:.1f}" + ("" if figures["fits"] else ": does not fit"),
        f"{figures['flops']['total'] / figures['chips'] / 1e12:,.0f}",
        f"{sent / 1e9:.1f}" if figures["fits"] else "",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--only", default="", help="only recipes and slices that have this in their names")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    print("| recipe | slice | rows a chip | peak HBM GiB | TFLOP a step and chip | sent GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for config, slices in SLICES.items():
        for topology in slices.values():
            name = f"{config}@{topology}"
            if arguments.only not in name:
                continue
            file = arguments.to / f"{name.replace(':', '_')}.json"
            figures = json.loads(file.read_text()) if file.exists() else plan(config, topology, file)
            print(line(config, figures), flush=True)


if __name__ == "__main__":
    main()
