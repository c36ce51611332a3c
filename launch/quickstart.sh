#!/usr/bin/env bash
# Installs the project, trains a tiny DreamLLM on pictures with their names, and shows what it learnt.
#
#   bash launch/quickstart.sh [--config.data.path=photographs] [--config.steps=500] ...
#
# Arguments go to the training; WORKDIR (default runs/quickstart) receives the results. Ends with status 1 if less than
# 90 % was learnt.
set -euo pipefail
SECONDS=0
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" quickstart
workdir="${WORKDIR:-runs/quickstart}"

echo "== training"
started=$SECONDS
python -m dreamllm_jax.train --config=configs/tiny.py --workdir="$workdir" "$@"
train_seconds=$((SECONDS - started))

echo "== evaluating"
python -m dreamllm_jax.evaluate recall --workdir="$workdir"
python -m dreamllm_jax.report --workdir="$workdir"

python - "$workdir" "$train_seconds" "$SECONDS" << 'PYTHON'
import json
import pathlib
import sys

workdir, train_seconds, total_seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
recall = json.loads((workdir / "evaluation" / "recall.json").read_text())
result = {name: recall[name] for name in ("creation_top1", "comprehension_exact", "pairs")}
result |= {"train_seconds": train_seconds, "total_seconds": total_seconds}
(workdir / "quickstart.json").write_text(json.dumps(result, indent=2) + "\n")
print(f"{workdir / 'quickstart.json'}: {json.dumps(result)}")
if min(result["creation_top1"], result["comprehension_exact"]) < 0.9:
    sys.exit("error: less than 90 % was learnt; train longer with --config.steps, or look at the report's curves")
PYTHON
