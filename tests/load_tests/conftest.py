from collections.abc import AsyncIterator

import pytest_asyncio

from tests.load_tests.fake_server import FakeServer


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer().running() as running:
        yield running
