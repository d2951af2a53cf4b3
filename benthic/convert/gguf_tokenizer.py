"""A tokenizer in a GGUF file: byte-level BPE whose way of cutting text into words llama.cpp has under a name.

The name of a way that is nearly the same would load and cut some texts otherwise, so that the model would read other
tokens than it was trained on. Only ways known to be the same are written; others are refused.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.files import read_json_object

if TYPE_CHECKING:
    from gguf import GGUFWriter

_BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "type": "ByteLevel"}
_DEEPSEEK_V3_WORDS = (
    "\\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_PLAIN_BPE = {
    "type": ("BPE",),
    "dropout": (None,), "unk_token": (None,), "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""), "byte_fallback": (None, False), "ignore_merges": (None, False),
}  # fmt: skip
"""What llama.cpp's byte-level BPE does, by the settings of the tokenizers library."""


def add_tokenizer(writer: "GGUFWriter", folder: Path, vocab_size: int) -> None:
    """Vocabulary, merges, special tokens and chat template of ``folder``.

    Args:
        writer: takes them as metadata.
        folder: with ``tokenizer.json``.
        vocab_size: rows of the embedding; ids that the tokenizer does not have become unused tokens.

    Raises:
        InputError: the tokenizer is of a kind that llama.cpp has no equal of, or has more tokens than the model.
    """
    tokenizer, file = Tokenizer.load(folder), folder / "tokenizer.json"
    if tokenizer.vocab_size > vocab_size:
        raise InputError(f"{file}: {tokenizer.vocab_size} tokens; the model has {vocab_size}")
    raw = read_json_object(file)
    merges = _merges(raw, file)  # refuses other kinds of tokenizers
    tokens, types = _tokens(raw, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_word_splitter(raw, file))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if "user" in tokenizer.role_ids:  # the other side's turn ends the model's; the file has room for one such token
        writer.add_eot_token_id(tokenizer.role_ids["user"])
    writer.add_add_bos_token(True)  # the engine puts it before every prompt
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def add_no_tokenizer(writer: "GGUFWriter") -> None:
    """For a model that is only given token ids."""
    writer.add_tokenizer_model("none")


def _tokens(raw: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's text and llama.cpp's kind of token."""
    from gguf import TokenType

    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for text, index in raw["model"]["vocab"].items():
        tokens[index], types[index] = text, int(TokenType.NORMAL)
    for added in raw.get("added_tokens") or []:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _merges(raw: dict[str, Any], file: Path) -> list[str]:
    model = raw["model"]
    odd = [f"model.{key}={model.get(key)!r}" for key, plain in _PLAIN_BPE.items() if model.get(key) not in plain]
    if raw.get("normalizer") is not None:
        odd.append("normalizer")
    if odd:
        raise InputError(f"{file}: {odd[0]}: llama.cpp reads plain byte-level BPE; export with --format hf")
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _word_splitter(raw: dict[str, Any], file: Path) -> str:
    """llama.cpp's name for the tokenizer's way of cutting text into words."""
    found = raw.get("pre_tokenizer")
    if found == {**_BYTE_LEVEL, "use_regex": True}:
        return "gpt-2"
    steps = [_step(pattern) for pattern in _DEEPSEEK_V3_WORDS]
    if found == {"type": "Sequence", "pretokenizers": [*steps, {**_BYTE_LEVEL, "use_regex": False}]}:
        return "deepseek-v3"
    raise InputError(
        f"{file}: pre_tokenizer: llama.cpp is known to cut text in the same way for Benthic's and DeepSeek-V3's "
        "tokenizers only; export with --format hf"
    )


def _step(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
