"""The structures that Python and the native decoder share: field by field those of ``ops/native/decode``'s headers."""

import ctypes
from typing import Any, ClassVar

_Int, _Float, _Pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Matrix(ctypes.Structure):
    """``matrix.h``: a stack of matrices; no rows means that there is none."""

    FP32, BF16, FP8, INT8, INT4 = range(5)
    _fields_: ClassVar = [*_fields(_Pointer, "data scales"), *_fields(_Int, "kind rows columns")]


class Layer(ctypes.Structure):
    """``model.h``: one block's weights."""

    _fields_: ClassVar = [
        *_fields(_Pointer, "attention_norm q_norm kv_norm ffn_norm router_bias"),
        *_fields(Matrix, "q_a q_b kv_a key value o gate_up down router expert_gate_up expert_down"),
        *_fields(_Pointer, "embed_norm hidden_norm"),
        ("project", Matrix),
    ]


class Model(ctypes.Structure):
    """``model.h``: sizes and weights."""

    _fields_: ClassVar = [
        ("layers", _Pointer),
        *_fields(Matrix, "embed head draft_head"),
        *_fields(_Int, "width heads q_rank c nope rope value groups top_groups top_k normalise"),
        *_fields(_Float, "eps latent_eps softmax_scale gate_scale"),
    ]


class Request(ctypes.Structure):
    """``model.h``: one step."""

    _fields_: ClassVar = [
        *_fields(_Int, "batch first last"),
        *_fields(_Pointer, "tokens previous positions table"),
        ("table_stride", _Int),
        ("pages", ctypes.POINTER(_Pointer)),
        *_fields(_Int, "page_count page_kind"),
        *_fields(_Pointer, "cos sin"),
        ("angles", _Int),
        *_fields(_Pointer, "norm hidden head_rows"),
        ("head_count", _Int),
        *_fields(_Pointer, "logits best peak log_sum experts"),
    ]


class DraftRequest(ctypes.Structure):
    """``model.h``: drafts that are made before a step."""

    _fields_: ClassVar = [
        *_fields(_Int, "layer rows"),
        *_fields(_Pointer, "tokens previous positions norm"),
        ("sequences", _Int),
        *_fields(_Pointer, "last depth to"),
        ("seconds", ctypes.c_double),
    ]


def check_layout(library: ctypes.CDLL) -> None:
    """Sizes must agree; a library compiled of other sources than these would read at random."""
    library.decode_size_of.restype = _Int
    for which, structure in enumerate((Matrix, Layer, Model, Request, DraftRequest)):
        there = library.decode_size_of(_Int(which))
        assert there == ctypes.sizeof(structure), f"{structure.__name__}: {there} bytes in C++"
