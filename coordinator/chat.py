"""Chat messages to token ids, and token ids to text: what a model's own files say, without torch or transformers.

`ChatFormat` renders the model's chat template as transformers does and encodes it with the model's tokenizer.
`Detokenizer` and `StopStrings` turn the token stream back into text that never has to be taken back.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer, decoders

from azu.errors import InputError, ModelError
from coordinator.generation import ServedModel
from coordinator.template import ChatTemplate

__all__ = ["ChatFormat", "Detokenizer", "StopStrings"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A ticket carries at most this many stop tokens; no model has more than a handful.
_MAX_STOP_TOKENS = 64
# Unicode's noncharacters are for a program's internal use and mean nothing in a message.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
# Added tokens which applications hand back as part of an earlier answer, and which templates look for in there.
_ANSWER_TOKEN = re.compile(r"think|tool|reason", re.IGNORECASE)
# A character has at most 4 bytes: whatever ends in U+FFFD after so many more tokens is invalid and not unfinished.
_MAX_HELD_TOKENS = 16
_REPLACEMENT = "\ufffd"


class ChatFormat:
    """How one model reads a conversation, and how its tokens read as text. Safe to share between threads.

    Text in a message that spells one of the model's control tokens ("<|im_end|>") is encoded as the plain text that it
    is, so nobody can forge a turn from inside a message. Without such text the ids equal those of transformers'
    `apply_chat_template(messages, add_generation_prompt=True)`; with it, those under `sanitize_control_tokens=True`,
    but for tokens such as <think> and <tool_call>, which stay what transformers makes of them by default.

    Raises:
        ModelError: a file of the tokenizer is missing or unusable.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model_id = model.model_id
        self._tokenizer = _load_tokenizer(model)
        config = _load_json(model, "tokenizer_config.json")
        names = _special_names(config, _load_json(model, "special_tokens_map.json"))
        source = _template_source(model, config)
        self._template = None if source is None else ChatTemplate(source, names, self._model_id)
        self._special = _special_ids(self._tokenizer)
        self._control = self._control_pattern()
        self._stop_tokens = self._find_stop_tokens(model, names)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer, in ascending order."""
        return self._stop_tokens

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt for the next answer.

        Args:
            messages: plain JSON values with "role" and "content"; what else the template knows is passed on.

        Raises:
            ModelError: code "no_chat_template", or "bad_chat_template" where the template is broken.
            InputError: code "bad_messages", where the template refuses the messages.
        """
        if self._template is None:
            remedy = "Use a chat (instruct) model."
            raise ModelError(f"{self._model_id} has no chat template", code="no_chat_template", remedy=remedy)
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        ids = self._encode_marked(self._template.render(self._mark(plain)))
        if not ids:
            raise InputError("the messages make an empty prompt", code="bad_messages", remedy="Add some text.")
        return tuple(ids)

    def detokenizer(self) -> Detokenizer:
        """A fresh detokenizer, for one answer."""
        return Detokenizer(self._tokenizer, self._special)

    def _mark(self, value: Any) -> Any:
        """`value` with each control token in its strings between markers."""
        if isinstance(value, str):
            bare = value.replace(_OPEN, "").replace(_CLOSE, "")
            return self._control.sub(f"{_OPEN}\\g<0>{_CLOSE}", bare)
        if isinstance(value, Mapping):
            return {key: self._mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._mark(item) for item in value]
        return value

    def _encode_marked(self, text: str) -> list[int]:
        if _OPEN not in text and _CLOSE not in text:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        # Template methods such as split() may tear a pair of markers apart; a lone one still separates.
        pattern = f"{_OPEN}({self._control.pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]"
        pieces = re.split(pattern, text)
        ids = list(self._tokenizer.encode(pieces[0], add_special_tokens=False).ids)
        for index, piece in enumerate(pieces[1:], start=1):
            if piece:  # odd ones are control tokens out of messages, None for a lone marker
                ids += self._encode_inner(piece, as_text=index % 2 == 1)
        return ids

    def _encode_inner(self, piece: str, *, as_text: bool) -> list[int]:
        """A piece from the middle of a text: behind a newline, so that SentencePiece prefixes no space to it."""
        newline = self._encode_piece("\n", as_text=False)
        ids = self._encode_piece("\n" + piece, as_text=as_text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._encode_piece(piece, as_text=as_text)

    def _encode_piece(self, text: str, *, as_text: bool) -> list[int]:
        if not as_text:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        # The tokenizer's own steps, but for its search for added tokens.
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        splits = [text]
        if self._tokenizer.pre_tokenizer is not None:
            splits = [split for split, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for split in splits for token in self._tokenizer.model.tokenize(split)]

    def _control_pattern(self) -> re.Pattern[str]:
        literals = "" if self._template is None else self._template.literals
        added = self._tokenizer.get_added_tokens_decoder().values()
        control = [
            token.content
            for token in added
            if token.special
            # Some models' turn markers are not flagged as special: they are known by the template's use of them.
            or (token.content in literals and not token.content.isspace() and not _ANSWER_TOKEN.search(token.content))
        ]
        control.sort(key=len, reverse=True)  # a token before those that it contains
        return re.compile("|".join(map(re.escape, control)) or r"(?!)")

    def _find_stop_tokens(self, model: ServedModel, names: Mapping[str, str]) -> tuple[int, ...]:
        text_config = model.config.get("text_config")
        sources: list[object] = [_load_json(model, "generation_config.json"), model.config, text_config]
        found = {token for source in sources if isinstance(source, Mapping) for token in _ids(source)}
        named = self._tokenizer.token_to_id(names.get("eos_token", ""))
        if named is not None:
            found.add(named)
        usable = sorted(token for token in found if 0 <= token < model.manifest.vocab_size)
        return tuple(usable[:_MAX_STOP_TOKENS])


class Detokenizer:
    """Text out of a stream of token ids, special tokens left out; the pieces joined are the decoded whole.

    A piece never ends inside a character: its bytes are held until the last one has come. Each id costs the same
    whatever came before it.
    """

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._special = _special_ids(tokenizer) if special is None else special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        # For any other decoder: a window of ids, of which the first `_shown` give `_known`, text that went out already.
        self._window: list[int] = []
        self._shown = 0
        self._known = ""

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; often one word, sometimes nothing."""
        if token in self._special:
            return ""
        if self._byte_level:
            return self._utf8.decode(_token_bytes(self._tokenizer.id_to_token(token)))
        return self._push_window(token)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, mostly nothing."""
        if self._byte_level:
            return self._utf8.decode(b"", final=True)
        rest = self._decode(self._window)[len(self._known) :]
        self._window, self._shown, self._known = [], 0, ""
        return rest

    def _push_window(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        held = len(self._window) - self._shown
        unfinished = len(text) <= len(self._known) or text.endswith(_REPLACEMENT)
        if unfinished and held < _MAX_HELD_TOKENS:
            return ""
        piece = text[len(self._known) :]
        # The ids of this piece stay as context for the next: a decoder treats the first of a text differently.
        self._window = self._window[self._shown :]
        self._shown, self._known = len(self._window), self._decode(self._window)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class StopStrings:
    """Cuts a text before the first of some strings, wherever the borders of its pieces are.

    What may be the beginning of a stop string is held back until it is certain.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The part of the held text and `text` that is certain to lie before any stop string."""
        if self.matched:
            return ""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.matched, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held at the end of the text."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def _byte_values() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


# GPT-2's bijection of bytes to characters, which every byte-level vocabulary is written in.
_BYTE_VALUES: Final = _byte_values()


def _token_bytes(token: str | None) -> bytes:
    if token is None:  # a padded vocabulary has ids without a token
        return b""
    try:
        return bytes([_BYTE_VALUES[character] for character in token])
    except KeyError:  # an added token stands for itself
        return token.encode()


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)


def _load_tokenizer(model: ServedModel) -> Tokenizer:
    path = model.tokenizer_files.get("tokenizer.json")
    if path is None:
        remedy = "Convert its tokenizer with transformers' AutoTokenizer.save_pretrained and publish it again."
        raise ModelError(f"{model.model_id} has no tokenizer.json", code="no_tokenizer", remedy=remedy)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare ones
        raise _unusable(model, "tokenizer.json", error) from error
    tokenizer.no_truncation()  # some files carry the settings of a training run
    tokenizer.no_padding()
    return tokenizer


def _load_json(model: ServedModel, name: str) -> dict[str, Any]:
    text = _load_text(model, name)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unusable(model, name, error) from error
    return value if isinstance(value, dict) else {}


def _load_text(model: ServedModel, name: str) -> str | None:
    path = model.tokenizer_files.get(name)
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(model, name, error) from error


def _unusable(model: ServedModel, name: str, error: Exception) -> ModelError:
    return ModelError(f"{name} of {model.model_id} is unusable: {error}", code="bad_tokenizer")


def _template_source(model: ServedModel, config: Mapping[str, Any]) -> str | None:
    source: object = _load_text(model, "chat_template.jinja")
    if source is None:
        source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, Mapping)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _special_names(config: Mapping[str, Any], fallback: Mapping[str, Any]) -> dict[str, str]:
    values = {name: config.get(name, fallback.get(name)) for name in _SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _ids(config: Mapping[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int) and not isinstance(token, bool)]
