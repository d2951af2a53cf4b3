"""llama.cpp in this process: as much of it as comparing text, logits and speed with it takes.

    pip install 'benthic[llama]'

Its key-value cache is fp32 and its flash attention off unless asked otherwise: either rounds in fp16, and so would
hide that an F32 file leaves the order of additions as the only difference. On processors with AMX it may not rearrange
weights for it: as of llama-cpp-python 0.3.36 that ends the process for f16, q8_0 and q4_0 files of this architecture.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from benthic.errors import MissingExtra

try:
    import llama_cpp
except ImportError as error:
    raise MissingExtra("llama-cpp-python", "gguf,llama") from error

F32, F16 = 0, 1
AUTOMATIC, OFF = -1, 0
_PIECE_BYTES = 256


@llama_cpp.llama_log_callback
def _silence(level: int, text: bytes, data: Any) -> None:
    """Its log goes nowhere."""


def has_amx() -> bool:
    """Whether this processor has AMX, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "amx_tile" in info.read_text(encoding="utf-8", errors="replace")


class LlamaCpp:
    """A GGUF file loaded for one sequence of tokens."""

    def __init__(
        self, path: Path, *, context: int, threads: int = 1, batch: int = 512, cache_type: int = F32, flash: int = OFF
    ) -> None:
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = not has_amx()
        self._context: Any = None
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        running = llama_cpp.llama_context_default_params()
        running.n_ctx, running.n_batch, running.n_ubatch = context, batch, batch
        running.n_threads = running.n_threads_batch = threads
        running.type_k = running.type_v = cache_type
        running.flash_attn_type = flash
        self._batch = batch
        self._context = llama_cpp.llama_init_from_model(self._model, running)
        if not self._context:
            raise RuntimeError(f"{path}: llama.cpp cannot make a context for it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def tokens(self, text: str, *, begin: bool = False, special: bool = False) -> list[int]:
        """Ids of a text, with the begin token and with special tokens' text read as them if asked."""
        raw = text.encode()
        room = len(raw) + 8
        buffer = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, raw, len(raw), buffer, room, begin, special)
        assert count >= 0
        return list(buffer[:count])

    def text(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        pieces = []
        for token in ids:
            size = llama_cpp.llama_token_to_piece(self._vocabulary, token, buffer, _PIECE_BYTES, 0, False)
            pieces.append(buffer.raw[: max(size, 0)])
        return b"".join(pieces).decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Whether generation stops at a token."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))

    def forget(self, keep: int = 0) -> None:
        """Drop all tokens read but the first ``keep``."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_rm(memory, 0, keep, -1)

    def read(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits (V,) of the token after ``ids``, which follow what was read before."""
        for start in range(0, len(ids), self._batch):
            part = ids[start : start + self._batch]
            buffer = (llama_cpp.llama_token * len(part))(*part)
            if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(buffer, len(part))):
                raise RuntimeError("llama.cpp could not decode")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,)).copy()

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """The likeliest token again and again, up to one that ends the text (left out) or ``new_tokens``."""
        self.forget()
        out: list[int] = []
        logits = self.read(ids)
        while len(out) < new_tokens:
            token = int(logits.argmax())
            if self.ends(token):
                break
            out.append(token)
            logits = self.read([token])
        return out
