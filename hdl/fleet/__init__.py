"""A machine with several GPUs, measured unattended: launch/bench_8gpu.sh."""
