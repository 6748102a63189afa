"""The secrets of the pipelines that this node holds: kept, filled in, masked, forgotten (RG3).

A pipeline's values lie in one file of mode 0600, written before the journal accepts it: an agent
that starts again needs them for the next step, and to mask what the last one prints. The journal
itself never holds any.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from gamenode.agent.masking import mask, masked
from gamenode.agent.runtime import LogBlock
from gamenode.domain.command import ExecuteOrder
from gamenode.domain.errors import invalid
from gamenode.domain.log import LogStream
from gamenode.domain.pipeline import ContainerSpec
from gamenode.domain.secret import length_problem, masked_texts
from gamenode.domain.template import Namespace, fill_container, names_used
from gamenode.lib.clock import Clock
from gamenode.lib.durable import sync_folder, write_private

_log = logging.getLogger(__name__)
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretSettings:
    """Bounds of masking."""

    hold_s_max: float = 1.0
    """How long up to three bytes that may begin a secret are held back, if nothing follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hidden:
    """What must not be seen of one pipeline."""

    args: Mapping[str, str] = field(repr=False)
    envs: tuple[str, ...] = field(repr=False)
    """Values of secret envs that its steps use, as they were when it was accepted."""
    lost: bool = False
    """Its values are needed and not there: what its steps print cannot be masked."""

    @property
    def texts(self) -> tuple[bytes, ...]:
        return masked_texts([*self.args.values(), *self.envs])


_NOTHING: Final = _Hidden(args={}, envs=())


