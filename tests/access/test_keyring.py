"""Keys: what opens, what does not, what is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.access.caller import DEFAULT_TENANT, SCOPES, Caller
from server.access.keyring import Keyring
from server.access.keys import digest_of, id_of
from server.errors import InsufficientScope, InvalidRequest, NotFound, Unauthorized
from server.registry.data_folder import DataFolder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[DataFolder]:
    folder = DataFolder(tmp_path / "data")
    yield folder
    folder.close()


@pytest.fixture
def keyring(folder: DataFolder) -> Iterator[Keyring]:
    keyring = Keyring([], folder.keys)
    yield keyring
    keyring.close()


def refused(keyring: Keyring, key: str | None) -> str:
    with pytest.raises(Unauthorized) as caught:
        keyring.identify(key)
    assert caught.value.status == 401
    assert caught.value.code is not None
    return caught.value.code


def test_without_keys_everybody_may_do_everything(keyring: Keyring) -> None:
    caller = keyring.identify(None)
    assert (caller.tenant, caller.key_id) == (DEFAULT_TENANT, None)
    assert all(caller.may(scope) for scope in SCOPES)


def test_from_the_first_key_on_one_is_needed(keyring: Keyring) -> None:
    key, text = keyring.create("mine", ["admin"])
    assert keyring.identify(text) == Caller(DEFAULT_TENANT, key.id, frozenset({"admin"}))
    assert refused(keyring, None) == refused(keyring, "") == "missing_api_key"
    other = text[:-1] + ("a" if text[-1] != "a" else "b")
    for wrong in (
        other,
        text + "x",
        text[1:],
        f"chorus-{key.id}-",
        "chorus",
        "x" * 10_000,
        "é",
        text.upper(),
    ):
        assert refused(keyring, wrong) == "invalid_api_key"
    keyring.revoke(key.id)
    assert refused(keyring, text) == "invalid_api_key"  # and the door stays shut
    assert keyring.asks
    assert keyring.usable == 0


def test_the_first_key_must_be_able_to_make_others(keyring: Keyring) -> None:
    for scopes, lifetime in ((["infer"], None), (["admin"], 60.0)):
        with pytest.raises(InvalidRequest, match="first key"):
            keyring.create("", scopes, lifetime_s=lifetime)
    assert not keyring.asks
    keyring.create("", ["admin"])
    keyring.create("", ["infer"], lifetime_s=60.0)


def test_static_keys_belong_to_the_operator(folder: DataFolder) -> None:
    keyring = Keyring(["first", "second"], folder.keys)
    for key in ("first", "second"):
        assert keyring.identify(key) == Caller(DEFAULT_TENANT, None, frozenset(SCOPES))
    assert refused(keyring, "third") == "invalid_api_key"
    assert refused(keyring, None) == "missing_api_key"
    keyring.close()


def test_where_no_key_is_wanted_none_is_looked_at(folder: DataFolder) -> None:
    keyring = Keyring([], folder.keys, wanted=False)
    keyring.create("", ["admin"])
    assert keyring.identify("nonsense").may("admin")
    keyring.close()


def test_the_end_of_a_key(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring.create("", ["admin"])
    key, text = keyring.create("", ["infer"], lifetime_s=60.0)
    assert keyring.identify(text).key_id == key.id
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 61)
    assert refused(keyring, text) == "invalid_api_key"


def test_only_hashes_are_kept(keyring: Keyring, folder: DataFolder) -> None:
    key, text = keyring.create("", ["admin"])
    assert id_of(text) == key.id
    assert folder.keys.load() == [key]
    assert key.digest == digest_of(text)
    secret = text.rpartition(key.id)[2].encode()
    for file in folder.store.data_dir.glob("registry.db*"):
        assert secret not in file.read_bytes()


def test_keys_and_their_use_survive_a_restart(folder: DataFolder) -> None:
    keyring = Keyring([], folder.keys)
    admin, text = keyring.create("of the operator", ["admin"])
    other, _ = keyring.create("of a tenant", ["infer", "upload"], tenant="acme")
    keyring.identify(text)
    keyring.revoke(other.id)
    known = keyring.known()
    assert known[0].last_used is not None
    keyring.close()
    again = Keyring([], folder.keys)
    assert again.known() == known
    assert [(key.name, key.tenant, key.scopes) for key in known] == [
        ("of the operator", DEFAULT_TENANT, ("admin",)),
        ("of a tenant", "acme", ("infer", "upload")),
    ]
    assert known[1].revoked_at is not None
    assert again.identify(text).key_id == admin.id
    again.close()


def test_when_a_key_was_used_is_not_written_at_each_use(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[dict[str, float]] = []
    monkeypatch.setattr(type(folder.keys), "note_used", lambda _, used: writes.append(used))
    keyring = Keyring([], folder.keys)
    key, text = keyring.create("", ["admin"])
    for _ in range(1000):
        keyring.identify(text)
    assert writes == []
    keyring.close()
    assert [list(used) for used in writes] == [[key.id]]


def test_revoking_twice_and_what_is_not_there(keyring: Keyring) -> None:
    key, _ = keyring.create("", ["admin"])
    first = keyring.revoke(key.id)
    assert keyring.revoke(key.id) == first
    with pytest.raises(NotFound):
        keyring.revoke("0" * 12)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["infer", "root"]}, "scopes"),
        ({"scopes": ["admin"], "tenant": "acme"}, "scopes"),
        ({"scopes": ["metrics"], "tenant": "acme"}, "scopes"),
        ({"scopes": ["infer"], "tenant": "A"}, "tenant"),
        ({"scopes": ["infer"], "tenant": ""}, "tenant"),
        ({"scopes": ["infer"], "tenant": "a" * 64}, "tenant"),
        ({"scopes": ["infer"], "name": "x" * 201}, "name"),
        ({"scopes": ["infer"], "name": "\x1b[2J"}, "name"),
    ],
)
def test_keys_that_are_not_made(keyring: Keyring, fields: dict[str, object], param: str) -> None:
    keyring.create("", ["admin"])
    with pytest.raises(InvalidRequest) as caught:
        keyring.create(**{"name": ""} | fields)  # type: ignore[arg-type]  # fields of many types
    assert caught.value.param == param
    assert len(keyring.known()) == 1


def test_what_a_caller_may_do() -> None:
    caller = Caller("acme", "1", frozenset({"infer"}))
    caller.require("infer", "upload")
    with pytest.raises(InsufficientScope) as caught:
        caller.require("upload", "manage")
    assert 'scope="upload manage"' in (caught.value.challenge or "")
    assert caller.acting_for("acme") == caller
    with pytest.raises(InsufficientScope):
        caller.acting_for("other")
    admin = replace(caller, scopes=frozenset({"admin"}))
    assert admin.acting_for("other") == replace(admin, tenant="other")
    for name in ("", "A", "a b", "../a", "a" * 64):
        with pytest.raises(InvalidRequest):
            admin.acting_for(name)
