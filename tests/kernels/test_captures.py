"""What happens when a capture finds no memory, without a GPU."""

import pytest
import torch

from hdl.kernels.captures import Captures


class Broken:
    """A capture whose first tries end with these."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if not self.errors:
            return "captured"
        try:
            raise self.errors[0]
        except torch.OutOfMemoryError:
            if len(self.errors) == 1:
                raise
            raise self.errors[-1]  # as the end of a capture hides what broke it off  # noqa: B904


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
NO_GRAPH = torch.AcceleratorError("CUDA error: out of memory\nSearch for it")
NO_MODULE = RuntimeError("Triton Error [CUDA]: out of memory")
HIDDEN = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    "errors",
    [[NO_MEMORY], [NO_GRAPH], [NO_MODULE], [NO_MEMORY, HIDDEN]],
    ids=["torch", "driver", "triton", "hidden"],
)
def test_without_memory_there_are_no_more_tries(errors: list[BaseException]) -> None:
    captures = Captures[str](enabled=True)
    captures.captured.append("another")
    assert captures.with_room(Broken(*errors)) is None
    assert not captures.captured, "given up first"
    assert not captures._enabled


def test_the_memory_of_others_may_be_enough() -> None:
    captures = Captures[str](enabled=True)
    captures.captured.append("another")
    broken = Broken(NO_GRAPH)

    def capture() -> str:
        if not captures.captured:
            broken.errors.clear()
        return broken()

    assert captures.with_room(capture) == "captured"
    assert captures._enabled


def test_other_errors_are_nobodys_to_hide() -> None:
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        Captures[str](enabled=True).with_room(
            Broken(torch.AcceleratorError("CUDA error: an illegal memory access"))
        )
