"""Many callers' writes in one transaction, each in a savepoint, and one commit (rules RC1, RC4)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sqlalchemy import Connection

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Clock
from gamenode.server.db.engines import DatabaseEngine, Failure, close_quietly, raw_of

_log = logging.getLogger(__name__)

Work = Callable[[Connection], Any]
"""What a caller wants done; see the module `database` for what it must keep to."""

_COLLECTED: Final = "gamenode.collected"


class CommitHook(Protocol):
    """Something that belongs to every commit."""

    def before_commit(self, conn: Connection, collected: Sequence[object]) -> object:
        """Do the last work of a transaction, on the writer's thread; return what follows from it.

        `collected` is what the callers whose work stands have collected, in order. An error rolls
        the transaction back.
        """

    def after_commit(self, outcome: object) -> None:
        """Learn, on the event loop, that the transaction is durable; its callers are answered next.

        `outcome` is what `before_commit` returned. Called once for each commit, in commit order.
        """


def collect(conn: Connection, item: object) -> None:
    """Hand `item` to the commit hooks, unless the running caller's work is rolled back.

    Only inside a function given to `Database.write`.
    """
    conn.info[_COLLECTED].append(item)


class _RolledBackError(Exception):
    """A group's transaction is gone, and nothing of it was committed."""

    def __init__(self, cause: BaseException, culprit: int | None) -> None:
        """Tell what ended it, and in whose work, if in anybody's."""
        super().__init__(str(cause))
        self.cause = cause
        self.culprit = culprit


@dataclass(frozen=True, slots=True)
class _Writer:
    """The connection that writes. `raw` takes the transaction's own words, without ceremony."""

    conn: Connection
    raw: Any
    collected: list[object]


