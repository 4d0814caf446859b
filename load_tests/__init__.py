"""Load tests for any OpenAI-style `/v1/completions`: traces, random adapters, a runner, reports.

`python -m load_tests --help` lists the commands; README.md shows a whole session.
"""
