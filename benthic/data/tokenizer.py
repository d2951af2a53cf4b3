"""Byte-level BPE in the Hugging Face layout, safe by default.

Text never becomes a control token: ``encode`` ignores special-token strings, and ``apply_chat`` lets only the
template, not the messages, produce them. A file that transformers, vLLM or SGLang load is all that is stored.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from benthic.data.byte_level import BYTE_OF_LETTER
from benthic.data.chat_template import CHAT_TEMPLATE, ChatTemplate, Message
from benthic.data.document import ROLES, Document, Role, Turn
from benthic.errors import InputError
from benthic.files import read_json_object, write_atomically

BOS, EOS = "<|begin|>", "<|end|>"
ROLE_TOKENS: dict[Role, str] = {role: f"<|{role}|>" for role in ROLES}
MIN_VOCAB_SIZE = 256 + 2 + len(ROLES)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What :meth:`Tokenizer.save` writes."""
_LONG_RUN = re.compile(r"\S{512}|\s{512}")
_GUARD = "\ufdd0"
"""A Unicode noncharacter that breaks up control-token strings in messages while a template is rendered."""


class TooLong(InputError):
    """A conversation has ``fewest`` tokens or more, and that is more than are wanted."""

    def __init__(self, fewest: int) -> None:
        super().__init__(f"the conversation has {fewest} tokens or more")
        self.fewest = fewest


class Tokenizer:
    """Text to token ids and back.

    ``bos_id`` and ``eos_id`` begin and end a document; ``role_ids`` are the ids of the role markers (empty for a
    third-party tokenizer without them); ``stop_ids`` are all tokens that end an assistant's turn.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any], stop_ids: Iterable[int] = ()) -> None:
        self._backend = backend
        self._plain = _without_added_tokens(backend)
        self._settings = settings
        self.bos_id, self.eos_id = _id(backend, settings["bos_token"]), _id(backend, settings["eos_token"])
        found = {role: backend.token_to_id(token) for role, token in ROLE_TOKENS.items()}
        self.role_ids: dict[Role, int] = {role: index for role, index in found.items() if index is not None}
        self.stop_ids = frozenset({self.eos_id, *self.role_ids.values(), *stop_ids})
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        template = settings.get("chat_template")
        self._template = ChatTemplate(template) if template else None
        added = backend.get_added_tokens_decoder().values()
        self._added = frozenset(backend.get_added_tokens_decoder())
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._special = _any_of(token.content for token in added if token.special)
        self._control = _any_of(token.content for token in added)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Byte-level BPE of at most ``vocab_size`` tokens from ``texts``; the same texts give the same tokenizer."""
        if vocab_size < MIN_VOCAB_SIZE:
            raise InputError(f"vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE}: all bytes and special tokens")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS, *ROLE_TOKENS.values()],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        backend.train_from_iterator((piece for text in texts for piece in _short_words(text)), trainer)
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        return cls(
            backend,
            {
                "bos_token": BOS,
                "eos_token": EOS,
                "chat_template": CHAT_TEMPLATE,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From a directory with ``tokenizer.json``, or a run directory; raises ``InputError`` if it is not usable."""
        folder = Path(path)
        if (folder / "tokenizer" / "tokenizer.json").is_file():
            folder = folder / "tokenizer"
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{folder}: no tokenizer.json in this folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: not a tokenizer: {' '.join(str(error).split())}") from None
        settings, stop_ids = _load_settings(folder, backend)
        return cls(backend, settings, stop_ids)

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` as transformers' AutoTokenizer reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        contents = (self._backend.to_str(pretty=True), json.dumps(self._settings, indent=2))
        for name, content in zip(TOKENIZER_FILES, contents, strict=True):
            write_atomically(directory / name, content)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the template that ``apply_chat`` renders, if there is one."""
        source = self._settings.get("chat_template")
        return source if isinstance(source, str) else None

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template reads ``tools``, and messages with calls and their results."""
        return self._template is not None and "tools" in self._template.names

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's content: equal means equal ids for every text."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone: no begin token, and special-token strings in it are ordinary characters."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        try:
            return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError):
            raise InputError("text that is not UTF-8: it holds bytes or a surrogate that are no character") from None

    def fewest(self, size: int) -> int:
        """Tokens that so many bytes of text have at the least, without encoding them; 0 where that cannot be said."""
        return -(-size // self._longest) if self._longest else 0

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token, if each byte of a text is part of one; else 0."""
        steps = json.loads(self._backend.to_str())
        if not self._byte_level or steps["normalizer"] is not None or not _keeps_all(steps["pre_tokenizer"]):
            return 0
        return max(len(self.token_bytes(index)) for index in self._backend.get_vocab().values())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; the inverse of ``encode``."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, index: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters; of a control token, its name."""
        name = self._backend.id_to_token(index)
        if name is None:
            return b""
        if index in self._added:
            return str(name).encode()
        letters = [BYTE_OF_LETTER.get(letter) for letter in name]
        if self._byte_level and None not in letters:
            return bytes(letter for letter in letters if letter is not None)
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):  # SentencePiece's way of writing a byte
            return bytes.fromhex(found[1])
        return str(self._backend.decode([index])).encode()

    def encode_documents(self, documents: Sequence[Document]) -> list[list[int]]:
        """Each document from begin to end token; a conversation as ``apply_chat`` renders it without a prompt."""
        texts = iter(self.encode_batch([turn.text for document in documents for turn in document.turns]))
        return [self._assemble(document, [next(texts) for _ in document.turns]) for document in documents]

    def _assemble(self, document: Document, texts: list[list[int]]) -> list[int]:
        spoken = any(turn.role for turn in document.turns)
        if spoken and not self.role_ids and self._template:
            return self.apply_chat([_message(turn) for turn in document.turns], add_generation_prompt=False)
        ids = [self.bos_id]
        for turn, text in zip(document.turns, texts, strict=True):
            if turn.role in self.role_ids:
                ids.append(self.role_ids[turn.role])
            elif len(ids) > 1:
                ids += self.encode("\n")  # nothing else says where a turn ends
            ids += text
        return [*ids, self.eos_id]

    def apply_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, *,
        tools: Sequence[Mapping[str, Any]] = (), fewer_than: int | None = None,
    ) -> list[int]:  # fmt: skip
        """Ids of a conversation, ready for the assistant's next turn or, without the prompt, ended.

        Raises TooLong, before it is encoded, where its length alone says that it has not ``fewer_than`` so many tokens.

        ``tools`` are functions the model may call, for a template that has the name (see :attr:`knows_tools`).

        Special-token strings inside messages stay text. Only an assistant's own message may hold tokens that its
        tokenizer adds but does not call special, such as ``</think>``, because templates look for them there.
        """
        if self._template is None:
            raise InputError("this tokenizer has no chat_template")
        guarded = [self._guard(message) for message in messages]
        text = self._template.render(
            guarded,
            bos_token=self._settings["bos_token"],
            eos_token=self._settings["eos_token"],
            add_generation_prompt=add_generation_prompt,
            **({"tools": _guarded(tools, self._control)} if tools else {}),
        )
        fewest = self.fewest(len(_unguard(text).encode(errors="surrogatepass")))
        if fewer_than is not None and fewest >= fewer_than:
            raise TooLong(fewest)
        return [index for piece in self._split(text) for index in piece]

    def _guard(self, message: Message) -> Message:
        control = self._special if message.get("role") == "assistant" else self._control
        return {key: value if key == "role" else _guarded(value, control) for key, value in message.items()}

    def _split(self, text: str) -> Iterator[list[int]]:
        """Control tokens by their ids, and the text between them, freed of the guard, encoded."""
        position = 0
        for match in self._control.finditer(text):
            yield self.encode(_unguard(text[position : match.start()]))
            yield [_id(self._backend, match[0])]
            position = match.end()
        yield self.encode(_unguard(text[position:]))