class GroupCommit:
    """Owns the connection that writes. `run` is for one thread alone, `announce` for the loop."""

    def __init__(
        self,
        engine: DatabaseEngine,
        *,
        told: Callable[[BaseException], BaseException],
        retry_s: float,
        slow_s: float,
        clock: Clock,
    ) -> None:
        """Connect with the first write. `told` returns what callers are told of an error."""
        self._engine = engine
        self._callers_word = told
        self._retry_s = retry_s
        self._slow_s = slow_s
        self._clock = clock
        self._hooks: list[CommitHook] = []
        self._outcomes: deque[Sequence[object]] = deque()
        self._writer: _Writer | None = None
        self._full = False

    def on_commit(self, hook: CommitHook) -> None:
        """Add `hook` to every commit, after those added before. Before the first write."""
        self._hooks.append(hook)

    def run(self, group: Sequence[Work]) -> Sequence[Any]:
        """Carry out `group`; return one result or exception for each of it, in order."""
        began_s = self._clock.monotonic_s()
        waiting = dict(enumerate(group))
        results: dict[int, Any] = {}
        try:
            self._run_all(waiting, results)
        except Exception as error:  # noqa: BLE001 - no caller may be left without an answer
            self._abandon(error)
            results |= {index: self._told(error) for index in waiting}
        took_s = self._clock.monotonic_s() - began_s
        if took_s > self._slow_s:
            _log.warning(
                "a commit was slow",
                extra={"event": "database.slow", "took_s": took_s, "writes": len(group)},
            )
        self._note_room(results.values())
        return [results[index] for index in range(len(group))]

    def _note_room(self, results: Collection[Any]) -> None:
        """Say once that the disk is full, and once that it is not any more (P13)."""
        if all(isinstance(result, BaseException) for result in results):
            full = self._full or any(
                isinstance(result, GameNodeError) and result.code is ErrorCode.STORAGE_FULL
                for result in results
            )
        else:
            full = False  # one that is refused beside others was too large alone
        if full is self._full:
            return
        self._full = full
        if full:
            _log.error(
                "the database has no room left: nothing is written until there is some",
                extra={"event": "database.full"},
            )
        else:
            _log.info("the database has room again", extra={"event": "database.writable"})

    def _run_all(self, waiting: dict[int, Work], results: dict[int, Any]) -> None:
        """Answer all that wait: together, once more without a culprit, then each alone (RC1)."""

        def answer(answers: Mapping[int, Any]) -> None:
            results.update(answers)
            for index in answers:
                del waiting[index]

        for _ in range(2):
            if not waiting:
                return
            try:
                answer(self._transact(waiting))
            except _RolledBackError as end:
                if end.culprit is None and self._engine.judge(end.cause) is Failure.AGAIN:
                    raise end.cause from None  # each alone would wait for the same lock
                if end.culprit is None:
                    break
                answer({end.culprit: self._told(end.cause)})
        for index, work in list(waiting.items()):
            try:
                answer(self._transact({index: work}))
            except _RolledBackError as end:
                answer({index: self._told(end.cause)})

    def _transact(self, group: Mapping[int, Work]) -> Mapping[int, Any]:
        """Run `group` in one transaction and commit it; return everybody's result or exception.

        Raises:
            _RolledBackError: nothing of the group was committed.
            Exception: no transaction could begin.
        """
        writer = self._begin()
        try:
            alone = len(group) == 1
            answers = {
                index: self._run_one(writer, index, work, alone=alone)
                for index, work in group.items()
            }
            outcomes = self._before_commit(writer)
        except _RolledBackError as end:
            self._abandon(end.cause)
            raise
        try:
            writer.raw.execute("COMMIT")
        except Exception as error:
            if self._engine.judge(error) is Failure.FULL and self._abandon(error):
                raise _RolledBackError(error, None) from error
            # Whether it landed is not known, and a failed fsync is never repeated by asking again.
            self.close()
            _log.exception("a commit failed", extra={"event": "database.commit_failed"})
            return {index: self._outcome_unknown(error) for index in group}
        self._outcomes.append(outcomes)
        return answers

    def _begin(self) -> _Writer:
        """Return the writer, in a new transaction; connect where the old connection is lost."""
        if self._writer is not None:
            try:
                self._writer.raw.execute(self._engine.begin_write)
            except Exception as error:
                if self._engine.judge(error) is not Failure.BROKEN:
                    raise
                self.close()
        if self._writer is None:
            conn = self._engine.connect(read_only=False)
            self._writer = _Writer(conn, raw_of(conn), [])
            conn.info[_COLLECTED] = self._writer.collected
            self._writer.raw.execute(self._engine.begin_write)
        self._writer.collected.clear()
        return self._writer

    def _run_one(self, writer: _Writer, index: int, work: Work, *, alone: bool) -> Any:
        """Return what `work` returns or raises; its failure undoes its own statements alone."""
        mark = len(writer.collected)
        raw = writer.raw
        try:
            if not alone:
                raw.execute("SAVEPOINT caller")
            result = work(writer.conn)
            if not alone:
                # Fails if the transaction was lost on the way, even if `work` hid that.
                raw.execute("RELEASE SAVEPOINT caller")
            self._require_transaction(raw)
        except BaseException as error:
            # Alone, the transaction is the savepoint.
            if alone or self._engine.judge(error) is Failure.BROKEN:
                raise _RolledBackError(error, index) from error
            del writer.collected[mark:]
            try:
                raw.execute("ROLLBACK TO SAVEPOINT caller")
                raw.execute("RELEASE SAVEPOINT caller")
            except Exception:  # noqa: BLE001 - whatever it is, the transaction is lost
                raise _RolledBackError(error, index) from error
            return self._told(error)
        return result

    def _require_transaction(self, raw: Any) -> None:
        if not self._engine.in_transaction(raw):
            raise RuntimeError("a database function ended its own transaction")

    def _before_commit(self, writer: _Writer) -> Sequence[object]:
        try:
            outcomes = [
                hook.before_commit(writer.conn, tuple(writer.collected)) for hook in self._hooks
            ]
            self._require_transaction(writer.raw)
        except Exception as error:
            raise _RolledBackError(error, None) from error
        return outcomes

    def _abandon(self, cause: BaseException) -> bool:
        """Roll back what is open; return whether the connection is kept for the next write.

        A full disk costs no connection: opening another one may need room too.
        """
        if self._writer is None:
            return False
        if self._engine.judge(cause) is not Failure.BROKEN:
            try:
                self._writer.raw.rollback()
            except Exception:  # noqa: BLE001 - then the connection goes
                _log.warning("a rollback failed", extra={"event": "database.rollback_failed"})
            else:
                return True
        self.close()
        return False

    def announce(self) -> None:
        """Tell the hooks about every commit that they do not know of yet."""
        while self._outcomes:
            for hook, outcome in zip(self._hooks, self._outcomes.popleft(), strict=True):
                try:
                    hook.after_commit(outcome)
                except Exception:  # noqa: BLE001 - the write is durable; its callers must hear that
                    _log.exception("a commit hook failed", extra={"event": "database.hook_failed"})

    def close(self) -> None:
        """Give up the connection; a later write would open another one."""
        if self._writer is not None:
            close_quietly(self._writer.conn)
            self._writer = None

    def _told(self, error: BaseException) -> BaseException:
        if isinstance(error, StopIteration):  # no future can carry one
            told = RuntimeError("StopIteration in a database function")
            told.__cause__ = error
            return told
        return self._callers_word(error)

    def _outcome_unknown(self, error: Exception) -> GameNodeError:
        told = GameNodeError(
            ErrorCode.UNAVAILABLE,
            "the database did not confirm this write; it may have landed",
            hint="repeat it: a repeat of a write that landed changes nothing",
            retry_after_s=self._retry_s,
        )
        told.__cause__ = error
        return told
