"""The cases, by what they attack. Importing this makes them known to `case.CASES`."""

from load_tests.drills.cases import adapters, connections, engine, hostile, load, requests, tenants

__all__ = ["adapters", "connections", "engine", "hostile", "load", "requests", "tenants"]