def _short_words(text: str) -> Iterator[str]:
    """A text, cut within words of more than 512 characters: what training takes grows with the square of a word."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _id(backend: tokenizers.Tokenizer, token: str) -> int:
    index = backend.token_to_id(token)
    assert index is not None, token
    return index


def _guarded(value: Any, control: re.Pattern[str]) -> Any:
    """A message's content, tool calls and the like, with control-token strings in all their text broken up."""
    if isinstance(value, str):
        return control.sub(lambda match: match[0][0] + _GUARD + match[0][1:], value.replace(_GUARD, 2 * _GUARD))
    if isinstance(value, Mapping):
        return {_guarded(key, control): _guarded(item, control) for key, item in value.items()}
    return [_guarded(item, control) for item in value] if isinstance(value, list | tuple) else value


def _unguard(text: str) -> str:
    return re.sub(f"{_GUARD}({_GUARD}?)", r"\1", text)


def _message(turn: Turn) -> Message:
    return {"role": turn.role, "content": turn.text}


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of ``tokens``, the longest first; nothing if there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _keeps_all(step: dict[str, Any] | None) -> bool:
    """Whether cutting a text into words loses none of it."""
    if step is None or step["type"] == "ByteLevel":
        return step is not None
    if step["type"] == "Sequence":
        *first, last = step["pretokenizers"]
        return _keeps_all(last) and all(one["type"] == "Split" and one["behavior"] != "Removed" for one in first)
    return False


def _without_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    plain = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def _load_settings(folder: Path, backend: tokenizers.Tokenizer) -> tuple[dict[str, Any], set[int]]:
    """tokenizer_config.json with bos, eos and chat template filled in from the other places they may be."""
    settings, config, generation = (
        read_json_object(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "config.json", "generation_config.json")
    )
    stop_ids = {*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))}
    for key in ("eos_token", "bos_token"):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        ids = _ids(config.get(f"{key}_id"))
        token = token or (backend.id_to_token(ids[0]) if ids else None) or settings.get("eos_token")
        if not isinstance(token, str) or backend.token_to_id(token) is None:
            raise InputError(f"{folder}: no usable {key} in tokenizer_config.json and no {key}_id in config.json")
        settings[key] = token
    return {**settings, "chat_template": _find_template(folder, settings.get("chat_template"))}, stop_ids


def _find_template(folder: Path, setting: Any) -> str | None:
    """The template's own file, or the setting: one template, or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    if isinstance(setting, list):
        named = [entry for entry in setting if isinstance(entry, dict) and entry.get("name") == "default"]
        setting = named[0].get("template") if named else None
    if not isinstance(setting, str | None):
        raise InputError(f"{folder}: chat_template in tokenizer_config.json must be text")
    return setting


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and 0 <= index < 2**31]
