"""Checkpoints that all ranks of a run write together, and that are there for all of them or for none.

Each rank writes the part it owns into one hidden directory. Rank 0 begins it, and commits it with manifest and rename
only when every rank has said that its part is on disk; what it then says, every rank returns or raises. The ranks
speak over a board, so that all this can happen in threads beside the training.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from benthic.files import sync
from benthic.parallel.board import Board, NoAnswer
from benthic.train.checkpoint import CheckpointFailed, committed, discard, discard_leftovers
from benthic.train.parts import Owned, describe_file, part_name, write_part


class JointSaves:
    """The saves of one rank, in step with those of the others: each calls :meth:`save` as often and in one order."""

    def __init__(self, board: Board) -> None:
        """``board`` is for these alone."""
        self._board = board
        self._number = 0

    def save(self, root: Path, step: int, owned: Owned, state: dict[str, Any], keep: int | None) -> Path:
        """Commit ``root/step-N`` with what all ranks own, and delete all but the newest ``keep``, or none.

        ``root`` must be one directory for all ranks; ``state`` is rank 0's.

        Raises:
            CheckpointFailed: on every rank, if any could not write its part; the message says which and why.
        """
        self._number += 1
        target = root / f"step-{step}"
        trouble = self._begin(root, target) or self._write(root, target, owned, state)
        if trouble:
            raise CheckpointFailed(f"{target}: not saved ({trouble}); earlier checkpoints are intact")
        if self._board.rank == 0:
            # One too many is no reason to stop a run; the next save tries again.
            with suppress(OSError):
                for old in committed(root)[:-keep] if keep else []:
                    discard(old)
        return target

    def give_up(self) -> None:
        """Let a save that waits for other ranks fail."""
        self._board.give_up()

    def _key(self, what: str) -> str:
        return f"{self._number}/{what}"

    def _told(self, what: str) -> str | None:
        """What rank 0 says went wrong, to all."""
        try:
            told: str | None = self._board.read(self._key(what))
        except NoAnswer as error:
            return f"rank 0: {error}"
        return told

    def _begin(self, root: Path, target: Path) -> str | None:
        """Rank 0 makes the directory, the others wait for it."""
        if self._board.rank != 0:
            return self._told("begun")
        trouble = None
        try:
            root.mkdir(parents=True, exist_ok=True)
            discard_leftovers(root)
            _temporary(target).mkdir()
        except OSError as error:
            trouble = f"rank 0: {error}"
        self._board.post(self._key("begun"), trouble)
        return trouble

    def _write(self, root: Path, target: Path, owned: Owned, state: dict[str, Any]) -> str | None:
        """Write the rank's part, say so, and hear from rank 0 whether there is a checkpoint."""
        said: dict[str, Any]
        try:
            said = {"entry": write_part(_temporary(target), self._board.rank, owned)}
        except (OSError, SafetensorError) as error:
            said = {"error": str(error)}
        self._board.post(self._key(f"part-{self._board.rank}"), said)
        if self._board.rank == 0:
            return self._commit(root, target, state)
        told = self._told("end")
        self._board.post(self._key(f"heard-{self._board.rank}"), None)
        return told

    def _commit(self, root: Path, target: Path, state: dict[str, Any]) -> str | None:
        """Once all parts are there, make them a checkpoint; say whether it is one."""
        parts = [self._heard(rank) for rank in range(self._board.world)]
        self._clear()
        errors = [f"rank {rank}: {part['error']}" for rank, part in enumerate(parts) if "error" in part]
        trouble = "; ".join(errors) or self._finish(root, target, state, [part["entry"] for part in parts])
        if trouble:
            shutil.rmtree(_temporary(target), ignore_errors=True)
        self._board.post(self._key("end"), trouble)
        self._wait_for_the_others()
        return trouble

    def _wait_for_the_others(self) -> None:
        """Until all have heard how the save ended: they read it from this process, which may be about to end."""
        keys = [self._key(f"heard-{rank}") for rank in range(1, self._board.world)]
        with suppress(NoAnswer):
            for key in keys:
                self._board.read(key)
            self._board.remove(keys)

    def _clear(self) -> None:
        """Take down what is read: who has said what became of its part knows how the save before this one ended."""
        self._board.remove(self._key(f"part-{rank}") for rank in range(self._board.world))
        self._board.remove(f"{self._number - 1}/{what}" for what in ("begun", "end"))

    def _heard(self, rank: int) -> dict[str, Any]:
        key = self._key(f"part-{rank}")
        try:
            said: dict[str, Any] = self._board.read(key)
        except NoAnswer as error:
            return {"error": str(error)}
        return said

    def _finish(self, root: Path, target: Path, state: dict[str, Any], entries: list[Any]) -> str | None:
        """Write what is of the whole, and make it one checkpoint by a rename."""
        directory = _temporary(target)
        try:
            for rank in range(len(entries)):
                if not (directory / part_name(rank)).is_file():
                    return f"rank {rank} has written where rank 0 does not see it: all need one directory"
            (directory / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            files = {part_name(rank): entry for rank, entry in enumerate(entries)}
            files["state.json"] = describe_file(directory / "state.json")
            manifest = {"parts": len(entries), "files": files}
            (directory / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (directory / "state.json", directory / "manifest.json", directory):
                sync(path)
            directory.rename(target)
            sync(root)
        except OSError as error:
            return f"rank 0: {error}"
        return None


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")
