"""Files that are made to hurt whoever reads them, and a registry that was hurt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from load_tests.drills.bombs import BOMBS
from load_tests.drills.case import case, expect
from load_tests.drills.cases.adapters import changed_config, header, nothing_left
from load_tests.drills.cases.requests import refused
from load_tests.drills.site import Site

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@case(
    41, "PAX headers of digits, sparse maps, nested PAX headers", "400 in under 1 s; never parsed in the face"
)
async def tar_bombs(site: Site) -> str:
    loop = asyncio.get_running_loop()
    seen = []
    for name, made_of in BOMBS.items():
        archive = made_of(site.adapter_files())
        began = loop.time()
        answer = await site.upload("bomb", {name: archive})
        seconds = loop.time() - began
        expect(answer.status_code in (400, 413), f"{name}: {answer.status_code} {answer.text[:100]}")
        seen.append(f"{name} ({len(archive) // 1024} KiB) {answer.status_code} in {seconds:.2f} s")
    await nothing_left(site, "bomb")
    return "; ".join(seen)


def of_rank(site: Site, rank: int, number: int = 0) -> dict[str, bytes]:
    """The sound adapter's first module alone, at another rank, and with other weights for each number."""
    files = changed_config(site, r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={})
    tensors = load(files[_WEIGHTS])
    module = sorted(tensors)[0].rpartition(".lora_")[0]
    inputs = tensors[f"{module}.lora_A.weight"].shape[1]
    outputs = tensors[f"{module}.lora_B.weight"].shape[0]
    first = np.zeros((rank, inputs), np.float16)
    first[0, :2] = divmod(number, 1000)
    return files | {
        _WEIGHTS: save(
            {
                f"{module}.lora_A.weight": first,
                f"{module}.lora_B.weight": np.zeros((outputs, rank), np.float16),
            }
        )
    }


@case(
    44, "rank 800,000; rank x prompt scratch", "400 at upload, or served within bounded scratch", limit_s=300
)
async def huge_ranks(site: Site) -> str:
    seen = []
    for rank in (800_000, 20_000, 4096, 512):
        answer = await site.upload("broad", of_rank(site, rank))
        if answer.status_code == 201:
            used = await site.complete("broad", prompt=[5] * 1500, max_tokens=2)
            expect(used.status_code in (200, 400, 503), f"rank {rank}: {used.status_code} {used.text[:100]}")
            await site.http.delete("/v1/adapters/broad")
            seen.append(f"{rank}: 201, used {used.status_code}")
        else:
            expect(answer.status_code in (400, 413), f"rank {rank}: {answer.status_code} {answer.text[:100]}")
            seen.append(f"{rank}: {answer.status_code}")
    expect(await site.ready(), "the engine is gone")
    return "; ".join(seen)


@case(45, "a 14 MiB safetensors header of a million keys; six at once", "400, typed reading")
async def million_keys(site: Site) -> str:
    raw = b'{"t":{"dtype":"F32","shape":[0],"data_offsets":[0,0],' + b",".join(
        b'"%d":%d' % (i, i) for i in range(900_000)
    )
    content = header(raw + b"}}")
    uploads = [site.upload(f"keys-{k}", site.adapter_files() | {_WEIGHTS: content}) for k in range(6)]
    for answer in await asyncio.gather(*uploads):
        expect(answer.status_code in (400, 413), f"{answer.status_code} {answer.text[:100]}")
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for within in (
        b"{" + b",".join(b'"t%d":%b' % (i, entry) for i in range(19_900)) + b"}",
        b'{"__metadata__":{' + b",".join(b'"%d":"%d"' % (i, i) for i in range(190_000)) + b"}}",
    ):  # as much as the cap on a header's size lets in
        files = site.adapter_files() | {_WEIGHTS: header(within)}
        for answer in await asyncio.gather(*(site.upload(f"keys-{k}", files) for k in range(6))):
            refused(answer, 400)
    return "six times refused, and six each of the most tensors and values that a header of 4 MiB has"


