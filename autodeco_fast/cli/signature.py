"""Commands whose options are those of a dataclass (`autodeco_fast/options.py`)."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated

import typer

from autodeco_fast.options import help_of, is_list, listed, size, type_of
from autodeco_fast.urls import Location


def _parameter(field: Field, required: bool) -> inspect.Parameter:
    """What typer reads; a size is text on the command line, a switch a pair like `--resume` and
    `--no-resume`, so that it can win over a file, too."""
    option_type, optional = type_of(field)
    default = field.default
    if default is MISSING:
        default, optional = (inspect.Parameter.empty, optional) if required else (None, True)
    if field.metadata["is_size"]:
        option_type, default = str, str(default)
    if option_type == Location:
        option_type = str  # a Path would make one slash of a URL's two
    if is_list(field):
        option_type = list[option_type]
    return inspect.Parameter(
        name=field.name,
        kind=inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[
            option_type | None if optional else option_type,
            typer.Option(help=help_of(field)),
        ],
    )


def takes(*options: type, required: bool = True) -> Callable[[Callable], Callable]:
    """Gives a command an option for every one of some dataclasses, once where they share it; it
    gets them as keyword arguments.

    Args:
        required: whether those without a default must be given; else they are None.
    """

    def with_options(command: Callable) -> Callable:
        named = [
            parameter
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        found = {field.name: field for each in reversed(options) for field in listed(each)}
        made = {
            field.name: _parameter(found[field.name], required)
            for each in options
            for field in listed(each)
        }
        command.__signature__ = inspect.Signature([*named, *made.values()])
        return command

    return with_options


def with_sizes(options: type, values: dict) -> dict:
    """Values from the command line, sizes as numbers of bytes.

    Raises:
        ValueError: for a text that is no size.
    """
    sizes = {field.name for field in fields(options) if field.metadata["is_size"]}
    return {name: size(value) if name in sizes else value for name, value in values.items()}
