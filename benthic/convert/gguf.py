"""GGUF files, as llama.cpp and what is built on it run them: architecture ``deepseek2``, attention absorbed.

A file is planned whole before anything is written: names, shapes, types and so the bytes of every tensor. Weights then
stream into it, one tensor in memory at a time, and it appears under its name only once it is as long as planned.
"""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from benthic.config.schema import ModelConfig
from benthic.convert.gguf_settings import ARCHITECTURE, add_model_settings, check_supported, remarks
from benthic.convert.gguf_tokenizer import add_no_tokenizer, add_tokenizer
from benthic.convert.names import gguf_names, split_kv_b
from benthic.convert.resolve import find_tokenizer, load_model
from benthic.convert.shards import PRODUCER
from benthic.errors import InputError, MissingExtra, WorkFailed
from benthic.files import cannot_write, sync
from benthic.model import LanguageModel

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

Precision = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
"""How matrices are stored: ``q8_0`` and ``q4_0`` have one fp16 scale for 32 numbers of a row."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_OF_DTYPE: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "f16"}
_FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0",
}  # fmt: skip
_ALWAYS_F32 = ("ffn_gate_inp.weight", "exp_probs_b.bias")
"""The router decides by small differences."""
_VOCABULARY = ("token_embd.weight", "output.weight")
"""Kept in 8 bits where the rest has 4: errors here reach every token."""
_OURS = "benthic.producer"


class Exported(NamedTuple):
    """What an export wrote."""

    tensors: int
    bytes: int
    precision: Precision
    remarks: list[str]
    """What llama.cpp does otherwise than Benthic."""


class _Planned(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: "GGMLQuantizationType"
    nbytes: int


def precision_named(name: str | None) -> Precision | None:
    """A precision by its name on the command line; none for none. Raises InputError if there is no such."""
    found = next((precision for precision in PRECISIONS if precision == name), None)
    if name is not None and found is None:
        raise InputError(f"--precision {name}: must be one of {', '.join(PRECISIONS)}")
    return found


def export_gguf(run: Path, out: Path, precision: Precision | None = None) -> Exported:
    """Writes the model and tokenizer of a run as a GGUF file.

    Args:
        run: a run, an exported or a Hugging Face directory.
        out: a free path.
        precision: of matrices; by default as the model is stored.

    Raises:
        InputError: there is no model or tokenizer, llama.cpp cannot run it, or something is at ``out``.
        MissingExtra: the ``gguf`` package is not installed.
        WorkFailed: the disk is full.
    """
    _require_library()
    _check_free(out)
    tokenizer = find_tokenizer(run)
    model, config = load_model(run)
    precision = precision or _OF_DTYPE.get(model.transformer.head.weight.dtype, "f32")
    return write_gguf(model, config, tokenizer, out, precision)


def write_gguf(
    model: LanguageModel, config: ModelConfig, tokenizer_dir: Path | None, out: Path, precision: Precision
) -> Exported:
    """Writes a model's main transformer as a GGUF file, complete or not at all.

    Args:
        model: the weights; those of MTP modules are left out, which llama.cpp does not run.
        config: of ``model``.
        tokenizer_dir: with ``tokenizer.json``; without one the file takes and gives token ids only.
        out: a free path.
        precision: of matrices; vectors and routers are fp32. Rows that 32 does not divide are fp16 instead of 8 or 4
            bits; embedding and head have 8 bits instead of 4.

    Raises:
        InputError: as :func:`export_gguf`, or a weight is too large for fp16.
        MissingExtra: the ``gguf`` package is not installed.
        WorkFailed: the disk is full.
    """
    _require_library()
    from gguf import GGUFWriter

    check_supported(config)
    _check_free(out)
    state = model.state_dict()
    plan = [_planned(name, tensor, precision) for name, tensor in _tensors(config, state)]
    with _new_file(out) as draft, closing(GGUFWriter(None, ARCHITECTURE)) as writer:
        _add_metadata(writer, config, tokenizer_dir, precision)
        for planned in plan:
            _announce(writer, planned)
        _require_space(out, sum(planned.nbytes for planned in plan))
        writer.write_header_to_file(draft)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        beginning = draft.stat().st_size
        for planned, (_, tensor) in zip(plan, _tensors(config, state), strict=True):
            writer.write_tensor_data(_encoded(tensor, planned))
        writer.close()
        _check_size(draft, beginning, plan)
    return Exported(len(plan), out.stat().st_size, precision, remarks(config))


def _tensors(config: ModelConfig, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its GGUF name, as views of the model's; shapes as in PyTorch, the longest stride first."""
    for name, place in gguf_names(config).items():
        weight = place.view(state)
        if name.endswith("attn_k_b.weight"):
            weight = split_kv_b(weight, config)[0]
        elif name.endswith("attn_v_b.weight"):
            weight = split_kv_b(weight, config)[1]
        yield name, weight


