#!/usr/bin/env bash
# Train on one GPU, planned to fit its memory.
#
#   launch/single_gpu.sh CARD CONFIG [train.py flags]     CARD: a preset's name, 8gb 12gb 16gb 24gb 80gb
#
#   launch/single_gpu.sh 24gb run.toml --lora.rank 16
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
presets="$(cd "$here/presets" && ls [0-9]*gb.toml | grep -v x | sort -n | sed 's/\.toml//' | tr '\n' ' ')"
card="${1:?usage: launch/single_gpu.sh CARD CONFIG [train.py flags]; CARD is one of $presets}"
config="${2:?usage: launch/single_gpu.sh CARD CONFIG [train.py flags]; CONFIG is the TOML file of a run}"
shift 2
if [ ! -f "$here/presets/$card.toml" ]; then
    echo "error: no preset $card; there are: $presets" >&2
    exit 1
fi
exec torchrun --standalone --nproc_per_node=1 "$here/../train.py" "$config" "$here/presets/$card.toml" "$@"
