"""Adapters that are wrong, hostile, or come and go."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import tarfile
from functools import partial
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from load_tests.drills.archives import zipped
from load_tests.drills.case import case, expect
from load_tests.drills.cases.requests import refused
from load_tests.drills.site import Site

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MIB = 2**20


async def nothing_left(site: Site, name: str) -> None:
    """Nothing of a refused upload is registered or staged."""
    answer = await site.http.get(f"/v1/adapters/{name}")
    expect(answer.status_code == 404, f"after the refusal: {answer.status_code} {answer.text[:100]}")


def of_members(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """An archive of entries as they are given, whatever they are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def changed_config(site: Site, **fields: Any) -> dict[str, bytes]:
    """The sound adapter with these fields in its config."""
    files = site.adapter_files()
    config = json.loads(files[_CONFIG]) | fields
    return files | {_CONFIG: json.dumps(config).encode()}


@case(8, "a pattern that backtracks", "400 after at most 5 s, off the loop")
async def regex_bomb(site: Site) -> str:
    seen = refused(
        await site.upload("bomb", changed_config(site, target_modules=r"(.|.)*(.|.)*(.|.)*\d\d$")),
        400,
        "target_modules",
    )
    await nothing_left(site, "bomb")
    return seen


@case(16, "zip bomb", "413 at the unpacked cap; clean", "--max-unpacked-bytes", "64MiB")
async def zip_bomb(site: Site) -> str:
    files = site.adapter_files() | {_WEIGHTS: bytes(256 * _MIB)}
    seen = refused(await site.upload("bomb", {"a.zip": zipped(files)}), 413)
    await nothing_left(site, "bomb")
    return seen


@case(17, "archive with ../, absolute, link or device entries", "400; nothing outside staging")
async def archive_that_leaves(site: Site) -> str:
    files = site.adapter_files()
    marker = site.scratch / "escaped"
    entries: list[tarfile.TarInfo] = [tarfile.TarInfo(f"../../../{marker}"), tarfile.TarInfo(str(marker))]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo(_WEIGHTS)
        info.type, info.linkname = kind, str(marker)
        entries.append(info)
    for info in entries:
        members = [
            (tarfile.TarInfo(_CONFIG), files[_CONFIG]),
            (info, b"" if info.type != tarfile.REGTYPE else b"x"),
        ]
        refused(await site.upload("leaver", {"a.tar.gz": of_members(members)}), 400)
    expect(not marker.exists(), "a file was written outside")
    await nothing_left(site, "leaver")
    return f"{len(entries)} times 400"


@case(18, "adapter named ../x, with NUL, 10 kB long", "400; names are never paths")
async def names_that_are_paths(site: Site) -> str:
    names = ("../x", "a\0b", "x" * 10_000, "a//b", "/etc", "a b", ".hidden", "ünïcode")
    for name in names:
        refused(await site.upload(name, site.adapter_files()), 400, "name")
    return f"{len(names)} times 400"


@case(20, ".bin or other pickle", "415 that names safetensors")
async def pickles(site: Site) -> str:
    config = {_CONFIG: site.adapter_files()[_CONFIG]}
    for files in (
        config | {"adapter_model.bin": b"\x80\x02."},
        {"a.zip": zipped(config | {"adapter_model.bin": b"\x80\x02."})},
    ):
        answer = await site.upload("pickle", files)
        expect("safetensors" in answer.text, answer.text[:200])
        refused(answer, 415)
    return "415, names safetensors"


