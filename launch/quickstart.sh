#!/usr/bin/env bash
# Installs the project, trains a small DreamLLM on drawn scenes, and asks it for scenes that it has never seen.
#
#   bash launch/quickstart.sh [--config.steps=1600] [--config.seed=1] ...
#
# Arguments go to the training; WORKDIR (default runs/quickstart) receives the results. Ends with status 1 if hardly
# anything was learnt.
set -euo pipefail
SECONDS=0
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" quickstart
workdir="${WORKDIR:-runs/quickstart}"

echo "== training"
started=$SECONDS
python -m dreamllm_jax.train --config=configs/scenes.py --workdir="$workdir" "$@"
train_seconds=$((SECONDS - started))

echo "== evaluating"
python -m dreamllm_jax.evaluate scenes --workdir="$workdir" --guidance=1 --sampling_steps=10
python -m dreamllm_jax.report --workdir="$workdir"

python - "$workdir" "$train_seconds" "$SECONDS" << 'PYTHON'
import json
import pathlib
import sys

workdir, train_seconds, total_seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
found = json.loads((workdir / "evaluation" / "scenes.json").read_text())
result = {f"{name}_{way}": found[name][way]["right"]["all"] for name in ("seen", "unseen") for way in ("read", "painted")}
result |= {name: found["seen"][name] for name in ("psnr", "psnr_of_things")}
result |= {"train_seconds": train_seconds, "total_seconds": total_seconds}
(workdir / "quickstart.json").write_text(json.dumps(result, indent=2) + "\n")
print(f"{workdir / 'quickstart.json'}: {json.dumps(result)}")
if result["seen_read"] < 0.5 or result["seen_painted"] < 0.5:
    sys.exit("error: less than half was learnt; train longer with --config.steps, or look at the report's curves")
PYTHON
