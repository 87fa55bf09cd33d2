"""Train a LoRA on an O1: torchrun --nproc_per_node=N train.py CONFIG.toml [--section.field VALUE ...]"""

import sys
import warnings

from hdl.config import load_run
from hdl.errors import HdlError, command_line


def main() -> int:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    try:
        run = load_run(sys.argv[1:])
    except HdlError as error:
        raise HdlError(str(error), on_all_ranks=True) from None
    from hdl.engine.processes import process_group  # torch and DeepSpeed take seconds to import

    with process_group() as processes:
        from hdl.engine.loop import train  # after process_group: it tells DeepSpeed which accelerator to use

        return train(run, processes)


if __name__ == "__main__":
    command_line(main)