def _planned(name: str, tensor: Tensor, precision: Precision) -> _Planned:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[precision.upper()]
    if tensor.dim() < 2 or name.endswith(_ALWAYS_F32):
        kind = GGMLQuantizationType.F32
    elif precision == "q4_0" and name in _VOCABULARY:
        kind = GGMLQuantizationType.Q8_0
    if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return _Planned(name, tuple(tensor.shape), kind, tensor.numel() // block * block_bytes)


def _announce(writer: "GGUFWriter", planned: _Planned) -> None:
    import numpy as np

    # The dtype is that of the numbers, so that the library takes the shape as it is.
    writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, raw_dtype=planned.kind)


def _encoded(tensor: Tensor, planned: _Planned) -> "np.ndarray[Any, Any]":
    """The bytes of a tensor as ggml stores them."""
    import numpy as np
    from gguf import GGMLQuantizationType, quantize

    numbers = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    with np.errstate(over="ignore"):
        data = quantize(numbers, planned.kind)
    if planned.kind == GGMLQuantizationType.F16 and not np.isfinite(data).all():
        raise InputError(f"{planned.name}: holds numbers beyond fp16's {np.finfo(np.float16).max}: choose bf16 or f32")
    if data.nbytes != planned.nbytes:
        raise WorkFailed(f"{planned.name}: {data.nbytes} bytes where {planned.nbytes} were planned")
    return data


def _add_metadata(writer: "GGUFWriter", config: ModelConfig, tokenizer_dir: Path | None, precision: Precision) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_string(_OURS, PRODUCER)
    writer.add_type("model")
    writer.add_file_type(LlamaFileType[_FILE_TYPES[precision]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_model_settings(writer, config)
    if tokenizer_dir is None:
        add_no_tokenizer(writer)
    else:
        add_tokenizer(writer, tokenizer_dir, config.vocab_size)


def _check_size(file: Path, beginning: int, plan: list[_Planned]) -> None:
    """A file that is shorter than its header says would be read past its end."""
    aligned = [-(-size // 32) * 32 for size in (beginning, *(planned.nbytes for planned in plan))]
    if file.stat().st_size != sum(aligned):
        raise WorkFailed(f"{file}: {file.stat().st_size} bytes where {sum(aligned)} were planned")


def _require_library() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingExtra("gguf", "gguf") from None


def _check_free(out: Path) -> None:
    """Raises InputError if something is there."""
    if out.is_dir():
        raise InputError(f"{out}: is a directory; give the path of a file")
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: already there and not replaced; give a path that is free")


def _require_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise WorkFailed(f"{out}: needs {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB of disk are free")


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """A draft beside ``out`` that becomes it when the block ends well, and else is removed."""
    draft = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex}.draft")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        sync(draft)
        draft.replace(out)
        sync(out.absolute().parent)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        draft.unlink(missing_ok=True)
