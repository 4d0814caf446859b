"""The `chorus` command."""

from __future__ import annotations

import inspect
import typing
from typing import Annotated, Any, NoReturn

import pydantic
import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import SettingsError

import server
from server import adapters_cli, keys_cli, quotas_cli, usage_cli
from server.api.output import open_standard_files, say
from server.api.signals import end_during_start, handling_signals
from server.config import Settings
from server.log import configure

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Chorus: one frozen base model, thousands of LoRA adapters, one batch.",
)
app.add_typer(adapters_cli.app, name="adapters")
app.add_typer(keys_cli.app, name="keys")
app.add_typer(quotas_cli.app, name="quotas")
app.command()(usage_cli.usage)


def main() -> None:
    """Entry point of the `chorus` script."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chorus {server.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def serve(**flags: Any) -> None:
    """Serve a base model and its adapters over HTTP.

    Every option can be given in the environment instead, as CHORUS_<NAME>; a flag wins.
    """
    open_standard_files()
    with handling_signals(end_during_start):
        settings = _settings({name: value for name, value in flags.items() if value not in (None, [])})
        configure(settings.log_level, settings.log_format)
        from server.api.listen import serve as listen  # the HTTP stack: not for --help and --version
        from server.base_model import StartError
        from server.border.client import ProcessEngineClient

        try:
            code = listen(settings, ProcessEngineClient)
        except StartError as error:
            _fail(error.message, code=1)
    raise typer.Exit(code)


def _settings(given: dict[str, Any]) -> Settings:
    try:
        return Settings(**given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            _fail(f"{_flag(name)} is missing (or {_variable(name)})", code=2)
        _fail(f"{_flag(name) if name in given else _elsewhere(name, given)}: {reason}", code=2)
    except SettingsError as error:
        _fail(str(error), code=2)


def _elsewhere(name: str, given: dict[str, Any]) -> str:
    """Where a setting that no flag gives was read from."""
    return f"{_variable(name)} or {name} in {given['config']}" if "config" in given else _variable(name)


def _fail(reason: str, *, code: int) -> NoReturn:
    say(reason)
    raise typer.Exit(code)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return f"{Settings.model_config['env_prefix']}{name.upper()}"


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """One setting as a flag. Values stay text: the settings tree judges them, wherever they come from."""
    flag = _flag(name)
    kind: Any = str | None
    metavar: str | None = name.rsplit("_", 1)[-1].upper()
    if field.annotation is bool:
        flag, kind, metavar = f"{flag}/--no-{flag.removeprefix('--')}", bool | None, None
    elif typing.get_origin(field.annotation) is tuple:
        kind = list[str] | None
    elif typing.get_origin(field.annotation) is typing.Literal:
        metavar = "|".join(typing.get_args(field.annotation))
    option = typer.Option(flag, help=_help(field), metavar=metavar, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.default in (None, (), PydanticUndefined):
        return text
    return f"{text} (default: {field.default})"


def _with_settings_as_flags(function: Any) -> Any:
    """Gives `function(**flags)` one keyword parameter per setting, which is what typer reads."""
    parameters = [_parameter(name, field) for name, field in Settings.model_fields.items()]
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


app.command()(_with_settings_as_flags(serve))