class Secrets:
    """Knows the secrets of every pipeline that is held here."""

    def __init__(
        self,
        folder: Path,
        *,
        envs: Mapping[str, str],
        secret_envs: Collection[str],
        clock: Clock,
        settings: SecretSettings,
        pool: Executor | None = None,
    ) -> None:
        """Keep files in `folder`, written in `pool`. Of `envs`, `secret_envs` are secret.

        Raises:
            GameNodeError: INVALID_REQUEST, a secret env that has no value, or one that is too short
                to be masked.
        """
        for name in sorted(secret_envs):
            if name not in envs:
                raise invalid("envs.secret", f"{name} has no value here", advice="add it to values")
            if problem := length_problem(envs[name]):
                raise invalid("envs.secret", f"{name} {problem[0]}", advice=problem[1])
        self._folder = folder
        self._envs = envs
        self._secret_envs = frozenset(secret_envs)
        self._clock = clock
        self._settings = settings
        self._pool = pool
        self._hidden: dict[str, _Hidden] = {}
        self._texts: dict[str, tuple[bytes, ...]] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def resume(self, held: Iterable[ExecuteOrder], living: Iterable[str]) -> None:
        """Take up what is kept for held orders and for the pipelines of living services.

        Files of other pipelines go: a crash left them. Blocks; call before the loop has work.
        """
        orders = {order.dispatch.pipeline_id: order for order in held}
        wanted = {*orders, *living}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.is_file() and (path.stem not in wanted or path.suffix != ".json"):
                path.unlink()
        for pipeline_id in wanted:
            self._know(pipeline_id, self._found(pipeline_id, orders.get(pipeline_id)))

    def _found(self, pipeline_id: str, order: ExecuteOrder | None) -> _Hidden:
        """Return what is kept of a pipeline, with what its next steps are given now."""
        kept = self._read(pipeline_id)
        if order is None:
            return kept or _NOTHING
        lost = kept is None and any(names_used(s.container, Namespace.ARGS) for s in order.steps)
        if lost:
            _log.error(
                "the secrets of a pipeline are missing: its log is withheld",
                extra={"event": "secrets.missing", "pipeline_id": pipeline_id},
            )
        kept = kept or _NOTHING
        # The configuration may be another one than when the last step was given its values.
        return replace(kept, envs=(*kept.envs, *self._used_envs(order)), lost=lost)

    async def keep(self, order: ExecuteOrder) -> None:
        """Keep what `order` brings, before it is accepted; on disk on return.

        Raises:
            OSError: it cannot be written; nothing is kept.
        """
        envs = self._used_envs(order)
        if not order.secrets and not envs:
            return
        hidden = _Hidden(args=dict(order.secrets), envs=envs)
        pipeline_id = order.dispatch.pipeline_id
        async with self._turn(pipeline_id):
            await self._in_thread(partial(self._write, pipeline_id, hidden))
            self._know(pipeline_id, hidden)

    async def forget(self, pipeline_id: str, *, unless: Callable[[], bool]) -> None:
        """Forget a pipeline's secrets, unless they are needed by the time that it is its turn."""
        if pipeline_id not in self._hidden:
            return
        async with self._turn(pipeline_id):
            if pipeline_id in self._hidden and not unless():
                remove = partial(self._path(pipeline_id).unlink, missing_ok=True)
                await self._in_thread(remove)
                del self._hidden[pipeline_id], self._texts[pipeline_id]

    def missing(self, pipeline_id: str, container: ContainerSpec) -> Collection[str]:
        """Return the secret args that `container` needs and that are not there."""
        known = self._hidden.get(pipeline_id, _NOTHING).args
        return sorted(names_used(container, Namespace.ARGS) - known.keys())

    def fill(
        self, pipeline_id: str, container: ContainerSpec, envs: Mapping[str, str]
    ) -> ContainerSpec:
        """Return `container` as it is to run; `envs` are what its caller gave.

        Raises:
            GameNodeError: see `fill_container`.
        """
        return fill_container(
            container,
            # The node's own values win: a caller supplies only what it does not define (F6).
            {**envs, **self._envs},
            secrets=self._hidden.get(pipeline_id, _NOTHING).args,
            secret_envs=self._secret_envs,
        )

    def mask(self, pipeline_id: str, text: str) -> str:
        """Return `text`, such as an engine's words, as it can be reported or logged."""
        return mask(text, self._texts.get(pipeline_id, ()))

    def log(self, pipeline_id: str, blocks: AsyncIterator[LogBlock]) -> AsyncIterator[LogBlock]:
        """Return what a step of a pipeline prints, as others may see it."""
        if self._hidden.get(pipeline_id, _NOTHING).lost:
            return self._withheld()
        texts = self._texts.get(pipeline_id, ())
        return masked(blocks, texts, hold_s_max=self._settings.hold_s_max) if texts else blocks

    async def _withheld(self) -> AsyncIterator[LogBlock]:
        record = b"what follows is withheld: the secrets to mask in it are gone from this node\n"
        yield LogBlock(stream=LogStream.GAMENODE, data=record, at=self._clock.now())

    def _turn(self, pipeline_id: str) -> asyncio.Lock:
        """Return the lock by which a new dispatch of a pipeline waits for the end of an old one."""
        turn = self._turns.get(pipeline_id)
        if turn is None:
            turn = self._turns[pipeline_id] = asyncio.Lock()
        return turn

    def _know(self, pipeline_id: str, hidden: _Hidden) -> None:
        if hidden != _NOTHING:
            self._hidden[pipeline_id] = hidden
            self._texts[pipeline_id] = hidden.texts

    def _used_envs(self, order: ExecuteOrder) -> tuple[str, ...]:
        if not self._secret_envs:
            return ()
        used = {name for step in order.steps for name in names_used(step.container, Namespace.ENVS)}
        return tuple(self._envs[name] for name in sorted(used & self._secret_envs))

    def _write(self, pipeline_id: str, hidden: _Hidden) -> None:
        path = self._path(pipeline_id)
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            sync_folder(self._folder.parent)
        content = {"args": hidden.args, "envs": hidden.envs}
        write_private(path, json.dumps(content).encode())

    def _read(self, pipeline_id: str) -> _Hidden | None:
        try:
            content = json.loads(self._path(pipeline_id).read_bytes())
            return _Hidden(args=content["args"], envs=tuple(content["envs"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            # Not its words: they may quote what the file holds.
            _log.error(
                "a file of secrets cannot be read",
                extra={"event": "secrets.unreadable", "pipeline_id": pipeline_id},
            )
            return None

    def _path(self, pipeline_id: str) -> Path:
        if not _SAFE_NAME.fullmatch(pipeline_id):
            raise invalid("pipeline_id", f"{pipeline_id!r} is not an id")
        return self._folder / f"{pipeline_id}.json"

    async def _in_thread(self, work: partial[None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, work)
