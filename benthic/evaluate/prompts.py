"""From a problem of a task file to the token ids a model reads."""

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate.task_files import Asked, Message


def chat_ids(tokenizer: Tokenizer, problem: Asked, chat: bool) -> list[int] | None:
    """Ids of a conversation that waits for the assistant; None where the problem is plain text.

    Args:
        tokenizer: with a chat template, where a conversation is to be had.
        problem: with messages, or a prompt.
        chat: take a prompt as what a user says.

    Raises:
        InputError: the model has no chat template, or its template refuses the conversation.
    """
    messages = problem.messages
    if problem.prompt is not None:
        if not chat:
            return None
        messages = (Message(role="user", content=problem.prompt),)
    return tokenizer.apply_chat([message.model_dump() for message in messages])


def prompt_ids(tokenizer: Tokenizer, problem: Asked, chat: bool) -> list[int]:
    """Ids of a problem's prompt, whichever kind it is; plain text comes after the begin token. Raises as above."""
    ids = chat_ids(tokenizer, problem, chat)
    return [tokenizer.bos_id, *tokenizer.encode(problem.prompt or "")] if ids is None else ids


def fits(length: int, room: int, where: str) -> None:
    """Raises ``InputError`` unless so many tokens are at most ``room``."""
    if length > room:
        raise InputError(f"{where}: {length} tokens; the model takes {room}")
