"""Which adapters a request runs with: the names that it gives, then their versions, leased while it runs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from server.api.face import Face
from server.api.inference.schemas import GenerationRequest
from server.errors import DamagedAdapter, InvalidRequest, ModelNotFound
from server.messages import AdapterRef, EngineInfo
from server.registry.records import AdapterVersion
from server.registry.registry import Registry


@dataclass(frozen=True)
class LeasedMix:
    """Versions whose files stay while the request runs; no members for the base model."""

    members: tuple[tuple[AdapterVersion, float], ...] = ()  # with the weight of its delta

    @property
    def refs(self) -> tuple[AdapterRef, ...]:
        return tuple(version.ref(weight) for version, weight in self.members)

    @property
    def rank(self) -> int:
        """An upper bound of the ranks on one module together: the registry knows each version's largest."""
        ranks = Counter[str]()
        for version, _ in self.members:
            ranks.update(dict.fromkeys(version.targets, version.rank))
        return max(ranks.values(), default=0)

    @property
    def version(self) -> str | None:
        """What answers carry as `adapter_version`: the digest; of a composition, digests joined by `+`."""
        return "+".join(version.digest for version, _ in self.members) or None


class AdapterMix:
    """The adapters that one request names."""

    def __init__(self, members: list[tuple[str, float, str]]) -> None:
        self._members = members  # name, weight, the field that named it

    @classmethod
    def of(cls, request: GenerationRequest, base: str) -> AdapterMix:
        """Raises InvalidRequest where the fields contradict each other."""
        members = _members(request, base)
        if request.adapter_scale is not None and not members:
            raise InvalidRequest("adapter_scale: the request names no adapter", param="adapter_scale")
        scale = 1.0 if request.adapter_scale is None else request.adapter_scale
        return cls([(name, weight * scale, param) for name, weight, param in members])

    @contextmanager
    def lease(self, face: Face, tenant: str) -> Iterator[LeasedMix]:
        """Takes a lease on each member's version, as `tenant` sees it, and gives it back at the end. Raises
        ModelNotFound, and InvalidRequest for ranks that the engine's kernels cannot take."""
        if not self._members:
            yield LeasedMix()
            return
        registry = face.require_registry()
        with ExitStack() as leases:
            members = []
            for name, weight, param in self._members:
                try:
                    lease = leases.enter_context(registry.acquire(name, tenant=tenant))
                except ModelNotFound as error:
                    error.param = param
                    raise
                version = lease.version
                face.names.remember(version.digest, version.label)
                members.append((version, weight))
            leased = LeasedMix(tuple(members))
            self._judge_rank(leased, face.engine.info)
            try:
                yield leased
            except DamagedAdapter:
                face.background.start(_recheck(registry, leased))
                raise

    def _judge_rank(self, leased: LeasedMix, info: EngineInfo | None) -> None:
        limit = info.max_mix_rank if info else None
        if limit is not None and leased.rank > limit:
            param = self._members[0][2].partition("[")[0]  # of a composition, the list
            raise InvalidRequest(
                f"{param}: ranks of {leased.rank} on one module, the limit of this server is {limit}",
                param=param,
                code="unsupported",
            )


async def _recheck(registry: Registry, leased: LeasedMix) -> None:
    """The engine says that files are damaged, and not whose."""
    for version, _ in leased.members:
        await asyncio.to_thread(registry.damage.recheck, version)


def _members(request: GenerationRequest, base: str) -> list[tuple[str, float, str]]:
    model = None if request.model == base else request.model
    if model is not None and model.startswith(f"{base}:"):  # as SGLang names an adapter
        model = model.removeprefix(f"{base}:")
    fields = {"adapter": request.adapter, "lora_path": request.lora_path, "adapter_id": request.adapter_id}
    named = {name: value for name, value in fields.items() if value is not None}
    if request.adapters is not None:
        if model is not None or named:
            raise InvalidRequest("adapters: another adapter is named as well", param="adapters")
        names = [member.name for member in request.adapters]
        if len(set(names)) != len(names):
            raise InvalidRequest("adapters: an adapter is named twice", param="adapters")
        return [
            (member.name, member.weight, f"adapters[{i}].name") for i, member in enumerate(request.adapters)
        ]
    for param, name in named.items():
        if {model or name, *named.values()} != {name}:
            other = "`model`" if model not in (None, name) else "another field"
            raise InvalidRequest(f"{param}: {other} names another adapter", param=param)
        return [(name, 1.0, param)]
    if request.model is None:
        raise InvalidRequest("Missing field: model", param="model")
    return [] if model is None else [(model, 1.0, "model")]
