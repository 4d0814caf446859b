"""What the client of one request is given, told to the ledger before it is sent."""

from __future__ import annotations

from typing import Self

from server.access.caller import Caller
from server.api.face import Face
from server.api.inference.generation import Delta
from server.api.inference.mix import LeasedMix
from server.api.inference.spec import GenerationSpec
from server.usage.ledger import UsageLedger
from server.usage.quotas import Grant
from server.usage.records import Amount, UsageKey


class Meter:
    """Counts deltas as `usage` of the answer does. The request and its prompts count with the first of them,
    so one that gives its client nothing costs nothing."""

    def __init__(self, ledger: UsageLedger | None, key: UsageKey, prompt_tokens: int, grant: Grant) -> None:
        self._ledger = ledger
        self._key = key
        self._first = Amount(1, prompt_tokens)
        self._grant = grant
        self._begun = False
        self._seen: set[int] = set()  # choices whose cached tokens are counted
        self._cached = 0  # not told yet, as is the next
        self._completion = 0

    @classmethod
    def of(cls, face: Face, caller: Caller, spec: GenerationSpec, leased: LeasedMix, grant: Grant) -> Self:
        adapter = "+".join(version.label for version, _ in leased.members) or face.base.name
        key = UsageKey(caller.tenant, caller.key_id or "", adapter, leased.version or "")
        return cls(face.usage, key, spec.prompt_tokens, grant)

    def add(self, delta: Delta) -> None:
        """It is about to be given."""
        choice = delta.choice
        self._completion += len(delta.token_ids)
        self._grant.generated(len(delta.token_ids))
        if choice.index not in self._seen:
            self._seen.add(choice.index)
            if choice.request_id == choice.request.request_id:  # each prompt once, however many choices
                self._cached += choice.cached_tokens

    def tell(self) -> None:
        """Before what was added is sent."""
        if self._ledger is None:
            return
        amount = Amount(0, 0, self._cached, self._completion)
        self._ledger.count(self._key, amount if self._begun else self._first.plus(amount))
        self._begun, self._cached, self._completion = True, 0, 0