@case(
    49,
    "a PUT that dribbles",
    "least rate, total time; DELETE wins",
    "--read-timeout-s",
    "1",
    "--min-rate-bytes",
    "64KiB",
    "--upload-timeout-s",
    "6",
)
async def dribbling_put(site: Site) -> str:
    await site.upload("dribbled", site.adapter_files())
    writer = await site.half_an_upload("dribbled")
    await asyncio.sleep(1)
    second = await site.upload("dribbled", site.adapter_files(), "PUT")
    gone = await site.http.delete("/v1/adapters/dribbled")
    writer.transport.abort()
    expect(second.status_code == 200, f"another PUT meanwhile: {second.status_code} {second.text[:100]}")
    expect(gone.status_code in (200, 202), f"a DELETE meanwhile: {gone.status_code} {gone.text[:100]}")
    slow, long = await asyncio.gather(_put_at(site, 1), _put_at(site, 128 * 1024))
    await nothing_left(site, "paced")
    expect(slow[0] < 5, f"a byte a second: ended after {slow[0]:.1f} s")
    expect(4 < long[0] < 12, f"at twice the least rate: ended after {long[0]:.1f} s")
    for _, said in (slow, long):
        expect(b" 408 " in said[:20], f"{said[:60]!r}")
    return (
        f"another PUT {second.status_code}, DELETE {gone.status_code}; a byte a second: 408 after "
        f"{slow[0]:.1f} s, at twice the least rate: 408 after {long[0]:.1f} s"
    )


