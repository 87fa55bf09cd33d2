#!/usr/bin/env bash
# From nothing to a trained LoRA and its pictures, with the small O1 that comes with hdl.
#
# Draws a style set, prepares shards, trains on two processes (GPUs if there are two, else the CPU) and
# draws prompts that were not in the set, with and without the trigger phrase.
#   launch/quickstart.sh [OUT]        OUT: a new folder, runs/quickstart unless given
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-runs/quickstart}"
if [ -e "$out" ]; then
    echo "error: $out is already there and is left as it is; give another folder: launch/quickstart.sh OUT" >&2
    exit 1
fi
. launch/environment.sh
make_environment ""

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=2
[ "$gpus" -eq 1 ] && processes=1
[ "$gpus" -eq 0 ] && export DS_ACCELERATOR=cpu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c "import os; print(max(1, len(os.sched_getaffinity(0)) // $processes))")}"
base=hdl/mini/o1-mini

echo "== 1/4 drawing a style set"
python tools/style_set.py "$out/images"
echo "== 2/4 preparing shards"
python tools/prepare.py "$out/images" "$out/shards" --base "$base" --area 128
echo "== 3/4 training a LoRA on $processes processes"
torchrun --standalone --nproc_per_node="$processes" train.py launch/quickstart.toml \
    --data.shards "$out/shards" --save.output "$out/run"
echo "== 4/4 drawing prompts that were not in the set, with and without the trigger"
style=$(python tools/style_gate.py "$out/gate" --base "$base" --lora "$out/run/adapter" | tail -1)

echo
echo "adapter (PEFT):           $out/run/adapter"
echo "before / after pictures:  $(ls "$out"/run/pictures/*.png | tail -1)"
echo "curves:                   .venv/bin/tensorboard --logdir $out/run/tensorboard"
echo "$style"