def header(entries: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@case(21, "malformed header, huge header, 300,000 tensors", "400; no jump in memory")
async def headers(site: Site) -> str:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    wrong = (
        header(b"{"),
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 10) + b"{}",
        header(b"[" * 100_000),
        header(b'{"a":' * 100_000),
        header({f"t{i}": entry for i in range(300_000)}),
        header({"t": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"),
    )
    for content in wrong:
        files = site.adapter_files() | {_WEIGHTS: content}
        answer = await site.upload("header", files)
        expect(answer.status_code in (400, 413), f"{answer.status_code} {answer.text[:100]}")
    await nothing_left(site, "header")
    return f"{len(wrong)} times 400 or 413"


@case(22, "NaN or Inf weights", "400 that names the tensor")
async def no_numbers(site: Site) -> str:
    files = site.adapter_files()
    for value in (np.nan, np.inf):
        tensors = {name: np.array(tensor, np.float32) for name, tensor in load(files[_WEIGHTS]).items()}
        name = sorted(tensors)[1]
        tensors[name].flat[3] = value
        refused(await site.upload("nan", files | {_WEIGHTS: save(tensors)}), 400, name)
    return f"400, names {name}"


@case(23, "wrong shape, layer, PEFT feature", "400 that names the field and what was expected")
async def misfits(site: Site) -> str:
    files = site.adapter_files()
    tensors = load(files[_WEIGHTS])
    name = sorted(tensors)[0]
    longer = tensors | {
        name: np.zeros((tensors[name].shape[0], tensors[name].shape[1] + 8), tensors[name].dtype)
    }
    other = {key.replace("layers.0.", "layers.99."): tensor for key, tensor in tensors.items()}
    refused(await site.upload("misfit", files | {_WEIGHTS: save(longer)}), 400, name)
    refused(await site.upload("misfit", files | {_WEIGHTS: save(other)}), 400)
    refused(await site.upload("misfit", changed_config(site, r=3)), 400)
    refused(await site.upload("misfit", changed_config(site, arrow_config={"a": 1})), 400, "arrow_config")
    refused(await site.upload("misfit", changed_config(site, an_unknown_field=1)), 400, "an_unknown_field")
    await nothing_left(site, "misfit")
    return "five times 400 by name"


@case(25, "client dies in mid-upload", "staging removed, no registry row")
async def half_an_upload(site: Site) -> str:
    writer = await site.half_an_upload("half", sent=100_000)
    await asyncio.sleep(0.5)
    writer.transport.abort()

    async def swept() -> bool:
        return not list((site.data_dir / "staging").iterdir())

    await site.until(swept, "staging to be empty")
    await nothing_left(site, "half")
    return "nothing left"


@case(28, "50 uploads of one name at once", "one wins; the others 409; one copy")
async def one_name_at_once(site: Site) -> str:
    uploads = [site.upload("contended", site.adapter_files()) for _ in range(50)]
    statuses = [answer.status_code for answer in await asyncio.gather(*uploads)]
    expect(sorted(set(statuses)) == [201, 409] and statuses.count(201) == 1, str(sorted(statuses)))
    await site.http.delete("/v1/adapters/contended")
    return f"one 201, {statuses.count(409)} times 409"


@case(29, "delete with requests in flight", "they finish on their weights; new ones 404")
async def delete_in_flight(site: Site) -> str:
    expect((await site.upload("leaving", site.adapter_files())).status_code == 201, "no upload")
    alone = (await site.complete("leaving", max_tokens=100, ignore_eos=True)).json()["choices"][0]["text"]
    running = [
        asyncio.create_task(site.complete("leaving", max_tokens=100, ignore_eos=True)) for _ in range(8)
    ]
    await asyncio.sleep(0.15)
    gone = await site.http.delete("/v1/adapters/leaving")
    late = refused(await site.complete("leaving"), 404, "model", "model_not_found")
    texts = [answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*running)]
    expect(set(texts) == {alone}, f"{len(set(texts))} different answers")
    return f"delete {gone.status_code}, 8 finished alike, then {late}"


def scaled(files: dict[str, bytes], factor: float) -> dict[str, bytes]:
    """The same adapter with other weights: its B times a factor."""
    tensors = {
        name: tensor * np.asarray(factor, tensor.dtype) if "lora_B" in name else tensor
        for name, tensor in load(files[_WEIGHTS]).items()
    }
    return files | {_WEIGHTS: save(tensors)}


async def _seen(answers: dict[str, set[str]], version: str) -> bool:
    return version in answers


@case(30, "replace under traffic", "each response from exactly one version; no prefix is shared across")
async def replace_under_traffic(site: Site) -> str:
    files = site.adapter_files()
    await site.upload("moving", files)
    answers: dict[str, set[str]] = {}
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            answer = (await site.complete("moving", max_tokens=24, ignore_eos=True)).json()
            answers.setdefault(answer["adapter_version"], set()).add(answer["choices"][0]["text"])

    clients = [asyncio.create_task(client()) for _ in range(4)]
    for k in range(1, 6):
        answer = await site.upload("moving", scaled(files, (-1.0) ** k + k / 50), "PUT")
        expect(answer.status_code == 200, answer.text[:100])
        await site.until(partial(_seen, answers, answer.json()["digest"]), "an answer of the new version")
    stop.set()
    await asyncio.gather(*clients)
    await site.http.delete("/v1/adapters/moving")
    mixed = {version[:8]: len(texts) for version, texts in answers.items() if len(texts) > 1}
    expect(not mixed and len(answers) > 3, f"{len(answers)} versions; several answers of {mixed}")
    return f"{len(answers)} versions, one answer each"


@case(31, "delete, then other weights under the same name", "no stale KV")
async def other_weights_same_name(site: Site) -> str:
    files = site.adapter_files()
    other = scaled(files, -1.0)
    await site.upload("fresh", other)
    wanted = (await site.complete("fresh", max_tokens=32)).json()["choices"][0]["text"]
    await site.http.delete("/v1/adapters/fresh")
    texts = []
    for content in (files, other):
        await site.upload("reborn", content)
        texts.append((await site.complete("reborn", max_tokens=32)).json()["choices"][0]["text"])
        await site.http.delete("/v1/adapters/reborn")
    expect(texts[1] == wanted != texts[0], f"{texts} and alone {wanted!r}")
    return "the answer of the new weights"
