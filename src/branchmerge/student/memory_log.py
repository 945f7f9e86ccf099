"""Log every allocation and release of tensors' memory while code runs, with the phase in which it was allocated.

Made for fake tensors, which have sizes and no contents. Pieces of memory are assigned to kinds (such as gradients)
afterwards, when it is known what they were used for.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BLOCK = 512
"""torch's CUDA allocator rounds sizes up to multiples of this many bytes."""
FSDP_OPERATIONS = {"fsdp", "c10d", "_c10d_functional"}


@dataclass(eq=False)
class Piece:
    """One storage."""

    phase: str
    """The phase in which it was allocated"""
    gathered: bool = False
    """Whether FSDP gathers it from shares, or scatters it into shares"""
    size: int = 0
    """Its current size in bytes"""


class MemoryLog(TorchDispatchMode):
    """Logs while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.events: list[tuple[int, Piece]] = []
        """Changes in order: bytes allocated (negative: released), and the piece"""
        self._pieces: dict[int, Piece] = {}

    def pieces(self, tensors: Iterable[Tensor]) -> set[Piece]:
        """The pieces of memory of these tensors, or of their local shards."""
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        return {self._seen(tensor) for tensor in local}

    def begin(self, held: Iterable[Piece]) -> None:
        """Restart the log, with these pieces as already allocated."""
        self.events = [(piece.size, piece) for piece in held]

    def __enter__(self) -> "MemoryLog":
        log, original = self, torch.UntypedStorage.resize_
        self._original_resize = original

        # FSDP frees a gathered weight by resizing its storage to 0, which no operation reports.
        def resize(storage: torch.UntypedStorage, size: int) -> None:
            original(storage, size)
            if (piece := log._pieces.get(id(storage))) is not None:
                log._note(piece, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._original_resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls this again with the local tensors
        if func is torch.ops.aten.nonzero.default:  # the number of results is unknown: assume the maximum, all
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        result = func(*args, **(kwargs or {}))
        by_fsdp = func.namespace in FSDP_OPERATIONS
        for tensor in tree_iter((result, args, kwargs) if by_fsdp else result):
            if isinstance(tensor, Tensor):
                piece = self._seen(tensor)
                piece.gathered |= by_fsdp
        if (takes := SCRATCH.get(func.name())) is not None:
            scratch = Piece(self.phase)
            self._note(scratch, takes(*args))
            self._note(scratch, 0)
        return result

    def _seen(self, tensor: Tensor) -> Piece:
        storage = tensor.untyped_storage()
        piece = self._pieces.get(id(storage))
        if piece is None:
            piece = self._pieces[id(storage)] = Piece(self.phase)
            weakref.finalize(storage, self._gone, id(storage)).atexit = False
            self._note(piece, storage.nbytes())
        return piece

    def _note(self, piece: Piece, size: int) -> None:
        size = -(-size // BLOCK) * BLOCK
        if size != piece.size:
            self.events.append((size - piece.size, piece))
            piece.size = size

    def _gone(self, number: int) -> None:
        self._note(self._pieces.pop(number), 0)


def _of_logsumexp(x: Tensor, *_: Any) -> int:
    """exp(x - max)"""
    return x.numel() * x.element_size()


def _of_attention_backward(_: Tensor, query: Tensor, key: Tensor, *__: Any) -> int:
    """FlashAttention 2: the query's gradient in float32; if heads share keys, gradients of keys and values per head."""
    shared = query.shape[1] != key.shape[1]
    return query.numel() * 4 + (2 * query.numel() * query.element_size() if shared else 0)


SCRATCH: dict[str, Callable[..., int]] = {
    "aten::logsumexp": _of_logsumexp,
    "torch_attn::_varlen_attn_backward": _of_attention_backward,
}
"""Bytes that an operation's CUDA kernel allocates temporarily, which no fake tensor shows"""


def peak(
    events: Sequence[tuple[int, Piece]], marks: Sequence[int], kind: Callable[[Piece], str], elsewhere: Collection[str]
) -> list[dict[str, int]]:
    """Bytes of each kind at the moment of the largest total, for each of the spans that end at `marks`.

    Args:
        marks: indices of events, ascending
        elsewhere: kinds that are in another memory: reported, but not counted in the total
    """
    spans: list[dict[str, int]] = [{} for _ in marks]
    now: dict[str, int] = {}
    span, held, most = 0, 0, -1
    for number, (change, piece) in enumerate(events):
        while number >= marks[span]:
            span, most = span + 1, -1
        name = kind(piece)
        now[name] = now.get(name, 0) + change
        held += 0 if name in elsewhere else change
        if held > most:
            most, spans[span] = held, dict(now)
    return spans