async def _put_at(site: Site, rate: int) -> tuple[float, bytes]:
    """An upload of so many bytes a second without end: after how many seconds it was answered, and what."""
    reader, writer = await site.connect()
    headers = "content-length: 100000000", "content-type: multipart/form-data; boundary=b"
    part = 'content-disposition: form-data; name="files"; filename="adapter_model.safetensors"'
    writer.write(site.head("PUT /v1/adapters/paced", *headers) + f"\r\n--b\r\n{part}\r\n\r\n".encode())
    began = time.monotonic()
    answer = asyncio.create_task(reader.readline())
    with contextlib.suppress(ConnectionError):
        while not answer.done() and time.monotonic() - began < 20:
            writer.write(bytes(max(rate // 10, 1)))
            await asyncio.wait([answer], timeout=0.1 if rate > 1 else 1.0)
    seconds = time.monotonic() - began
    writer.transport.abort()
    return seconds, await answer if answer.done() else b"nothing"


@case(52, "(?R) in target_modules; 40,000 tiny patterns", "400")
async def hostile_patterns(site: Site) -> str:
    wanted = {
        "target_modules": changed_config(site, target_modules="(a|(?R))*"),
        "rank_pattern": changed_config(site, rank_pattern={f"a{i}": 4 for i in range(5_000)}),
        "adapter_config.json": changed_config(site, rank_pattern={f"a{i}": 4 for i in range(40_000)}),
        "alpha_pattern": changed_config(site, alpha_pattern={"(?:" * 50 + "a" + ")*" * 50: 4}),
    }
    for field, files in wanted.items():
        answer = await site.upload("pattern", files)
        expect(field != "alpha_pattern" or answer.status_code < 500, answer.text[:100])
        if field != "alpha_pattern":
            refused(answer, 400, field)
    await site.http.delete("/v1/adapters/pattern")
    return "400 by name"


@case(
    57,
    "flipped bytes in a stored blob; other base weights of the same shapes",
    "refused with the reason",
    own_server=True,
    limit_s=300,
)
async def changed_on_disk(site: Site) -> str:
    await site.upload("rotten", site.adapter_files())
    blob = next((site.data_dir / "adapters").glob(f"*/*/{_WEIGHTS}"))
    content = bytearray(blob.read_bytes())
    content[-100] ^= 0x40
    blob.chmod(0o600)
    blob.write_bytes(content)
    answer = await site.complete("rotten")
    seen = f"{answer.status_code} {answer.json().get('error')}"
    expect(answer.status_code >= 400 and "adapter_damaged" in seen, seen)
    expect((await site.complete()).status_code == 200, "the base model does not answer")
    await site.end()
    command = [_other_weights(part, site.scratch) for part in site.server.command]
    ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    said = ended.stderr.strip()
    expect(ended.returncode == 1 and "base model" in said and "Traceback" not in said, said[:300])
    return f"{answer.status_code} {answer.json()['error']['message'][:80]}; other weights: {said[:160]}"


def _other_weights(argument: str, scratch: Path) -> str:
    """Where this names a model's folder, one like it whose last weights differ."""
    if not (Path(argument) / "model.safetensors").is_file():
        return argument
    copy = scratch / "other"
    shutil.copytree(argument, copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    weights = np.frombuffer(content, np.uint8)[8 + int.from_bytes(content[:8], "little") + 1 :: 2]
    weights ^= 0x80  # the sign of bfloat16
    (copy / "model.safetensors").write_bytes(content)
    return str(copy)


def _zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _foreign(file: Path) -> None:
    file.write_text("not a database, but a letter\n" * 500)


@case(
    59,
    "damaged or missing registry",
    "before the model loads; one sentence with file and remedy; nothing deleted",
    own_server=True,
    limit_s=300,
)
async def damaged_registry(site: Site) -> str:
    await site.upload("kept", site.adapter_files())
    await site.end()
    sound = {path.name: path.read_bytes() for path in site.data_dir.glob("registry.db*")}
    stored = len(list((site.data_dir / "adapters").glob(f"*/*/{_CONFIG}")))
    seen = []
    damages: list[Callable[[Path], None]] = [_zeroed, _truncated, _foreign, Path.unlink]
    for damage in damages:
        for name, content in sound.items():
            (site.data_dir / name).write_bytes(content)
        damage(site.data_dir / "registry.db")
        code, said = await asyncio.to_thread(_start, site)
        blobs = len(list((site.data_dir / "adapters").glob(f"*/*/{_CONFIG}")))
        expect(
            code == 1 and "registry" in said and len(said.splitlines()) == 1,
            f"{damage.__name__}: {code} {said[:200]}",
        )
        expect(blobs == stored > 0, f"{damage.__name__}: {blobs} of {stored} blobs are left")
        seen.append(damage.__name__.strip("_"))
    return f"{', '.join(seen)}: exit 1, one line, as {said.strip()[:160]!r}"


def _start(site: Site) -> tuple[int, str]:
    """Runs the server's command to its end: exit code and standard error."""
    ended = subprocess.run(site.server.command, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stderr


@case(55, "another local user", "0700 folders, 0600 files")
async def other_users(site: Site) -> str:
    await site.upload("private", site.adapter_files())
    await site.complete("private")
    open_ones = [
        str(path.relative_to(site.data_dir))
        for path in [site.data_dir, *site.data_dir.rglob("*")]
        if stat.S_IMODE(path.lstat().st_mode) & 0o077
    ]
    await site.http.delete("/v1/adapters/private")
    expect(not open_ones, f"open to others: {open_ones[:5]}")
    return "nothing is open to others"


@case(19, "lora_path outside the allowed roots; a source URI to a private address", "403")
async def outside(site: Site) -> str:
    for path in ("/etc", "/etc/passwd", "../../etc", str(site.data_dir)):
        body = {"lora_name": "outside", "lora_path": path}
        refused(await site.http.post("/v1/load_lora_adapter", json=body), 403, "lora_path")
    for uri in ("http://127.0.0.1:1/a", "http://169.254.169.254/latest", "https://[::1]/a"):
        answer = await site.http.post("/v1/adapters", json={"name": "outside", "source": uri})
        expect(answer.status_code in (400, 403), f"{uri}: {answer.status_code}")
    return "403"
