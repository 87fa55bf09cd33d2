#!/usr/bin/env bash
# Twenty steps of the real loop on random weights of the real 8B shapes: how fast, how much memory.
#
#   launch/random_8b.sh OUT [--train.batch_size 4 ...]     OUT: a folder for base, shards and runs; reused
#
# Needs hdl installed and a CUDA GPU, or GPUS=N of them. The last flags go to train.py; without --save.output
# every call trains into a new folder OUT/run-N. Random weights and pixels say nothing of quality.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:?usage: launch/random_8b.sh OUT [train.py flags]}"
shift
if [ ! -f "$out/shards/index.json" ]; then
    mkdir -p "$out/base" "$out/images"
    cp tests/o1/o1-8b-config.json "$out/base/config.json"
    cp hdl/mini/o1-mini/{tokenizer*,*.jinja,vocab.json,merges.txt,*tokens*.json} "$out/base/"
    python - "$out/images" <<'EOF'
import sys
import numpy as np
from PIL import Image
for i in range(8):  # random pixels, captions of about 160 tokens of the mini's tokenizer
    pixels = np.random.default_rng(i).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"{sys.argv[1]}/{i}.png")
    open(f"{sys.argv[1]}/{i}.txt", "w").write("a small red boat on a calm sea, " * 18)
EOF
    python tools/prepare.py "$out/images" "$out/shards" --base "$out/base" --random-init --area 1024
fi
run="$out/run-$(find "$out" -maxdepth 1 -name 'run-*' | wc -l)"
torchrun --standalone --nproc_per_node="${GPUS:-1}" train.py --model.base "$out/base" --model.random_init \
    --data.shards "$out/shards" --save.output "$run" \
    --train.steps 20 --train.batch_size 1 --train.warmup_steps 5 --save.every 1000 "$@"
